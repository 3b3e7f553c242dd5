"""Shards that move between groups: MIT 6.824 lab 4B and its challenges (scenarios S-1 to S-10)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from random import Random

import pytest

from shardkv.client.errors import DeadlineExceeded
from shardkv.shardctrler.client import AdminRefused
from shardkv.shardctrler.shard_map import ShardId
from shardkv.state import layout
from shardkv.state.row import Row, State
from tests.sim.network import Weather
from tests.sim.workload import Workload
from tests.sim.world import Process, World, in_world

KEYS = [bytes([0x21 + 3 * n]) + b"/k" for n in range(30)]


async def fill(world: World, size: int = 20) -> dict[bytes, bytes]:
    clerk = world.clerk()
    values = {key: key * (size // len(key)) for key in KEYS}
    await asyncio.gather(*(clerk.put(key, value) for key, value in values.items()))
    return values


async def all_there(world: World, values: dict[bytes, bytes]) -> None:
    clerk = world.clerk()
    assert await clerk.multi_get(values) == values
    assert [pair async for pair in clerk.scan()] == sorted(values.items())


async def shards_of(world: World, gid: int) -> list[int]:
    return [shard.id for shard in (await world.config()).shards() if shard.gid == gid]


@in_world()
async def test_s_1_a_stopped_group_s_keys_wait_and_the_others_are_served(world: World) -> None:
    values = await fill(world)
    for process in world.of(2):
        await world.crash(process)
    config = await world.config()
    clerk = world.clerk()
    for key in KEYS:
        if config.lookup(key).gid == 1:
            assert await clerk.get(key) == values[key]
        else:
            with pytest.raises(DeadlineExceeded):
                await clerk.get(key, timeout=0.2)
    waiting = asyncio.ensure_future(all_there(world, values))
    await asyncio.sleep(2)
    assert not waiting.done()
    await world.start_all()
    await waiting


@in_world(groups=(1,))
async def test_s_2_join_then_leave_with_data(world: World) -> None:
    values = await fill(world)
    await world.join(2)
    await world.settle()
    await all_there(world, values)
    await world.leave(1)
    await world.settle()
    await all_there(world, values)
    for process in world.of(1):
        await world.crash(process)
    await all_there(world, values)


@in_world(groups=(1,), compact_bytes=1000, segment_bytes=1000)
async def test_s_3_snapshots_joins_leaves_and_a_restart_of_everything(world: World) -> None:
    values = await fill(world)
    for change in (world.join(2), world.join(3), world.leave(1)):
        await change
        values |= await fill(world)
        await world.crash_all()
        await world.start_all()
        await world.settle()
        await all_there(world, values)


@in_world(groups=(1, 2), compact_bytes=2000)
async def test_s_4_replicas_that_missed_changes_catch_up_step_by_step(world: World) -> None:
    values = await fill(world)
    away = [next(p for p in world.of(gid) if not p.rsm.is_leader) for gid in (1, 2)]
    for process in away:
        await world.crash(process)
    await world.join(3)
    await world.settle()
    await world.leave(1)
    await world.settle()
    await world.join(1)
    await world.settle()
    values |= await fill(world, 40)
    for process in away:
        await world.start(process)
    latest = (await world.config()).num
    async with asyncio.timeout(30):
        while any(process.group.machine.ownership.config_num < latest for process in away):
            await asyncio.sleep(0.05)
    for process in away:  # each becomes part of the only quorum left
        other = next(p for p in world.of(process.gid) if p not in away)
        await world.crash(other)
    await all_there(world, values)


async def _confusion(world: World, admin: Callable[[Random], Awaitable[object]], rounds: int) -> None:
    """Clients run while admins change the map and replicas crash; in the end all is judged."""
    rng = world.rng
    work = Workload(rng.randrange(1 << 30))
    for _ in range(3):
        work.start(world.clerk(), 2)
    for _ in range(rounds):
        await asyncio.sleep(rng.uniform(0.05, 0.6))
        if rng.random() < 0.4:
            process = rng.choice(list(world.processes.values()))
            await world.crash(process)
            await asyncio.sleep(rng.uniform(0, 0.5))
            await world.start(process)
        else:
            try:
                await admin(rng)
            except AdminRefused:
                pass  # what was asked made no sense for this map
    world.network.heal()
    world.network.weather = Weather()
    await world.start_all()
    await world.settle()
    async with asyncio.timeout(60):
        while len(work.history) < 400:  # a bad network leaves a slow history: let it grow
            await asyncio.sleep(0.05)
    await work.stop()
    assert work.judge() >= 400


async def _any_change(world: World, rng: Random) -> None:
    config = await world.config()
    shard = rng.choice(list(config.by_id.values()))
    match rng.choice(["join", "leave", "move", "move", "split", "merge"]):
        case "join":
            await world.join(rng.choice([1, 2, 3]))
        case "leave" if len(config.groups) > 1:
            await world.leave(rng.choice(sorted(config.groups)))
        case "split":
            await world.split(shard.id, shard.start + bytes([rng.randrange(40, 120)]))
        case "merge":
            await world.merge(shard.id)
        case _:
            await world.move(shard.id, rng.choice(sorted(config.groups)))


@pytest.mark.parametrize("seed", range(6))
def test_s_5_concurrent_clients_through_every_change(seed: int) -> None:
    weather = Weather(loss=0.05, repeat=0.05, long_delay=0.1) if seed % 2 else Weather()

    @in_world(seed=500 + seed, weather=weather, compact_bytes=3000, segment_bytes=2000)
    async def story(world: World) -> None:
        await _confusion(world, lambda rng: _any_change(world, rng), 25)

    story()


@in_world(compact_bytes=20_000, segment_bytes=8000)
async def test_s_6_moved_shards_are_deleted_and_disks_stay_small(world: World) -> None:
    values = await fill(world, 1000)
    for turn in range(6):
        for shard in await shards_of(world, turn % 2 + 1):
            await world.move(shard, 2 - turn % 2)
        await world.settle()
    await all_there(world, values)
    live = sum(len(key) + 1 + len(value) for key, value in values.items())
    await asyncio.sleep(5.0)
    for replica in range(3):
        held = sum(world.group_bytes(gid)[replica] for gid in (1, 2))
        assert held == live, "one live copy, counted over the groups"
    for process in world.of(1) + world.of(2):
        # One copy in the state file, and a log of a few compaction thresholds.
        assert process.disk.size < 2 * live + 8 * 20_000


@in_world(groups=(1, 2, 3), shards=9)
async def test_s_7_unaffected_shards_are_served_without_pause(world: World) -> None:
    """Group 3 dies while shards leave group 1; a client of the shards that stay on 1 and 2 sees nothing."""
    values = await fill(world)
    config = await world.config()
    for process in world.of(3):
        await world.crash(process)
    moving, *staying = await shards_of(world, 1)
    await world.move(moving, 2)
    clerk, loop = world.clerk(), asyncio.get_running_loop()
    worst = 0.0
    keys = [key for key in KEYS if config.lookup(key).id in staying or config.lookup(key).gid == 2]
    for _ in range(10):
        for key in keys:
            began = loop.time()
            assert await clerk.get(key) == values[key]
            worst = max(worst, loop.time() - began)
    assert worst < 0.1
    await world.start_all()


@in_world(groups=(1, 2, 3), shards=6)
async def test_s_8_a_shard_that_arrived_is_served_while_another_s_source_is_dead(world: World) -> None:
    values = await fill(world)
    from_two, from_three = (await shards_of(world, 2))[0], (await shards_of(world, 3))[0]
    for process in world.of(3):
        await world.crash(process)
    await world.move(from_three, 1)
    await world.move(from_two, 1)
    config, clerk = await world.config(), world.clerk()
    for key in KEYS:
        if config.lookup(key).id == from_two:
            await clerk.put(key, values[key])
            assert await clerk.get(key) == values[key]
    leader = await world.leader(1)
    rows = leader.group.machine.ownership.rows
    assert rows[from_two].state is State.SERVING and rows[from_three].state is State.PULLING
    await world.start_all()
    await world.settle()
    await all_there(world, values)


@in_world(groups=(1, 2, 3), shards=6)
async def test_s_8b_a_stuck_shard_holds_up_nothing_and_walks_its_chain_later(world: World) -> None:
    values = await fill(world)
    stuck = (await shards_of(world, 3))[0]
    others = await shards_of(world, 1)
    for process in world.of(3):
        await world.crash(process)
    await world.move(stuck, 1)
    await world.move(stuck, 2)  # moved on before it ever arrived
    await world.move(others[0], 2)
    await world.move(stuck, 1)
    await world.move(others[1], 2)
    config, clerk = await world.config(), world.clerk()
    for key in KEYS:
        if config.lookup(key).id in others:
            assert await clerk.get(key) == values[key], "later changes of the same groups go on"
    await world.start_all()
    await world.settle()
    await all_there(world, values)


@in_world()
async def test_s_9_a_retry_of_a_write_done_just_before_the_hand_over(world: World) -> None:
    """The old owner's reply is lost on the way; the retry finds the new owner, and the record there."""
    clerk = world.clerk()
    await clerk.get("k")
    config = await world.config()
    shard = config.lookup(b"k")
    target = 3 - shard.gid
    for turn in range(5):
        old = [process.address for process in world.of(shard.gid if turn % 2 == 0 else target)]
        world.network.cut = {(address, "clerk-0:1") for address in old}  # replies vanish
        append = asyncio.ensure_future(clerk.append("k", f"{turn};"))
        await asyncio.sleep(0.2)
        assert not append.done()
        await world.move(shard.id, target if turn % 2 == 0 else shard.gid)
        await world.settle()
        if turn == 3:
            await world.crash_all()
            await world.start_all()
        await append
        world.network.heal()
        assert await clerk.get("k") == b"".join(b"%d;" % n for n in range(turn + 1))


