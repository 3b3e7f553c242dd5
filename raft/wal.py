"""The write-ahead log: what a replica promised, on disk, in append-only segments.

    segment  "wal-%016x.log": header, then batches
    header   magic, format version, salt (random, part of every checksum below), CRC32C of these
    batch    marker, sequence number, length, CRC32C; then records. One `append` is
             one batch is one write and one sync: a batch is whole or it never was
    record   kind, then: term and vote / an entry with its own checksum / the base below which
             all is compacted

A new segment begins with a batch that repeats the hard state and the base, so the
segments before it may go once their entries are compacted away.

A segment may end in zeros, for files are made longer than what they hold. Recovery
reads all segments in order. What does not check at the very end, with no
valid batch after it, is a torn write: nothing rested on it, so it is cut off and
reported. The same anywhere else is damage: `CorruptLog`, and the replica does not
start. The salt keeps bytes that users store from ever passing for a batch.

What `open_wal` reads is not yet durable: a process that was killed may have written a batch and
not synced it, and the kernel still shows that batch. A vote or an acknowledgement that rests on
it would be broken by a loss of power. So the last batch is made durable before `open_wal`
returns. A sync alone is not enough: after a sync that *failed* the kernel may take a page for
clean that is not on the disk (fsyncgate), and the next sync succeeds without writing it. So the
last batch is written again, over itself, and then synced: the same bytes, so a crash meanwhile
harms nothing, and no room on the disk is needed. The last batch is enough: each append is durable
before the next begins, none follows one that failed, and each new segment is synced whole before
it has its name. `Directory` sees to the names.

Segments go oldest first, each for good before the next: a crash leaves no gap among them. A gap
is therefore damage and refused by name, for nobody can tell what the missing segment replaced.

Limit, admitted: damage to the very last batch looks like a torn write.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import google_crc32c

from shardkv.raft.errors import CorruptEntry, CorruptLog
from shardkv.raft.interfaces import Directory, File
from shardkv.raft.protocol.types import Entry, HardState, Index, Kind, Term
from shardkv.raft.unreadable import Unreadable

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
SEGMENT_MAGIC = b"SKVWAL\0\0"
SEGMENT_HEADER = struct.Struct("<8sI8sI")  # magic, version, salt, checksum
BATCH_MARKER = b"\xa7BAT"
BATCH_HEADER = struct.Struct("<4sQII")  # marker, sequence number, length, checksum
HARD_STATE = struct.Struct("<BQI")
ENTRY = struct.Struct("<BQQBII")  # kind of record, index, term, kind of entry, the entry's checksum, length
BASE = struct.Struct("<BQQ")
RECORD_HARD_STATE, RECORD_ENTRY, RECORD_BASE = 1, 2, 3


@dataclass(slots=True)
class Recovered:
    """What the segments hold together."""

    hard_state: HardState = field(default_factory=HardState)
    base_index: Index = 0
    base_term: Term = 0
    entries: list[Entry] = field(default_factory=list)
    cut_bytes: int = 0  # length of a torn write at the end, now gone
    gap: bool = False  # entries before the first are missing, and no base has explained it yet

    @property
    def last_index(self) -> Index:
        return self.base_index + len(self.entries)

    def replay_entry(self, entry: Entry) -> None:
        """An entry takes the place of what was at its index and after (§5.3)."""
        if entry.index <= self.base_index:
            return  # a segment older than the base that was not removed in time
        if entry.index > self.last_index + 1:
            # What is missing was compacted, and its segment removed, if a later record
            # says so; until then the log is taken to begin here.
            self.gap = True
            self.base_index, self.base_term, self.entries = entry.index - 1, 0, []
        del self.entries[entry.index - self.base_index - 1 :]
        self.entries.append(entry)

    def replay_base(self, index: Index, term: Term) -> None:
        """Everything up to `index` is in the state machine; a log that differs there is void."""
        if index < self.base_index:
            if self.gap:
                return  # older than the gap: a later base must explain it
            raise ValueError(f"the base goes back from {self.base_index} to {index}")
        kept: list[Entry] = []
        if index == self.base_index:
            kept = self.entries if self.gap or term == self.base_term else []
        elif index <= self.last_index and self.entries[index - self.base_index - 1].term == term:
            kept = self.entries[index - self.base_index :]
        self.base_index, self.base_term, self.entries, self.gap = index, term, kept, False


@dataclass(slots=True)
class _Segment:
    name: str
    last_index: Index  # the highest entry in it: once that is compacted, the segment may go


class Wal:
    """One replica's log on disk. Get one from `open_wal`. One `append` or `compact` at a time."""

    def __init__(self, directory: Directory, rng: Random, segment_bytes: int, recovered: Recovered) -> None:
        self._directory = directory
        self._rng = rng
        self._segment_bytes = segment_bytes
        self._file: File | None = None
        self._salt = b""
        self._size = 0
        self._sequence = 0
        self._segments: list[_Segment] = []
        self._removing: asyncio.Task[None] | None = None
        self._hard_state = recovered.hard_state
        self._base = (recovered.base_index, recovered.base_term)

    @property
    def segment_names(self) -> list[str]:
        return [segment.name for segment in self._segments]

    async def append(self, hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        """One batch, durable on return. Raises OSError or CorruptEntry, after which the replica must stop."""
        records = []
        if hard_state is not None:
            self._hard_state = hard_state
            records.append(_pack_hard_state(hard_state))
        for entry in entries:
            if not entry.is_whole():
                raise CorruptEntry(entry.index)
            header = ENTRY.pack(RECORD_ENTRY, entry.index, entry.term, entry.kind, entry.crc, len(entry.data))
            records += (header, entry.data)
        if not records:
            return
        body = b"".join(records)
        if self._file is None or self._size + len(body) > self._segment_bytes:
            await self._roll()
        assert self._file is not None
        batch = self._pack_batch(body)
        await self._file.append(batch)
        self._size += len(batch)
        self._sequence += 1
        if entries:
            segment = self._segments[-1]
            segment.last_index = max(segment.last_index, entries[-1].index)

    async def hard_state_beside(self, applied_term: Term) -> HardState:
        """The hard state of a replica whose state machine has an entry of `applied_term`; durable on return.

        A snapshot may be installed before its leader's term is on this disk (raft soak, seed 176). Had this
        replica voted in that term, the log would know the term: a vote leaves only after it.
        """
        if applied_term > self._hard_state.term:
            await self.append(HardState(applied_term), ())
        return self._hard_state

    async def set_base(self, index: Index, term: Term) -> None:
        """The state machine is durable up to `index`: note it, and remove what only the past needs."""
        self._base = (index, term)
        base = BASE.pack(RECORD_BASE, index, term)
        if self._file is None or self._size >= self._segment_bytes // 2:
            await self._roll()  # so that the segment just left can go as soon as it is compacted
        else:
            batch = self._pack_batch(base)
            await self._file.append(batch)
            self._size += len(batch)
            self._sequence += 1
        # Only from the front: a later segment may hold entries that replace an earlier one's.
        dead = 0
        while dead < len(self._segments) - 1 and self._segments[dead].last_index <= index:
            dead += 1
        if dead and (self._removing is None or self._removing.done()):
            await self.removed()
            names = [segment.name for segment in self._segments[:dead]]
            del self._segments[:dead]
            # Beside the appends, which must not wait for it; what a crash leaves is removed later.
            self._removing = asyncio.get_running_loop().create_task(self._directory.remove(names))

    async def removed(self) -> None:
        """The removal before is over. Raises OSError if the disk failed it."""
        if self._removing is not None:
            await self._removing
            self._removing = None

    def close(self) -> None:
        if self._removing is not None:
            self._removing.cancel()
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    async def _roll(self) -> None:
        """Begin a new segment, which says all that the earlier ones say but their entries."""
        self._close_file()
        number = _number(self._segments[-1].name) + 1 if self._segments else 1
        name = f"wal-{number:016x}.log"
        self._salt = self._rng.randbytes(8)
        header = SEGMENT_HEADER.pack(
            SEGMENT_MAGIC, FORMAT_VERSION, self._salt, _header_checksum(FORMAT_VERSION, self._salt)
        )
        state = _pack_hard_state(self._hard_state) + BASE.pack(RECORD_BASE, *self._base)
        first = header + self._pack_batch(state)
        self._file = await self._directory.create(name, first)
        self._size = len(first)
        self._sequence += 1
        self._segments.append(_Segment(name, 0))

    def _pack_batch(self, records: bytes) -> bytes:
        checksum = _checksum(self._salt, self._sequence, records)
        return BATCH_HEADER.pack(BATCH_MARKER, self._sequence, len(records), checksum) + records


def _pack_hard_state(state: HardState) -> bytes:
    return HARD_STATE.pack(RECORD_HARD_STATE, state.term, state.voted_for)


def _checksum(salt: bytes, sequence: int, records: bytes) -> int:
    crc = google_crc32c.value(salt + sequence.to_bytes(8, "little"))
    return int(google_crc32c.extend(crc, records))


def _header_checksum(version: int, salt: bytes) -> int:
    return int(google_crc32c.value(SEGMENT_MAGIC + version.to_bytes(4, "little") + salt))


def _number(name: str) -> int:
    return int(name[4:20], 16)


async def open_wal(directory: Directory, rng: Random, segment_bytes: int = 64 << 20) -> tuple[Wal, Recovered]:
    """Recover what is on disk, make it durable, and open the log for appending.

    Raises CorruptLog, and OSError when the disk fails.
    """
    recovered = Recovered()
    names = [name for name in directory.names() if name.startswith("wal-")]
    segments: list[_Segment] = []
    sequence: int | None = None
    for name in names:
        if segments and _number(name) != _number(segments[-1].name) + 1:
            raise CorruptLog(name, 0, f"the segment between {segments[-1].name} and this one is missing")
        reader = _SegmentReader(name, _read(directory, name), is_last=name == names[-1])
        segment = _Segment(name, 0)
        batches = reader.batches()
        for offset, number, records in batches:
            if sequence is not None and number != sequence + 1:
                raise CorruptLog(name, offset, f"batch {number} follows batch {sequence}")
            sequence = number
            try:
                segment.last_index = max(segment.last_index, _replay(records, recovered))
            except (ValueError, struct.error) as error:
                raise CorruptLog(name, offset, str(error)) from None
        if reader.torn_at is not None:
            recovered.cut_bytes = len(reader.data.rstrip(b"\0")) - reader.torn_at
            log.warning(
                "%s: cut %d bytes of an unfinished write (damage to the last batch looks the same)",
                name,
                recovered.cut_bytes,
            )
        if reader.is_last:
            offset, _, records = batches[-1]
            end = offset + BATCH_HEADER.size + len(records)
            await directory.rewrite_tail(name, offset, reader.data[offset:end])
        segments.append(segment)
    if recovered.gap:
        raise CorruptLog(names[-1], 0, f"entries before {recovered.base_index + 1} are missing")
    wal = Wal(directory, rng, segment_bytes, recovered)
    wal._segments = segments
    wal._sequence = 0 if sequence is None else sequence + 1
    return wal, recovered


def _read(directory: Directory, name: str) -> bytes:
    """Raises CorruptLog where the disk has lost a part: also in what would be cut, for nobody can tell."""
    try:
        return directory.read(name)
    except Unreadable as error:
        raise CorruptLog(
            name, error.offset, f"{error}. If the disk was only away, start again once it is back"
        ) from None


class _SegmentReader:
    """Splits one segment into batches, and tells a torn tail from damage."""

    def __init__(self, name: str, data: bytes, is_last: bool) -> None:
        self.name, self.data, self.is_last = name, data, is_last
        self.torn_at: int | None = None
        self._salt = b""

    def batches(self) -> list[tuple[int, int, bytes]]:
        """(offset, sequence number, records) of each batch; sets `torn_at`. Raises CorruptLog."""
        if len(self.data) < SEGMENT_HEADER.size:
            raise CorruptLog(self.name, 0, "the header is cut short")
        magic, version, self._salt, checksum = SEGMENT_HEADER.unpack_from(self.data)
        if magic != SEGMENT_MAGIC:
            raise CorruptLog(self.name, 0, "not a log segment")
        if version != FORMAT_VERSION:
            raise CorruptLog(self.name, 8, f"format version {version}, this program reads {FORMAT_VERSION}")
        if checksum != _header_checksum(version, self._salt):
            raise CorruptLog(self.name, 0, "the header does not match its checksum")
        found: list[tuple[int, int, bytes]] = []
        offset = SEGMENT_HEADER.size
        end = len(self.data.rstrip(b"\0"))  # zeros at the end are room that was never used
        while offset < end:
            batch = self._batch_at(offset)
            if batch is None:
                last = found[-1][1] if found else 0
                self._torn_or_damaged(offset, last, "a batch does not match its checksum")
                break
            found.append((offset, *batch))
            offset += BATCH_HEADER.size + len(batch[1])
        if not found:
            # A segment appears with its first batch or not at all: this is no torn write.
            raise CorruptLog(self.name, SEGMENT_HEADER.size, "the first batch does not match its checksum")
        return found

    def _batch_at(self, offset: int) -> tuple[int, bytes] | None:
        if offset + BATCH_HEADER.size > len(self.data):
            return None
        marker, sequence, length, checksum = BATCH_HEADER.unpack_from(self.data, offset)
        start = offset + BATCH_HEADER.size
        if marker != BATCH_MARKER or start + length > len(self.data):
            return None
        records = self.data[start : start + length]
        return (sequence, records) if _checksum(self._salt, sequence, records) == checksum else None

    def _torn_or_damaged(self, offset: int, last: int, why: str) -> None:
        """A torn write, if nothing that was written after batch `last` follows. Raises CorruptLog."""
        if not self.is_last:
            raise CorruptLog(self.name, offset, why)
        later = self.data.find(BATCH_MARKER, offset + 1)
        while later >= 0:
            batch = self._batch_at(later)
            if batch is not None and batch[0] > last:  # else: a copy of an old one, in a user's value
                raise CorruptLog(self.name, offset, f"{why}, and a valid batch follows at byte {later}")
            later = self.data.find(BATCH_MARKER, later + 1)
        self.torn_at = offset


def _replay(records: bytes, into: Recovered) -> Index:
    """Apply one batch's records. Returns its highest entry index, 0 if it has none."""
    offset, highest = 0, 0
    while offset < len(records):
        match records[offset]:
            case 1:
                _, term, voted_for = HARD_STATE.unpack_from(records, offset)
                into.hard_state = HardState(term, voted_for)
                offset += HARD_STATE.size
            case 2:
                _, index, term, kind, crc, length = ENTRY.unpack_from(records, offset)
                offset += ENTRY.size
                if offset + length > len(records):
                    raise ValueError("an entry longer than its batch")
                entry = Entry(index, term, Kind(kind), records[offset : offset + length], crc)
                if not entry.is_whole():
                    raise ValueError(f"entry {index} does not match its checksum")
                into.replay_entry(entry)
                offset += length
                highest = max(highest, index)
            case 3:
                _, index, term = BASE.unpack_from(records, offset)
                into.replay_base(index, term)
                offset += BASE.size
            case kind:
                raise ValueError(f"a record of unknown kind {kind}")
    return highest
