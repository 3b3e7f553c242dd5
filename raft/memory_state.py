"""State machines that fit in memory: made durable by writing all of it aside and renaming.

    state file   magic, format version, index, term, length, CRC32C; then the state's bytes

The same bytes are the snapshot that a lagging replica gets. `apply` changes only
memory: after a crash the last state file and the log give the state back.
"""

from __future__ import annotations

import asyncio
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable

import google_crc32c

from raft.doors import Directory
from raft.errors import StorageError
from raft.snapshot import BytesSink, BytesSource, SnapshotSink
from raft.types import Index, SnapshotMeta

STATE_FILE = "state"
HEADER = struct.Struct("<8sIQQQI")
MAGIC = b"SKVSTATE"
FORMAT_VERSION = 1


class InMemoryMachine(ABC):
    """The part of `rsm.StateMachine` that is the same for all state kept in memory.

    Call `recover` before use. Raises StorageError when the state file is damaged.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._applied = SnapshotMeta(0, 0)
        self._durable: Index = 0
        self._writing = asyncio.Lock()

    @abstractmethod
    def dump(self) -> bytes:
        """The whole state, the same bytes on every replica."""

    @abstractmethod
    def load(self, data: bytes) -> None:
        """Become the state that `dump` gave. Raises ValueError for anything else."""

    @property
    def applied(self) -> SnapshotMeta:
        return self._applied

    def recover(self) -> None:
        """Become what the state file holds, if there is one."""
        if STATE_FILE in self._directory.names():
            packed = self._directory.read(STATE_FILE)
            try:
                meta, data = _unpack(packed)
                self.load(data)
            except ValueError as error:
                raise StorageError(f"state file: {error}") from None
            self._applied, self._durable = meta, meta.index

    async def flush(self) -> Index:
        async with self._writing:
            await self._make_durable(self._applied, self.dump)
            # The file may be ahead: a received snapshot is in it before it is installed, if it ever is.
            return min(self._durable, self._applied.index)

    async def open_snapshot(self) -> BytesSource:
        meta = self._applied
        return BytesSource(meta, _pack(meta, self.dump()))

    def open_sink(self, meta: SnapshotMeta) -> BytesSink:
        return _StateSink(self)

    def install(self, meta: SnapshotMeta, sink: SnapshotSink) -> None:
        assert isinstance(sink, BytesSink)
        self.load(_unpack(sink.data)[1])
        self._applied = meta

    def close(self) -> None:
        """Nothing to do: what is not in the state file is in the log."""

    async def make_durable(self, packed: bytes) -> None:
        """A received snapshot becomes the state file, unless that is newer already."""
        meta, data = _unpack(packed)
        async with self._writing:
            await self._make_durable(meta, lambda: data)

    async def _make_durable(self, meta: SnapshotMeta, dump: Callable[[], bytes]) -> None:
        if meta.index > self._durable:
            await self._directory.replace(STATE_FILE, _pack(meta, dump()))
            self._durable = meta.index


class _StateSink(BytesSink):
    def __init__(self, machine: InMemoryMachine) -> None:
        super().__init__(_unpack)
        self._machine = machine

    async def finish(self) -> None:
        await super().finish()
        await self._machine.make_durable(self.data)


def _pack(meta: SnapshotMeta, data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return HEADER.pack(MAGIC, FORMAT_VERSION, meta.index, meta.term, len(data), crc) + data


def _unpack(packed: bytes) -> tuple[SnapshotMeta, bytes]:
    if len(packed) < HEADER.size:
        raise ValueError("cut short")
    magic, version, index, term, length, crc = HEADER.unpack_from(packed)
    data = packed[HEADER.size :]
    if magic != MAGIC or version != FORMAT_VERSION:
        raise ValueError(f"not a state of format {FORMAT_VERSION}")
    if len(data) != length or google_crc32c.value(data) != crc:
        raise ValueError("does not match its checksum")
    return SnapshotMeta(index, term), data
