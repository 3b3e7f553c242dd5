"""Whole-cluster simulations over many seeds: `python -m tests.sim.soak --seeds N`, or `--seed N` for one.

Each seed draws the weather, the sizes, the faults and what admins do; clients run all
the while. Afterwards faults stop, everything must settle within a bounded virtual
time, and the history is judged. `--seed N --trace` prints what happened, line by line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from random import Random

from shardkv.raft.protocol.ready import Options
from shardkv.raft.protocol.space import Room
from shardkv.raft.sessions import DEFAULT_TTL_MS
from shardkv.server.giver import Pace
from shardkv.shardctrler.client import AdminRefused
from tests.sim import loop
from tests.sim.faults import Faults
from tests.sim.loop import world_time
from tests.sim.network import Weather
from tests.sim.pipelines import Pipelines
from tests.sim.workload import Workload
from tests.sim.world import Settings, World

STEPS = 50
SETTLE_SECONDS = 60.0
LIMIT_SECONDS = 3000.0
CPU_SECONDS = 120
MEMORY_BYTES = 4 << 30


@dataclass
class Outcome:
    """What one seed covered."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    virtual_seconds: float = 0.0
    trace_hash: str = ""


def settings_of(rng: Random) -> Settings:
    """Tiny sizes as well as large ones: every bound is reached in some seed."""
    election_ticks, lease = rng.choice([(14, 0.0), (14, 0.5), (14, 0.5), (5, 0.0), (5, 0.15)])
    return Settings(
        controllers=rng.choice([1, 3, 3, 3]),
        replicas=rng.choice([1, 3, 3, 3, 3, 5]),
        shards=rng.choice([1, 2, 4, 8]),
        weather=Weather(
            loss=rng.choice([0, 0.02, 0.1]),
            repeat=rng.choice([0, 0.05, 0.3]),
            long_delay=rng.choice([0, 0.1, 0.3]),
        ),
        core=Options(
            election_ticks=election_ticks,
            heartbeat_ticks=rng.choice([1, 2]),
            max_append_bytes=rng.choice([1, 200, 1 << 20]),
            window_messages=rng.choice([1, 4, 64]),
            window_bytes=rng.choice([100, 8 << 20]),
            max_uncommitted_bytes=rng.choice([500, 64 << 20]),
            max_waiting_reads=rng.choice([3, 100_000]),
            max_apply_bytes=rng.choice([1, 1 << 20]),
            lease_seconds=lease,
        ),
        compact_bytes=rng.choice([500, 2000, 20_000, 1 << 20]),
        segment_bytes=rng.choice([500, 1000, 65_536]),
        chunk_bytes=rng.choice([100, 4096]),
        pace=rng.choice([Pace(40, 2, 1), Pace(300, 10, 5), Pace()]),
        drift=rng.choice([0.0, 0.05]),
        session_ttl_ms=rng.choice([2000, 8000, DEFAULT_TTL_MS, DEFAULT_TTL_MS]),
        process_death=rng.choice([0.0, 0.5, 0.9]),
        hanging_disks=True,
        flipped_bits=True,
    )


async def story(seed: int, steps: int = STEPS, printing: Callable[[str], None] | None = None) -> Outcome:
    """Raises AssertionError (also NotLinearizable), or TimeoutError when something got stuck."""
    rng = Random(seed * 7919 + 1)
    world = World(seed, settings_of(rng))
    world.printing = printing
    try:
        return await _story(world, rng, seed, steps)
    except (Exception, asyncio.CancelledError):
        world.check_failures()  # what broke inside a replica is the better explanation
        raise


async def _story(world: World, rng: Random, seed: int, steps: int) -> Outcome:
    await world.start_all()
    await _join(world, 1, 2)
    work, faults, pipelines = Workload(seed), Faults(world, rng), Pipelines(seed)
    for _ in range(3):
        clerk = world.clerk(rng.choice([2.0, 60.0]))
        work.start(clerk, 3, world.host_of(clerk))
        pipelines.start(clerk, world.host_of(clerk))
    for _ in range(steps):
        await asyncio.sleep(rng.uniform(0, rng.choice([0.1, 1.0])))
        await faults.step()
        world.check_failures()
    await faults.stop()
    if not (await world.config()).groups:
        await _join(world, 1)  # all have left: the data waits with the last owners
    if rng.random() < 0.4:
        await _serve_while_a_taker_stays_low(world, rng, work)
    await world.settle(SETTLE_SECONDS)
    async with asyncio.timeout(SETTLE_SECONDS):
        await work.stop()
        await pipelines.stop()
        await work.read_all(world.clerk())
        pipelined = await pipelines.read_all(world.clerk())
    await world.converge(SETTLE_SECONDS)
    world.compare_replicas()
    await world.check_groups()
    world.check_leftovers()
    outcome = Outcome(seed, faults.counts, world_time(), world.trace_hash)
    outcome.counts["operations"] = work.judge()
    outcome.counts["pipelined writes"] = pipelined
    outcome.counts["unknown outcomes"] = work.unknown
    outcome.counts["configurations"] = (await world.config()).num
    outcome.counts["elections"] = world.invariants.elections
    outcome.counts["moves of a shard"] = world.invariants.moves
    outcome.counts["deaths at a sync"] = world.deaths
    await world.close()
    return outcome


