"""Clients that do a bit of everything, write down what they saw, and are judged."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Sequence
from random import Random

from shardkv.client import AsyncShardClerk
from shardkv.client.clerk import Consistency
from shardkv.client.errors import (
    DeadlineExceeded,
    NotANumber,
    OutcomeUnknown,
    OutOfSpace,
    SessionExpired,
    Unavailable,
)
from tests.check.linearizability import NO_NUMBER, Operation, check
from tests.sim.loop import Host, world_time

KINDS = ("get", "append", "put", "cas", "delete", "scan", "incr", "new", "erase", "count")
ALL = (5, 6, 1, 2, 0.5, 0.5, 4, 0.5, 0.2, 0.5)
READS = (1, 0, 0, 0, 0, 0.1, 0, 0, 0, 0.1)  # a caller that no lost write can hold up: it sees what is stale


class Workload:
    """Callers on a few keys that lie in different shards. Every written value is unique."""

    def __init__(self, seed: int, keys: int = 6, is_alone: bool = True) -> None:
        """`is_alone`: nobody else has keys, so ranges that are deleted may reach from one of ours to the next."""
        self.is_alone = is_alone
        self.rng = Random(seed)
        # Keys across printable ASCII, so that they fall into different shards.
        self.keys = [bytes([0x21 + 90 * n // keys]) + b"/key" for n in range(keys)]
        self.counters = [key + b"/n" for key in self.keys[::3]]
        self.history: list[Operation] = []
        self.unknown = 0
        self._stop = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, clerk: AsyncShardClerk, callers: int = 1, host: Host | None = None) -> None:
        """Begin to call; on `host`, which has a clock of its own and may be paused, if it is given."""
        for _ in range(callers):
            number = len(self._tasks)
            context = contextvars.copy_context() if host is None else host.context
            task = asyncio.get_running_loop().create_task(self._call(clerk, number), context=context)
            self._tasks.append(task)

    async def stop(self) -> None:
        """Let every caller finish what it is at. An error of any of them is raised."""
        self._stop = True
        await asyncio.gather(*self._tasks)

    async def read_all(self, clerk: AsyncShardClerk) -> None:
        """A last look at every key, so that nothing is lost unseen."""
        for key in self.keys + self.counters:
            called = world_time()
            self._note("get", key, None, await clerk.get(key), called)
        await self._scan(clerk)

    def judge(self) -> int:
        """Raises NotLinearizable. Returns how many operations were judged."""
        return check(self.history)

    async def _call(self, clerk: AsyncShardClerk, number: int) -> None:
        turn = 0
        while not self._stop:
            turn += 1
            await self._one(clerk, b"%d.%d;" % (number, turn), READS if number % 3 == 2 else ALL)
            await asyncio.sleep(self.rng.uniform(0, 0.04))

    async def _one(self, clerk: AsyncShardClerk, token: bytes, weights: Sequence[float]) -> None:
        rng = self.rng
        kind = rng.choices(KINDS, weights)[0]
        # A counter is read, deleted and now and then set to what is no number; only counters are counted up.
        counts = rng.random() < {"incr": 1.0, "get": 0.2, "delete": 0.5, "put": 0.1}.get(kind, 0)
        key = rng.choice(self.counters if counts else self.keys)
        called = world_time()
        argument: object = None
        result: object = None
        try:
            match kind:
                case "get":
                    consistency: Consistency = rng.choice(("leader", "any"))
                    result = await clerk.get(key, consistency=consistency)
                case "append":
                    argument = token
                    await clerk.append(key, token)
                case "put":
                    argument = token
                    await clerk.put(key, token)
                case "delete":
                    result = await clerk.delete(key)
                case "cas":
                    expected = await clerk.get(key)
                    self._note("get", key, None, expected, called)
                    called = world_time()
                    argument = (expected, token)
                    result = await clerk.cas(key, expected, token)
                case "incr":
                    argument = rng.randint(1, 1 << 30)
                    try:
                        result = await clerk.incr(key, argument)
                    except NotANumber:
                        result = NO_NUMBER
                case "new":
                    argument, kind = (None, token), "cas"
                    result = await clerk.put_if_absent(key, token)
                case "erase":
                    await self._erase(clerk, key)
                    return
                case "count":
                    result = bool(
                        await clerk.count(key, key + b"\0", consistency=rng.choice(["leader", "any"]))
                    )
                case _:
                    await self._scan(clerk)
                    return
        except (OutcomeUnknown, SessionExpired):  # the latter: an earlier attempt may have been done
            self.unknown += 1
            self.history.append(Operation(kind, key, argument, None, called))
            return
        except (DeadlineExceeded, Unavailable, OutOfSpace):
            return  # surely not done
        self._note(kind, key, argument, result, called)

    async def _erase(self, clerk: AsyncShardClerk, first: bytes) -> None:
        """A deleted range is a delete of each of its keys somewhere in the call's time"""
        # To before the next key's first letter: what lies there is other writers' (`pipelines.py`).
        ends = [first + b"\0", first + b"0"]
        if self.is_alone:
            ends += [key[:1] for key in self.keys if key > first][:1]
        end = self.rng.choice(ends)
        inside = [key for key in self.keys + self.counters if first <= key < end]
        called = world_time()
        try:
            await clerk.delete_range(first, end)
        except OutcomeUnknown:
            self.unknown += 1
            self.history += [Operation("erase", key, None, None, called) for key in inside]
        else:
            for key in inside:
                self._note("erase", key, None, None, called)

    async def _scan(self, clerk: AsyncShardClerk) -> None:
        """Each key's value in a scan is a read of it somewhere in the scan's time."""
        called = world_time()
        reverse, keys_only = self.rng.random() < 0.5, self.rng.random() < 0.3
        found: dict[bytes, bytes] = {}
        last: bytes | None = None
        try:
            if keys_only:
                found = {key: b"" async for key in clerk.scan(reverse=reverse, keys_only=True)}
            else:
                async for key, value in clerk.scan(reverse=reverse):
                    assert last is None or (key < last if reverse else key > last), "a scan goes one way"
                    last = key
                    found[key] = value
        except (DeadlineExceeded, Unavailable):
            return
        for key in self.keys + self.counters:
            if keys_only:
                self._note("count", key, None, key in found, called)
            else:
                self._note("get", key, None, found.get(key), called)

    def _note(self, kind: str, key: bytes, argument: object, result: object, called: float) -> None:
        now = world_time()
        self.history.append(Operation(kind, key, argument, result, called, now))
