"""Where the state machine of a process is on its disk: opened, set aside when it is damaged, removed when repaired.

controller, --ephemeral   `state`; aside: `state.damaged`
group                     `rocks/`; aside: `rocks.damaged/`
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from shardkv.process.options import CONTROLLER_GROUP
from shardkv.raft.disk import RealDirectory
from shardkv.raft.errors import DamagedState
from shardkv.raft.machine import StateMachine
from shardkv.raft.repair import StateStore
from shardkv.raft.state_file import StateFile
from shardkv.shardctrler.machine import ControllerMachine
from shardkv.state.machine import ShardMachine
from shardkv.storage.memory import MemoryEngine
from shardkv.storage.rocks import RocksEngine
from shardkv.storage.tables import RocksOptions, sync_directory

ROCKS = "rocks"
ROCKS_ASIDE = "rocks.damaged"


def store_of(directory: RealDirectory, gid: int, ephemeral: bool, tables: int = 256) -> StateStore:
    """The store of the state machine that a data directory is for; it keeps at most `tables` files open."""

    def controller() -> ControllerMachine:
        machine = ControllerMachine(directory)
        machine.recover()
        return machine

    if gid == CONTROLLER_GROUP:
        return StateFile(directory, controller)
    if ephemeral:
        return StateFile(directory, lambda: ShardMachine(gid, MemoryEngine(directory)))
    return RocksStore(directory, gid, tables)


def named_below(data: Path, error: DamagedState) -> DamagedState:
    """The same, with the file's name from the data directory on: status shows the replica beside it."""
    file = Path(error.file)
    return DamagedState(str(file.relative_to(data)), error.why) if file.is_relative_to(data) else error


class RocksStore:
    """See `raft.repair.StateStore`."""

    def __init__(self, directory: RealDirectory, gid: int, tables: int = 256) -> None:
        self._path, self._gid = directory.path, gid
        self._options = RocksOptions(open_files=tables)

    def open(self) -> StateMachine:
        try:
            return ShardMachine(self._gid, RocksEngine(self._path / ROCKS, self._options))
        except DamagedState as error:
            raise named_below(self._path, error) from None

    async def set_aside(self) -> None:
        await asyncio.to_thread(self._set_aside)

    def _set_aside(self) -> None:
        if (self._path / ROCKS_ASIDE).exists():
            shutil.rmtree(self._path / ROCKS, ignore_errors=True)
        elif (self._path / ROCKS).exists():
            (self._path / ROCKS).rename(self._path / ROCKS_ASIDE)
        sync_directory(self._path)

    async def drop_aside(self) -> None:
        if (self._path / ROCKS_ASIDE).exists():
            await asyncio.to_thread(shutil.rmtree, self._path / ROCKS_ASIDE)
