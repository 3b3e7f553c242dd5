"""When each entry of a group's log was written, though some wall clocks were wrong. Pure.

Each entry carries the group's time, which never goes back and runs at the pace of time, and the
wall clock of the leader, which may be wrong (`raft/protocol/clock.py`). Their difference, the *offset*, tells
the two apart. One wrong entry among a leader's others is outvoted by the median of its
neighbours. What is left are *plateaus*: stretches of one leader with about one offset. An offset may
rise for good, since the group's time stands still while nobody leads. So the moments rest
on the longest chain of plateaus whose changes are fewest. A plateau outside that chain is a
wrong wall clock, and its entries are placed by the group's time alone.

Where an entry's wall clock agrees with that estimate to `TOLERANCE_MS`, its moment is the wall clock.

Limits: a new leader's clock that is ahead looks like a group that slept, until a later leader, or the
archive's watermark, contradicts it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from shardkv.raft.protocol.clock import SLEW
from shardkv.raft.protocol.types import Index, Term

TOLERANCE_MS = 2000  # clocks that differ by less are all called right
WINDOW = 31  # entries of one leader whose median offset counts: up to 15 wrong ones in a row are outvoted
LINKS = 64  # plateaus before one that it is compared with: work stays linear in the length of the log
CHANGE = (
    0.6  # what a change of the offset costs, in plateaus: one that comes and goes is dearer than its plateau
)


@dataclass(slots=True)
class _Plateau:
    first: int  # positions of its first and last sample
    last: int
    term: Term
    score: float = 1.0
    entries: int = 0  # in the chain that ends here
    before: int = -1  # the plateau before it in that chain


class Moments:
    """Takes the stamps of a log in order; tells when each entry was written."""

    def __init__(self) -> None:
        self._index, self._term = array("q"), array("q")
        self._clock, self._wall = array("q"), array("q")
        self._anchors = 0
        self._moments: array[int] | None = None

    def add(self, index: Index, term: Term, clock_ms: int, wall_ms: int) -> None:
        """The stamp of entry `index`."""
        self._index.append(index)
        self._term.append(term)
        self._clock.append(clock_ms)
        self._wall.append(wall_ms)
        self._moments = None

    def anchor(self, clock_ms: int, wall_ms: int) -> None:
        """At the group's time `clock_ms`, which is between the entries before and after, it was `wall_ms`.

        It comes from other clocks than the leader's, and counts as much as one leader.
        """
        self._anchors += 1
        self.add(0, -self._anchors, clock_ms, wall_ms)

    def cut(self, until_ms: int) -> Index:
        """The last entry that was written at that moment or before; 0 if there is none."""
        moments = self._all()
        for position in range(len(moments) - 1, -1, -1):
            if self._index[position] and moments[position] <= until_ms:
                return self._index[position]
        return 0

    def next_after(self, index: Index) -> Index:
        """The first entry with a stamp after `index`; 0 if there is none."""
        return next((found for found in self._index if found > index), 0)

    def moment_of(self, index: Index) -> int:
        return self._all()[self._index.index(index)]

    # ---- inside

    def _all(self) -> array[int]:
        if self._moments is None:
            offsets = array("q")
            for start, end in self._terms():
                offsets.extend(_medians([self._wall[n] - self._clock[n] for n in range(start, end)]))
            for start, end, offset in self._wrong(self._plateaus(offsets), offsets):
                offsets[start : end + 1] = array("q", [offset]) * (end + 1 - start)
            self._moments = array("q")
            for clock_ms, wall_ms, offset in zip(self._clock, self._wall, offsets, strict=True):
                right = abs(wall_ms - clock_ms - offset) <= TOLERANCE_MS
                self._moments.append(wall_ms if right else clock_ms + offset)
        return self._moments

    def _terms(self) -> Iterator[tuple[int, int]]:
        """Positions of the stretches that one leader wrote, as (first, last + 1)."""
        start = 0
        for position in range(1, len(self._term) + 1):
            if position == len(self._term) or self._term[position] != self._term[start]:
                yield start, position
                start = position

    def _slack_ms(self, one: int, other: int) -> float:
        """By how much the offset may change between two samples while every clock is right."""
        return TOLERANCE_MS + SLEW * max(0, self._clock[other] - self._clock[one])

    def _plateaus(self, offsets: array[int]) -> list[_Plateau]:
        found: list[_Plateau] = []
        for start, end in self._terms():
            found.append(_Plateau(start, start, self._term[start]))
            for n in range(start + 1, end):
                if abs(offsets[n] - offsets[n - 1]) > self._slack_ms(n - 1, n):
                    found.append(_Plateau(n, n, self._term[start]))
                found[-1].last = n
        return found

    def _wrong(self, plateaus: list[_Plateau], offsets: array[int]) -> Iterator[tuple[int, int, int]]:
        """The plateaus outside the best chain: (first position, last position, the offset that is right there)."""
        for n, plateau in enumerate(plateaus):
            size = plateau.entries = plateau.last - plateau.first + 1
            for k in range(max(0, n - LINKS), n):
                cost = self._cost(plateaus[k], plateau, k == n - 1, offsets)
                if cost is None:
                    continue
                chain = plateaus[k].score + 1.0 - cost, plateaus[k].entries + size
                if chain > (plateau.score, plateau.entries):
                    plateau.score, plateau.entries = chain
                    plateau.before = k
        if not plateaus:
            return
        at = max(range(len(plateaus)), key=lambda n: (plateaus[n].score, plateaus[n].entries, n))
        right: set[int] = set()
        while at >= 0:
            right.add(at)
            at = plateaus[at].before
        offset = offsets[plateaus[min(right)].first]
        for n, plateau in enumerate(plateaus):
            if n in right:
                offset = offsets[plateau.last]
            else:
                yield plateau.first, plateau.last, offset

    def _cost(self, one: _Plateau, other: _Plateau, adjacent: bool, offsets: array[int]) -> float | None:
        """What it costs to call both right; None: both cannot be."""
        change = offsets[other.first] - offsets[one.last]
        if abs(change) <= TOLERANCE_MS:
            return 0.0
        if change < 0:
            # Within a term the group's time may have jumped forward: then wall time went on as ever.
            goes_on = self._clock[other.first] + change >= self._clock[one.last] - TOLERANCE_MS
            if adjacent and one.term == other.term and goes_on:
                return 0.0
            if -change > self._slack_ms(one.last, other.first):
                return None
        return CHANGE


def _medians(offsets: list[int]) -> list[int]:
    """For each, the median of the `WINDOW` around it; at the ends, of the outermost `WINDOW`."""
    width = min(WINDOW, len(offsets))
    window = sorted(offsets[:width])
    medians = [window[width // 2]] * (width // 2 + 1)
    for n in range(width, len(offsets)):
        window.pop(bisect_left(window, offsets[n - width]))
        insort(window, offsets[n])
        medians.append(window[width // 2])
    return medians + [window[width // 2]] * (len(offsets) - len(medians))
