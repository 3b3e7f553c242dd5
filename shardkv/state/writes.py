"""What each kind of write does to one key, or to a range of keys. The caller has seen to ownership and exactly-once.

A write reads and changes the batch alone, and what it does depends on nothing but the state before it, the frame and
the leader's limits, all of which are in the log. So replicas and replays do the same, however entries share a batch.

A frame does a bounded amount of work. What appends write and what deleted ranges look at is counted; when the frame's
share is spent, the rest of the frame is not done, and the clerk asks for it again. A deleted range takes away a page of keys
at a time, whose journal entries, where the shard is being lent, are as many.
"""

from __future__ import annotations

from shardkv.state import layout
from shardkv.state.row import Row
from shardkv.storage.engine import Batch
from shardkv.wire import frames
from shardkv.wire.frames import (
    ABANDON,
    APPEND,
    CAS_OP,
    DELETE,
    DELETE_RANGE,
    FIRST_VERSION,
    INCR,
    NEWEST_OF_FIRST,
    PUT,
    MalformedFrame,
    Status,
)
from shardkv.wire.ranges import LEAST, MOST, pack_tally, parse_number, unpack_by, unpack_look

FRAME_BYTES = 16 << 20  # what one frame may write by appends and look at in ranges; the rest is asked for again
BATCH_BYTES = 64 << 20  # … the entries that share a batch
# Both are part of the format: replicas that counted differently would not do the same.
PAGE_KEYS = 1000  # that one delete_range takes away
PAGE_BYTES = 4 << 20  # of keys and values that it looks at, or a little more
RANGE_COST = 64 << 10  # that a range counts as besides, and …
KEY_COST = 1 << 10  # … each of its keys

OK = b""  # the reply that most writes leave in the record
NOT_FOUND = bytes([Status.NOT_FOUND])
CAS_FAILED = bytes([Status.CAS_FAILED])
ABANDONED = bytes([Status.ABANDONED])
VALUE_TOO_LARGE = bytes([Status.VALUE_TOO_LARGE])
BAD_OPERATION = bytes([Status.BAD_OPERATION])
NOT_A_NUMBER = bytes([Status.NOT_A_NUMBER])
OVERFLOW = bytes([Status.OVERFLOW])
DONE_WITH = bytes([Status.OK])  # … and a value


class Writing:
    """The writes of one frame, one after the other."""

    __slots__ = ("_batch", "_max_value", "_newest", "erased", "grown")

    def __init__(self, batch: Batch, max_value: int, version: int) -> None:
        self._batch, self._max_value = batch, max_value
        self._newest = NEWEST_OF_FIRST if version == FIRST_VERSION else 255
        self.grown = 0  # bytes, of the frame's share
        self.erased: list[bytes] = []  # engine keys that ranges have deleted, for the journal

    @property
    def is_spent(self) -> bool:
        return self.grown > FRAME_BYTES

    def apply(self, row: Row, kind: int, key: bytes, value: bytes) -> bytes:
        """Do one write. Returns the reply: empty, or a status and the answer's value."""
        batch, item = self._batch, layout.data_key(key)
        if kind == PUT:
            batch.put(item, value)
        elif kind == APPEND:
            whole = (batch.get(item) or b"") + value
            if len(whole) > self._max_value:
                return VALUE_TOO_LARGE
            batch.put(item, whole)
            self.grown += len(whole)
        elif kind == DELETE:
            if batch.get(item) is None:
                return NOT_FOUND
            batch.delete(item)
        elif kind == CAS_OP:
            return self._swap(item, value)
        elif kind == ABANDON:
            return ABANDONED  # the record keeps the write of this number from being done
        elif kind > self._newest:
            return BAD_OPERATION
        elif kind == INCR:
            return self._increment(item, value)
        elif kind == DELETE_RANGE:
            return self._delete_range(row, key, value)
        else:
            return BAD_OPERATION
        return OK

    def _swap(self, item: bytes, value: bytes) -> bytes:
        try:
            expected, new = frames.unpack_cas(value)
        except MalformedFrame:
            return BAD_OPERATION
        if self._batch.get(item) != expected:
            return CAS_FAILED
        if len(new) > self._max_value:
            return VALUE_TOO_LARGE
        self._batch.put(item, new)
        return OK

    def _increment(self, item: bytes, value: bytes) -> bytes:
        """An absent key counts as 0. The answer is the new value, as it is stored."""
        try:
            by = unpack_by(value)
        except MalformedFrame:
            return BAD_OPERATION
        before = self._batch.get(item)
        number = 0 if before is None else parse_number(before)
        if number is None:
            return NOT_A_NUMBER
        if not LEAST <= number + by <= MOST:
            return OVERFLOW
        after = b"%d" % (number + by)
        self._batch.put(item, after)
        return DONE_WITH + after

    def _delete_range(self, row: Row, start: bytes, value: bytes) -> bytes:
        """Delete the first page of the keys of this shard in [start, end). The answer is a tally."""
        try:
            end, limit, _ = unpack_look(value)
        except MalformedFrame:
            return BAD_OPERATION
        stop = min(filter(None, (end, row.end)), default=b"")
        most = min(limit or PAGE_KEYS, PAGE_KEYS)
        found: list[bytes] = []
        size, cursor = 0, stop
        is_last = stop == end or (bool(end) and end <= start)
        if not stop or start < stop:
            for item, held in self._batch.walk(*layout.data_range(start, stop)):
                if len(found) >= most or size >= PAGE_BYTES:
                    is_last, cursor = False, item[1:]
                    break
                found.append(item)
                size += len(item) + len(held)
        for item in found:
            self._batch.delete(item)
        self.erased += found
        self.grown += size + RANGE_COST + KEY_COST * len(found)
        return DONE_WITH + pack_tally(is_last, b"" if is_last else cursor, len(found))
