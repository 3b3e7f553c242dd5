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
from itertools import count
from typing import TypeVar

from shardkv.client import AsyncShardClerk, ShardClerk, ShardKVError
from shardkv.client.clerk import Consistency
from shardkv.load.figures import INTERVAL_SECONDS, Interval
from shardkv.load.workload import (
    BACK,
    COUNT,
    ERASE,
    INCR,
    INSERT,
    KINDS,
    MODIFY,
    NEW,
    READ,
    SCAN,
    UPDATE,
    Source,
    counter_of,
    few_after,
)

T = TypeVar("T")
Emit = Callable[[int, Interval], None]


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

    def __init__(self, answered_by_group: Callable[[], dict[int, int]], emit: Emit) -> None:
        self._answered_by_group, self._emit = answered_by_group, emit
        self._answered_before: Counter[int] = Counter()
        self._current = Interval()
        self.latencies: list[list[float]] = [[] for _ in KINDS]  # callers append to the list of a kind
        self.measured_from = 0.0

    def begin(self, measured_from: float) -> None:
        self.measured_from = measured_from

    def failed(self, error: ShardKVError) -> None:
        self._current.errors += 1
        self._current.first_error = self._current.first_error or f"{type(error).__name__}: {error}"

    def warmed_up(self) -> None:
        """What the groups answered until now does not count."""
        self._answered_before = Counter(self._answered_by_group())

    def flush(self, index: int) -> None:
        """Close an interval."""
        interval, self._current = self._current, Interval()
        answered = Counter(self._answered_by_group())
        interval.by_group, self._answered_before = answered - self._answered_before, answered
        for histogram, values in zip(interval.by_kind, self.latencies, strict=True):
            histogram.add_all(_take(values))
        self._emit(index, interval)


def _take(values: list[T]) -> list[T]:
    """Empty the list, but for what other threads append meanwhile: that is the next interval's."""
    taken = values[:]
    del values[: len(taken)]
    return taken


class Schedule:
    """When the next operation begins. Ends when the plan says so."""

    def __init__(self, plan: Plan, began: float, clock: Callable[[], float]) -> None:
        self._rate, self._clock = plan.rate, clock
        self.measured_from = began + plan.warm_up_seconds
        self._until = self.measured_from + plan.seconds if plan.seconds is not None else float("inf")
        self._left = iter(range(plan.operations)) if plan.operations is not None else count()
        self._began, self._turns = began, count()

    def next(self) -> float | None:  # hot: runs per operation
        """When the next operation is due: now, or by the rate; None at the end.

        Threads may share it: each count is one call into C.
        """
        now = self._clock()
        due = now if self._rate is None else self._began + next(self._turns) / self._rate
        if max(now, due) >= self._until:
            return None
        if due >= self.measured_from and next(self._left, None) is None:
            return None
        return due


async def drive(clerk: AsyncShardClerk, source: Source, plan: Plan, recorder: Recorder) -> float:
    """Run the plan with tasks; returns how many seconds the measured part took."""
    clock = time.perf_counter
    schedule = Schedule(plan, clock(), clock)
    recorder.begin(schedule.measured_from)
    operations = _async_operations(clerk, source, plan.consistency)

    async def call() -> None:  # hot: runs per operation
        latencies, draw_key, draw_kind = recorder.latencies, source.draw_key, source.draw_kind
        measured_from, open_loop, next_due = schedule.measured_from, plan.rate is not None, schedule.next
        while (due := next_due()) is not None:
            kind = draw_kind()
            key = source.new_key() if kind == INSERT else draw_key()
            if open_loop and (early := due - clock()) > 0:
                await asyncio.sleep(early)
            try:
                await operations[kind](key)
            except ShardKVError as error:
                recorder.failed(error)
                continue
            if due >= measured_from:
                latencies[kind].append(clock() - due)

    flushing = asyncio.create_task(_flush_forever(recorder))
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(plan.callers):
                group.create_task(call())
    finally:
        flushing.cancel()
    return _finish(recorder, clock())


