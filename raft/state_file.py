"""State machines that fit in memory: made durable by writing all of it aside and renaming.

    state file   sealed (`sealed.py`): index u64, term u64, then the state's bytes

The same bytes are the snapshot that a lagging replica gets. `apply` changes only
memory: after a crash the last state file and the log give the state back. Index and
term are inside the checksum like the rest: what a replica claims to have applied
decides what it acknowledges, and for whom it votes.
"""

from __future__ import annotations

import asyncio
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING

from shardkv.raft.errors import DamagedState, StorageError
from shardkv.raft.interfaces import Directory
from shardkv.raft.protocol.types import Index, SnapshotMeta
from shardkv.raft.sealed import OtherVersion, seal, unseal
from shardkv.raft.snapshot import BytesSink, BytesSource, SnapshotSink
from shardkv.raft.unreadable import as_damage

if TYPE_CHECKING:
    from shardkv.raft.machine import StateMachine

STATE_FILE = "state"
STATE_ASIDE = "state.damaged"
META = struct.Struct("<QQ")
MAGIC = b"SKVSTATE"
FORMAT_VERSION = 2  # 1 left index and term out of the checksum


class InMemoryMachine(ABC):
    """The part of `machine.StateMachine` that is the same for all state kept in memory.

    Call `recover` before use.
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
        """Become the state that `dump` gave. Any exception means that `data` is something else.

        It replaces what this machine holds and changes none of it in place: see `check`.
        """

    def check(self, data: bytes) -> None:
        """Prove that `load` takes this, and change nothing. Raises ValueError."""
        copy(self)._load(data)

    @property
    def applied(self) -> SnapshotMeta:
        return self._applied

    def recover(self) -> None:
        """Become what the state file holds, if there is one. Raises DamagedState; StorageError for another version.

        A file of an older version is not converted: its index and term cannot be trusted.
        """
        if STATE_FILE in self._directory.names():
            with as_damage(STATE_FILE):
                packed = self._directory.read(STATE_FILE)
            try:
                meta, data = _unpack(packed)
                self._load(data)
            except OtherVersion as error:
                raise StorageError(
                    f"{STATE_FILE}: {error}: start the old program once more and copy the data with "
                    "`shardkv backup`, or take this replica out with `shardkv admin member replace`"
                ) from None
            except ValueError as error:
                raise DamagedState(STATE_FILE, str(error)) from None
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
        self._load(_unpack(sink.data)[1])
        self._applied = meta

    def close(self) -> None:
        """Nothing to do: what is not in the state file is in the log."""

    async def make_durable(self, packed: bytes) -> None:
        """A received snapshot becomes the state file, unless that is newer already.

        Only one that `install` will take: the file that it replaces may be all that holds our state.
        Raises ValueError.
        """
        meta, data = _unpack(packed)
        self.check(data)
        async with self._writing:
            await self._make_durable(meta, lambda: data)

    def _load(self, data: bytes) -> None:
        """Raises ValueError whatever `load` meets: a snapshot that cannot be read is refused, and is no fault of ours."""
        try:
            self.load(data)
        except Exception as error:
            raise ValueError(f"the state cannot be read: {error!r}") from error

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
    return seal(MAGIC, FORMAT_VERSION, META.pack(meta.index, meta.term), data)


def _unpack(packed: bytes) -> tuple[SnapshotMeta, bytes]:
    """Raises ValueError."""
    contents = unseal(MAGIC, FORMAT_VERSION, packed)
    if len(contents) < META.size:
        raise ValueError("cut short")
    return SnapshotMeta(*META.unpack_from(contents)), contents[META.size :]


class StateFile:
    """A `repair.StateStore`: the state machine that `make` makes, in the state file of `directory`."""

    def __init__(self, directory: Directory, make: Callable[[], StateMachine]) -> None:
        self._directory, self._make = directory, make

    def open(self) -> StateMachine:
        return self._make()

    async def set_aside(self) -> None:
        names = self._directory.names()
        if STATE_FILE not in names:
            return
        if STATE_ASIDE in names:
            await self._directory.remove([STATE_FILE])
        else:
            await self._directory.rename(STATE_FILE, STATE_ASIDE)

    async def drop_aside(self) -> None:
        if STATE_ASIDE in self._directory.names():
            await self._directory.remove([STATE_ASIDE])