async def _join(world: World, *gids: int) -> None:
    """Where sessions live for seconds, a request whose answer was lost may be too old to be retried: then look."""
    while not (await world.config()).groups:
        with contextlib.suppress(AdminRefused):
            await world.join(*gids)


async def _serve_while_a_taker_stays_low(world: World, rng: Random, work: Workload) -> None:
    """Shards are given to a group whose disks get low in the middle of it, and stay so: every key is served.

    From a settled map: what is split or merged while it moves has another id at the giver (docs/sharding.md, Limits).
    """
    await world.settle(SETTLE_SECONDS)
    config = await world.config()
    gid = rng.choice(sorted(config.groups))
    others = sorted(shard.id for shard in config.by_id.values() if shard.gid != gid)
    for shard in rng.sample(others, min(3, len(others))):
        with contextlib.suppress(AdminRefused):  # where sessions live for seconds, a slow one may be too old
            await world.move(shard, gid)
        await asyncio.sleep(rng.choice([0, 0, rng.uniform(0, 0.05)]))
    for process in world.of(gid):
        world.set_room(process, Room.LOW)
    await asyncio.sleep(rng.uniform(0, 2.0))
    try:
        async with asyncio.timeout(SETTLE_SECONDS):
            await work.read_all(world.clerk())
    except TimeoutError:
        raise AssertionError(
            "\n".join(["not every key is served:", *world.leftovers(), *world.tell()])
        ) from None
    if others and rng.random() < 0.3:
        with contextlib.suppress(AdminRefused):  # somebody has moved or merged it meanwhile
            await world.move(rng.choice(others), rng.choice(sorted(config.groups)))
    for process in world.of(gid):
        world.set_room(process, Room.PLENTY)


def run_seed(seed: int) -> Outcome:
    """One seed in a worker. Events without end, or memory without bound, are failures too."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGVTALRM, _took_too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        with loop.silence():
            return loop.run(story(seed), limit=LIMIT_SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


class TookTooLong(KeyboardInterrupt):
    """Of this kind, because an event loop catches and logs any other that a callback raises."""


def _took_too_long(*_: object) -> None:
    raise TookTooLong(f"{CPU_SECONDS} seconds of CPU: events without end?")


def soak(seeds: Iterable[int], workers: int) -> int:
    """Run the seeds side by side; the exit status."""
    began, totals, virtual, count = time.monotonic(), Counter[str](), 0.0, 0
    with ProcessPoolExecutor(workers) as pool:
        futures = {pool.submit(run_seed, seed): seed for seed in seeds}
        for future in as_completed(futures):
            error, seed = future.exception(), futures[future]
            if error is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                print(f"\nseed {seed} failed: {type(error).__name__}: {str(error)[:3000]}")
                print(f"replay it: .venv/bin/python -m tests.sim.soak --seed {seed} --trace")
                return 1
            count += 1
            totals += future.result().counts
            virtual += future.result().virtual_seconds
            _show_progress(count, len(futures), time.monotonic() - began)
    print(f"\n{count} seeds, 0 failures, {time.monotonic() - began:.0f} s, {virtual:.0f} virtual seconds")
    for name, number in totals.most_common():
        print(f"{number:>10,}  {name}")
    return 0


def _show_progress(count: int, total: int, seconds: float) -> None:
    left = seconds / count * (total - count)
    bar = "#" * (40 * count // total)
    line = f"[{bar:<40}] {count}/{total} seeds, {left:.0f} s left "
    if sys.stdout.isatty():
        print(f"\r{line}", end="", flush=True)
    elif count % max(1, total // 20) == 0:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, help="run this one only")
    parser.add_argument("--trace", action="store_true", help="print every message, fault and change of state")
    options = parser.parse_args()
    if options.seed is not None:
        printing = print if options.trace else None
        with loop.silence():
            print(loop.run(story(options.seed, printing=printing), limit=LIMIT_SECONDS))
        return
    sys.exit(soak(range(options.first, options.first + options.seeds), options.workers))


if __name__ == "__main__":
    main()
