"""What operations on counters and ranges carry, and what they are answered with. Pure, shared by clerk and server.

    incr          key; by (64 bit, signed)                  the new value, in decimal
    delete_range  start of the range; end                    a tally: keys deleted, and where to go on
    range         start of the range; end, limit, flags      a page, or with COUNT a tally
    range back    end of the range; start, limit, flags      a page from the end downwards

A range is `start <= key < end`; an empty end is open. An operation covers the part of its range that lies in one shard,
and no more of it than a page. Its answer says where the next operation begins: forwards the first key that was not
looked at; backwards the end of what was not looked at.
"""

from __future__ import annotations

import struct

from shardkv.wire.frames import PAGE, MalformedFrame

BY = struct.Struct("<q")
LOOK = struct.Struct("<IB")  # limit, flags; what follows is the other end of the range
KEYS_ONLY, COUNT = 1, 2  # flags: pairs have empty values; nothing but how many there are
FLAGS = KEYS_ONLY | COUNT

LEAST, MOST = -(1 << 63), (1 << 63) - 1  # what a counter can hold, and be incremented by
DIGITS = 20  # of the longest, with its sign
FIRST_KEY = b"\0"  # of all: a key is not empty, but a write has a key, and an open start is none


def pack_by(by: int) -> bytes:
    """`by` lies between `LEAST` and `MOST`."""
    return BY.pack(by)


def unpack_by(value: bytes) -> int:
    """Raises MalformedFrame."""
    if len(value) != BY.size:
        raise MalformedFrame("an incr without its argument")
    return int(BY.unpack(value)[0])


def parse_number(value: bytes) -> int | None:
    """The counter in a value: a decimal integer of 64 bits as an incr writes it; None where it is none."""
    digits = value[1:] if value[:1] == b"-" else value
    if len(value) > DIGITS or not digits.isdigit():
        return None
    number = int(value)
    return number if b"%d" % number == value and LEAST <= number <= MOST else None


def pack_look(other: bytes, limit: int, flags: int = 0) -> bytes:
    """`other`: the end of the range; for a range back, its start. A limit of 0 is as much as a page holds."""
    return LOOK.pack(limit, flags) + other


def unpack_look(value: bytes) -> tuple[bytes, int, int]:
    """(other end, limit, flags). Raises MalformedFrame."""
    if len(value) < LOOK.size:
        raise MalformedFrame("a range without its arguments")
    limit, flags = LOOK.unpack_from(value)
    if flags & ~FLAGS:
        raise MalformedFrame(f"a range with flags {flags:#x}")
    return value[LOOK.size :], limit, flags


def pack_tally(finished: bool, cursor: bytes, count: int) -> bytes:
    """How many there were, and where to go on unless it is finished."""
    return PAGE.pack(finished, len(cursor), count) + cursor


def unpack_tally(data: bytes) -> tuple[bool, bytes, int]:
    """(finished, cursor, count). Raises MalformedFrame."""
    if len(data) < PAGE.size:
        raise MalformedFrame("not a tally")
    finished, cursor_length, count = PAGE.unpack_from(data)
    if len(data) != PAGE.size + cursor_length:
        raise MalformedFrame("a tally of another length than it says")
    return bool(finished), data[PAGE.size :], count


def after_prefix(prefix: bytes) -> bytes:
    """The first key that is above all that begin with `prefix`; empty where there is none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b""
