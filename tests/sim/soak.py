"""Whole-cluster simulations over many seeds: `python -m tests.sim.soak --seeds N`, or `--seed N` for one.

Each seed draws the weather, the sizes, the faults and what admins do; clients run all
the while. Afterwards faults stop, everything must settle within a bounded virtual
time, and the history is judged.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from random import Random

from raft.ready import Options
from shardctrler.query import AdminRefused, ControllerUnavailable
from tests.sim import loop
from tests.sim.network import Weather
from tests.sim.workload import Workload
from tests.sim.world import Settings, World

STEPS = 25
SETTLE_SECONDS = 60.0


@dataclass
class Outcome:
    """What one seed covered."""

    seed: int
    operations: int = 0
    unknown: int = 0
    crashes: int = 0
    cuts: int = 0
    configurations: int = 0
    terms: int = 0
    virtual_seconds: float = 0.0


def settings_of(rng: Random) -> Settings:
    return Settings(
        shards=rng.choice([1, 2, 4, 8]),
        weather=Weather(
            loss=rng.choice([0, 0.02, 0.1]),
            repeat=rng.choice([0, 0.05]),
            long_delay=rng.choice([0, 0.1]),
        ),
        core=Options(
            max_append_bytes=rng.choice([200, 1 << 20]),
            window_messages=rng.choice([1, 4, 64]),
            lease_seconds=rng.choice([0.0, 0.5]),
        ),
        compact_bytes=rng.choice([2000, 20_000, 1 << 20]),
        segment_bytes=rng.choice([1000, 65_536]),
    )


async def story(seed: int, steps: int = STEPS) -> Outcome:
    """Raises AssertionError (also NotLinearizable), or TimeoutError when something got stuck."""
    rng = Random(seed * 7919 + 1)
    world = World(seed, settings_of(rng))
    outcome = Outcome(seed)
    await world.start_all()
    await world.join(1, 2)
    work = Workload(seed)
    for _ in range(3):
        work.start(world.clerk(rng.choice([2.0, 60.0])), 2)
    for _ in range(steps):
        await asyncio.sleep(rng.uniform(0.05, 1.2))
        await _fault_or_change(world, rng, outcome)
    world.network.heal()
    world.network.weather = Weather()
    for process in world.processes.values():
        process.disk.faults.slow = 0.0
    await world.start_all()
    await world.settle(SETTLE_SECONDS)
    async with asyncio.timeout(SETTLE_SECONDS):
        await work.stop()
    world.compare_replicas()
    outcome.operations = work.judge()
    outcome.unknown = work.unknown
    outcome.configurations = (await world.config()).num
    outcome.terms = sum(
        max(p.rsm.core.term for p in world.of(gid)) for gid in {p.gid for p in world.processes.values()}
    )
    outcome.virtual_seconds = asyncio.get_running_loop().time()
    await world.close()
    return outcome


async def _fault_or_change(world: World, rng: Random, outcome: Outcome) -> None:
    kind = rng.random()
    processes = list(world.processes.values())
    if kind < 0.25:
        outcome.crashes += 1
        process = rng.choice(processes)
        await world.crash(process)
        await asyncio.sleep(rng.uniform(0, 1))
        await world.start(process)
    elif kind < 0.30:
        outcome.crashes += len(processes)
        await world.crash_all()
        await world.start_all()
    elif kind < 0.42:
        outcome.cuts += 1
        names = [process.address for process in processes] + [f"clerk-{n}:1" for n in range(3)]
        rng.shuffle(names)
        cut = rng.randrange(1, len(names))
        world.network.partition(names[:cut], names[cut:])
        await asyncio.sleep(rng.uniform(0.2, 2))
        world.network.heal()
    elif kind < 0.48:
        outcome.cuts += 1
        one, other = rng.sample(processes, 2)
        world.network.cut.add((one.address, other.address))  # one way only, until the next healing
    elif kind < 0.52:
        rng.choice(processes).disk.faults.slow = 0.2
    elif kind < 0.56:
        gid = rng.choice([1, 2])
        leaders = [p for p in world.of(gid) if p.server is not None and p.rsm.is_leader]
        if leaders:
            leaders[0].rsm.node.transfer(rng.choice(list(leaders[0].peers)))
    else:
        try:
            await _change(world, rng)
        except (AdminRefused, ControllerUnavailable):
            pass  # it made no sense for this map, or faults kept it from being done


async def _change(world: World, rng: Random) -> None:
    config = await world.config()
    shard = rng.choice(list(config.by_id.values()))
    match rng.choice(["join", "leave", "move", "move", "split", "merge"]):
        case "join":
            await world.join(rng.choice([1, 2, 3, 4]), timeout=20)
        case "leave" if len(config.groups) > 1:
            await world.leave(rng.choice(sorted(config.groups)), timeout=20)
        case "split":
            await world.split(shard.id, shard.start + bytes([rng.randrange(40, 120)]), timeout=20)
        case "merge":
            await world.merge(shard.id, timeout=20)
        case _ if config.groups:
            await world.move(shard.id, rng.choice(sorted(config.groups)), timeout=20)


def run_seed(seed: int) -> Outcome:
    logging.disable(logging.CRITICAL)
    return loop.run(story(seed), limit=3000)


def soak(seeds: Iterable[int], workers: int) -> int:
    """Run the seeds side by side; the exit status."""
    began, totals, count = time.monotonic(), Outcome(0), 0
    with ProcessPoolExecutor(workers) as pool:
        futures = {pool.submit(run_seed, seed): seed for seed in seeds}
        for future in as_completed(futures):
            error = future.exception()
            if error is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                print(f"\nseed {futures[future]} failed: {type(error).__name__}: {str(error)[:3000]}")
                print(f"replay it: .venv/bin/python -m tests.sim.soak --seed {futures[future]}")
                return 1
            count += 1
            outcome = future.result()
            for name in vars(totals):
                setattr(totals, name, getattr(totals, name) + getattr(outcome, name))
            if sys.stdout.isatty() or count % 50 == 0:
                print(f"\r{count}/{len(futures)} seeds", end="" if sys.stdout.isatty() else "\n", flush=True)
    facts = {name: round(value) for name, value in vars(totals).items() if name != "seed"}
    print(f"\n{count} seeds, 0 failures, {time.monotonic() - began:.0f} s: {facts}")
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    if options.seed is not None:
        print(loop.run(story(options.seed), limit=3000))
        return
    sys.exit(soak(range(options.first, options.first + options.seeds), options.workers))


if __name__ == "__main__":
    main()
