"""The log as the core sees it: in memory, with what it knows of the disk.

    snapshot | base+1 … applied … commit … durable … last
             ^ compacted below

Entries at or below `base_index` live only in the state machine. `durable_index`
is the last one known to be on this replica's disk; writes finish in the order
they were handed out, so `written` pops the oldest, and a truncation clamps the
writes in flight: what a truncated write reports can no longer count (this is
the whole defence against the ABA case where an index is written twice).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from shardkv.raft.protocol.types import Entry, Index, Term


class Log:
    """Entries from `base_index + 1` to `last_index`, without a gap."""

    def __init__(self, base_index: Index = 0, base_term: Term = 0, entries: Sequence[Entry] = ()) -> None:
        self.base_index = base_index
        self.base_term = base_term
        self._entries: list[Entry] = list(entries)
        self._bytes = sum(len(entry.data) for entry in entries)
        self.durable_index = self.last_index
        self._unwritten = self.last_index + 1  # first entry not yet handed to the disk
        self._in_flight: deque[Index] = deque()
        self.check()

    @property
    def last_index(self) -> Index:
        return self.base_index + len(self._entries)

    @property
    def last_term(self) -> Term:
        return self._entries[-1].term if self._entries else self.base_term

    @property
    def size_bytes(self) -> int:
        """Payload bytes held in memory."""
        return self._bytes

    def term_at(self, index: Index) -> Term | None:
        """The term at `index`, or None where it is compacted away or beyond the end."""
        if index == self.base_index:
            return self.base_term
        if self.base_index < index <= self.last_index:
            return self._entries[index - self.base_index - 1].term
        return None

    def slice(self, start: Index, stop: Index, max_bytes: int) -> tuple[Entry, ...]:
        """Entries in [start, stop), as many as fit `max_bytes`, but at least one."""
        assert start > self.base_index, f"entry {start} is compacted (base {self.base_index})"
        offset = start - self.base_index - 1
        end = min(stop, self.last_index + 1) - self.base_index - 1
        size = 0
        for position in range(offset, end):
            size += len(self._entries[position].data)
            if size > max_bytes and position > offset:
                end = position
                break
        return tuple(self._entries[offset:end])

    def append(self, entries: Sequence[Entry]) -> None:
        """Add entries at the end. They must follow on."""
        if entries:
            assert entries[0].index == self.last_index + 1, "a gap in the log"
            assert entries[0].term >= self.last_term, "terms never fall along the log"
            self._entries.extend(entries)
            self._bytes += sum(len(entry.data) for entry in entries)

    def truncate(self, index: Index) -> None:
        """Drop the entries from `index` on: they conflict with the leader's (§5.3)."""
        assert index > self.base_index, "committed entries are never truncated"
        cut = index - self.base_index - 1
        self._bytes -= sum(len(entry.data) for entry in self._entries[cut:])
        del self._entries[cut:]
        self.durable_index = min(self.durable_index, index - 1)
        self._unwritten = min(self._unwritten, index)
        self._in_flight = deque(min(last, index - 1) for last in self._in_flight)

    def take_unwritten(self) -> tuple[Entry, ...]:
        """Entries for the next write, which from now on is in flight."""
        entries = tuple(self._entries[self._unwritten - self.base_index - 1 :])
        self._unwritten = self.last_index + 1
        self._in_flight.append(self.last_index)
        return entries

    def has_unwritten(self) -> bool:
        return self._unwritten <= self.last_index

    def written(self) -> None:
        """The oldest write in flight reached the disk."""
        self.durable_index = max(self.durable_index, self._in_flight.popleft())

    def compact(self, index: Index) -> None:
        """Forget the entries up to `index`; the state machine holds them durably."""
        if index <= self.base_index:
            return
        term = self.term_at(index)
        assert term is not None, "cannot compact beyond the log"
        assert index <= self.durable_index, "cannot compact what is not yet on disk"
        cut = index - self.base_index
        self._bytes -= sum(len(entry.data) for entry in self._entries[:cut])
        del self._entries[:cut]
        self.base_index, self.base_term = index, term

    def reset(self, index: Index, term: Term) -> None:
        """Begin anew after a snapshot that the log does not reach (§7)."""
        self._entries.clear()
        self._bytes = 0
        self.base_index, self.base_term = index, term
        self.durable_index = index
        self._unwritten = index + 1
        self._in_flight = deque(index for _ in self._in_flight)

    def conflict_at(self, index: Index) -> tuple[Term, Index]:
        """Where a leader should look next if ours differs at `index`: by term, not by entry (§5.3).

        Our term there and where it begins, or (0, the first entry that we lack).
        """
        term = self.term_at(index)
        if term is None:
            return 0, self.last_index + 1
        while index - 1 > self.base_index and self.term_at(index - 1) == term:
            index -= 1
        return term, index

    def last_index_of_term(self, term: Term, below: Index) -> Index | None:
        """The last entry of `term` at or below `below`, or None if the leader has none."""
        for index in range(min(below, self.last_index), self.base_index, -1):
            found = self.term_at(index)
            assert found is not None
            if found == term:
                return index
            if found < term:
                return None
        return None

    def is_up_to_date(self, last_index: Index, last_term: Term) -> bool:
        """Whether a candidate's log is at least as complete as ours (§5.4.1): terms first."""
        return (last_term, last_index) >= (self.last_term, self.last_index)

    def check(self) -> None:
        """All invariants, for tests and simulation; linear in the log's length."""
        term = self.base_term
        for offset, entry in enumerate(self._entries):
            assert entry.index == self.base_index + 1 + offset, "a gap in the log"
            assert entry.term >= term, "terms never fall along the log"
            term = entry.term
        assert self.base_index <= self.durable_index <= self.last_index
        assert self._unwritten <= self.last_index + 1
        assert self._bytes == sum(len(entry.data) for entry in self._entries)
        assert all(index <= self.last_index for index in self._in_flight)