def _finish(recorder: Recorder, now: float) -> float:
    seconds = max(now - recorder.measured_from, 1e-9)
    recorder.flush(int(seconds / INTERVAL_SECONDS))
    return seconds


async def _flush_forever(recorder: Recorder) -> None:
    index = 0
    await asyncio.sleep(recorder.measured_from - time.perf_counter())
    recorder.warmed_up()
    while True:
        end = recorder.measured_from + (index + 1) * INTERVAL_SECONDS
        await asyncio.sleep(max(0.0, end - time.perf_counter()))
        recorder.flush(index)
        index += 1


def _async_operations(
    clerk: AsyncShardClerk, source: Source, consistency: Consistency
) -> list[Callable[[bytes], Awaitable[object]]]:
    def read(key: bytes) -> Awaitable[object]:
        return clerk.get(key, consistency=consistency)

    def put(key: bytes) -> Awaitable[object]:
        return clerk.put(key, source.value())

    async def scan(key: bytes) -> None:
        async for _ in clerk.scan(key, None, source.scan_length(), consistency=consistency):
            pass

    async def modify(key: bytes) -> None:
        await clerk.get(key)
        await clerk.put(key, source.value())

    async def back(key: bytes) -> None:
        async for _ in clerk.scan(None, key, source.scan_length(), reverse=True, consistency=consistency):
            pass

    by_kind: dict[int, Callable[[bytes], Awaitable[object]]]
    by_kind = {READ: read, UPDATE: put, INSERT: put, SCAN: scan, MODIFY: modify, BACK: back}
    by_kind[INCR] = lambda key: clerk.incr(counter_of(key))
    by_kind[NEW] = lambda key: clerk.put_if_absent(key, source.value())
    by_kind[COUNT] = lambda key: clerk.count(*few_after(key), consistency=consistency)
    by_kind[ERASE] = lambda key: clerk.delete_range(*few_after(key))
    return [by_kind[kind] for kind in range(len(KINDS))]


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
    recorder.begin(schedule.measured_from)
    failures: list[BaseException] = []
    operations = _blocking_operations(clerk, source, plan.consistency)

    def call() -> None:  # hot: runs per operation
        latencies, measured_from = recorder.latencies, schedule.measured_from
        while (due := schedule.next()) is not None:
            kind = source.draw_kind()
            key = source.new_key() if kind == INSERT else source.draw_key()
            if plan.rate is not None and (early := due - clock()) > 0:
                time.sleep(early)
            try:
                operations[kind](key)
            except ShardKVError as error:
                recorder.failed(error)
                continue
            if due >= measured_from:
                latencies[kind].append(clock() - due)

    def guarded() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(plan.callers)]
    for thread in threads:
        thread.start()
    time.sleep(max(0.0, schedule.measured_from - clock()))
    recorder.warmed_up()
    index = 0
    for thread in threads:
        while thread.is_alive():
            end = schedule.measured_from + (index + 1) * INTERVAL_SECONDS
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

    def back(key: bytes) -> object:
        pairs = clerk.scan(None, key, source.scan_length(), reverse=True, consistency=consistency)
        return sum(1 for _ in pairs)

    by_kind: dict[int, Callable[[bytes], object]]
    by_kind = {READ: read, UPDATE: put, INSERT: put, SCAN: scan, MODIFY: modify, BACK: back}
    by_kind[INCR] = lambda key: clerk.incr(counter_of(key))
    by_kind[NEW] = lambda key: clerk.put_if_absent(key, source.value())
    by_kind[COUNT] = lambda key: clerk.count(*few_after(key), consistency=consistency)
    by_kind[ERASE] = lambda key: clerk.delete_range(*few_after(key))
    return [by_kind[kind] for kind in range(len(KINDS))]
