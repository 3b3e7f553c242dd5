"""A run as a picture: throughput and latency percentiles over time. Needs the extra `plot` (matplotlib)."""

from __future__ import annotations

from pathlib import Path

from shardkv.load.figures import Figures

SHARES = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))


def plot(figures: Figures, title: str, path: Path) -> None:
    """Write `path`; its suffix, .png or .svg, says as what. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure  # without pyplot: no display is asked for

    timeline = [
        (start, length, interval) for start, length, interval in figures.timeline() if interval.operations
    ]
    times = [start for start, _, _ in timeline]
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(times, [interval.operations / length for _, length, interval in timeline], color="tab:blue")
    above.set_ylabel("operations / s")
    above.set_ylim(bottom=0)
    above.set_title(title)
    for name, share in SHARES:
        below.plot(times, [interval.all().percentile(share) * 1000 for _, _, interval in timeline], label=name)
    below.set_yscale("log")
    below.set_ylabel("latency, ms")
    below.set_xlabel("seconds")
    below.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path)
