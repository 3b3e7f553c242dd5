"""About how large each shard is: exact for small ones, estimated for others, and never in anybody's way.

While somebody asks for the status, one shard after the other is looked at, about a millisecond
at a time. A small shard is read to its end; of a large one the engine tells what its
tables say.
"""

from __future__ import annotations

import asyncio
from itertools import islice

from shardkv.state import layout
from shardkv.state.machine import ShardMachine

LOOK_PAIRS = 2000
LARGE_BYTES = 32 << 20  # in tables; what is not in tables yet is less than that
REST_SECONDS = 0.05  # after a look
ASKED_SECONDS = 15.0  # nobody has asked for so long: nobody wants to know


class Sizes:
    def __init__(self, machine: ShardMachine) -> None:
        self._machine = machine
        self._known: dict[int, int] = {}
        self._looking: asyncio.Task[None] | None = None
        self._asked_at = 0.0

    def all(self) -> dict[int, int]:
        """Bytes of keys and values by shard, as of a moment ago. Shards not looked at yet are not in it."""
        loop = asyncio.get_running_loop()
        self._asked_at = loop.time()
        if self._looking is None or self._looking.done():
            self._looking = loop.create_task(self._look_around())
        return self._known

    async def _look_around(self) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() - self._asked_at < ASKED_SECONDS:
            rows = self._machine.ownership.rows
            served = [shard for shard, row in rows.items() if row.serves and row.fence is None]
            self._known = {shard: size for shard, size in self._known.items() if shard in served}
            for shard in served:
                await self._look(shard)
            await asyncio.sleep(REST_SECONDS)

    async def _look(self, shard: int) -> None:
        engine, size = self._machine.engine, 0
        cursor: bytes | None = None
        while True:
            await asyncio.sleep(REST_SECONDS)
            row = self._machine.ownership.rows.get(shard)
            if row is None or not row.serves or row.fence is not None:
                return
            low, high = layout.data_range(row.start, row.end)
            if cursor is None and (estimate := engine.estimate(low, high)) >= LARGE_BYTES:
                self._known[shard] = estimate
                return
            pairs = list(islice(engine.scan(max(low, cursor or low), high), LOOK_PAIRS))
            size += sum(len(key) - 1 + len(value) for key, value in pairs)
            if len(pairs) < LOOK_PAIRS:
                self._known[shard] = size
                return
            self._known[shard] = max(size, self._known.get(shard, 0))  # until all of it is read
            cursor = pairs[-1][0] + b"\0"

    async def stop(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