STATES = ("PULLING", "LENDING", "FROZEN")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("side", ["giver", "taker"])
def test_s_10_leaders_change_at_every_step_of_a_hand_over(state: str, side: str) -> None:
    @in_world(seed=hash_of(state, side))
    async def story(world: World) -> None:
        work = Workload(hash_of(state, side))
        for _ in range(2):
            work.start(world.clerk(), 2)
        await fill(world, 2000)
        for _ in range(4):
            shard = world.rng.choice(list((await world.config()).by_id.values()))
            target = 3 - shard.gid
            move = asyncio.ensure_future(world.move(shard.id, target))
            async with asyncio.timeout(20):
                while not _someone_is(world, shard.id, state):
                    if move.done() and (await world.overview()).settled()[0] == 4:
                        break  # it went by between two looks
                    await asyncio.sleep(0.0005)
            await world.restart(await world.leader(shard.gid if side == "giver" else target))
            await move
            await world.settle()
        async with asyncio.timeout(60):
            while len(work.history) < 200:
                await asyncio.sleep(0.05)
        await work.stop()
        assert work.judge() >= 200

    story()


def hash_of(*words: str) -> int:
    return sum(ord(letter) * (n + 1) for n, letter in enumerate("".join(words)))


def _someone_is(world: World, shard: int, state: str) -> bool:
    return any(
        process.gid
        and process.server is not None
        and shard in rows(process)
        and rows(process)[shard].state.name == state
        for process in world.processes.values()
    )


