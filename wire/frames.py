"""Client frames: many operations as columns of bytes. Pure, shared by clerk and server, and hot.

    frame    header (magic, version, kind, sections, configuration number, issued_ms, heard_ms)
    section  header (shard, session, acked_below, count, bytes of blob)
             kinds[count] u8 | seqs[count] u64 (writes) | key lengths u32 | value lengths u32 | blob
    blob     key, value, key, value, …

    reply    header (replicated clock in ms, sections), then for each section of the frame:
             status u8, gid and addresses of who may serve it (when refused),
             count, statuses u8 | value lengths u32 | blob

A leader looks at the columns of lengths (`check_frame`), not at the operations: the bytes go into the log as
they came, unless some operation has to be refused (`admission.py`). Columns are unpacked by C code; per
operation there are two slices and nothing else.

A refusal is a status of its operation. Only bytes that are no frame are refused as a whole (`MalformedFrame`),
and a frame has at most `MAX_OPERATIONS` operations.

`issued_ms` is the least time of issue of the frame's operations, each fixed when the operation was
first sent; `heard_ms` the highest replicated time that the clerk has heard of, no less than any of these
(`raft/sessions.py`).

A cas packs `expected` and `new` into its value, a scan packs `end` and `limit`; `wire/ranges.py` packs counters and
ranges. An abandon stands in for a write that its caller has given up: it has that write's number and key, and does
nothing but keep the write from being done later.

A frame has the lowest version that knows all of its operations. A kind of operation that the version does not know
is a BAD_OPERATION, in a new server too: replicas of both versions apply one log alike.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from math import ceil, log2

MAGIC = b"SKF"
VERSION = 3  # a frame has the lowest version that knows all of its operations (`version_for`)
FIRST_VERSION = 2
FRAME = struct.Struct("<3sBBHQQQ")  # magic, version, kind, sections, configuration, issued_ms, heard_ms
SECTION = struct.Struct("<Q16sQII")  # shard, session, acked_below, count, blob bytes
REPLY = struct.Struct("<QH")
REPLY_SECTION = struct.Struct("<BQHII")  # status, gid, length of addresses, count, blob bytes
CAS = struct.Struct("<BI")  # whether a value is expected (else absence), its length
SCAN = struct.Struct("<BII")  # whether there is an end, its length, limit
NO_SESSION = b"\0" * 16

WRITE, READ = 1, 2  # kinds of frame
PUT, APPEND, DELETE, CAS_OP = 1, 2, 3, 4  # kinds of write
GET, SCAN_OP = 5, 6  # kinds of read
ABANDON = 7  # a write that its caller has given up: from now on it is not done, unless it was
INCR, DELETE_RANGE = 8, 9  # writes; in frames of version 3, and so is what follows
RANGE, RANGE_BACK = 10, 11  # reads: a scan with flags, from its start upwards and from its end downwards
NEWEST_OF_FIRST = ABANDON  # the kinds of operations that version 2 knows end here
GROWS_NOTHING = frozenset((DELETE, DELETE_RANGE, ABANDON))
FORBIDDEN = (
    255  # the authorizer of a server writes it over the kinds of operations that it does not let through
)
FIRST_BUSY = 192  # from here to 254: a kind, and a status, that says when to come back (`busy_kind`)
MARKED = re.compile(rb"[\xc0-\xff]")  # kinds that a server has written over others
MAX_SECTIONS = 4096
MAX_OPERATIONS = 4096  # of a frame: more would keep a replica busy for too long at one entry


class Status(IntEnum):
    """How one operation went."""

    OK = 0
    NOT_FOUND = 1  # get, delete: the key is absent
    CAS_FAILED = 2  # the value was another
    SESSION_EXPIRED = 3  # too old to be retried; not done now
    WRONG_SHARD = 4  # the key is outside the shard, which was split; not done
    VALUE_TOO_LARGE = 5  # an append would make the value too large; not done
    BAD_OPERATION = 6  # unknown kind, or malformed; not done
    LOCKED = 7  # a transaction holds the key; not done (reserved: no server of this version says it)
    ABANDONED = 8  # its caller gave it up before it was done; it is not done, now or later
    NOT_A_NUMBER = 9  # an incr of a value that is no decimal integer; not done
    OVERFLOW = 10  # an incr beyond 64 bits; not done
    # From 16 on: said without a record. This attempt did nothing; an earlier one may have, or still may.
    KEY_SIZE = 16  # the key is empty, or longer than the server takes
    VALUE_SIZE = 17  # the value is larger than the server takes
    DENIED = 18  # the caller may not touch this key
    NO_ROOM = 19  # the group's disks are nearly full
    NOT_ANSWERED = 20  # the answer is as large as it may be: ask for the rest at once
    RESTORING = 21  # a restore writes the key's shard: ask when it has ended
    # From FIRST_BUSY to 254: a quota is used up. Come back when `busy_seconds` have passed.


class SectionStatus(IntEnum):
    OK = 0
    WRONG_GROUP = 1  # nothing was done; the reply names who may serve the shard, if known
    NOT_READY = 2  # nothing was done; this replica has not come so far, ask again


class MalformedFrame(ValueError):
    """Bytes that are no frame. Nothing of it was done."""


FIRST_UNRECORDED = Status.KEY_SIZE


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes, in bytes."""

    key_bytes: int = 4096
    value_bytes: int = 1 << 20
    frame_bytes: int = 8 << 20


