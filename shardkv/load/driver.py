"""Callers of one clerk: closed-loop, or at a given rate.

Closed: each caller begins its next operation when the last one ended. Open: operations
are due at fixed times, whoever is late; an operation's latency counts from the time it
was *due*, so that a stall is charged to everybody who had to wait for it and cannot hide
("coordinated omission", Tene).

The blocking clerk's callers are threads. They are measured the same way; the clerk's
event loop has the other half of the interpreter's time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import TypeVar

from client import AsyncShardClerk, ShardClerk, ShardKVError
from client.clerk import Consistency
from shardkv.load.figures import INTERVAL_SECONDS, Interval
from shardkv.load.workload import INSERT, KINDS, MODIFY, READ, SCAN, UPDATE, Source

T = TypeVar("T")
Emit = Callable[[int, Interval], None]
GroupOf = Callable[[bytes], int]


@dataclass(frozen=True)
class Plan:
    """What one worker does. `operations` or `seconds` bounds it, whichever is given."""

    callers: int
    operations: int | None
    seconds: float | None
    rate: float | None  # operations a second, due at even distances; None: closed loop
    warm_up_seconds: float
    consistency: Consistency


class Recorder:
    """Gathers what one worker measures, and hands it on interval by interval."""

    def __init__(self, group_of: GroupOf, emit: Emit) -> None:
        self._group_of, self._emit = group_of, emit
        self._latencies: list[list[float]] = [[] for _ in KINDS]
        self._groups: list[int] = []
        self._current = Interval()
        self.began = 0.0

    def done(self, kind: int, key: bytes, latency: float) -> None:  # hot: runs per operation
        self._latencies[kind].append(latency)
        self._groups.append(self._group_of(key))

    def failed(self, error: ShardKVError) -> None:
        self._current.errors += 1
        self._current.first_error = self._current.first_error or f"{type(error).__name__}: {error}"

    def flush(self, index: int) -> None:
        """Close an interval."""
        interval, self._current = self._current, Interval()
        interval.by_group = Counter(_take(self._groups))
        for histogram, values in zip(interval.by_kind, self._latencies, strict=True):
            histogram.add_all(_take(values))
        self._emit(index, interval)


def _take(values: list[T]) -> list[T]:
    """Empty the list, but for what other threads append meanwhile: that is the next interval's."""
    taken = values[:]
    del values[: len(taken)]
    return taken


class Schedule:
    """Hands out the times at which operations are due: 0.0 for at once. Ends when the plan says so."""

    def __init__(self, plan: Plan, began: float, clock: Callable[[], float]) -> None:
        self._plan, self._clock = plan, clock
        self.measured_from = began + plan.warm_up_seconds
        self._until = self.measured_from + plan.seconds if plan.seconds is not None else float("inf")
        self._left = islice(count(), plan.operations) if plan.operations is not None else count()
        self._began, self._turns = began, count()

    def next(self) -> float | None:  # hot: runs per operation
        """When the next operation is due, None at the end. Threads may share it: each count is one call into C."""
        rate = self._plan.rate
        now = self._clock()
        if now >= self._until:
            return None
        if now >= self.measured_from and next(self._left, None) is None:
            return None
        if rate is None:
            return 0.0
        return self._began + next(self._turns) / rate


async def drive(clerk: AsyncShardClerk, source: Source, plan: Plan, recorder: Recorder) -> float:
    """Run the plan with tasks; returns how many seconds the measured part took."""
    clock = time.perf_counter
    schedule = Schedule(plan, clock(), clock)
    caller = _AsyncCaller(clerk, source, plan.consistency)
    recorder.began = schedule.measured_from

    async def call() -> None:  # hot: runs per operation
        done, operations, draw_key, draw_kind = (
            recorder.done,
            caller.operations,
            source.draw_key,
            source.draw_kind,
        )
        measured_from, next_due = schedule.measured_from, schedule.next
        while (due := next_due()) is not None:
            kind = draw_kind()
            key = source.new_key() if kind == INSERT else draw_key()
            began = clock()
            if due:
                if due > began:
                    await asyncio.sleep(due - began)
                began = due
            try:
                await operations[kind](key)
            except ShardKVError as error:
                recorder.failed(error)
                continue
            if began >= measured_from:
                done(kind, key, clock() - began)

    flushing = asyncio.create_task(_flush_forever(recorder))
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(plan.callers):
                group.create_task(call())
    finally:
        flushing.cancel()
    return _finish(recorder, clock())


