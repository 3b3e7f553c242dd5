"""Writers that do not wait: several writes to a key at once, some cancelled, some with little time. Order is judged.

Each writer has keys that nobody else writes. Every token is unique and numbered in the order of the calls, so the
value of a key shows which writes took effect, and in which order.
"""

from __future__ import annotations

import asyncio
import contextvars
from dataclasses import dataclass
from random import Random

from shardkv.client import AsyncShardClerk
from shardkv.client.errors import OutcomeUnknown, ShardKVError
from tests.sim.loop import Host

DONE, UNKNOWN, NOT_DONE = "done", "unknown", "not done"


@dataclass
class Write:
    kind: str  # put, append
    outcome: str = ""


class OutOfOrder(AssertionError):
    """A value that no order of the calls explains."""


class Pipelines:
    def __init__(self, seed: int, keys: int = 2) -> None:
        self._rng = Random(seed)
        self._keys = keys
        self.writes: dict[bytes, list[Write]] = {}
        self._clerk_of: dict[bytes, AsyncShardClerk] = {}
        self._stop = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, clerk: AsyncShardClerk, host: Host | None = None) -> None:
        number = len(self._tasks)
        context = contextvars.copy_context() if host is None else host.context
        # Across printable ASCII, as the keys of `Workload`, which deletes what lies behind its own.
        keys = [bytes([0x21 + 90 * n // self._keys]) + b"/a-own-%d" % number for n in range(self._keys)]
        task = asyncio.get_running_loop().create_task(self._run(clerk, keys), context=context)
        self._tasks.append(task)

    async def stop(self) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)

    async def read_all(self, clerk: AsyncShardClerk) -> int:
        """Judge every key once more; the number of writes."""
        for key in self.writes:
            self._judge(key, await clerk.get(key))
        return sum(map(len, self.writes.values()))

    async def _run(self, clerk: AsyncShardClerk, keys: list[bytes]) -> None:
        rng = self._rng
        for key in keys:
            self.writes[key] = []
        while not self._stop:
            key = rng.choice(keys)
            burst = []
            for _ in range(rng.choice([1, 2, 2, 5, 20])):
                burst.append(self._write(clerk, key))
                if rng.random() < 0.5:
                    await asyncio.sleep(rng.uniform(0, 0.01))  # so that they leave in several frames
            await asyncio.gather(*burst)
            if rng.random() < 0.5:
                try:
                    value = await clerk.get(key)
                except ShardKVError:
                    continue
                self._judge(key, value)
            await asyncio.sleep(rng.uniform(0, 0.2))

    def _write(self, clerk: AsyncShardClerk, key: bytes) -> asyncio.Task[None]:
        rng, writes = self._rng, self.writes[key]
        write = Write(rng.choices(["put", "append"], [1, 4])[0])
        token = b"%d;" % len(writes)
        writes.append(write)
        timeout = rng.choice([None, None, None, 0.05, 0.5])
        leave_after = rng.choice([None, None, None, 0.0, 0.02, 0.3])

        async def call() -> None:
            write.outcome = UNKNOWN  # so that a look at a cancelled one sees what is true
            try:
                async with asyncio.timeout(leave_after):
                    if write.kind == "put":
                        await clerk.put(key, token, timeout=timeout)
                    else:
                        await clerk.append(key, token, timeout=timeout)
                write.outcome = DONE
            except OutcomeUnknown:
                pass
            except ShardKVError:  # before TimeoutError, which DeadlineExceeded is too
                write.outcome = NOT_DONE
            except TimeoutError:  # cancelled
                pass

        # A task begins in the order in which it was made, and so do the calls.
        return asyncio.get_running_loop().create_task(call())

    def _judge(self, key: bytes, value: bytes | None) -> None:
        """Raises OutOfOrder unless some of the unknown writes explain the value."""
        writes = self.writes[key]
        seen = [int(token) for token in (value or b"").split(b";")[:-1]]
        first = seen[0] if seen else -1
        wrong = (
            sorted(set(seen)) != seen
            or any(writes[n].outcome == NOT_DONE for n in seen)
            or any(writes[n].kind == "put" for n in seen[1:])
            or any(write.kind == "put" and write.outcome == DONE for write in writes[first + 1 :])
            or any(
                write.outcome == DONE and n not in seen
                for n, write in enumerate(writes)
                if n > first or writes[first].kind == "append"
            )
        )
        if wrong:
            told = [f"{n}:{write.kind} {write.outcome}" for n, write in enumerate(writes)][max(first - 5, 0) :]
            raise OutOfOrder(f"{key!r} is {value!r} after {told}")
