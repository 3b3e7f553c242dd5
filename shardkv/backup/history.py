"""One group's log as the archive has it: whether it is unbroken, and where it is to be cut for a moment.

The archive claims, by its watermark, that it holds every entry up to a last one. The claim is held
against the objects that are there: entries that are missing in the middle, at the end, or right after
the backup are named, and nothing is restored that would need them.

A moment before a hole can be restored, if an entry before the hole was written after that moment.
A hole at the end refuses every moment: what is missing there is also what would tell that a wall
clock before it was wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardkv.backup.archive import ArchivedGroup, Segment, Watermark
from shardkv.backup.errors import Damaged
from shardkv.backup.manifest import moment
from shardkv.backup.moments import Moments
from shardkv.backup.store import Store
from shardkv.raft.machine import unstamp
from shardkv.raft.protocol.types import Entry, Index, Kind

Hole = tuple[Index, Index]  # first and last entry that is missing


@dataclass(frozen=True, slots=True)
class Cut:
    """Up to which entry a group's log belongs to a moment."""

    last: Index
    why_not: str = ""  # why that may be too early or too late; empty: it is proven


class History:
    """What the archive has of one group after entry `after`."""

    def __init__(
        self, group: ArchivedGroup, after: Index, segments: Sequence[Segment], mark: Watermark | None
    ) -> None:
        self.group, self.after, self._mark = group, after, mark
        self.segments: list[Segment] = []  # those that hold something new, in order
        self.holes: list[Hole] = []
        self.missing_end: Hole | None = None
        self._moments = Moments()
        last = after
        for segment in segments:
            if segment.last <= last:
                continue
            if segment.first > last + 1:
                self.holes.append((last + 1, segment.first - 1))
            self.segments.append(segment)
            last = segment.last
        if mark is not None and mark.last > last:
            self.missing_end = (last + 1, mark.last)
        self.last = last

    def anchor(self, clock_ms: int, wall_ms: int) -> None:
        """The backup's moment by the group's time and by wall clocks."""
        if clock_ms:
            self._moments.anchor(clock_ms, wall_ms)

    async def read(self, store: Store) -> None:
        """Read every stamp. Raises Damaged."""
        last, mark = self.after, self._mark
        anchored = mark is None or not mark.clock_ms
        for segment in self.segments:
            for item in await segment.entries(store):
                if mark is not None and item.index == mark.last and item.term != mark.term:
                    raise Damaged(
                        f"{store.url}: {segment.name} is of another log than its watermark: entry {item.index} "
                        f"has term {item.term}, not {mark.term}"
                    )
                if item.index <= last:
                    continue
                last = item.index
                stamp, command = unstamp(Entry(item.index, item.term, Kind(item.kind), item.data))
                if not command:
                    continue
                if mark is not None and not anchored and item.index > mark.last:
                    self._moments.anchor(mark.clock_ms, mark.time_ms)
                    anchored = True
                self._moments.add(item.index, item.term, *stamp)
        if mark is not None and not anchored:
            self._moments.anchor(mark.clock_ms, mark.time_ms)

    def cut(self, until_ms: int) -> Cut:
        """Where the log ends at that moment, and whether that is proven."""
        last = max(self.after, self._moments.cut(until_ms))
        named = f"the archive of group {self.group.gid} (incarnation {self.group.incarnation})"
        if self.missing_end is not None:
            return Cut(min(last, self.last), f"{named} lacks entries {_span(self.missing_end)}, its last ones")
        if self._mark is None:
            return Cut(self.after, f"{named} has no watermark, so that nothing tells where it ends")
        following = self._moments.next_after(last)
        for hole in self.holes:
            if last >= hole[0] - 1 or not following or following > hole[0]:
                return Cut(
                    min(last, hole[0] - 1),
                    f"{named} has a gap: entries {_span(hole)} are missing. "
                    "Restore an earlier moment, or begin with a backup that was made after the gap",
                )
            break  # the entry that follows was written after the moment, and comes before every hole
        if until_ms > self._mark.time_ms:
            return Cut(
                last,
                f"{named} reaches to {moment(self._mark.time_ms)} only: "
                "choose an earlier moment, or let `shardkv backup archive` catch up",
            )
        return Cut(last)


def _span(hole: Hole) -> str:
    return f"{hole[0]} to {hole[1]}" if hole[1] > hole[0] else f"{hole[0]}"
