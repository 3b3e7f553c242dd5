"""A simulated disk: what a process wrote, what a sync made durable, and what a power loss leaves.

A `SimDisk` outlives its process. Each start opens a `SimDirectory` on it; the death of the process
ends that one for good, and whatever it still does has no effect.

The death of a process is not a power loss. Two things are kept apart, for contents and for names:

    cached    what reading shows now. It survives the process: the next one reads what the last one
              wrote and never synced, and may take it for durable
    durable   what a sync has put on the medium. A power loss leaves this, and of what was written
              since perhaps a first part, perhaps torn; of names that changed since, any

A sync that fails leaves pages that are clean and not on the medium (fsyncgate): a later sync
succeeds and does not write them. Only writing them again helps.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from shardkv.raft.unreadable import Unreadable

HANG_STEP = 0.05  # how often a sync that hangs looks whether the disk answers again


@dataclass
class DiskFaults:
    sync_seconds: tuple[float, float] = (0.0005, 0.002)
    slow: float = 0.0  # chance that a sync takes 50 times as long
    hang: bool = False  # no sync returns while this holds
    failing: bool = False  # every write fails from now on (EIO), perhaps after a part of it was done
    full: bool = False  # every write fails from now on (ENOSPC)
    fail_at: int = 0  # the how-manyth sync from now fails, once (0: none)
    error: int = errno.EIO  # how it fails
    crash: float = 0.0  # chance that the process dies at a sync: just before it counts, or just after


class Content:
    """The bytes of one file, whatever its name."""

    def __init__(self, data: bytes = b"") -> None:
        self.cached = bytearray(data)
        self.durable = bytearray()
        self.bad_sector = False  # reading it fails from now on; only what is written anew can be read
        self._dirty: list[tuple[int, int]] = [(0, len(data))]  # written since a sync last took pages

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        self.cached[offset:end] = data
        self._dirty.append((offset, end))

    def cut(self, size: int) -> None:
        del self.cached[size:]
        self._dirty = [(start, min(end, size)) for start, end in self._dirty if start < size]
        if len(self.durable) > size:
            self._dirty.append((size, size))  # the new size is to be synced

    def synced(self) -> None:
        """Everything that is dirty is on the medium; what a failed sync dropped is not."""
        size = len(self.cached)
        if self._dirty:
            del self.durable[size:]
            self.durable.extend(bytes(size - len(self.durable)))
            for start, end in self._dirty:
                self.durable[start:end] = self.cached[start:end]
        self._dirty.clear()

    def sync_failed(self) -> None:
        """The pages are called clean and are lost, as Linux has it."""
        self._dirty.clear()

    def lose_power(self, rng: Random) -> None:
        """Of each dirty range a first part may be there, perhaps with a sector of garbage at its end."""
        for start, end in self._dirty:
            kept = rng.randrange(end - start + 1)
            if kept == 0 or start > len(self.durable):
                continue
            there = self.cached[start : start + kept]
            if there != self.durable[start : start + kept] and rng.random() < 0.3:
                there[-1] ^= 0x55
            self.durable[start : start + kept] = there
        self._dirty.clear()
        self.cached = bytearray(self.durable)

    def flip(self, position: int, mask: int) -> None:
        """A bit changes at rest."""
        self.cached[position] ^= mask
        if position < len(self.durable):
            self.durable[position] ^= mask


@dataclass
class SimDisk:
    rng: Random
    faults: DiskFaults = field(default_factory=DiskFaults)
    generation: int = 0
    version: int = 0  # changes with everything that changes what a power loss would leave
    on_crash_point: Callable[[], None] = lambda: None  # kills the process that uses this disk
    on_remove: Callable[[Sequence[str]], None] = lambda names: (
        None
    )  # before files go: does anything rest on them?
    _names: dict[str, Content] = field(default_factory=dict)
    _durable_names: dict[str, Content] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        """What a process that starts now would read."""
        return {name: bytes(content.cached) for name, content in self._names.items()}

    @property
    def kept(self) -> dict[str, bytes]:
        """What is there after a power loss at this moment, whatever the luck."""
        return {name: bytes(content.durable) for name, content in self._durable_names.items()}

    @property
    def size(self) -> int:
        return sum(len(content.cached) for content in self._names.values())

    def open(self) -> SimDirectory:
        """To open a directory makes durable which files are in it; see `raft.interfaces.Directory`."""
        self.generation += 1
        self.sync_names()
        return SimDirectory(self, self.generation)

    def sync_names(self) -> None:
        self._durable_names = dict(self._names)
        self.version += 1

    def crash(self, power: bool = True) -> None:
        """The process is gone; with the `power`, also what was not synced, but for a part of it."""
        self.generation += 1
        if not power:
            return
        names = dict(self._durable_names)
        for name in sorted(set(self._names) | set(names)):
            now = self._names.get(name)
            if now is not names.get(name) and self.rng.random() < 0.5:  # the change had reached the medium
                if now is None:
                    del names[name]
                else:
                    names[name] = now
        for name in sorted(names):
            names[name].lose_power(self.rng)
        self._names, self._durable_names = names, dict(names)
        self.version += 1

    def wipe(self) -> None:
        self._names, self._durable_names = {}, {}
        self.version += 1

    def spoil(self, name: str) -> None:
        """A sector of a file goes bad at rest."""
        self._names[name].bad_sector = True
        self.version += 1

    def put(self, name: str, data: bytes) -> None:
        """Have this in a file, durably: for tests that damage one."""
        content = Content(data)
        content.synced()
        self._names[name] = self._durable_names[name] = content
        self.version += 1

    def flip(self, name: str, position: int, mask: int = 1) -> None:
        """A bit of a file changes at rest."""
        self._names[name].flip(position, mask)
        if (durable := self._durable_names.get(name, self._names[name])) is not self._names[name]:
            durable.flip(min(position, len(durable.cached) - 1), mask)
        self.version += 1


class SimDirectory:
    def __init__(self, disk: SimDisk, generation: int) -> None:
        self._disk, self._generation = disk, generation

    async def _sync(self, done: Callable[[], None], failed: Callable[[], None] = lambda: None) -> None:
        """Wait as a sync does, then have it `done`: unless the process died before, or dies at it."""
        faults, rng = self._disk.faults, self._disk.rng
        delay = rng.uniform(*faults.sync_seconds)
        if rng.random() < faults.slow:
            delay *= 50
        await asyncio.sleep(delay)
        while faults.hang and self._disk.generation == self._generation:
            await asyncio.sleep(HANG_STEP)
        await self._if_alive()
        if faults.failing or faults.full:
            failed()
            raise OSError(errno.EIO if faults.failing else errno.ENOSPC, "simulated disk fault")
        if faults.fail_at:
            faults.fail_at -= 1
            if not faults.fail_at:
                failed()
                raise OSError(faults.error, "simulated disk fault")
        dies = rng.random() < faults.crash
        if dies and rng.random() < 0.5:
            self._disk.on_crash_point()
            await self._if_alive()
        done()
        self._disk.version += 1
        if dies:
            self._disk.on_crash_point()
            await self._if_alive()

    async def _if_alive(self) -> None:
        if self._disk.generation != self._generation:
            await asyncio.get_running_loop().create_future()  # the process is dead: nothing returns to it

    def names(self) -> list[str]:
        return sorted(self._disk._names)

    def read(self, name: str) -> bytes:
        content = self._disk._names[name]
        if content.bad_sector:
            raise Unreadable(OSError(errno.EIO, "simulated bad sector"), name, 0)
        return bytes(content.cached)

    async def create(self, name: str, data: bytes) -> SimFile:
        await self.replace(name, data)
        return SimFile(self, self._disk._names[name])

    async def replace(self, name: str, data: bytes) -> None:
        """Write aside, sync, rename, sync the directory; a crash may come between any two of these."""
        await self._if_alive()
        content = Content(data)

        def written() -> None:
            content.synced()
            self._disk._names[name] = content

        await self._sync(written, content.sync_failed)
        await self._sync_names()

    async def _sync_names(self) -> None:
        await self._sync(self._disk.sync_names)

    async def rename(self, name: str, other: str) -> None:
        """A journal of the file system keeps the two names together: a crash leaves the one or the other."""
        await self._if_alive()

        def renamed() -> None:
            self._disk._names[other] = self._disk._names.pop(name)
            self._disk.sync_names()

        await self._sync(renamed)

    async def rewrite_tail(self, name: str, offset: int, data: bytes) -> None:
        await self._if_alive()
        content = self._disk._names[name]
        content.cut(offset)
        content.write(offset, data)
        await self._sync(content.synced, content.sync_failed)

    async def remove(self, names: Sequence[str]) -> None:
        for name in names:  # one after the other: a crash may leave the rest
            await self._if_alive()
            self._disk.on_remove([name])
            self._disk._names.pop(name, None)
            await self._sync_names()

    def close(self) -> None: ...


class SimFile:
    def __init__(self, directory: SimDirectory, content: Content) -> None:
        self._directory, self._content = directory, content

    async def append(self, data: bytes) -> None:
        await self._directory._if_alive()
        self._content.write(len(self._content.cached), data)
        await self._directory._sync(self._content.synced, self._content.sync_failed)

    def close(self) -> None: ...
