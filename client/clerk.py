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
from typing import Any, Literal, overload

from shardkv.client.batch import Outcome, Writes
from shardkv.client.core import WRITE_LANE, ClerkCore, read_lane
from shardkv.client.errors import ShardKVError
from shardkv.client.operations import Operation
from shardkv.client.ranges import Count, Delete, Scan, bounds, pack_step
from shardkv.client.requests import K, Key, check_controllers, check_key, check_value
from shardkv.wire import frames
from shardkv.wire.auth import Login, Operator
from shardkv.wire.calls import Dialer
from shardkv.wire.dialer import TcpDialer
from shardkv.wire.frames import APPEND, CAS_OP, DELETE, GET, INCR, PUT, Limits, Status
from shardkv.wire.tls import Tls

Consistency = Literal["leader", "any", "stale"]
LIMITS = Limits()


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
        check_controllers(controllers)
        self._controllers = tuple(controllers)
        self.timeout = timeout
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._core = ClerkCore(
            controllers,
            dialer or TcpDialer(tls=tls, login=login),
            rng or Random(random.SystemRandom().getrandbits(128)),
        )

    def __repr__(self) -> str:
        return f"AsyncShardClerk({list(self._controllers)}, timeout={self.timeout:g})"

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

    async def put_if_absent(self, key: Key, value: Key, *, timeout: float | None = None) -> bool:
        """Set `key` to `value` if it is absent; whether it was set."""
        return await self.cas(key, None, value, timeout=timeout)

    async def incr(self, key: Key, by: int = 1, *, timeout: float | None = None) -> int:
        """Add `by` to the decimal integer that `key` has, 0 if it is absent. Returns the new number, as it was then.

        Raises NotANumber for another value, CounterOverflow beyond 64 bits.
        """
        _, value = await self._write(INCR, key, pack_step(by), timeout)
        return int(value)

    async def delete_range(self, start: Key | None, end: Key | None, *, timeout: float | None = None) -> int:
        """Remove the keys with start <= key < end; how many there were. Empty or None ends are open.

        A page of up to 1,000 keys of one shard is removed at one moment, the next page at another. If the call
        ends between them, it raises PartlyDeleted. `timeout` is for the whole call.
        """
        return await self._delete(*bounds(start, end, None), timeout)

    async def delete_prefix(self, prefix: Key, *, timeout: float | None = None) -> int:
        """Remove the keys that begin with `prefix`, as `delete_range` does. Raises ValueError for an empty one."""
        if not prefix:
            raise ValueError("an empty prefix is every key: delete_range(None, None) removes all")
        return await self._delete(*bounds(None, None, prefix), timeout)

    async def _delete(self, start: bytes, end: bytes, timeout: float | None) -> int:
        pages, deadline = Delete(start, end), self._deadline(timeout)
        while (asked := pages.ask()) is not None:
            try:
                _, tally = await self._submit(*asked, WRITE_LANE, deadline - self._loop.time())
            except ShardKVError as error:
                raise pages.ended_by(error) from error
            pages.take(tally)
        return pages.deleted

    # ---- reads

    @overload
    async def get(
        self, key: Key, default: bytes, *, timeout: float | None = ..., consistency: Consistency = ...
    ) -> bytes: ...

    @overload
    async def get(
        self, key: Key, default: None = ..., *, timeout: float | None = ..., consistency: Consistency = ...
    ) -> bytes | None: ...

    async def get(
        self,
        key: Key,
        default: bytes | None = None,
        *,
        timeout: float | None = None,
        consistency: Consistency = "leader",
    ) -> bytes | None:
        """The value of `key`, or `default` if it is absent.

        Linearizable from the leader or, with "any", from any replica; "stale" reads
        what one replica has now, which may be old.
        """
        data = check_key(key, self._limits)
        status, value = await self._submit(GET, data, b"", read_lane(consistency), timeout)
        return default if status == Status.NOT_FOUND else value

    async def multi_get(
        self, keys: Iterable[K], *, timeout: float | None = None, consistency: Consistency = "leader"
    ) -> dict[K, bytes | None]:
        """The values of many keys, by the keys as they were given. Each is linearizable by itself."""
        given = list(keys)
        wanted = [check_key(key, self._limits) for key in given]
        values = await asyncio.gather(
            *(self.get(key, timeout=timeout, consistency=consistency) for key in wanted)
        )
        return dict(zip(given, values, strict=True))

    @overload
    def scan(
        self,
        start: Key | None = ...,
        end: Key | None = ...,
        limit: int | None = ...,
        *,
        prefix: Key | None = ...,
        reverse: bool = ...,
        keys_only: Literal[False] = ...,
        timeout: float | None = ...,
        consistency: Consistency = ...,
    ) -> AsyncIterator[tuple[bytes, bytes]]: ...

    @overload
    def scan(
        self,
        start: Key | None = ...,
        end: Key | None = ...,
        limit: int | None = ...,
        *,
        prefix: Key | None = ...,
        reverse: bool = ...,
        keys_only: Literal[True],
        timeout: float | None = ...,
        consistency: Consistency = ...,
    ) -> AsyncIterator[bytes]: ...

    async def scan(
        self,
        start: Key | None = b"",
        end: Key | None = b"",
        limit: int | None = None,
        *,
        prefix: Key | None = None,
        reverse: bool = False,
        keys_only: bool = False,
        timeout: float | None = None,
        consistency: Consistency = "leader",
    ) -> AsyncIterator[Any]:
        """Pairs with start <= key < end in key order, fetched a page at a time as they are used.

        Empty or None ends are open; `prefix` stands for both ends. `reverse`: from the largest key down. `keys_only`:
        keys instead of pairs, and no value travels. `timeout` is for a page. Each page is linearizable; a long scan
        does not freeze the data under it.
        """
        pages = Scan(*bounds(start, end, prefix), limit, reverse, keys_only)
        while (asked := pages.ask()) is not None:
            _, page = await self._submit(*asked, read_lane(consistency), timeout)
            for item in pages.take(page):
                yield item

    async def count(
        self,
        start: Key | None = b"",
        end: Key | None = b"",
        *,
        prefix: Key | None = None,
        timeout: float | None = None,
        consistency: Consistency = "leader",
    ) -> int:
        """How many keys there are with start <= key < end, or with the `prefix`. `timeout` is for the whole call.

        A page of up to 4,096 keys of one shard is counted at one moment, the next page at another.
        """
        pages, deadline = Count(*bounds(start, end, prefix)), self._deadline(timeout)
        while (asked := pages.ask()) is not None:
            left = deadline - self._loop.time()
            _, tally = await self._submit(*asked, read_lane(consistency), left)
            pages.take(tally)
        return pages.found

    def batch(self) -> AsyncBatch:
        """Collect writes and send them together: `async with clerk.batch() as b: b.put(…)`."""
        return AsyncBatch(self)

    def answered_by_group(self) -> dict[int, int]:
        """How many operations each group has answered this clerk: how even the load is, at no cost."""
        return self._core.answered_by_group()

    # ---- inside

    def _deadline(self, timeout: float | None) -> float:
        return self._loop.time() + (self.timeout if timeout is None else timeout)

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
            self._writes.clear()  # the block has failed: nothing of it is sent
            return
        await self.execute()

    async def execute(self) -> list[Outcome]:
        """Send what was collected; the outcome of each write, in order. Raises BatchError unless all were done."""
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
        return self.results
