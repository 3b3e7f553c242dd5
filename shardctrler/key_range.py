"""A range of keys: what shards, moves and the rows of a group have in common. The comparison stands here alone."""

from __future__ import annotations

from collections.abc import Collection


class KeyRange:
    """The keys in [start, end), in byte order; an empty `end` lies beyond all keys. For classes that have both fields."""

    __slots__ = ()
    start: bytes
    end: bytes

    def contains(self, key: bytes) -> bool:
        return self.start <= key and (not self.end or key < self.end)

    def contains_all(self, keys: Collection[bytes]) -> bool:
        """`keys`: at least one."""
        return self.start <= min(keys) and (not self.end or max(keys) < self.end)

    def ends_in(self, end: bytes) -> bool:
        """Whether a range with that end has its last keys here, so that a look from there downwards begins here."""
        return self.start < end and (not self.end or end <= self.end) if end else not self.end

    def overlaps(self, other: KeyRange) -> bool:
        """Whether the two share a key."""
        return overlap(self.start, self.end, other.start, other.end)


def overlap(start: bytes, end: bytes, other_start: bytes, other_end: bytes) -> bool:
    return (not other_end or start < other_end) and (not end or other_start < end)


def inside(key: bytes, start: bytes, end: bytes) -> bool:
    """The same for a message of the wire."""
    return start <= key and (not end or key < end)
