"""Answers read frames from applied state. The caller has seen to it that the state is new enough."""

from __future__ import annotations

from shardkv import frames, layout
from shardkv.frames import GET, SCAN_OP, MalformedFrame, Section, Status
from shardkv.machine import ShardMachine
from shardkv.ownership import Row

SCAN_PAGE_BYTES = 1 << 20
SCAN_PAGE_PAIRS = 4096


def read_frame(machine: ShardMachine, frame: bytes) -> bytes:
    """Reply to a read frame that `check_frame` has passed. Refusals are in the reply."""
    sections = [_read_section(machine, section) for section in frames.unpack_sections(frame)]
    return frames.pack_reply(machine.clock_ms, sections)


def _read_section(machine: ShardMachine, section: Section) -> bytes:  # hot: runs per operation
    row = machine.ownership.rows.get(section.shard)
    if row is None or not row.serves:
        return machine.refuse(row)
    machine.reads[section.shard] += len(section.keys)
    if section.kinds.count(GET) == len(section.keys) and _all_inside(section, row):
        found = machine.engine.multi_get([b"d" + key for key in section.keys])
        statuses = bytes([Status.NOT_FOUND if value is None else Status.OK for value in found])
        return frames.pack_results(statuses, [value or b"" for value in found])
    statuses_one_by_one = bytearray()
    values = []
    for kind, key, value in zip(section.kinds, section.keys, section.values, strict=True):
        status, result = _read_one(machine, row, kind, key, value)
        statuses_one_by_one.append(status)
        values.append(result)
    return frames.pack_results(bytes(statuses_one_by_one), values)


def _all_inside(section: Section, row: Row) -> bool:
    return min(section.keys) >= row.start and (not row.end or max(section.keys) < row.end)


def _read_one(machine: ShardMachine, row: Row, kind: int, key: bytes, value: bytes) -> tuple[int, bytes]:
    if key < row.start or (row.end and key >= row.end):
        return Status.WRONG_SHARD, b""
    if kind == GET:
        found = machine.engine.get(layout.data_key(key))
        return (Status.NOT_FOUND, b"") if found is None else (Status.OK, found)
    if kind == SCAN_OP:
        try:
            end, limit = frames.unpack_scan(value)
        except MalformedFrame:
            return Status.BAD_OPERATION, b""
        return Status.OK, scan_page(machine, row, key, end, limit)
    return Status.BAD_OPERATION, b""


def scan_page(machine: ShardMachine, row: Row, start: bytes, end: bytes, limit: int) -> bytes:
    """One page: u8 how it ended, length and bytes of where to go on, then key and value lengths and bytes.

    A page ends at `limit` pairs, at the page size, at `end`, or at the shard's end;
    the cursor says where the next page begins, whoever serves that.
    """
    stop = min(filter(None, (end, row.end)), default=b"")
    limit = min(limit or SCAN_PAGE_PAIRS, SCAN_PAGE_PAIRS)
    pairs: list[tuple[bytes, bytes]] = []
    size, cursor = 0, stop
    for key, value in machine.engine.scan(*layout.data_range(start, stop)):
        if len(pairs) >= limit or size >= SCAN_PAGE_BYTES:
            cursor = key[1:]
            break
        pairs.append((key[1:], value))
        size += len(key) + len(value)
    else:
        if stop == end:
            return frames.pack_page(True, b"", pairs)
    return frames.pack_page(False, cursor, pairs)