def _finish(recorder: Recorder, now: float) -> float:
    seconds = max(now - recorder.began, 1e-9)
    recorder.flush(int(seconds / INTERVAL_SECONDS))
    return seconds


async def _flush_forever(recorder: Recorder) -> None:
    index = 0
    while True:
        end = recorder.began + (index + 1) * INTERVAL_SECONDS
        await asyncio.sleep(max(0.0, end - time.perf_counter()))
        recorder.flush(index)
        index += 1


class _AsyncCaller:
    def __init__(self, clerk: AsyncShardClerk, source: Source, consistency: Consistency) -> None:
        self._clerk, self._source, self._consistency = clerk, source, consistency
        by_kind: dict[int, Callable[[bytes], Awaitable[object]]] = {
            READ: self._read,
            UPDATE: self._put,
            INSERT: self._put,
            SCAN: self._scan,
            MODIFY: self._modify,
        }
        self.operations = [by_kind[kind] for kind in range(len(KINDS))]

    def _read(self, key: bytes) -> Awaitable[object]:
        return self._clerk.get(key, consistency=self._consistency)

    def _put(self, key: bytes) -> Awaitable[object]:
        return self._clerk.put(key, self._source.value())

    async def _scan(self, key: bytes) -> None:
        async for _ in self._clerk.scan(key, None, self._source.scan_length(), consistency=self._consistency):
            pass

    async def _modify(self, key: bytes) -> None:
        await self._clerk.get(key)
        await self._clerk.put(key, self._source.value())


async def load(clerk: AsyncShardClerk, source: Source, numbers: Iterator[bytes], at_once: int) -> None:
    """Put each of these keys once, so that reads find something."""

    async def put_some() -> None:
        for key in numbers:
            await clerk.put(key, source.value(), timeout=60)

    await asyncio.gather(*(put_some() for _ in range(at_once)))


def drive_threads(clerk: ShardClerk, source: Source, plan: Plan, recorder: Recorder) -> float:
    """The same with the blocking clerk and a thread for each caller."""
    clock = time.perf_counter
    schedule = Schedule(plan, clock(), clock)
    recorder.began = schedule.measured_from
    failures: list[BaseException] = []
    operations = _blocking_operations(clerk, source, plan.consistency)

    def call() -> None:  # hot: runs per operation
        try:
            while (due := schedule.next()) is not None:
                kind = source.draw_kind()
                key = source.new_key() if kind == INSERT else source.draw_key()
                began = clock()
                if due:
                    if due > began:
                        time.sleep(due - began)
                    began = due
                try:
                    operations[kind](key)
                except ShardKVError as error:
                    recorder.failed(error)
                    continue
                if began >= schedule.measured_from:
                    recorder.done(kind, key, clock() - began)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(plan.callers)]
    for thread in threads:
        thread.start()
    index = 0
    for thread in threads:
        while thread.is_alive():
            end = recorder.began + (index + 1) * INTERVAL_SECONDS
            thread.join(max(0.0, end - clock()))
            if clock() >= end:
                recorder.flush(index)
                index += 1
    if failures:
        raise failures[0]
    return _finish(recorder, clock())


def _blocking_operations(
    clerk: ShardClerk, source: Source, consistency: Consistency
) -> list[Callable[[bytes], object]]:
    def read(key: bytes) -> object:
        return clerk.get(key, consistency=consistency)

    def put(key: bytes) -> None:
        clerk.put(key, source.value())

    def scan(key: bytes) -> object:
        return sum(1 for _ in clerk.scan(key, None, source.scan_length(), consistency=consistency))

    def modify(key: bytes) -> None:
        clerk.get(key)
        clerk.put(key, source.value())

    by_kind: dict[int, Callable[[bytes], object]] = {
        READ: read,
        UPDATE: put,
        INSERT: put,
        SCAN: scan,
        MODIFY: modify,
    }
    return [by_kind[kind] for kind in range(len(KINDS))]
