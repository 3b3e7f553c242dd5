"""Latencies by the million in a few kilobytes: a histogram whose buckets grow with what they hold. Pure.

The idea is HdrHistogram's (Tene): equal *relative* precision over any range. A double
is an exponent and a fraction, so its top bits are such a bucket's number already: with
7 bits of the fraction a bucket is less than 0.8 % wide, from nanoseconds to hours.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from struct import Struct

FRACTION_BITS = 7
_SHIFT = 52 - FRACTION_BITS
_BITS, _DOUBLE = Struct("<Q"), Struct("<d")


class Histogram:
    """Counts of positive numbers. What it answers is right to within a bucket's width."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self.count = 0
        self.highest = 0.0

    def add_all(self, values: Sequence[float]) -> None:  # hot: runs per operation
        """Values of at least 0; many at a time, which is what it is fast at."""
        if values:
            bits = array("Q", array("d", values).tobytes())
            self._buckets.update([number >> _SHIFT for number in bits])
            self.count += len(values)
            self.highest = max(self.highest, max(values))

    def merge(self, other: Histogram) -> None:
        self._buckets.update(other._buckets)
        self.count += other.count
        self.highest = max(self.highest, other.highest)

    def percentile(self, share: float) -> float:
        """The least value that `share` (0 to 1) of all are not above; 0 when there are none."""
        assert 0 <= share <= 1
        left = share * self.count
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return min(_upper_edge(bucket), self.highest)
        return self.highest

    def encode(self) -> dict[str, object]:
        """For another process; see `decode`."""
        return {"buckets": dict(self._buckets), "highest": self.highest}

    @classmethod
    def decode(cls, data: Mapping[str, object]) -> Histogram:
        histogram = cls()
        buckets, highest = data["buckets"], data["highest"]
        assert isinstance(buckets, dict) and isinstance(highest, float)
        histogram._buckets.update(buckets)
        histogram.count = sum(buckets.values())
        histogram.highest = highest
        return histogram


def _upper_edge(bucket: int) -> float:
    edge: float = _DOUBLE.unpack(_BITS.pack((bucket + 1) << _SHIFT))[0]
    return edge
