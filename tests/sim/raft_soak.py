"""A bare Raft group in trouble: elections without rest, stranded entries, crashes at the worst moments.

The whole-cluster soak spreads its faults over many processes; this one aims all of
them at one small group, and so gets to the rare orders of events of Raft itself.
"""

from __future__ import annotations

import asyncio
from random import Random

from shardkv.raft.errors import RaftError
from shardkv.raft.protocol.quorum import majority
from shardkv.raft.protocol.ready import Options
from tests.sim import loop
from tests.sim.network import Weather
from tests.sim.raft_world import RaftWorld

STEPS = 150


class Proposals:
    """Commands proposed at whoever leads or thinks so, without waiting; and which of them were acknowledged."""

    def __init__(self, world: RaftWorld) -> None:
        self._world = world
        self._count = 0
        self._waiting: dict[asyncio.Task[None], None] = {}
        self.acknowledged: list[str] = []

    def burst(self, node: int, count: int) -> None:
        for _ in range(count):
            self._count += 1
            task = asyncio.get_running_loop().create_task(self._propose(node, str(self._count)))
            self._waiting[task] = None
            task.add_done_callback(self._waiting.pop)

    async def _propose(self, node: int, value: str) -> None:
        try:
            await self._world.replicas[node].propose(value.encode())
            self.acknowledged.append(value)
        except (RaftError, KeyError):
            pass  # refused, or nobody knows; KeyError: it has died meanwhile


async def story(seed: int) -> None:
    rng = Random(seed * 31 + 7)
    world = RaftWorld(
        rng.choice([3, 3, 5]),
        seed,
        core=Options(
            election_ticks=rng.choice([3, 5, 14]),
            heartbeat_ticks=1,
            max_append_bytes=rng.choice([1, 40, 1 << 20]),
            window_messages=rng.choice([1, 3, 64]),
        ),
        compact_bytes=rng.choice([100, 1000, 1 << 20]),
        weather=Weather(
            delay=(0.0005, rng.choice([0.002, 0.05])),
            loss=rng.choice([0, 0.1, 0.3]),
            repeat=rng.choice([0, 0.2]),
            long_delay=rng.choice([0, 0.1, 0.3]),
            flip=rng.choice([0, 0, 0.02]),
        ),
    )
    await world.start()
    for node in world.ids:
        world.disks[node].on_crash_point = lambda node=node: world.kill(node, rng.uniform(0, 0.1))  # type: ignore[misc]
    proposals = Proposals(world)
    for _ in range(STEPS):
        await asyncio.sleep(rng.uniform(0, rng.choice([0.01, 0.1, 0.5])))
        _step(world, rng, proposals)
        for replica in world.replicas.values():
            assert replica.node.fault is None, replica.node.fault
    world.network.heal()
    world.network.weather = Weather()
    for node in world.ids:
        world.disks[node].faults.crash = world.disks[node].faults.slow = 0.0
    while world.restarts:
        await asyncio.sleep(0.1)
    await world.propose("end")
    await world.converge()
    values = world.values(world.ids[0])
    assert len(set(values)) == len(values), "a command was applied twice"
    lost = set(proposals.acknowledged) - set(values)
    assert not lost, f"acknowledged and lost: {sorted(lost)}"
    await world.crash(list(world.replicas))


def _step(world: RaftWorld, rng: Random, proposals: Proposals) -> None:
    nodes = list(world.replicas)
    if not nodes:
        return
    node, leaders = rng.choice(nodes), world.leaders_now()
    target = rng.choice(leaders) if leaders and rng.random() < 0.6 else node
    match rng.choice(
        ["burst", "burst", "kill", "crash point", "alone", "minority", "one way", "heal", "slow", "all"]
    ):
        case "burst":
            for leader in leaders:
                proposals.burst(leader, rng.choice([1, 1, 3, 20]))
        case "kill":
            world.kill(target, rng.uniform(0, rng.choice([0.02, 0.5])))
        case "crash point":
            world.disks[target].faults.crash = rng.choice([0.0, 0.3])
        case "alone":
            world.isolate(target)
        case "minority":
            others = [other for other in world.ids if other != target]
            side = [target, *rng.sample(others, len(world.ids) - majority(len(world.ids)) - 1)]
            world.partition(side, [other for other in world.ids if other not in side])
        case "one way":
            world.network.cut.add((f"n{target}", f"n{rng.choice(world.ids)}"))
        case "heal":
            world.network.heal()
        case "slow":
            world.disks[target].faults.slow = rng.choice([0.0, 1.0])
        case _ if rng.random() < 0.3:
            for other in nodes:
                world.kill(other, rng.uniform(0, 0.3))


def run_seed(seed: int) -> None:
    loop.run(story(seed), limit=3000)
