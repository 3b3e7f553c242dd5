"""`ShardClerk`: the service for ordinary programs. The async clerk's core on a background thread.

    with ShardClerk(["127.0.0.1:7000"]) as clerk:
        clerk.put("greeting", b"hello")
        assert clerk.get("greeting") == b"hello"

Any number of threads may share a clerk, and their calls share frames. A forked
child makes its own: using the parent's raises ForkedClerk.

A call crosses to the clerk's thread by a queue, and the thread is woken once for all
that queued meanwhile; the caller waits on a lock. That is the whole hand-over.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import Any, Literal, overload

from shardkv.client.batch import Outcome, Writes
from shardkv.client.clerk import LIMITS, Consistency
from shardkv.client.core import WRITE_LANE, ClerkCore, read_lane
from shardkv.client.errors import ClerkClosed, ShardKVError
from shardkv.client.operations import Operation
from shardkv.client.ranges import Count, Delete, Scan, bounds, pack_step
from shardkv.client.requests import K, Key, check_controllers, check_key, check_value
from shardkv.wire import frames
from shardkv.wire.auth import Login, Operator
from shardkv.wire.dialer import TcpDialer
from shardkv.wire.frames import APPEND, CAS_OP, DELETE, GET, INCR, PUT, Limits, Status
from shardkv.wire.tls import Tls

try:  # faster, where it is installed: pip install 'shardkv[fast]'
    from uvloop import new_event_loop
except ModuleNotFoundError:
    from asyncio import new_event_loop

_background: tuple[int, asyncio.AbstractEventLoop] | None = None
_starting = threading.Lock()


def background_loop() -> asyncio.AbstractEventLoop:
    """The event loop that all blocking clerks of this process share, on a thread of its own.

    It is never closed: clerks come and go on it. A forked child gets one of its own,
    since the parent's thread is not in it.
    """
    global _background
    with _starting:
        if _background is None or _background[0] != os.getpid():
            loop = new_event_loop()
            threading.Thread(target=_run_forever, args=(loop,), name="shardkv-clerk", daemon=True).start()
            _background = (os.getpid(), loop)
        return _background[1]


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


class _Waiter:
    """A caller that waits: a lock held until the answer is there."""

    __slots__ = ("error", "left", "lock", "result")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()
        self.result = (0, b"")
        self.error: Exception | None = None
        self.left = False  # a signal (KeyboardInterrupt) has ended the wait

    def done(self) -> bool:
        return self.left

    def set_result(self, result: tuple[int, bytes], /) -> None:
        self.result = result
        self.lock.release()

    def set_exception(self, exception: Exception, /) -> None:
        self.error = exception
        self.lock.release()

    def wait(self) -> tuple[int, bytes]:
        try:
            self.lock.acquire()
        except BaseException:
            self.left = True
            raise
        if self.error is not None:
            raise self.error
        return self.result


class ShardClerk:
    """The blocking client of a shardkv cluster; thread-safe. See `AsyncShardClerk` for the calls."""

    def __init__(
        self,
        controllers: Sequence[str],
        timeout: float = 10.0,
        *,
        limits: Limits = LIMITS,
        tls: Tls | None = None,
        login: Login | Operator | None = None,
    ) -> None:
        check_controllers(controllers)
        self._controllers = tuple(controllers)
        self.timeout = timeout
        self._limits = limits
        self._submitted: deque[tuple[Operation, int]] = deque()
        self._woken = False
        self._closed = False
        self._loop = background_loop()
        self._core: ClerkCore = asyncio.run_coroutine_threadsafe(
            self._open(controllers, tls, login), self._loop
        ).result()

    async def _open(
        self, controllers: Sequence[str], tls: Tls | None, login: Login | Operator | None
    ) -> ClerkCore:
        return ClerkCore(
            controllers, TcpDialer(tls=tls, login=login), Random(random.SystemRandom().getrandbits(128))
        )

    def __repr__(self) -> str:
        return f"ShardClerk({list(self._controllers)}, timeout={self.timeout:g})"

    def __enter__(self) -> ShardClerk:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End outstanding calls with ClerkClosed, and close the connections."""
        if self._closed:
            return
        self._core.check_process()
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._core.close(), self._loop).result()

    # ---- writes

    def put(self, key: Key, value: Key, *, timeout: float | None = None) -> None:
        """Set `key` to `value`."""
        self._call(PUT, check_key(key, self._limits), check_value(value, self._limits), WRITE_LANE, timeout)

    def append(self, key: Key, value: Key, *, timeout: float | None = None) -> None:
        """Add `value` to the end of what `key` has; an absent key has nothing."""
        self._call(APPEND, check_key(key, self._limits), check_value(value, self._limits), WRITE_LANE, timeout)

    def delete(self, key: Key, *, timeout: float | None = None) -> bool:
        """Remove `key`; whether it was there."""
        status, _ = self._call(DELETE, check_key(key, self._limits), b"", WRITE_LANE, timeout)
        return status == Status.OK

    def cas(self, key: Key, expected: Key | None, new: Key, *, timeout: float | None = None) -> bool:
        """Set `key` to `new` if it has `expected` (None: if it is absent); whether it was set."""
        before = None if expected is None else check_value(expected, self._limits)
        packed = frames.pack_cas(before, check_value(new, self._limits))
        status, _ = self._call(CAS_OP, check_key(key, self._limits), packed, WRITE_LANE, timeout)
        return status == Status.OK

    def put_if_absent(self, key: Key, value: Key, *, timeout: float | None = None) -> bool:
        """Set `key` to `value` if it is absent; whether it was set."""
        return self.cas(key, None, value, timeout=timeout)

    def incr(self, key: Key, by: int = 1, *, timeout: float | None = None) -> int:
        """Add `by` to the number that `key` has; returns the new number. See `AsyncShardClerk.incr`."""
        _, value = self._call(INCR, check_key(key, self._limits), pack_step(by), WRITE_LANE, timeout)
        return int(value)

    def delete_range(self, start: Key | None, end: Key | None, *, timeout: float | None = None) -> int:
        """Remove the keys with start <= key < end; how many there were. See `AsyncShardClerk.delete_range`."""
        return self._delete(*bounds(start, end, None), timeout)

    def delete_prefix(self, prefix: Key, *, timeout: float | None = None) -> int:
        """Remove the keys that begin with `prefix`, as `delete_range` does. Raises ValueError for an empty one."""
        if not prefix:
            raise ValueError("an empty prefix is every key: delete_range(None, None) removes all")
        return self._delete(*bounds(None, None, prefix), timeout)

    def _delete(self, start: bytes, end: bytes, timeout: float | None) -> int:
        pages, deadline = Delete(start, end), self._deadline(timeout)
        while (asked := pages.ask()) is not None:
            try:
                _, tally = self._call(*asked, WRITE_LANE, deadline - time.monotonic())
            except ShardKVError as error:
                raise pages.ended_by(error) from error
            pages.take(tally)
        return pages.deleted

    # ---- reads

    @overload
    def get(
        self, key: Key, default: bytes, *, timeout: float | None = ..., consistency: Consistency = ...
    ) -> bytes: ...

    @overload
    def get(
        self, key: Key, default: None = ..., *, timeout: float | None = ..., consistency: Consistency = ...
    ) -> bytes | None: ...

    def get(
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
        status, value = self._call(GET, data, b"", read_lane(consistency), timeout)
        return default if status == Status.NOT_FOUND else value

    def multi_get(
        self, keys: Iterable[K], *, timeout: float | None = None, consistency: Consistency = "leader"
    ) -> dict[K, bytes | None]:
        """The values of many keys, by the keys as they were given. Each is linearizable by itself."""
        given = list(keys)
        wanted = [check_key(key, self._limits) for key in given]
        lane = read_lane(consistency)
        waiters = [self._begin(GET, key, b"", lane, timeout) for key in wanted]
        found = [waiter.wait() for waiter in waiters]
        return {
            key: None if status == Status.NOT_FOUND else value
            for key, (status, value) in zip(given, found, strict=True)
        }

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
    ) -> Iterator[tuple[bytes, bytes]]: ...

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
    ) -> Iterator[bytes]: ...

    def scan(
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
    ) -> Iterator[Any]:
        """Pairs with start <= key < end in key order, lazily; see `AsyncShardClerk.scan`."""
        pages = Scan(*bounds(start, end, prefix), limit, reverse, keys_only)
        while (asked := pages.ask()) is not None:
            _, page = self._call(*asked, read_lane(consistency), timeout)
            yield from pages.take(page)

    def count(
        self,
        start: Key | None = b"",
        end: Key | None = b"",
        *,
        prefix: Key | None = None,
        timeout: float | None = None,
        consistency: Consistency = "leader",
    ) -> int:
        """How many keys there are with start <= key < end, or with the `prefix`. See `AsyncShardClerk.count`."""
        pages, deadline = Count(*bounds(start, end, prefix)), self._deadline(timeout)
        while (asked := pages.ask()) is not None:
            _, tally = self._call(*asked, read_lane(consistency), deadline - time.monotonic())
            pages.take(tally)
        return pages.found

    def batch(self) -> Batch:
        """Collect writes and send them together: `with clerk.batch() as b: b.put(…)`."""
        return Batch(self)

    def answered_by_group(self) -> dict[int, int]:
        """How many operations each group has answered this clerk: how even the load is, at no cost."""
        return self._core.answered_by_group()

    # ---- inside

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self.timeout if timeout is None else timeout)

    def _call(self, kind: int, key: bytes, value: bytes, lane: int, timeout: float | None) -> tuple[int, bytes]:
        return self._begin(kind, key, value, lane, timeout).wait()

    def _begin(  # hot: runs per operation
        self, kind: int, key: bytes, value: bytes, lane: int, timeout: float | None
    ) -> _Waiter:
        self._core.check_process()
        if self._closed:
            raise ClerkClosed("the clerk is closed")
        waiter = _Waiter()
        # uvloop's clock runs by the millisecond; see _submit_all.
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        self._submitted.append((Operation(kind, key, value, deadline, waiter), lane))
        if not self._woken:
            # Two threads may both wake it: that costs a turn, and loses nothing.
            self._woken = True
            self._loop.call_soon_threadsafe(self._submit_all)
        return waiter

    def _submit_all(self) -> None:
        self._woken = False  # before the queue is emptied: who appends later wakes us again
        drift = self._loop.time() - time.monotonic()
        submitted = self._submitted
        while submitted:
            operation, lane = submitted.popleft()
            operation.deadline += drift
            try:
                self._core.submit(operation, lane)
            except Exception as error:
                assert operation.waiter is not None
                operation.waiter.set_exception(error)


class Batch(Writes):
    """Writes that leave together when the block ends. Each is exactly-once; together they are not atomic.

    Raises BatchError unless all were done; `results` tells of each.
    """

    def __init__(self, clerk: ShardClerk) -> None:
        super().__init__(clerk._limits)
        self._clerk = clerk

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is not None:
            self._writes.clear()  # the block has failed: nothing of it is sent
            return
        self.execute()

    def execute(self) -> list[Outcome]:
        """Send what was collected; the outcome of each write, in order. Raises BatchError unless all were done."""
        writes, self._writes = self._writes, []
        begun: list[_Waiter | ShardKVError] = []
        for write in writes:
            try:
                begun.append(self._clerk._begin(*write, WRITE_LANE, None))
            except ShardKVError as error:  # it was not sent; those before it may have been
                begun.append(error)
        answers: list[tuple[int, bytes] | ShardKVError] = []
        for each in begun:
            try:
                answers.append(each if isinstance(each, ShardKVError) else each.wait())
            except ShardKVError as error:
                answers.append(error)
        self._settle(writes, answers)
        return self.results
