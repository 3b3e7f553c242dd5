"""A deletion that cleans up and a backup that is being made keep out of each other's way.

A backup relies on chunks that are there already, and a deletion removes chunks that no backup needs. So each
first puts an object of its own, and then looks for the other's: whoever comes second sees
the first. A backup puts `pending/<id>`, and does not go on while there is a `cleaning/now`; a deletion puts
`cleaning/now`, only where there is none, and removes nothing while there is a `pending/`.

Runs can be killed. A `cleaning/now` that is not renewed for `STALE_SECONDS` counts as left behind, and so
does a `pending/<id>` after a day. A run that was only suspended notices: a deletion looks again
before it goes on, and a backup whose `pending/<id>` is gone takes its manifest back.

Limit: a deletion that is suspended for longer than that, between its last look and a removal, removes one more object.
A backup looks for all its chunks before it puts its manifest.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

from shardkv.backup.errors import BackupError, Missing
from shardkv.backup.store import Store

LEFT_BEHIND = timedelta(days=1)  # an older `pending/<id>` is of a run that was killed and not repeated
CLEANING = "cleaning/now"
RENEW_SECONDS = 5.0
STALE_SECONDS = 30.0
POLL_SECONDS = 0.2
WAIT_SECONDS = 600.0  # a backup waits so long for a deletion to end


@contextlib.asynccontextmanager
async def pending(store: Store, id: str) -> AsyncIterator[None]:
    """While this is held no chunk is removed. Raises BackupError."""
    await store.put(f"pending/{id}", b"being made")
    try:
        await _wait_cleaned(store)
        yield
    finally:
        await store.delete(f"pending/{id}")


async def is_pending(store: Store, id: str) -> bool:
    """False: a deletion took this run for one that was killed, and what the run relied on may be gone."""
    return f"pending/{id}" in [item.name async for item in store.list("pending/")]


async def _wait_cleaned(store: Store) -> None:
    """Until no deletion cleans up. Raises BackupError."""
    began = changed_at = asyncio.get_running_loop().time()
    last: bytes | None = None
    while True:
        try:
            mark = await store.get(CLEANING)
        except Missing:
            return
        now = asyncio.get_running_loop().time()
        if mark != last:
            last, changed_at = mark, now
        if now - changed_at > STALE_SECONDS:
            await store.delete(CLEANING)  # its run was killed; a suspended one finds it gone and stops
            return
        if now - began > WAIT_SECONDS:
            raise BackupError(f"{store.url}: a deletion has been cleaning up there for {WAIT_SECONDS:.0f} s")
        await asyncio.sleep(POLL_SECONDS)


class Cleaning:
    """The right of one deletion to remove what nobody needs. Get it from `cleaning`."""

    def __init__(self, store: Store) -> None:
        self._store, self._run = store, secrets.token_hex(8)
        self._renewals = 0
        self._renewed_at = 0.0
        self.value = b""

    def next_value(self) -> bytes:
        self._renewals += 1
        self._renewed_at = asyncio.get_running_loop().time()
        self.value = f"{self._run} {self._renewals}".encode()
        return self.value

    async def check(self) -> None:
        """To be awaited before each removal. Raises BackupError: the right is lost."""
        if asyncio.get_running_loop().time() - self._renewed_at < RENEW_SECONDS:
            return
        try:
            ours = await self._store.get(CLEANING) == self.value
        except Missing:
            ours = False
        if not ours:
            raise BackupError(
                f"{self._store.url}: this deletion stood still, and another run went on: run it again"
            )
        await self._store.put(CLEANING, self.next_value())
        if await _is_any_pending(self._store, remove_old=False):
            raise BackupError(f"{self._store.url}: a backup began meanwhile: run the deletion again")


@contextlib.asynccontextmanager
async def cleaning(store: Store) -> AsyncIterator[Cleaning | None]:
    """None while a backup is being made. Raises BackupError while another deletion cleans up."""
    right = Cleaning(store)
    while not await store.put_new(CLEANING, right.next_value()):
        await _wait_cleaned(store)
    try:
        yield None if await _is_any_pending(store, remove_old=True) else right
    finally:
        with contextlib.suppress(Missing):
            if await store.get(CLEANING) == right.value:
                await store.delete(CLEANING)


async def _is_any_pending(store: Store, remove_old: bool) -> bool:
    oldest = datetime.now(UTC) - LEFT_BEHIND
    for item in [item async for item in store.list("pending/")]:
        if item.changed > oldest:
            return True
        if remove_old:
            await store.delete(item.name)
    return False
