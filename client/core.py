"""What both clerks share: operations find their lane, are tried until done, and end in time.

Lives on one event loop. The blocking clerk calls `submit` on that loop from other
threads; the async clerk calls it directly. Bounded: at most `max_outstanding`
operations at once, `Busy` beyond.

The writes of a clerk to one key take effect in the order in which they were submitted. Each knows the one before
it (`Operation.after`), and is sent once that is over, or behind it in the same section of the same frame.

A write whose caller was told that its outcome is unknown, or was cancelled after the write was sent, is not over
yet: an attempt may still be on its way to a server. What is sent from then on in its place is an *abandon* with
its number. Whichever of the two comes first decides, and then later writes to the key may go.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from random import Random

from shardkv.client.errors import (
    Busy,
    ClerkClosed,
    DeadlineExceeded,
    ForkedClerk,
    OutcomeUnknown,
    PermissionDenied,
    ShardKVError,
    Unavailable,
    in_doubt,
)
from shardkv.client.heard import CONTROLLER, HeardClocks
from shardkv.client.lane import Lane
from shardkv.client.operations import NOBODY, Numbering, Operation
from shardkv.client.requests import quoted
from shardkv.client.routing import Router
from shardkv.shardctrler.client import AccessDenied, ControllerClient, ControllerUnavailable
from shardkv.shardctrler.shard_map import NO_GROUP, Gid, ShardId
from shardkv.wire import frames
from shardkv.wire.calls import Dialer, retry_after
from shardkv.wire.frames import ABANDON, RANGE_BACK

log = logging.getLogger(__name__)

SWEEP_SECONDS = 0.05
NO_GROUP_PAUSE = 0.05
LOAD_SECONDS = 0.5  # one attempt at the first map; more follow
MAX_OUTSTANDING = 200_000
ABANDON_SECONDS = 60.0  # then a write in doubt is left to its fate, and holds up no later one

WRITE_LANE, READ_LANE, ANY_LANE, STALE_LANE = range(4)
LANES = {
    WRITE_LANE: (frames.WRITE, "kv.write", False),
    READ_LANE: (frames.READ, "kv.read", False),
    ANY_LANE: (frames.READ, "kv.read", True),
    STALE_LANE: (frames.READ, "kv.stale", True),
}
READ_LANES = {"leader": READ_LANE, "any": ANY_LANE, "stale": STALE_LANE}


def read_lane(consistency: str) -> int:  # hot: runs per operation
    """Raises ValueError."""
    lane = READ_LANES.get(consistency)
    if lane is None:
        raise ValueError(f"consistency is one of {', '.join(READ_LANES)}, not {consistency!r}")
    return lane


_forks = 0  # how many forks lie between the first process and this one


def _forked() -> None:
    global _forks
    _forks += 1


# Counted rather than asked for: a system call for each operation took a quarter of a clerk's time.
os.register_at_fork(after_in_child=_forked)


class ClerkCore:
    def __init__(
        self, controllers: Sequence[str], dialer: Dialer, rng: Random, max_outstanding: int = MAX_OUTSTANDING
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._dialer, self._rng = dialer, rng
        self._controller = ControllerClient(controllers, dialer, rng)
        self._router = Router(self._controller)
        self._clerk = rng.randbytes(16)
        self._numberings: dict[ShardId, Numbering] = {}
        self._lanes: dict[tuple[Gid, int], Lane] = {}
        self._outstanding: dict[Operation, int] = {}  # to the kind of lane that it needs
        self._last_writes: dict[bytes, Operation] = {}  # by key: the last that is not over
        self._max_outstanding = max_outstanding
        self.heard = HeardClocks(self._loop.time)
        self._sweeping: asyncio.TimerHandle | None = None
        self._loading: asyncio.Task[None] | None = None
        self._forks = _forks
        self._closed = False

    # ---- for the clerks

    def submit(self, operation: Operation, lane_kind: int) -> None:  # hot: runs per operation
        """Begin an operation. Raises Busy, ClerkClosed, ForkedClerk; its `waiter` hears the rest."""
        if self._closed:
            raise ClerkClosed("the clerk is closed")
        if len(self._outstanding) >= self._max_outstanding:
            raise Busy(
                f"{len(self._outstanding)} operations of this clerk are outstanding, which is the limit: wait for some of them"
            )
        self._outstanding[operation] = lane_kind
        if lane_kind == WRITE_LANE:
            last = self._last_writes
            operation.after = last.get(operation.key)
            last[operation.key] = operation
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep)
        if self._router.config is None:
            self._load()
        else:
            self._route(operation, lane_kind)

    def answered_by_group(self) -> dict[Gid, int]:
        """How many operations each group has answered. Any thread may ask."""
        counts: dict[Gid, int] = {}
        for (gid, _), lane in list(self._lanes.items()):
            counts[gid] = counts.get(gid, 0) + lane.answered
        return counts

    def check_process(self) -> None:  # hot: runs per operation
        if _forks != self._forks:
            raise ForkedClerk("this clerk was made before a fork; make a new one in the child")

    async def close(self) -> None:
        """End what is outstanding, then the connections."""
        if self._closed:
            return
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
        for operation in list(self._outstanding):
            error: ShardKVError = ClerkClosed("the clerk was closed with the operation outstanding")
            if self._lane_of_writes(operation) and operation.sent:
                error = in_doubt(error)
            self.ended(operation, error)
        for lane in self._lanes.values():
            await lane.close()
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        await self._router.close()
        await self._dialer.close()

    # ---- for the lanes

    def config_num(self) -> int:
        return self._router.config.num if self._router.config else 0

    def addresses(self, gid: Gid) -> tuple[str, ...]:
        return self._router.addresses(gid)

    def refused(self, shard: ShardId, gid: Gid, hint: Gid, addresses: tuple[str, ...]) -> None:
        self._router.refused(shard, gid, hint, addresses)

    def has_no_answer(self, gid: Gid, silent: Sequence[Operation]) -> None:
        self._router.forget(gid)
        self._router.refresh()
        if silent:
            self._router.look_back(gid, {operation.shard for operation in silent})

    def route_again(self, operations: list[Operation], pause: float) -> None:
        if pause > 0:
            self._loop.call_later(pause, self._route_all, operations)
        else:
            self._route_all(operations)

    def answered(self, members: list[Operation], statuses: bytes, values: list[bytes]) -> None:
        """These operations of one section have their answers. A second answer (of a retry) is ignored."""
        outstanding, last = self._outstanding, self._last_writes
        numbering = members[0].numbering
        over: list[int] = []
        held: list[Operation] = []
        for operation, status, value in zip(members, statuses, values, strict=True):  # hot: runs per operation
            waiter = operation.waiter
            if waiter is not None:
                operation.waiter = None
                del outstanding[operation]
                if numbering is not None:
                    over.append(operation.seq)
                    if last[operation.key] is operation:
                        del last[operation.key]  # whatever was before it is over, or not answered yet
                    if operation.held is not None or operation.after is not None:
                        self._let_go(operation, held)
                if not waiter.done():  # else: the caller was cancelled
                    waiter.set_result((status, value))
        if numbering is not None:
            numbering.over(over)
            if held:
                self._route_all(held)

    def ended(self, operation: Operation, error: Exception) -> None:
        """The operation was not done and will not be, or was done and its answer is lost for good."""
        held: list[Operation] = []
        self._end(operation, error, held)
        self._route_all(held)

    def refused_now(self, operation: Operation, error: ShardKVError) -> None:
        """This attempt did nothing, and the next would not either. An earlier one may have, or may still."""
        if operation.doubt and operation.waiter is not None and self._lane_of_writes(operation):
            if operation.kind != ABANDON:
                self._abandon(operation, in_doubt(error))
                self._route_all([operation])
                return
            log.info("gave up on a write of unknown outcome: %s", error)
        self.ended(operation, error)

    def is_wanted(self, operation: Operation) -> bool:
        """Whether to send an operation whose caller has left; one that may have been sent becomes an abandon."""
        if operation.sent and self._lane_of_writes(operation):
            self._abandon(operation, None)
            return True
        self.ended(operation, DeadlineExceeded("the call was cancelled"))
        return False

    # ---- inside

    def _lane_of_writes(self, operation: Operation) -> bool:
        return self._outstanding[operation] == WRITE_LANE

    def _end(self, operation: Operation, error: Exception, held: list[Operation]) -> None:
        """The operation is over without an answer; `held` gets the writes that waited for it."""
        waiter = operation.waiter
        if waiter is None:
            return
        operation.waiter = None
        if self._outstanding.pop(operation) == WRITE_LANE:
            if operation.numbering is not None:
                operation.numbering.over((operation.seq,))
            if self._last_writes[operation.key] is operation:
                del self._last_writes[operation.key]
            self._let_go(operation, held)
        if not waiter.done():
            waiter.set_exception(error)

    def _let_go(self, operation: Operation, held: list[Operation]) -> None:
        """A write is over: those that it held, and those that these held, look for their place again, in order."""
        before = operation.before()
        if before is not None and operation.key not in self._last_writes:
            self._last_writes[operation.key] = before  # what comes next has to wait for that one
        after, operation.held = operation.held, None
        while after is not None:
            held.append(after)
            after.held, after = None, after.held

    def _abandon(self, operation: Operation, error: OutcomeUnknown | None) -> None:
        """The caller goes, with the error if it waits still; the write stays until its fate is known."""
        waiter = operation.waiter
        assert waiter is not None
        operation.waiter = NOBODY
        operation.kind, operation.value = ABANDON, b""
        operation.deadline = self._loop.time() + ABANDON_SECONDS
        if error is not None and not waiter.done():
            waiter.set_exception(error)

    def _route_all(self, operations: list[Operation]) -> None:
        for operation in operations:
            waiter = operation.waiter
            if waiter is None:
                continue
            if operation.kind == ABANDON and not operation.doubt:
                self.ended(operation, DeadlineExceeded("not done"))  # the attempt that was out did nothing
            elif not waiter.done() or self.is_wanted(operation):
                self._route(operation, self._outstanding[operation])

    def _route(self, operation: Operation, lane_kind: int) -> None:  # hot: runs per operation
        if operation.kind == RANGE_BACK:
            shard, gid = self._router.lookup_below(operation.key)
        else:
            shard, gid = self._router.lookup(operation.key)
        if gid == NO_GROUP:
            operation.why = f"no group serves shard {shard.id}"
            self._router.refresh()
            self._loop.call_later(NO_GROUP_PAUSE, self._route_all, [operation])
            return
        operation.shard = shard.id
        if lane_kind == WRITE_LANE and operation.numbering is None:
            numbering = self._numberings.get(shard.id)
            if numbering is None:
                numbering = self._numberings[shard.id] = Numbering(self._clerk, shard.id)
            operation.numbering = numbering
            operation.seq = numbering.take()
        lane = self._lanes.get((gid, lane_kind))
        if lane is None:
            kind, method, spread = LANES[lane_kind]
            lane = Lane(self, gid, kind, method, self._dialer, self._rng, spread)
            self._lanes[gid, lane_kind] = lane
        lane.put(operation)

    def _load(self) -> None:
        """Get the first map; what is submitted meanwhile waits for it."""
        if self._loading is None:
            self._loading = self._loop.create_task(self._load_map())

    async def _load_map(self) -> None:
        while True:
            try:
                await self._router.load(LOAD_SECONDS)
                break
            except ControllerUnavailable as error:
                self._router.error = error
            except AccessDenied as error:
                # Who asks again may be known by then: the next call begins anew.
                for operation in list(self._outstanding):
                    self.ended(operation, PermissionDenied(str(error)))
                self._loading = None
                return
        self.heard.hear(CONTROLLER, self._controller.clock_ms)
        if hasattr(self._dialer, "cluster"):
            self._dialer.cluster = self._controller.cluster
        self._route_all(list(self._outstanding))

    def _sweep(self) -> None:
        """End the operations whose time is up. Looks at all that are outstanding, which are bounded."""
        now = self._loop.time()
        self._router.refresh_if_stale()
        held: list[Operation] = []
        for operation in list(self._outstanding):
            waiter = operation.waiter
            if waiter is None or (operation.deadline > now and not waiter.done()):
                continue
            in_flight = operation.sent and self._lane_of_writes(operation)
            if in_flight and operation.kind != ABANDON:
                why = operation.why or "no answer in time"
                text = f"{self._named(operation)}: the write was sent, and nothing tells whether it was done: {why}"
                self._abandon(operation, OutcomeUnknown(text))
                continue
            if in_flight:
                log.warning(
                    "gave up on a write of unknown outcome after %g s: %s", ABANDON_SECONDS, operation.why
                )
            self._end(operation, self._timed_out(operation), held)
        self._route_all(held)
        self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep) if self._outstanding else None

    def _timed_out(self, operation: Operation) -> ShardKVError:
        why = operation.why or (str(self._router.error) if self._router.error else "no answer in time")
        if self._router.config is None:
            error = self._router.error
            if isinstance(error, ControllerUnavailable) and error.retry_after:
                return Busy(f"the controllers are busy: {why}", error.retry_after)
            return Unavailable(
                f"{self._named(operation)}: not sent, since no controller could be reached: {why}"
            )
        if wait := retry_after(operation.why):
            return Busy(f"{self._named(operation)}: {operation.why}", wait)
        return DeadlineExceeded(f"{self._named(operation)}: not done before the timeout: {why}")

    @staticmethod
    def _named(operation: Operation) -> str:
        shard = f" (shard {operation.shard})" if operation.shard else ""
        return f"key {quoted(operation.key)}{shard}"
