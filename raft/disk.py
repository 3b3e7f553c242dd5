"""Real files, as `interfaces.Directory` asks for them: every change is on disk when the call returns.

Appends run on one thread of their own for each directory, off the event loop, so they
keep their order; replacing and removing files runs on another, for an append must
not wait until a large file is gone. For a small append the event loop stands still a
moment, since most syncs take less time than being woken by the thread does; one that
takes longer is awaited, so that no disk holds up the loop. A failed call is never
retried: its OSError goes up and stops the replica (DESIGN §3).
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from shardkv.raft.errors import DirectoryInUse
from shardkv.raft.private import FILE, make_directory
from shardkv.raft.unreadable import Unreadable, first_unreadable, is_unreadable

log = logging.getLogger(__name__)

T = TypeVar("T")
SLOW_SECONDS = 1.0  # for one append, to be worth a word in the log
TEMPORARY = ".tmp"
ZEROS_AHEAD = 1 << 20
SMALL_APPEND = 64 << 10
STILL_BYTES = 64 << 10  # for an append of at most so much, on a disk that has been fast of late,
STILL_SECONDS = 0.0004  # the event loop stands still for at most so long


class RealFile:
    """An append-only file; see `interfaces.File`.

    It is kept longer than what was written, with zeros: a sync that need not record
    a new size does not wait for the file system's journal, and so not for what other
    files have in it. Readers take zeros after the last append for its end.
    """

    def __init__(
        self, descriptor: int, size: int, run: ThreadPoolExecutor, appended: Callable[[float], None]
    ) -> None:
        self._descriptor, self._run, self._appended = descriptor, run, appended
        self._size = self._allocated = size
        self._usual_seconds = STILL_SECONDS  # for one append, of late; a new file has to show that it is fast

    async def append(self, data: bytes) -> None:
        appended = self._run.submit(self._append, data)
        if len(data) <= STILL_BYTES and self._usual_seconds < STILL_SECONDS:
            try:
                return appended.result(STILL_SECONDS)
            except TimeoutError:
                pass  # ours; or the disk's, which is raised again below
        await asyncio.wrap_future(appended)

    def _append(self, data: bytes) -> None:
        began = time.perf_counter()
        end = self._size + len(data)
        if end > self._allocated:
            # A large append is its own reason to wait; doubling it would not pay.
            zeros = ZEROS_AHEAD if len(data) <= SMALL_APPEND else 0
            self._allocated = end + zeros
            data += bytes(zeros)
        _write_all(self._descriptor, data, self._size)
        os.fdatasync(self._descriptor)
        self._size = end
        took = time.perf_counter() - began
        self._usual_seconds += (took - self._usual_seconds) / 8
        self._appended(took)

    def close(self) -> None:
        """Closed once the append that is under way is over, by the thread that makes it.

        Closed under a write, the descriptor's number may be given to another file, and the write with it.
        """
        try:
            self._run.submit(os.close, self._descriptor)
        except RuntimeError:  # the directory was closed first, and its thread is over
            os.close(self._descriptor)


class RealDirectory:
    """A directory on the real disk; see `interfaces.Directory`. Holds a lock against a second process.

    Raises DirectoryInUse when another process has it.
    """

    def __init__(self, path: Path) -> None:
        make_directory(path)
        _sync_path(path)
        self.path = path
        self.on_append: Callable[[float], None] = lambda seconds: None  # called on the disk's thread
        self._run = ThreadPoolExecutor(1, thread_name_prefix=f"disk-{path.name}")
        self._housekeeping = ThreadPoolExecutor(1, thread_name_prefix=f"files-{path.name}")
        self._lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise DirectoryInUse(f"{path} is in use by another process") from None
        for leftover in path.glob(f"*{TEMPORARY}"):
            leftover.unlink()  # a replace that a crash cut short: it never happened
        _sync_directory(path)  # before any of these names is rested on; see `interfaces.Directory`

    def _note_append(self, seconds: float) -> None:
        if seconds > SLOW_SECONDS:
            log.warning("slow disk: an append to the log in %s took %.1f s", self.path, seconds)
        self.on_append(seconds)

    def free_bytes(self) -> int:
        """What this process may still write on the directory's file system. May block."""
        return free_bytes(self.path)

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.path.iterdir() if entry.is_file() and entry.name[0] != ".")

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            if not is_unreadable(error):
                raise
            raise Unreadable(error, name, first_unreadable(self.path / name)) from None

    async def create(self, name: str, data: bytes) -> RealFile:
        def create() -> RealFile:
            return RealFile(self._put(name, data), len(data), self._run, self._note_append)

        return await self._on_thread(create)

    async def replace(self, name: str, data: bytes) -> None:
        def replace() -> None:
            os.close(self._put(name, data))

        await self._on_thread(replace, self._housekeeping)

    def _put(self, name: str, data: bytes) -> int:
        """Write aside, sync, rename, sync the directory: a crash leaves all or nothing."""
        temporary = self.path / (name + TEMPORARY)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, FILE)
        try:
            _write_all(descriptor, data, 0)
            os.fsync(descriptor)
            temporary.rename(self.path / name)
            _sync_directory(self.path)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    async def rename(self, name: str, other: str) -> None:
        def rename() -> None:
            (self.path / name).rename(self.path / other)
            _sync_directory(self.path)

        await self._on_thread(rename, self._housekeeping)

    async def rewrite_tail(self, name: str, offset: int, data: bytes) -> None:
        def rewrite() -> None:
            descriptor = os.open(self.path / name, os.O_WRONLY | os.O_CLOEXEC)
            try:
                _write_all(descriptor, data, offset)
                os.ftruncate(descriptor, offset + len(data))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

        await self._on_thread(rewrite)

    async def remove(self, names: Sequence[str]) -> None:
        def remove() -> None:
            for name in names:  # each is gone for good before the next goes: no later one without it
                (self.path / name).unlink()
                _sync_directory(self.path)

        await self._on_thread(remove, self._housekeeping)

    def close(self) -> None:
        """Wait for what is being written, then let the directory go."""
        self._run.shutdown(wait=True)
        self._housekeeping.shutdown(wait=True)
        os.close(self._lock)

    async def _on_thread(self, work: Callable[[], T], thread: ThreadPoolExecutor | None = None) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread or self._run, work)


def free_bytes(path: Path) -> int:
    there = os.statvfs(path)
    return there.f_bavail * there.f_frsize


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:  # pwrite(2) may take less than all of it
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _sync_path(path: Path) -> None:
    """Make every directory on the way to `path` durable, on the file system that holds `path`.

    Also those that were there before: an earlier process may have made them and been killed.
    """
    path = path.resolve()
    device = path.stat().st_dev
    for parent in path.parents:
        if parent.stat().st_dev != device:
            return  # `path` is below a mount point: who mounts keeps that
        try:
            _sync_directory(parent)
        except PermissionError:
            return  # a directory that we may not read is none that we made


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