@dataclass(slots=True)
class Section:
    """The operations of one frame on one shard, unpacked."""

    shard: int
    session: bytes
    acked_below: int
    kinds: bytes
    seqs: array[int]
    keys: list[bytes]
    values: list[bytes]


@dataclass(frozen=True, slots=True)
class FrameHeader:
    kind: int
    sections: int
    config_num: int
    issued_ms: int
    heard_ms: int
    plain: bool = True  # `check_frame` saw nothing that any of its operations could be refused for
    version: int = FIRST_VERSION


def pack_section(  # hot: runs per operation
    shard: int,
    session: bytes,
    acked_below: int,
    kinds: bytes,
    seqs: Sequence[int],
    keys: Sequence[bytes],
    values: Sequence[bytes],
) -> bytes:
    """One section. `seqs` is empty in a read frame."""
    pairs: list[bytes] = [b""] * (2 * len(keys))
    pairs[::2] = keys
    pairs[1::2] = values
    blob = b"".join(pairs)
    return b"".join(
        (
            SECTION.pack(shard, session, acked_below, len(keys), len(blob)),
            kinds,
            array("Q", seqs).tobytes(),
            array("I", map(len, keys)).tobytes(),
            array("I", map(len, values)).tobytes(),
            blob,
        )
    )


def pack_frame(
    kind: int,
    config_num: int,
    issued_ms: int,
    sections: Sequence[bytes],
    heard_ms: int = 0,
    version: int = FIRST_VERSION,
) -> bytes:
    header = FRAME.pack(MAGIC, version, kind, len(sections), config_num, issued_ms, heard_ms)
    return header + b"".join(sections)


def version_for(kinds: bytes) -> int:
    """The lowest version whose readers know all of these kinds of operations: older servers read what they can."""
    return FIRST_VERSION if max(kinds) <= NEWEST_OF_FIRST else VERSION


def read_header(frame: bytes) -> FrameHeader:
    """Raises MalformedFrame."""
    if len(frame) >= 4 and frame[:3] == MAGIC and not FIRST_VERSION <= frame[3] <= VERSION:
        raise MalformedFrame(f"frame version {frame[3]}, this server reads {FIRST_VERSION} to {VERSION}")
    if len(frame) < FRAME.size:
        raise MalformedFrame(f"a frame of {len(frame)} bytes")
    magic, version, kind, sections, config_num, issued_ms, heard_ms = FRAME.unpack_from(frame)
    if magic != MAGIC:
        raise MalformedFrame("not a frame")
    if kind not in (WRITE, READ) or not 0 < sections <= MAX_SECTIONS:
        raise MalformedFrame(f"a frame of kind {kind} with {sections} sections")
    return FrameHeader(kind, sections, config_num, issued_ms, heard_ms, version=version)


def check_frame(frame: bytes, kind: int, limits: Limits) -> FrameHeader:
    """Check that these bytes are a frame, and whether it is plain, by its columns alone. Raises MalformedFrame."""
    if len(frame) > limits.frame_bytes:
        raise MalformedFrame(f"a frame of {len(frame)} bytes; the limit is {limits.frame_bytes}")
    header = read_header(frame)
    if header.kind != kind:
        raise MalformedFrame(f"a frame of kind {header.kind} where {kind} belongs")
    offset, operations, plain = FRAME.size, 0, True
    for _ in range(header.sections):
        if offset + SECTION.size > len(frame):
            raise MalformedFrame("a section is cut short")
        _, _, _, count, blob_bytes = SECTION.unpack_from(frame, offset)
        offset += SECTION.size
        operations += count
        if operations > MAX_OPERATIONS:
            raise MalformedFrame(f"a frame has at most {MAX_OPERATIONS} operations")
        fixed = count * (17 if kind == WRITE else 9)
        if count == 0 or offset + fixed + blob_bytes > len(frame):
            raise MalformedFrame("a section is empty or cut short")
        lengths = array("I", frame[offset + fixed - 8 * count : offset + fixed])
        if sum(lengths) != blob_bytes:
            raise MalformedFrame("lengths that do not add up")
        plain = (
            plain
            and max(lengths[:count]) <= limits.key_bytes
            and (kind == READ or min(lengths[:count]) > 0)
            and max(lengths[count:]) <= limits.value_bytes
            and MARKED.search(frame, offset, offset + count) is None
        )
        offset += fixed + blob_bytes
    if offset != len(frame):
        raise MalformedFrame("bytes after the last section")
    return header if plain else replace(header, plain=False)


