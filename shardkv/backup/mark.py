"""The mark of a restore in the cluster that it writes to: one key, taken and kept by compare-and-set.

Each run has an id of its own, and renews its mark while it writes. Who finds a mark watches it: if it
is renewed, another restore is at work, and the newcomer is refused. If it is not, that run
was cut off, and a run of the same backup takes the mark over. A run whose mark was taken
notices by its next renewal, writes nothing more, and fails. No wall clock is compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

from client import AsyncShardClerk
from shardkv.backup.errors import BackupError

MARK = b"\0shardkv/restore"  # a key that is there while a restore is under way; its value names it
RENEW_SECONDS = 1.0
WATCH_SECONDS = 6.0  # a mark that is not renewed for so long is of a run that was cut off
FINISHED = "finished"


class MarkLost(BackupError):
    """Another run has the mark now."""


class Mark:
    """The mark of one run. Get it from `held`."""

    def __init__(self, clerk: AsyncShardClerk, name: str) -> None:
        self._clerk, self._name, self._run = clerk, name, secrets.token_hex(8)
        self._beat = 0
        self._value = b""
        self._lost = ""
        self._ended = asyncio.Event()

    def check(self) -> None:
        """To be called before every few writes. Raises MarkLost."""
        if self._lost:
            raise MarkLost(self._lost)

    def _next(self) -> bytes:
        self._beat += 1
        return f"{self._name}\n{self._run}\n{self._beat}".encode()

    async def take(self) -> None:
        """Raises BackupError, ShardKVError."""
        seen = await self._clerk.get(MARK)
        if seen is None:
            value = self._next()
            if await self._clerk.cas(MARK, None, value):
                self._value = value
                await self._check_empty()
                return
            seen = await self._clerk.get(MARK) or b""
        name = seen.split(b"\n")[0].decode(errors="replace")
        if seen.split(b"\n")[-1] == FINISHED.encode():
            await self._clerk.delete(MARK)  # its run ended after all was written, and could not say so
            raise BackupError("the cluster has data: restore into an empty one")
        if name != self._name:
            raise BackupError(f"the cluster has a part of another restore ({name}): begin with an empty one")
        await asyncio.sleep(WATCH_SECONDS)
        value = self._next()
        if not await self._clerk.cas(MARK, seen, value):
            raise BackupError(
                f"another restore of {name} is under way, or has just ended: only one writes at a time"
            )
        self._value = value

    async def _check_empty(self) -> None:
        """The mark is ours: nobody else has begun. Raises BackupError where there is data already."""
        if any([key != MARK async for key, _ in self._clerk.scan(limit=2)]):
            await self.release()
            raise BackupError("the cluster has data: restore into an empty one")

    async def renew(self) -> None:
        """Keep the mark until `stop`; once it is lost, `check` says so. Raises ShardKVError."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), RENEW_SECONDS)
                return
            value = self._next()
            if not await self._clerk.cas(MARK, self._value, value):
                self._lost = "another run has taken this restore over: this one writes nothing more"
                return
            self._value = value

    def stop(self) -> None:
        """Renew no more. A renewal that is under way ends first: cut off, it may have been done or not."""
        self._ended.set()

    async def release(self) -> None:
        """All is written. Raises MarkLost."""
        self.check()
        # First a state that nobody takes over: then the mark that is deleted is certainly ours.
        if not await self._clerk.cas(MARK, self._value, f"{self._name}\n{self._run}\n{FINISHED}".encode()):
            raise MarkLost("another run has taken this restore over")
        await self._clerk.delete(MARK)


@contextlib.asynccontextmanager
async def held(clerk: AsyncShardClerk, name: str) -> AsyncIterator[Mark]:
    """Hold the mark of a restore; it goes when the block ends well. Raises BackupError, ShardKVError."""
    mark = Mark(clerk, name)
    await mark.take()
    renewing = asyncio.create_task(mark.renew())
    try:
        yield mark
    finally:
        mark.stop()
        await asyncio.wait([renewing])
    renewing.result()  # raises where a renewal failed: whether the mark is still ours is unknown
    await mark.release()
