"""Two at once: no deletion takes a chunk from a backup that is being made."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from shardkv.backup import catalog, fence
from shardkv.backup.create import Backup
from shardkv.backup.errors import BackupError
from shardkv.backup.open import open_store
from shardkv.backup.store import Found, Store
from tests.sim.loop import world_time
from tests.sim.world import World, in_world
from tests.test_backup import CREDENTIALS, object_server
from tests.test_backup_digests import InMemory

PAIRS = [(b"k%03d" % n, b"v%d" % n) for n in range(300)]
NAME = "20261125T000000Z-000000"


# ---- a deletion beside a backup


async def filled(world: World) -> None:
    clerk = world.clerk()
    await asyncio.gather(*(clerk.put(key, value * 50) for key, value in PAIRS))


class Slow(InMemory):
    """Every call takes a while, so that whatever can come between two calls does."""

    def __init__(self, rng: Random) -> None:
        super().__init__()
        self._rng = rng

    async def _pause(self) -> None:
        await asyncio.sleep(self._rng.uniform(0, 0.05))

    async def put(self, name: str, data: bytes) -> None:
        await self._pause()
        await super().put(name, data)
        await self._pause()

    async def put_new(self, name: str, data: bytes) -> bool:
        await self._pause()
        done = await super().put_new(name, data)
        await self._pause()
        return done

    async def get(self, name: str) -> bytes:
        await self._pause()
        return await super().get(name)

    async def delete(self, name: str) -> None:
        await self._pause()
        await super().delete(name)

    async def list(self, prefix: str) -> AsyncIterator[Found]:
        found = [item async for item in super().list(prefix)]
        await self._pause()
        for item in found:
            yield item


@pytest.fixture(autouse=True)
def without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated loop has none."""

    async def inline(work: Any, *arguments: Any) -> Any:
        return work(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", inline)


@pytest.mark.parametrize("seed", range(12))
def test_no_backup_loses_a_chunk_to_a_deletion_beside_it(seed: int) -> None:
    """The one that is deleted has the chunks that the new one relies on."""

    @in_world(groups=(1,), controllers=1, seed=seed)
    async def story(world: World) -> None:
        await filled(world)
        store = Slow(Random(seed))
        first = await Backup(world.controller, world._dialer, store, Random(1)).create()
        await world.clerk().put(b"k000", b"changed")

        async def later(seconds: float, work: Any) -> Any:
            await asyncio.sleep(seconds)
            return await work

        rng = Random(seed)
        second, _ = await asyncio.gather(
            later(rng.uniform(0, 0.3), Backup(world.controller, world._dialer, store, Random(2)).create()),
            later(rng.uniform(0, 0.5), catalog.delete(store, first.id)),
        )
        await catalog.verify(store, second)
        assert [name for name in store.objects if name.startswith(("pending/", "cleaning/"))] == []
        third = await Backup(world.controller, world._dialer, store, Random(3)).create()
        assert await catalog.delete(store, second.id) is not None
        await catalog.verify(store, third)

    story()


@in_world(groups=(1,), controllers=1)
async def test_a_deletion_that_was_killed_holds_a_backup_up_for_a_while_only(world: World) -> None:
    await filled(world)
    store = InMemory()
    store.objects[fence.CLEANING] = b"a run 3"
    began = world_time()
    await Backup(world.controller, world._dialer, store, Random(1)).create()
    assert fence.STALE_SECONDS <= world_time() - began < 60 and fence.CLEANING not in store.objects


@in_world(groups=(1,), controllers=1)
async def test_a_deletion_that_stood_still_removes_nothing_more(world: World) -> None:
    store = InMemory()

    async def suspended() -> None:
        async with fence.cleaning(store) as right:
            assert right is not None
            await right.check()
            await asyncio.sleep(100)
            async with fence.pending(store, "id"):
                await right.check()
                raise AssertionError("it may remove nothing")

    with pytest.raises(BackupError, match="another run went on"):
        await suspended()


@in_world(groups=(1,), controllers=1)
async def test_a_deletion_renews_its_right_and_two_take_turns(world: World) -> None:
    store, held_by = InMemory(), []

    async def clean(name: str) -> None:
        async with fence.cleaning(store) as right:
            assert right is not None
            for _ in range(20):
                held_by.append(name)
                await asyncio.sleep(3)
                await right.check()

    await asyncio.gather(clean("a"), clean("b"))
    assert held_by in (["a"] * 20 + ["b"] * 20, ["b"] * 20 + ["a"] * 20) and store.objects == {}


@in_world(groups=(1,), controllers=1)
async def test_a_backup_that_a_deletion_took_for_killed_is_taken_back(world: World) -> None:
    await filled(world)
    store = InMemory()
    put = store.put

    async def put_and_lose(name: str, data: bytes) -> None:
        await put(name, data)
        if name.startswith("backups/"):
            for pending in [name for name in store.objects if name.startswith("pending/")]:
                del store.objects[pending]

    store.put = put_and_lose  # type: ignore[method-assign]
    with pytest.raises(BackupError, match="for one that was killed"):
        await Backup(world.controller, world._dialer, store, Random(1)).create()
    assert await catalog.backups(store) == []


def test_of_many_that_put_one_object_at_once_one_does(tmp_path: Path) -> None:
    """Of a directory, and of an object store."""
    os.environ.update(CREDENTIALS)

    async def story(store: Store) -> None:
        done = await asyncio.gather(*(store.put_new("cleaning/now", b"%d" % n) for n in range(8)))
        assert done.count(True) == 1
        assert await store.get("cleaning/now") == b"%d" % done.index(True)
        await store.delete("cleaning/now")
        assert await store.put_new("cleaning/now", b"x")

    asyncio.run(story(open_store(f"file://{tmp_path}/place")))
    with object_server() as endpoint:
        asyncio.run(story(open_store("s3://bucket/fence", endpoint, "us-east-1")))
