"""`AsyncShardClerk`: the service for asyncio programs. Every call is one operation, batched by itself.

    async with AsyncShardClerk(["127.0.0.1:7000"]) as clerk:
        await clerk.put("greeting", b"hello")
        assert await clerk.get("greeting") == b"hello"

Any number of tasks of one loop may share a clerk. Its writes to one key take effect in the order in which
they were called; a call that was awaited is done before the next begins. docs/client.md tells what errors,
timeouts and cancelled calls mean.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from random import Random
from typing import Literal

from shardkv.client.batch import Writes
from shardkv.client.core import READ_LANES, WRITE_LANE, ClerkCore
from shardkv.client.errors import ShardKVError
from shardkv.client.operations import Operation
from shardkv.client.requests import Key, check_key, check_value, to_bytes
from shardkv.wire import frames
from shardkv.wire.auth import Login, Operator
from shardkv.wire.calls import Dialer
from shardkv.wire.dialer import TcpDialer
from shardkv.wire.frames import APPEND, CAS_OP, DELETE, GET, PUT, SCAN_OP, Limits, Status
from shardkv.wire.tls import Tls

Consistency = Literal["leader", "any", "stale"]
LIMITS = Limits()
SCAN_PAGE = 1000


class AsyncShardClerk:
    """The client of a shardkv cluster. Make and use it on one event loop.

    `controllers`: addresses of controller replicas. `timeout`: seconds that a call may
    take, retries and all; each call may have its own. A write whose outcome is not
    known by then raises OutcomeUnknown; all errors are ShardKVErrors. `tls`: for clusters that
    ask for it; raises BadCertificate where its files are not what they should be.
    """

    def __init__(
        self,
        controllers: Sequence[str],
        timeout: float = 10.0,
        *,
        limits: Limits = LIMITS,
        tls: Tls | None = None,
        login: Login | Operator | None = None,
        dialer: Dialer | None = None,
        rng: Random | None = None,
    ) -> None:
        if not controllers or isinstance(controllers, str):
            raise ValueError("controllers is a list of host:port")
        self.timeout = timeout
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._core = ClerkCore(
            controllers,
            dialer or TcpDialer(tls=tls, login=login),
            rng or Random(random.SystemRandom().getrandbits(128)),
        )

    async def __aenter__(self) -> AsyncShardClerk:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End outstanding calls with ClerkClosed and close the connections."""
        await self._core.close()

    # ---- writes

    async def put(self, key: Key, value: Key, *, timeout: float | None = None) -> None:
        """Set `key` to `value`."""
        limits = self._limits
        await self._submit(PUT, check_key(key, limits), check_value(value, limits), WRITE_LANE, timeout)

    async def append(self, key: Key, value: Key, *, timeout: float | None = None) -> None:
        """Add `value` to the end of what `key` has; an absent key has nothing."""
        await self._write(APPEND, key, check_value(value, self._limits), timeout)

    async def delete(self, key: Key, *, timeout: float | None = None) -> bool:
        """Remove `key`; whether it was there."""
        status, _ = await self._write(DELETE, key, b"", timeout)
        return status == Status.OK

    async def cas(self, key: Key, expected: Key | None, new: Key, *, timeout: float | None = None) -> bool:
        """Set `key` to `new` if it has `expected` (None: if it is absent); whether it was set."""
        before = None if expected is None else check_value(expected, self._limits)
        packed = frames.pack_cas(before, check_value(new, self._limits))
        status, _ = await self._write(CAS_OP, key, packed, timeout)
        return status == Status.OK

    # ---- reads

    async def get(
        self, key: Key, *, timeout: float | None = None, consistency: Consistency = "leader"
    ) -> bytes | None:
        """The value of `key`, None if it is absent.

        Linearizable from the leader or, with "any", from any replica; "stale" reads
        what one replica has now, which may be old.
        """
        data = check_key(key, self._limits)
        status, value = await self._submit(GET, data, b"", READ_LANES[consistency], timeout)
        return None if status == Status.NOT_FOUND else value

    async def multi_get(
        self, keys: Iterable[Key], *, timeout: float | None = None, consistency: Consistency = "leader"
    ) -> dict[bytes, bytes | None]:
        """The values of many keys, by key. Each is linearizable by itself."""
        wanted = [check_key(key, self._limits) for key in keys]
        values = await asyncio.gather(
            *(self.get(key, timeout=timeout, consistency=consistency) for key in wanted)
        )
        return dict(zip(wanted, values, strict=True))

    async def scan(
        self,
        start: Key | None = b"",
        end: Key | None = b"",
        limit: int | None = None,
        *,
        timeout: float | None = None,
        consistency: Consistency = "leader",
    ) -> AsyncIterator[tuple[bytes, bytes]]:
        """Pairs with start <= key < end in key order, fetched a page at a time as they are used.

        Empty or None ends are open. Each page is linearizable; a long scan does not
        freeze the data under it.
        """
        cursor, stop = to_bytes(start or b""), to_bytes(end or b"")
        left = limit if limit is not None else 1 << 62
        while left > 0 and not (stop and cursor >= stop):
            finished, cursor, pairs = await self._page(cursor, stop, min(left, SCAN_PAGE), timeout, consistency)
            for pair in pairs:
                yield pair
            left -= len(pairs)
            if finished:
                return

    async def _page(
        self, cursor: bytes, stop: bytes, limit: int, timeout: float | None, consistency: Consistency
    ) -> tuple[bool, bytes, list[tuple[bytes, bytes]]]:
        lane = READ_LANES[consistency]
        _, page = await self._submit(SCAN_OP, cursor, frames.pack_scan(stop, limit), lane, timeout)
        return frames.unpack_page(page)

    def batch(self) -> AsyncBatch:
        """Collect writes and send them together: `async with clerk.batch() as b: b.put(…)`."""
        return AsyncBatch(self)

    def answered_by_group(self) -> dict[int, int]:
        """How many operations each group has answered this clerk: how even the load is, at no cost."""
        return self._core.answered_by_group()

    # ---- inside

    async def _write(self, kind: int, key: Key, value: bytes, timeout: float | None) -> tuple[int, bytes]:
        return await self._submit(kind, check_key(key, self._limits), value, WRITE_LANE, timeout)

    def _submit(  # hot: runs per operation
        self, kind: int, key: bytes, value: bytes, lane: int, timeout: float | None
    ) -> asyncio.Future[tuple[int, bytes]]:
        self._core.check_process()
        future: asyncio.Future[tuple[int, bytes]] = self._loop.create_future()
        deadline = self._loop.time() + (self.timeout if timeout is None else timeout)
        self._core.submit(Operation(kind, key, value, deadline, future), lane)
        return future


class AsyncBatch(Writes):
    """Writes that leave together when the block ends. Each is exactly-once; together they are not atomic.

    Raises BatchError unless all were done; `results` tells of each.
    """

    def __init__(self, clerk: AsyncShardClerk) -> None:
        super().__init__(clerk._limits)
        self._clerk = clerk

    async def __aenter__(self) -> AsyncBatch:
        return self

    async def __aexit__(self, kind: object, *rest: object) -> None:
        if kind is not None:
            return
        writes, self._writes = self._writes, []
        begun: list[asyncio.Future[tuple[int, bytes]] | ShardKVError] = []
        for write in writes:
            try:
                begun.append(self._clerk._submit(*write, WRITE_LANE, None))
            except ShardKVError as error:  # it was not sent; those before it may have been
                begun.append(error)
        await asyncio.gather(
            *(each for each in begun if isinstance(each, asyncio.Future)), return_exceptions=True
        )
        answers: list[tuple[int, bytes] | ShardKVError] = []
        for each in begun:
            try:
                answers.append(each if isinstance(each, ShardKVError) else each.result())
            except ShardKVError as error:
                answers.append(error)
        self._settle(writes, answers)