def only_deletes(frame: bytes) -> bool:
    """Whether a write frame that `check_frame` has passed makes nothing grow."""
    if frame[FRAME.size + SECTION.size] not in GROWS_NOTHING:
        return False  # nearly every frame is told by its first operation
    return all(GROWS_NOTHING.issuperset(section.kinds) for section in unpack_sections(frame))


def unpack_sections(frame: bytes) -> Iterator[Section]:  # hot: runs per operation
    """The sections of a frame that `check_frame` has passed."""
    _, _, kind, sections, *_ = FRAME.unpack_from(frame)
    offset = FRAME.size
    for _ in range(sections):
        shard, session, acked_below, count, _ = SECTION.unpack_from(frame, offset)
        offset += SECTION.size
        kinds = frame[offset : offset + count]
        offset += count
        seqs = array("Q")
        if kind == WRITE:
            seqs.frombytes(frame[offset : offset + 8 * count])
            offset += 8 * count
        lengths = array("I", frame[offset : offset + 8 * count])
        offset += 8 * count
        keys, values = [], []
        for key_length, value_length in zip(lengths[:count], lengths[count:], strict=True):
            middle = offset + key_length
            keys.append(frame[offset:middle])
            offset = middle + value_length
            values.append(frame[middle:offset])
        yield Section(shard, session, acked_below, kinds, seqs, keys, values)


def has_kind(frame: bytes, kind: int) -> bool:
    """Whether a write frame that `check_frame` has passed has an operation of that kind: by its headers alone."""
    sections, offset = FRAME.unpack_from(frame)[3], FRAME.size
    for _ in range(sections):
        _, _, _, count, blob_bytes = SECTION.unpack_from(frame, offset)
        offset += SECTION.size
        if frame.find(kind, offset, offset + count) >= 0:
            return True
        offset += count * 17 + blob_bytes
    return False


def count_operations(frame: bytes) -> int:
    """By the sections' headers alone; 1 for what is no frame, which is refused as what it is."""
    operations, offset = 0, FRAME.size
    try:
        _, _, kind, sections, *_ = FRAME.unpack_from(frame)
        for _ in range(min(sections, MAX_SECTIONS)):
            _, _, _, count, blob_bytes = SECTION.unpack_from(frame, offset)
            operations += count
            offset += SECTION.size + count * (17 if kind == WRITE else 9) + blob_bytes
    except struct.error:
        return 1
    return max(1, min(operations, MAX_OPERATIONS))


def busy_kind(seconds: float) -> int:
    """The kind that stands for "come back in so many seconds": rounded up, by a fifth at most, to 1 ms … 46 s."""
    return FIRST_BUSY + min(FORBIDDEN - 1 - FIRST_BUSY, max(0, ceil(4 * log2(max(seconds, 0.001) * 1000))))


def busy_seconds(kind: int) -> float:
    return float(2 ** ((kind - FIRST_BUSY) / 4) / 1000)


def forbid(frame: bytes, forbids: Callable[[int, bytes, bytes], bool]) -> bytes:
    """A frame that `check_frame` has passed, with the kinds of what `forbids` (kind, key, value) overwritten.

    The frame itself where nothing is forbidden.
    """
    return mark(frame, lambda kind, key, value: FORBIDDEN if forbids(kind, key, value) else kind)


def mark(frame: bytes, kind_of: Callable[[int, bytes, bytes], int]) -> bytes:
    """A frame that `check_frame` has passed, with the kinds that `kind_of` (kind, key, value) gives.

    The frame itself where all stay as they are.
    """
    marked, offset = bytearray(frame), FRAME.size
    for section in unpack_sections(frame):
        kinds = bytes(
            kind_of(kind, key, value)
            for kind, key, value in zip(section.kinds, section.keys, section.values, strict=True)
        )
        _, _, _, count, blob_bytes = SECTION.unpack_from(frame, offset)
        offset += SECTION.size
        marked[offset : offset + count] = kinds
        offset += count * (17 if section.seqs else 9) + blob_bytes
    return frame if marked == frame else bytes(marked)


