"""How long to wait before something is tried again: pauses double up to a bound, and are spread by chance.

Those who failed at the same moment do not come back at the same moment.
"""

from __future__ import annotations

from random import Random

Bounds = tuple[float, float]  # the first and the longest pause, in seconds


def after(failures: int, bounds: Bounds) -> float:
    """The pause after so many failures in a row, the first being number 0."""
    return min(bounds[0] * 2.0 ** min(failures, 30), bounds[1])


def longer(pause: float, bounds: Bounds) -> float:
    """The pause that follows `pause`."""
    return min(2 * pause, bounds[1])


def spread(pause: float, rng: Random) -> float:
    """`pause`, a half less to a half more."""
    return pause * rng.uniform(0.5, 1.5)
