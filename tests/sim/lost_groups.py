"""Groups that lose all of their disks, and numbers that are used again, under load: `python -m tests.sim.lost_groups`.

Each seed moves shards, crashes processes, and lets groups leave in good order, wipes them and lets
them join again under their number: after each of these everything must settle. In the end, in
most seeds, a group that is in the map loses all of its disks at once. Its keys may then time out, and
must not be answered from the empty disks: the history is judged.
"""

from __future__ import annotations

import argparse
import asyncio
from random import Random

from shardkv.client.errors import ShardKVError
from shardkv.shardctrler.client import AdminRefused
from tests.sim import loop
from tests.sim.loop import world_time
from tests.sim.workload import Workload
from tests.sim.world import Settings, World

STEPS = 6
SETTLE_SECONDS = 60.0
CALL_SECONDS = 3.0
LIMIT_SECONDS = 1000.0


async def story(seed: int) -> int:
    """Returns how many operations were judged. Raises AssertionError, also NotLinearizable."""
    rng = Random(seed)
    replicas, sizes = rng.choice([1, 3]), rng.choice([500, 1 << 20])
    world = World(seed, Settings(replicas=replicas, shards=rng.choice([2, 4, 8]), compact_bytes=sizes))
    await world.start_all()
    await world.join(1, 2)
    await world.settle()
    work = Workload(seed)
    for _ in range(2):
        clerk = world.clerk(CALL_SECONDS)
        work.start(clerk, 2, world.host_of(clerk))
    for _ in range(STEPS):
        await asyncio.sleep(rng.uniform(0, 0.5))
        await rng.choice([_move, _move, _use_again, _restart])(world, rng)
        world.check_failures()
    await world.settle(SETTLE_SECONDS)
    if rng.random() < 0.7:
        await _lose(world, rng)
        await work.stop()
        for key in work.keys:
            called = world_time()
            try:
                work._note("get", key, None, await clerk.get(key), called)
            except ShardKVError:
                pass  # nobody has it, or nobody who is known to
    else:
        await work.stop()
        await work.read_all(world.clerk())
    judged = work.judge()
    await world.close()
    return judged


async def _move(world: World, rng: Random) -> None:
    """One shard to the other group; what comes after does not wait for it."""
    config = await world.config()
    shard = rng.choice(sorted(config.by_id))
    try:
        await world.move(shard, rng.choice(sorted(config.groups)))
    except AdminRefused:
        pass  # it is there already


async def _restart(world: World, rng: Random) -> None:
    await world.restart(rng.choice(list(world.processes.values())))


async def _use_again(world: World, rng: Random) -> None:
    """In good order: what it has goes to the other group before it is wiped."""
    gid = rng.choice([1, 2])
    await world.leave(gid)
    await world.settle(SETTLE_SECONDS)
    before = rng.random() < 0.5  # it may join before or after its disks are wiped
    if before:
        for process in world.of(gid):
            await world.crash(process)
        await world.join(gid)
    await world.lose_group(gid)
    if not before:
        await world.join(gid)
    await world.settle(SETTLE_SECONDS)


async def _lose(world: World, rng: Random) -> None:
    """A group that serves is empty from one moment to the next; perhaps it is let go of then, and joins again."""
    gid = rng.choice([1, 2])
    await world.lose_group(gid)
    await asyncio.sleep(2.0)
    if rng.random() < 0.5:
        await world.leave(gid, force=True)
        await asyncio.sleep(1.0)
        if rng.random() < 0.5:
            await world.join(gid)
        await asyncio.sleep(2.0)


def run_seed(seed: int) -> int:
    with loop.silence():
        return loop.run(story(seed), limit=LIMIT_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    judged = 0
    for seed in range(options.first, options.first + options.seeds):
        try:
            judged += run_seed(seed)
        except BaseException:
            print(f"seed {seed} failed; replay it: python -m tests.sim.lost_groups --first {seed} --seeds 1")
            raise
    print(f"{options.seeds} seeds, {judged:,} operations judged")


if __name__ == "__main__":
    main()
