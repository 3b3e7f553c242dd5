"""A disk of numbers: it keeps what was synced, and after a crash perhaps some of what was not.

A `SimDisk` outlives its process. Each start opens a `SimDirectory` on it; a crash
ends that one for good, and whatever it still does has no effect.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random


@dataclass
class DiskFaults:
    sync_seconds: tuple[float, float] = (0.0005, 0.002)
    slow: float = 0.0  # chance that a sync takes 50 times as long
    hang: bool = False  # no sync returns until this ends
    failing: bool = False  # every write fails from now on (EIO), perhaps after a part of it was done
    full: bool = False  # every write fails from now on (ENOSPC)
    fail_at: int = 0  # the how-manyth sync from now fails, once (0: none)
    error: int = errno.EIO  # how it fails
    crash: float = 0.0  # chance that the process dies at a sync: just before it counts, or just after


@dataclass
class SimDisk:
    rng: Random
    faults: DiskFaults = field(default_factory=DiskFaults)
    files: dict[str, bytes] = field(default_factory=dict)  # what a sync has made durable
    unsynced: dict[str, bytes] = field(default_factory=dict)  # appended, not yet synced
    replacing: dict[str, bytes] = field(default_factory=dict)  # written aside, perhaps renamed already
    generation: int = 0
    on_crash_point: Callable[[], None] = lambda: None  # kills the process that uses this disk

    def open(self) -> SimDirectory:
        self.generation += 1
        return SimDirectory(self, self.generation)

    def crash(self) -> None:
        """Lose what was not synced, but perhaps a torn part of it."""
        self.generation += 1
        for name, data in self.unsynced.items():
            kept = data[: self.rng.randrange(len(data) + 1)]
            if kept and self.rng.random() < 0.3:  # a sector of garbage at the end
                kept = kept[:-1] + bytes([kept[-1] ^ 0x55])
            if name in self.files:
                self.files[name] += kept
        for name, data in self.replacing.items():
            if self.rng.random() < 0.5:  # the rename had reached the disk, or not: never a half
                self.files[name] = data
        self.unsynced.clear()
        self.replacing.clear()

    def wipe(self) -> None:
        self.files.clear()
        self.unsynced.clear()
        self.replacing.clear()

    @property
    def size(self) -> int:
        return sum(len(data) for data in self.files.values())


class SimDirectory:
    def __init__(self, disk: SimDisk, generation: int) -> None:
        self._disk, self._generation = disk, generation

    async def _sync(self, done: Callable[[], None]) -> None:
        """Wait as a sync does, then have it `done`: unless the process died before, or dies at it."""
        faults, rng = self._disk.faults, self._disk.rng
        delay = rng.uniform(*faults.sync_seconds)
        if rng.random() < faults.slow:
            delay *= 50
        await asyncio.sleep(delay)
        while faults.hang:
            await asyncio.sleep(0.01)
        await self._if_alive()
        if faults.failing or faults.full:
            raise OSError(errno.EIO if faults.failing else errno.ENOSPC, "simulated disk fault")
        if faults.fail_at:
            faults.fail_at -= 1
            if not faults.fail_at:
                raise OSError(faults.error, "simulated disk fault")
        dies = rng.random() < faults.crash
        if dies and rng.random() < 0.5:
            self._disk.on_crash_point()
            await self._if_alive()
        done()
        if dies:
            self._disk.on_crash_point()
            await self._if_alive()

    async def _if_alive(self) -> None:
        if self._disk.generation != self._generation:
            await asyncio.get_running_loop().create_future()  # the process is dead: nothing returns to it

    def names(self) -> list[str]:
        return sorted(self._disk.files)

    def read(self, name: str) -> bytes:
        return self._disk.files[name]

    async def create(self, name: str, data: bytes) -> SimFile:
        await self.replace(name, data)
        return SimFile(self, self._disk, name)

    async def replace(self, name: str, data: bytes) -> None:
        disk = self._disk

        def renamed() -> None:
            disk.replacing.pop(name, None)
            disk.files[name] = data

        await self._if_alive()
        disk.replacing[name] = data
        await self._sync(renamed)

    async def rewrite_tail(self, name: str, offset: int, data: bytes) -> None:
        def rewritten() -> None:
            self._disk.files[name] = self._disk.files[name][:offset] + data

        await self._sync(rewritten)

    async def remove(self, names: Sequence[str]) -> None:
        for name in names:  # one after the other: a crash may leave the rest
            await self._sync(lambda name=name: self._disk.files.pop(name) and None)  # type: ignore[misc]

    def close(self) -> None: ...


class SimFile:
    def __init__(self, directory: SimDirectory, disk: SimDisk, name: str) -> None:
        self._directory, self._disk, self._name = directory, disk, name

    async def append(self, data: bytes) -> None:
        await self._directory._if_alive()
        disk, name = self._disk, self._name
        disk.unsynced[name] = disk.unsynced.get(name, b"") + data

        def synced() -> None:
            disk.files[name] += disk.unsynced.pop(name)

        await self._directory._sync(synced)

    def close(self) -> None: ...
