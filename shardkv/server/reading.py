"""Answers read frames from applied state. The caller has seen to it that the state is new enough.

An answer has a bound in bytes and in pairs. What does not fit is told as `NOT_ANSWERED`, for the clerk to ask
for again at once; the first operation of a frame is answered whatever its size, so that each attempt gets on.

A long frame is answered in slices, and the event loop runs between these. Each get and each page is a read at
one moment between the call and its answer. After a pause the shard may be another group's: ownership is looked
at again for each slice. Long frames take turns, so that callers wait for one slice and not for one of each; users
take turns as well, so that one with many long frames does not hold up the others'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from shardkv.state import layout
from shardkv.state.machine import ShardMachine
from shardkv.state.row import Row
from shardkv.wire import frames
from shardkv.wire.frames import GET, RANGE, RANGE_BACK, SCAN_OP, MalformedFrame, Section, Status
from shardkv.wire.ranges import COUNT, KEYS_ONLY, pack_tally, unpack_look
from shardkv.wire.turns import OWNER, Turns

SCAN_PAGE_BYTES = 1 << 20
SCAN_PAGE_PAIRS = 4096
ANSWER_BYTES = 4 << 20  # of one frame
ANSWER_PAIRS = 65_536  # of one frame: values and pairs of pages
SLICE_BYTES = 1 << 20
SLICE_PAIRS = 1024
FEW_KEYS, MANY_KEYS = 4, 32  # that one look-up asks for: few, until the values are known to be small
SMALL_BYTES = 16 << 10


@dataclass(slots=True)
class _Budget:
    """What one frame may still answer, in all and before the next pause."""

    answer_bytes: int = ANSWER_BYTES
    answer_pairs: int = ANSWER_PAIRS
    slice_bytes: int = SLICE_BYTES
    slice_pairs: int = SLICE_PAIRS
    keys: int = FEW_KEYS  # of the next look-up
    is_long: bool = False  # it has had its first pause, and the turn is its

    @property
    def is_spent(self) -> bool:
        return self.answer_bytes <= 0 or self.answer_pairs <= 0

    @property
    def slice_is_spent(self) -> bool:
        return self.slice_bytes <= 0 or self.slice_pairs <= 0

    def has_room_for(self, size: int) -> bool:
        return size <= self.answer_bytes or self.answer_pairs == ANSWER_PAIRS

    def spend(self, size: int, pairs: int) -> None:
        self.answer_bytes -= size
        self.slice_bytes -= size
        self.answer_pairs -= pairs
        self.slice_pairs -= pairs

    def begin_slice(self) -> None:
        self.slice_bytes, self.slice_pairs = SLICE_BYTES, SLICE_PAIRS


class Reader:
    """Answers the read frames of one replica."""

    def __init__(self, machine: ShardMachine, looking: Callable[[], AbstractContextManager[None]]) -> None:
        """`looking` stands around every look into the engine (`Replica.looking`)."""
        self._machine, self._looking = machine, looking
        self._turn = Turns()  # of the one long frame that is being answered

    async def read(self, frame: bytes) -> bytes:
        """The reply to a plain read frame (`check_frame`). Refusals are in the reply."""
        budget = _Budget()
        try:
            replies = [await self._read_section(section, budget) for section in frames.unpack_sections(frame)]
        finally:
            if budget.is_long:
                self._turn.release()
        return frames.pack_reply(self._machine.clock_ms, replies)

    async def _read_section(self, section: Section, budget: _Budget) -> bytes:
        machine, count = self._machine, len(section.keys)
        statuses, values = bytearray(), list[bytes]()
        while True:
            row = machine.ownership.rows.get(section.shard)
            if row is None or not row.serves:
                if not statuses:
                    return machine.refuse(row)
                # It has left between two slices: as if it had been split, the clerk looks for it.
                statuses += bytes([Status.WRONG_SHARD]) * (count - len(statuses))
            elif row.fence is not None:
                statuses += bytes([Status.RESTORING]) * (count - len(statuses))
            else:
                with self._looking():
                    _read_slice(machine, row, section, budget, statuses, values)
            if budget.is_spent:
                statuses += bytes([Status.NOT_ANSWERED]) * (count - len(statuses))
            if len(statuses) == count:
                break
            await self._pause(budget)
        machine.reads[section.shard] += len(values)
        values += [b""] * (count - len(values))
        return frames.pack_results(bytes(statuses), values)

    async def _pause(self, budget: _Budget) -> None:
        """Let others run. The replica may have stopped meanwhile: the next look finds that out."""
        if not budget.is_long:
            await self._turn.acquire(OWNER.get())
            budget.is_long = True
        await asyncio.sleep(0)
        budget.begin_slice()


def _read_slice(  # hot: runs per operation
    machine: ShardMachine, row: Row, section: Section, budget: _Budget, statuses: bytearray, values: list[bytes]
) -> None:
    """Answer operations of the section, from the first that has no status, until the slice or the budget is spent."""
    count = len(section.keys)
    only_gets = section.kinds.count(GET) == count and row.contains_all(section.keys)
    while len(statuses) < count and not budget.slice_is_spent and not budget.is_spent:
        at = len(statuses)
        if only_gets:
            found = machine.engine.multi_get([b"d" + key for key in section.keys[at : at + budget.keys]])
            size = sum(map(len, filter(None, found)))
            # The next look-up asks for more where these were small; where they were not, memory is the bound.
            budget.keys = min(4 * budget.keys, MANY_KEYS) if size <= SMALL_BYTES * len(found) else FEW_KEYS
            if size <= budget.answer_bytes:
                statuses += bytes([Status.NOT_FOUND if value is None else Status.OK for value in found])
                values += [value or b"" for value in found]
                budget.spend(size, len(found))
                continue
            answers: list[tuple[int, bytes]]
            answers = [(Status.NOT_FOUND, b"") if value is None else (Status.OK, value) for value in found]
        else:
            answers = [_read_one(machine, row, section.kinds[at], section.keys[at], section.values[at], budget)]
        for status, value in answers:
            if not budget.has_room_for(len(value)):
                budget.answer_bytes = 0
                return
            statuses.append(status)
            values.append(value)
            budget.spend(len(value), 1)


def _read_one(
    machine: ShardMachine, row: Row, kind: int, key: bytes, value: bytes, budget: _Budget
) -> tuple[int, bytes]:
    if not _is_inside(row, kind, key):
        return Status.WRONG_SHARD, b""
    if kind == GET:
        found = machine.engine.get(layout.data_key(key))
        return (Status.NOT_FOUND, b"") if found is None else (Status.OK, found)
    try:
        if kind == SCAN_OP:
            end, limit = frames.unpack_scan(value)
            page, looked = scan_page(machine, row, key, end, limit, budget.answer_bytes)
        elif kind == RANGE:
            end, limit, flags = unpack_look(value)
            if flags & COUNT:
                page, looked = count_page(machine, row, key, end, limit)
            else:
                keys_only = bool(flags & KEYS_ONLY)
                page, looked = scan_page(machine, row, key, end, limit, budget.answer_bytes, keys_only)
        elif kind == RANGE_BACK:
            start, limit, flags = unpack_look(value)
            keys_only = bool(flags & KEYS_ONLY)
            page, looked = back_page(machine, row, start, key, limit, budget.answer_bytes, keys_only)
        else:
            return Status.BAD_OPERATION, b""
    except MalformedFrame:
        return Status.BAD_OPERATION, b""
    budget.spend(0, looked)
    return Status.OK, page


def _is_inside(row: Row, kind: int, key: bytes) -> bool:
    if kind == RANGE_BACK:  # its key is an end
        return row.ends_in(key)
    return row.contains(key)


def scan_page(
    machine: ShardMachine,
    row: Row,
    start: bytes,
    end: bytes,
    limit: int,
    most_bytes: int = SCAN_PAGE_BYTES,
    keys_only: bool = False,
) -> tuple[bytes, int]:
    """One page (`frames.pack_page`), and its number of pairs.

    A page ends at `limit` pairs, at the page size, at `end`, or at the shard's end; the cursor says where the
    next page begins, whoever serves that.
    """
    stop = min(filter(None, (end, row.end)), default=b"")
    limit = min(limit or SCAN_PAGE_PAIRS, SCAN_PAGE_PAIRS)
    most_bytes = min(most_bytes, SCAN_PAGE_BYTES)
    pairs: list[tuple[bytes, bytes]] = []
    size, cursor = 0, stop
    low, high = layout.data_range(start, stop)
    found = (
        ((key, b"") for key in machine.engine.keys(low, high)) if keys_only else machine.engine.scan(low, high)
    )
    for key, value in found:
        if len(pairs) >= limit or size >= most_bytes:
            cursor = key[1:]
            break
        pairs.append((key[1:], value))
        size += len(key) + len(value)
    else:
        if stop == end:
            return frames.pack_page(True, b"", pairs), len(pairs)
    return frames.pack_page(False, cursor, pairs), len(pairs)


def back_page(
    machine: ShardMachine,
    row: Row,
    start: bytes,
    end: bytes,
    limit: int,
    most_bytes: int = SCAN_PAGE_BYTES,
    keys_only: bool = False,
) -> tuple[bytes, int]:
    """The same from the end downwards, the largest key first. The cursor is the end of what is left."""
    first = max(start, row.start)
    limit = min(limit or SCAN_PAGE_PAIRS, SCAN_PAGE_PAIRS)
    most_bytes = min(most_bytes, SCAN_PAGE_BYTES)
    pairs: list[tuple[bytes, bytes]] = []
    size = 0
    low, high = layout.data_range(first, end)
    for key, value in machine.engine.scan_back(low, high) if low < high else ():
        if len(pairs) >= limit or size >= most_bytes:
            return frames.pack_page(False, pairs[-1][0], pairs), len(pairs)
        pairs.append((key[1:], b"" if keys_only else value))
        size += len(key) + (0 if keys_only else len(value))
    is_last = first == start
    return frames.pack_page(is_last, b"" if is_last else first, pairs), len(pairs)


def count_page(machine: ShardMachine, row: Row, start: bytes, end: bytes, limit: int) -> tuple[bytes, int]:
    """A tally (`ranges.pack_tally`) of a page of keys, and how many they are."""
    stop = min(filter(None, (end, row.end)), default=b"")
    limit = min(limit or SCAN_PAGE_PAIRS, SCAN_PAGE_PAIRS)
    looked = 0
    for key in machine.engine.keys(*layout.data_range(start, stop)):
        if looked >= limit:
            return pack_tally(False, key[1:], looked), looked
        looked += 1
    is_last = stop == end
    return pack_tally(is_last, b"" if is_last else stop, looked), looked
