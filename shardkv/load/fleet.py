"""Several worker processes under one parent: they load, wait for each other, run, and report as they go.

A clerk in Python is one core at most, so more load takes more processes. Each worker
has a pipe to the parent; what is said on it, in order:

    worker  ("loaded", n)…  ("ready",)  ("interval", index, data)…  ("done", seconds), ("failed", text) or ("unreachable", text)
    parent                            ("go",)

A worker whose parent is gone ends at its next word; the parent ends the workers that
are left when one fails.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import uvloop

from shardkv.client import AsyncShardClerk, DeadlineExceeded, ShardClerk, Unavailable
from shardkv.load import driver
from shardkv.load.driver import Plan, Recorder
from shardkv.load.figures import Figures, Interval
from shardkv.load.workload import Source, Workload, bench_key
from shardkv.wire.auth import Login, Operator
from shardkv.wire.tls import Tls

LOAD_AT_ONCE = 500
LOADED_EVERY = 10_000
JOIN_SECONDS = 10.0


class WorkerFailed(Exception):
    """A worker could not do its part; the text is what it said."""


@dataclass(frozen=True)
class Job:
    """All that the workers are told."""

    controllers: tuple[str, ...]
    workload: Workload
    plan: Plan  # of the whole fleet: callers, operations and rate are divided
    load: bool
    blocking: bool
    timeout: float
    processes: int
    tls: Tls | None = None
    login: Login | Operator | None = None

    def share(self, worker: int) -> Plan:
        """One worker's part; the parts add up."""

        def part(whole: int) -> int:
            return whole // self.processes + (worker < whole % self.processes)

        plan = self.plan
        return Plan(
            part(plan.callers),
            None if plan.operations is None else part(plan.operations),
            plan.seconds,
            None if plan.rate is None else plan.rate / self.processes,
            plan.warm_up_seconds,
            plan.consistency,
        )


def run(job: Job, on_loaded: Callable[[int], None], on_interval: Callable[[int, Interval], None]) -> Figures:
    """Run the fleet to its end. Raises WorkerFailed; Unavailable when there is no cluster to load."""
    context = multiprocessing.get_context("spawn")  # a clerk does not survive a fork
    pipes: list[Connection[Any, Any]] = []
    workers = []
    try:
        for number in range(job.processes):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(job, number, theirs), daemon=True)
            worker.start()
            theirs.close()
            pipes.append(ours)
            workers.append(worker)
        return _attend(pipes, on_loaded, on_interval)
    finally:
        for worker in workers:
            worker.join(JOIN_SECONDS if not any(pipe.closed for pipe in pipes) else 0.1)
            if worker.is_alive():
                worker.kill()
                worker.join()


def _attend(
    pipes: Sequence[Connection[Any, Any]],
    on_loaded: Callable[[int], None],
    on_interval: Callable[[int, Interval], None],
) -> Figures:
    figures, ready, left = Figures(), 0, list(pipes)
    while left:
        for pipe in wait(left):
            assert isinstance(pipe, Connection)
            try:
                said = pipe.recv()
            except EOFError:
                raise WorkerFailed("a worker ended without a word: was it killed?") from None
            match said:
                case ("loaded", count):
                    on_loaded(count)
                case ("ready",):
                    ready += 1
                    if ready == len(pipes):
                        for each in pipes:
                            each.send(("go",))
                case ("interval", index, data):
                    interval = Interval.decode(data)
                    figures.add(index, interval)
                    on_interval(index, interval)
                case ("done", seconds):
                    figures.seconds = max(figures.seconds, seconds)
                    left.remove(pipe)
                case ("failed", text):
                    raise WorkerFailed(text)
                case ("unreachable", text):
                    raise Unavailable(text)
    return figures


# ---- in a worker


def _work(job: Job, number: int, pipe: Connection[Any, Any]) -> None:
    try:
        work = _with_threads if job.blocking else _with_tasks
        pipe.send(("done", work(job, number, pipe)))
    except (BrokenPipeError, KeyboardInterrupt):
        pass  # the parent has gone, or was interrupted and ends us: nobody to tell
    except (Unavailable, DeadlineExceeded) as error:
        pipe.send(("unreachable", str(error)))
    except BaseException as error:
        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


def _numbers(job: Job, number: int, pipe: Connection[Any, Any]) -> Iterator[bytes]:
    """This worker's keys of those to be loaded, telling the parent how far it is."""
    for turn, key in enumerate(range(number, job.workload.keys, job.processes), 1):
        yield bench_key(key)
        if turn % LOADED_EVERY == 0:
            pipe.send(("loaded", LOADED_EVERY))


def _source(job: Job, number: int) -> Source:
    return Source(job.workload, number, job.processes, random.Random())


async def _prepare(
    clerk: AsyncShardClerk, source: Source, job: Job, number: int, pipe: Connection[Any, Any]
) -> None:
    await clerk.get(b"\x00")  # the map and the connections are no part of what is measured
    if job.load:
        await driver.load(clerk, source, _numbers(job, number, pipe), LOAD_AT_ONCE)


def _wait_for_the_others(pipe: Connection[Any, Any]) -> None:
    pipe.send(("ready",))
    pipe.recv()


def _with_tasks(job: Job, number: int, pipe: Connection[Any, Any]) -> float:
    async def work() -> float:
        async with AsyncShardClerk(job.controllers, timeout=job.timeout, tls=job.tls, login=job.login) as clerk:
            source = _source(job, number)
            await _prepare(clerk, source, job, number, pipe)
            _wait_for_the_others(pipe)
            return await driver.drive(
                clerk, source, job.share(number), _recorder(clerk.answered_by_group, pipe)
            )

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work())


def _with_threads(job: Job, number: int, pipe: Connection[Any, Any]) -> float:
    source = _source(job, number)

    async def prepare() -> None:
        async with AsyncShardClerk(job.controllers, timeout=job.timeout, tls=job.tls, login=job.login) as clerk:
            await _prepare(clerk, source, job, number, pipe)

    asyncio.run(prepare())
    with ShardClerk(job.controllers, timeout=job.timeout, tls=job.tls, login=job.login) as clerk:
        clerk.get(b"\x00")
        _wait_for_the_others(pipe)
        return driver.drive_threads(clerk, source, job.share(number), _recorder(clerk.answered_by_group, pipe))


def _recorder(answered_by_group: Callable[[], dict[int, int]], pipe: Connection[Any, Any]) -> Recorder:
    return Recorder(
        answered_by_group, lambda index, interval: pipe.send(("interval", index, interval.encode()))
    )