# ---- operations with two arguments


def pack_cas(expected: bytes | None, new: bytes) -> bytes:
    if expected is None:
        return CAS.pack(0, 0) + new
    return CAS.pack(1, len(expected)) + expected + new


def unpack_cas(value: bytes) -> tuple[bytes | None, bytes]:
    """(expected, new). Raises MalformedFrame."""
    if len(value) < CAS.size:
        raise MalformedFrame("a cas without its arguments")
    present, length = CAS.unpack_from(value)
    if CAS.size + length > len(value):
        raise MalformedFrame("a cas whose expected value is cut short")
    expected = value[CAS.size : CAS.size + length]
    return expected if present else None, value[CAS.size + length :]


def pack_scan(end: bytes, limit: int) -> bytes:
    return SCAN.pack(bool(end), len(end), limit) + end


def unpack_scan(value: bytes) -> tuple[bytes, int]:
    """(end, limit); an empty end is open. Raises MalformedFrame."""
    if len(value) < SCAN.size:
        raise MalformedFrame("a scan without its arguments")
    _, length, limit = SCAN.unpack_from(value)
    return value[SCAN.size : SCAN.size + length], limit


# ---- replies


def pack_reply(clock_ms: int, sections: Sequence[bytes]) -> bytes:
    return REPLY.pack(clock_ms, len(sections)) + b"".join(sections)


def pack_results(statuses: bytes, values: Sequence[bytes] | None) -> bytes:
    """A section's results; `values` None when every one is empty."""
    count = len(statuses)
    if values is None:
        return REPLY_SECTION.pack(SectionStatus.OK, 0, 0, count, 0) + statuses + bytes(4 * count)
    blob = b"".join(values)
    lengths = array("I", map(len, values)).tobytes()
    return REPLY_SECTION.pack(SectionStatus.OK, 0, 0, count, len(blob)) + statuses + lengths + blob


def pack_refusal(status: SectionStatus, gid: int = 0, addresses: Sequence[str] = ()) -> bytes:
    where = ",".join(addresses).encode()
    return REPLY_SECTION.pack(status, gid, len(where), 0, 0) + where


@dataclass(slots=True)
class SectionReply:
    status: SectionStatus
    gid: int
    addresses: tuple[str, ...]
    statuses: bytes
    values: list[bytes]


def unpack_reply(data: bytes) -> tuple[int, list[SectionReply]]:  # hot: runs per operation
    """(replicated clock in ms, replies by section). Raises MalformedFrame."""
    try:
        clock_ms, count = REPLY.unpack_from(data)
        offset, replies = REPLY.size, []
        for _ in range(count):
            status, gid, where_length, ops, _ = REPLY_SECTION.unpack_from(data, offset)
            offset += REPLY_SECTION.size
            where = data[offset : offset + where_length].decode()
            offset += where_length
            statuses = data[offset : offset + ops]
            offset += ops
            lengths = array("I", data[offset : offset + 4 * ops])
            offset += 4 * ops
            values = []
            for length in lengths:
                values.append(data[offset : offset + length])
                offset += length
            addresses = tuple(where.split(",")) if where else ()
            replies.append(SectionReply(SectionStatus(status), gid, addresses, statuses, values))
        if offset != len(data):
            raise MalformedFrame("a reply of another length than it says")
        return clock_ms, replies
    except (struct.error, ValueError) as error:
        raise MalformedFrame(f"not a reply: {error}") from None


# ---- pages of a scan

PAGE = struct.Struct("<BII")  # finished, length of the cursor, pairs


def pack_page(finished: bool, cursor: bytes, pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Pairs in key order, and where the next page begins unless the scan is finished."""
    flat = [part for pair in pairs for part in pair]
    lengths = array("I", map(len, flat)).tobytes()
    return PAGE.pack(finished, len(cursor), len(pairs)) + cursor + lengths + b"".join(flat)


def unpack_page(data: bytes) -> tuple[bool, bytes, list[tuple[bytes, bytes]]]:
    """(finished, cursor, pairs). Raises MalformedFrame."""
    try:
        finished, cursor_length, count = PAGE.unpack_from(data)
        offset = PAGE.size + cursor_length
        cursor = data[PAGE.size : offset]
        lengths = array("I", data[offset : offset + 8 * count])
        offset += 8 * count
        parts = []
        for length in lengths:
            parts.append(data[offset : offset + length])
            offset += length
        return bool(finished), cursor, list(zip(parts[::2], parts[1::2], strict=True))
    except (struct.error, ValueError) as error:
        raise MalformedFrame(f"not a page: {error}") from None
