"""Moves between two groups that are disturbed in the middle: no room, no way to each other, a move back.

A story of its own beside the soak: there few moves meet these at the very moment that counts.
"""

from __future__ import annotations

import asyncio
from random import Random

from shardkv.raft.protocol.space import Room
from shardkv.shardctrler.client import AdminRefused
from tests.sim import loop
from tests.sim.network import Weather
from tests.sim.workload import Workload
from tests.sim.world import Settings, World

ROUNDS = 14
SETTLE_SECONDS = 60.0
LIMIT_SECONDS = 2000.0


async def story(seed: int) -> int:
    """Raises AssertionError, or TimeoutError when something got stuck. Returns how many operations were judged."""
    rng = Random(seed * 104_729 + 5)
    weather = Weather(loss=rng.choice([0, 0.05]), long_delay=rng.choice([0, 0.2]))
    world = World(seed, Settings(shards=4, replicas=rng.choice([1, 3]), weather=weather))
    await world.start_all()
    await world.join(1, 2)
    await world.settle(SETTLE_SECONDS)
    work = Workload(seed)
    for _ in range(2):
        work.start(world.clerk(), 3)
    for _ in range(ROUNDS):
        await _disturbed_move(world, rng)
        world.check_failures()
    world.network.heal()
    world.network.weather = Weather()
    for gid in (1, 2):
        _set_room(world, gid, Room.PLENTY)
    await world.start_all()
    await world.settle(SETTLE_SECONDS)
    async with asyncio.timeout(SETTLE_SECONDS):
        await work.stop()
        await work.read_all(world.clerk())
    await world.converge(SETTLE_SECONDS)
    world.compare_replicas()
    world.check_leftovers()
    judged = work.judge()
    await world.close()
    return judged


async def _disturbed_move(world: World, rng: Random) -> None:
    shard = rng.choice(sorted((await world.config()).by_id))
    taker = rng.choice([1, 2])
    await _move(world, shard, taker)
    await asyncio.sleep(rng.uniform(0, rng.choice([0.01, 0.03])))
    if rng.random() < 0.7:
        _cut(world, both=rng.random() < 0.5, taker=taker)
    if rng.random() < 0.5:
        _set_room(world, taker, Room.LOW)
        await asyncio.sleep(rng.uniform(0.3, 1.0))
    if rng.random() < 0.5:
        await _move(world, shard, 3 - taker)
    if rng.random() < 0.3:
        await world.restart(rng.choice(world.of(rng.choice([1, 2]))))
    await asyncio.sleep(rng.choice([0.0, 0.5, 5.0]))
    world.network.heal()
    await asyncio.sleep(rng.uniform(0, 1.5))
    _set_room(world, taker, Room.PLENTY)
    await asyncio.sleep(rng.uniform(0, 1.0))


async def _move(world: World, shard: int, gid: int) -> None:
    try:
        await world.move(shard, gid)
    except AdminRefused:
        pass  # it is there already


def _cut(world: World, both: bool, taker: int) -> None:
    """The groups do not hear each other, or only the taker does not get through to the giver."""
    pairs = {(a.address, b.address) for a in world.of(taker) for b in world.of(3 - taker)}
    world.network.cut |= pairs | ({(b, a) for a, b in pairs} if both else set())


def _set_room(world: World, gid: int, room: Room) -> None:
    for process in world.of(gid):
        if process.room is not room:
            world.set_room(process, room)


def run_seed(seed: int) -> int:
    with loop.silence():
        return loop.run(story(seed), limit=LIMIT_SECONDS)
