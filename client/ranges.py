"""Calls on many keys, a page at a time: what to ask for next, and what the answers mean. What both clerks share.

A page is one operation on one shard. It is atomic and linearizable, and the pages of a call are not one moment:
keys may come and go between them. Each pager is asked for its next operation (`ask`) and told the answer (`take`),
until `ask` says None. Pure, so that one implementation serves threads and asyncio.
"""

from __future__ import annotations

from typing import Any

from shardkv.client.errors import CounterOverflow, PartlyDeleted, ShardKVError
from shardkv.client.requests import Key, to_bytes
from shardkv.wire import frames, ranges
from shardkv.wire.frames import DELETE_RANGE, RANGE, RANGE_BACK, SCAN_OP
from shardkv.wire.ranges import COUNT, FIRST_KEY, KEYS_ONLY, LEAST, MOST, after_prefix

SCAN_PAGE = 1000

Ask = tuple[int, bytes, bytes]  # kind, key, value of an operation


def bounds(start: Key | None, end: Key | None, prefix: Key | None) -> tuple[bytes, bytes]:
    """The range that a caller means; empty ends are open. Raises ValueError, TypeError."""
    if prefix is None:
        return to_bytes(start or b""), to_bytes(end or b"")
    if start or end:
        raise ValueError("a prefix says where to start and where to end: give no start or end with it")
    first = to_bytes(prefix)
    return first, after_prefix(first)


def pack_step(by: int) -> bytes:
    """The value of an incr. Raises TypeError, CounterOverflow."""
    if not isinstance(by, int) or isinstance(by, bool):
        raise TypeError(f"a counter is incremented by an int, not {type(by).__name__}")
    if not LEAST <= by <= MOST:
        raise CounterOverflow(f"a counter is incremented by a 64-bit integer, not {by}")
    return ranges.pack_by(by)


def _is_empty(start: bytes, end: bytes) -> bool:
    return bool(end) and start >= end


class Scan:
    """Pairs or keys of a range, upwards or downwards."""

    def __init__(self, start: bytes, end: bytes, limit: int | None, reverse: bool, keys_only: bool) -> None:
        self._start, self._end = start, end
        self._left = limit if limit is not None else 1 << 62
        self._reverse, self._keys_only = reverse, keys_only
        self._finished = False

    def ask(self) -> Ask | None:
        if self._finished or self._left <= 0 or _is_empty(self._start, self._end):
            return None
        limit, flags = min(self._left, SCAN_PAGE), KEYS_ONLY if self._keys_only else 0
        if self._reverse:
            return RANGE_BACK, self._end, ranges.pack_look(self._start, limit, flags)
        if flags:
            return RANGE, self._start, ranges.pack_look(self._end, limit, flags)
        return SCAN_OP, self._start, frames.pack_scan(self._end, limit)  # servers of any version know it

    def take(self, page: bytes) -> list[Any]:
        """What the page adds: pairs, or keys."""
        self._finished, cursor, pairs = frames.unpack_page(page)
        if self._reverse:
            self._end = cursor
        else:
            self._start = cursor
        self._left -= len(pairs)
        return [key for key, _ in pairs] if self._keys_only else pairs


class Count:
    """How many keys a range has."""

    def __init__(self, start: bytes, end: bytes) -> None:
        self._start, self._end = start, end
        self._finished = False
        self.found = 0

    def ask(self) -> Ask | None:
        if self._finished or _is_empty(self._start, self._end):
            return None
        return RANGE, self._start, ranges.pack_look(self._end, 0, COUNT)

    def take(self, tally: bytes) -> None:
        self._finished, self._start, count = ranges.unpack_tally(tally)
        self.found += count


class Delete:
    """Delete a range. Each page is a write of its own, exactly once."""

    def __init__(self, start: bytes, end: bytes) -> None:
        self._start, self._end = start or FIRST_KEY, end
        self._finished = False
        self.deleted = 0

    def ask(self) -> Ask | None:
        if self._finished or _is_empty(self._start, self._end):
            return None
        return DELETE_RANGE, self._start, ranges.pack_look(self._end, 0)

    def take(self, tally: bytes) -> None:
        self._finished, self._start, count = ranges.unpack_tally(tally)
        self.deleted += count

    def ended_by(self, error: ShardKVError) -> ShardKVError:
        """What a page's error means for the whole call."""
        return PartlyDeleted(self.deleted, self._start, error) if self.deleted else error
