"""What was measured, second by second, and the totals. Workers send intervals; the parent adds them up. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from shardkv.load.histogram import Histogram
from shardkv.load.workload import KINDS

INTERVAL_SECONDS = 0.5


@dataclass
class Interval:
    """Half a second of one worker, or of all; latencies in seconds."""

    by_kind: list[Histogram] = field(default_factory=lambda: [Histogram() for _ in KINDS])
    by_group: Counter[int] = field(default_factory=Counter)  # answers; see `Figures.shares`
    errors: int = 0
    first_error: str = ""

    @property
    def operations(self) -> int:
        return sum(histogram.count for histogram in self.by_kind)

    def merge(self, other: Interval) -> None:
        for own, added in zip(self.by_kind, other.by_kind, strict=True):
            own.merge(added)
        self.by_group.update(other.by_group)
        self.errors += other.errors
        self.first_error = self.first_error or other.first_error

    def all(self) -> Histogram:
        """Of operations of every kind."""
        whole = Histogram()
        for histogram in self.by_kind:
            whole.merge(histogram)
        return whole

    def encode(self) -> dict[str, Any]:
        return {
            "by_kind": [histogram.encode() for histogram in self.by_kind],
            "by_group": dict(self.by_group),
            "errors": self.errors,
            "first_error": self.first_error,
        }

    @classmethod
    def decode(cls, data: dict[str, Any]) -> Interval:
        return cls(
            [Histogram.decode(each) for each in data["by_kind"]],
            Counter(data["by_group"]),
            data["errors"],
            data["first_error"],
        )


@dataclass
class Figures:
    """A whole run."""

    intervals: dict[int, Interval] = field(default_factory=dict)  # by half second since the start
    seconds: float = 0.0

    def add(self, index: int, interval: Interval) -> None:
        self.intervals.setdefault(index, Interval()).merge(interval)

    def timeline(self) -> list[tuple[float, float, Interval]]:
        """(start, length, interval) in seconds. The last one is shorter, and left out where it tells nothing."""
        found = []
        for index, interval in sorted(self.intervals.items()):
            start = index * INTERVAL_SECONDS
            length = min(INTERVAL_SECONDS, self.seconds - start)
            if length > INTERVAL_SECONDS / 5:
                found.append((start, length, interval))
        return found

    def total(self) -> Interval:
        whole = Interval()
        for interval in self.intervals.values():
            whole.merge(interval)
        return whole

    def shares(self) -> dict[int, float]:
        """Each group's part of all answers; an operation may take several (a scan's pages, a read and a write)."""
        answers = self.total().by_group
        whole = answers.total() or 1
        return {gid: count / whole for gid, count in sorted(answers.items())}

    def as_json(self) -> dict[str, object]:
        total = self.total()
        rate = 1 / self.seconds if self.seconds else 0.0
        return {
            "ops_per_s": round(total.operations * rate, 1),
            "ops": total.operations,
            "errors": total.errors,
            **({"first_error": total.first_error} if total.errors else {}),
            **_latencies(total.all()),
            "seconds": round(self.seconds, 3),
            "by_group": {
                str(gid): {"ops_per_s": round(total.operations * share * rate, 1)}
                for gid, share in self.shares().items()
            },
            "by_kind": {
                name: {"ops_per_s": round(histogram.count * rate, 1), **_latencies(histogram)}
                for name, histogram in zip(KINDS, total.by_kind, strict=True)
                if histogram.count
            },
            "timeline": [
                {
                    "seconds": round(start, 1),
                    "ops_per_s": round(interval.operations / length, 1),
                    "errors": interval.errors,
                    **_latencies(interval.all()),
                }
                for start, length, interval in self.timeline()
            ],
        }


def _latencies(histogram: Histogram) -> dict[str, float]:
    shares = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99, "p999_ms": 0.999, "max_ms": 1.0}
    return {name: round(histogram.percentile(share) * 1000, 3) for name, share in shares.items()}