def rows(process: Process) -> Mapping[ShardId, Row]:
    return process.group.machine.ownership.rows


@in_world(groups=(1,), shards=2)
async def test_a_split_keeps_the_records_on_both_halves_and_a_merge_joins_them(world: World) -> None:
    clerk = world.clerk()
    await clerk.append("a", "1")
    await clerk.append("z", "1")
    leader = await world.leader(1)
    machine = leader.group.machine
    shard = (await world.config()).lookup(b"z")
    before = len(list(machine.engine.scan(*layout.record_range(shard.id))))
    await world.split(shard.id, b"m" if shard.contains(b"m") else b"x")
    await world.settle()
    config = await world.config()
    new = config.lookup(b"z").id
    assert new != shard.id
    assert len(list(machine.engine.scan(*layout.record_range(new)))) == before
    await clerk.append("z", "2")
    await world.merge(shard.id)
    await world.settle()
    assert list(machine.engine.scan(*layout.record_range(new))) == []
    await clerk.append("z", "3")
    assert await clerk.get("z") == b"123"


@in_world(groups=(1, 2))
async def test_a_shard_lent_back_while_its_old_copy_is_still_frozen(world: World) -> None:
    """Split on the way: the half that returns must not meet the whole's old copy (docs/sharding.md)."""
    values = await fill(world, 200)
    shard = next(s for s in (await world.config()).shards() if s.gid == 1)
    takers = [process.address for process in world.of(2)]
    givers = [process.address for process in world.of(1)]
    await world.move(shard.id, 2)
    middle = next(key for key in sorted(KEYS) if shard.contains(key) and key > shard.start)
    await asyncio.sleep(0.02)
    world.network.cut = {(giver, taker) for giver in givers for taker in takers}
    await world.split(shard.id, middle)
    await world.move((await world.config()).lookup(middle).id, 1)
    await asyncio.sleep(1.0)
    world.network.heal()
    await world.settle()
    await all_there(world, values)
