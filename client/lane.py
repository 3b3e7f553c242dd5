"""All operations of one kind (reads or writes) to one group: a queue that batches by itself.

Whatever queued while the last frames were out is the next frame: no timer, and a
lone caller's frame holds one operation. A few frames may be out at once, so that a
slow answer does not hold up the rest. Who leads the group is learnt from answers.

A server answers only so many bytes of a read frame. The lane asks for the rest at once, and sizes
the next frames by what operations were answered with lately.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from operator import attrgetter
from random import Random
from typing import Protocol

from shardkv.client.errors import (
    BadRequest,
    Busy,
    OutOfSpace,
    PermissionDenied,
    ShardKVError,
)
from shardkv.client.heard import HeardClocks
from shardkv.client.operations import Numbering, Operation
from shardkv.client.refusals import error_of
from shardkv.client.requests import quoted
from shardkv.shardctrler.shard_map import Gid
from shardkv.wire import backoff, frames
from shardkv.wire.calls import Code, Dialer, Unreachable, busy_text, parse, retry_after
from shardkv.wire.frames import (
    FIRST_BUSY,
    FIRST_UNRECORDED,
    MalformedFrame,
    SectionReply,
    SectionStatus,
    Status,
    busy_seconds,
)

FRAMES_OUT = 2
FRAME_OPERATIONS = 1024
FEW_OPERATIONS = 4  # out: their callers are nearly alone
SPLIT_OPERATIONS = 64  # more than so many are spread over all frames that may go out
FRAME_BYTES = 1 << 20
ANSWER_BYTES = 3 << 20  # that a read frame may be expected to be answered with; less than servers answer
ATTEMPT_SECONDS = 1.0
ANSWER_BYTES_PER_SECOND = 1 << 20  # so much longer than ATTEMPT_SECONDS may a large answer take
BACKOFF_SECONDS = (0.002, 0.05)
SILENT_ROUNDS = 2  # of frames without any answer, one for each replica, after which a group counts as silent

SectionKey = tuple[int, Numbering | None]

_frame_numbers = count(1)
_kind_of = attrgetter("kind")


class Owner(Protocol):
    """What a lane needs of its clerk."""

    heard: HeardClocks

    def config_num(self) -> int: ...

    def addresses(self, gid: Gid) -> tuple[str, ...]: ...

    def refused(self, shard: int, gid: Gid, hint: Gid, addresses: tuple[str, ...]) -> None: ...

    def has_no_answer(self, gid: Gid, silent: Sequence[Operation]) -> None:
        """Nobody whom we know of this group answers for it now: trust the map alone, and ask whether it has changed.

        `silent`: these found none of its replicas at all, round after round.
        """

    def route_again(self, operations: list[Operation], pause: float) -> None:
        """These were not done here: find them a lane after `pause` seconds."""

    def answered(self, members: list[Operation], statuses: bytes, values: list[bytes]) -> None: ...

    def ended(self, operation: Operation, error: Exception) -> None:
        """What the error says is final."""

    def refused_now(self, operation: Operation, error: ShardKVError) -> None:
        """This attempt did nothing, and another would not either."""

    def is_wanted(self, operation: Operation) -> bool:
        """Whether an operation is to be sent whose caller has left."""


class Lane:
    def __init__(
        self, owner: Owner, gid: Gid, kind: int, method: str, dialer: Dialer, rng: Random, spread: bool = False
    ) -> None:
        self._owner, self._gid, self._kind, self._method = owner, gid, kind, method
        self._dialer, self._rng = dialer, rng
        self._spread = spread  # reads that any replica may answer go round all of them
        self._turn = rng.randrange(1 << 16)
        self.queue: deque[Operation] = deque()
        self.answered = 0  # operations, for those who count
        self._leader = ""
        self._frames = 0  # out, or answered and not yet settled
        self._operations_out = 0
        self._most_frames = FRAMES_OUT  # where any replica may answer, for each of them
        self._unheard = 0  # frames without any answer since the last that had one
        self._answer_bytes = 0.0  # that an operation was answered with lately
        self._settling = asyncio.Lock()
        self._scheduled = False
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, operation: Operation) -> None:  # hot: runs per operation
        self.queue.append(operation)
        if not self._scheduled and self._may_send():
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._send_frames)

    def _may_send(self) -> bool:  # hot: runs per operation
        """Whether what is queued is worth a frame now, or better waits for the one that is out.

        A second frame keeps the group busy while we are at work on the first, if it is large; and
        spares a caller who is nearly alone the wait. In between, fewer and fuller frames cost less.
        """
        if self._frames == 0:
            return True
        worth = len(self.queue) >= SPLIT_OPERATIONS or self._operations_out <= FEW_OPERATIONS
        return worth and self._frames < self._most_frames

    def _send_frames(self) -> None:
        """Once a turn of the loop, so that all that this turn queued shares a frame."""
        self._scheduled = False
        if self._spread:
            self._most_frames = FRAMES_OUT * max(1, len(self._owner.addresses(self._gid)))
        while self.queue and self._may_send():
            operations = self._take()
            if operations:
                self._frames += 1
                self._operations_out += len(operations)
                task = asyncio.get_running_loop().create_task(self._send(operations))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _take(self) -> tuple[Operation, ...]:
        """The next frame's operations; those that are over are dropped, those that have to wait are held."""
        taken: list[Operation] = []
        size, queue, frame = 0.0, self.queue, next(_frame_numbers)
        free = self._most_frames - self._frames
        most = min(FRAME_OPERATIONS, max(SPLIT_OPERATIONS, -(-len(queue) // free)))
        if self._answer_bytes * most > ANSWER_BYTES:
            most = max(1, int(ANSWER_BYTES / self._answer_bytes))
        while queue and len(taken) < most and size < FRAME_BYTES:  # hot: runs per operation
            operation = queue.popleft()
            waiter = operation.waiter
            if waiter is None or (waiter.done() and not self._owner.is_wanted(operation)):
                continue
            if operation.after is not None and not _may_go(operation, frame):
                continue
            operation.frame = frame
            operation.sent = (
                True  # from here on nobody may call it undone, though the frame is packed in a later turn
            )
            taken.append(operation)
            size += len(operation.key) + len(operation.value)
        return tuple(taken)

    async def _send(self, operations: tuple[Operation, ...]) -> None:
        outcome = await self._attempt(operations)
        # Frames that were answered together are not to stay together: the callers of the first
        # ask again, and that is on its way to the server, before those of the second wake up.
        async with self._settling:
            try:
                outcome()
                if self._frames > 1:
                    await asyncio.sleep(0)
            finally:
                self._frames -= 1
                self._operations_out -= len(operations)
                self._send_frames()

    async def _attempt(self, operations: tuple[Operation, ...]) -> Callable[[], None]:
        """Send one frame; returns what that means for each operation: done, refused, or to be tried again."""
        addresses = self._owner.addresses(self._gid)
        if not addresses:
            return lambda: self._again(operations, f"group {self._gid} is not known")
        sections = self._sections(operations)
        issued_ms = least_ms = self._owner.heard.issue_ms(self._gid)
        for operation in operations:  # hot: runs per operation
            if not operation.issued_ms:
                operation.issued_ms = issued_ms
            elif operation.issued_ms < least_ms:
                least_ms = operation.issued_ms
        frame = frames.pack_frame(
            self._kind,
            self._owner.config_num(),
            least_ms,
            [self._pack(key, members) for key, members in sections.items()],
            self._owner.heard.highest_ms,
            frames.version_for(bytes(map(_kind_of, operations))),
        )
        address = self._choose(addresses)
        patience = ATTEMPT_SECONDS + self._answer_bytes * len(operations) / ANSWER_BYTES_PER_SECOND
        try:
            code, body = parse(await self._dialer.call(address, self._method, frame, patience))
            if code is Code.OK:
                clock_ms, replies = frames.unpack_reply(body)
                _check_shape(sections, replies)
        except (Unreachable, MalformedFrame, ValueError) as error:
            why = str(error)
            return lambda: self._unanswered(operations, why, addresses, address)
        self._unheard = 0
        if code is not Code.OK:
            text = body.decode(errors="replace")
            return lambda: self._refused_whole(operations, code, text, addresses, address)
        self._leader = address
        self._owner.heard.hear(self._gid, clock_ms)

        def settle() -> None:
            if self._kind == frames.READ:
                self._learn_size(len(body), replies)
            for (key, members), reply in zip(sections.items(), replies, strict=True):
                self._settle(key[0], members, reply)

        return settle

    def _learn_size(self, size: int, replies: list[SectionReply]) -> None:
        answered = sum(len(reply.statuses) - reply.statuses.count(Status.NOT_ANSWERED) for reply in replies)
        self._answer_bytes = max(size / max(1, answered), self._answer_bytes / 2)

    def _unanswered(
        self, operations: tuple[Operation, ...], why: str, addresses: tuple[str, ...], address: str
    ) -> None:
        self._leader = self._next(addresses, address)
        self._unheard += 1
        is_silent = self._unheard >= SILENT_ROUNDS * len(addresses)
        self._owner.has_no_answer(self._gid, operations if is_silent else ())
        self._again(operations, why, doubt=True)

    def _choose(self, addresses: tuple[str, ...]) -> str:
        if self._spread:
            self._turn += 1
            return addresses[self._turn % len(addresses)]
        if self._leader not in addresses:
            self._leader = self._rng.choice(addresses)
        return self._leader

    @staticmethod
    def _next(addresses: tuple[str, ...], address: str) -> str:
        return addresses[(addresses.index(address) + 1) % len(addresses)] if address in addresses else ""

    def _sections(self, operations: tuple[Operation, ...]) -> dict[SectionKey, list[Operation]]:
        sections: dict[SectionKey, list[Operation]] = {}
        for operation in operations:  # hot: runs per operation
            sections.setdefault((operation.shard, operation.numbering), []).append(operation)
        return sections

    def _pack(self, key: SectionKey, members: list[Operation]) -> bytes:  # hot: runs per operation
        shard, numbering = key
        return frames.pack_section(
            shard,
            numbering.session if numbering else frames.NO_SESSION,
            numbering.acked_below if numbering else 0,
            bytes([member.kind for member in members]),
            [member.seq for member in members] if numbering else [],
            [member.key for member in members],
            [member.value for member in members],
        )

    def _refused_whole(
        self, operations: tuple[Operation, ...], code: Code, text: str, addresses: tuple[str, ...], address: str
    ) -> None:
        match code:
            case Code.NOT_LEADER if text in addresses and text != address:
                self._leader = text
                self._again(operations, f"{address}: not the leader", at_once=self._leader != address)
            case Code.BAD_REQUEST:
                self._refuse(operations, BadRequest, f"{address} refused the request: {text}")
            case Code.NO_ROOM:
                self._refuse(operations, OutOfSpace, f"{address}: {text}")
            case Code.DENIED:
                self._refuse(operations, PermissionDenied, text)
            case Code.BUSY:
                self._come_back(operations, f"{address}: {code.name} {text}", retry_after(text))
            case Code.RETRY:
                self._again(operations, f"{address}: {code.name} {text}", doubt=True)
            case _:
                self._leader = self._next(addresses, address)
                self._owner.has_no_answer(self._gid, ())
                self._again(operations, f"{address}: {code.name} {text}", doubt=code is Code.STOPPED)

    def _settle(self, shard: int, members: list[Operation], reply: SectionReply) -> None:  # hot
        if reply.status is not SectionStatus.OK:
            self._owner.refused(shard, self._gid, reply.gid, reply.addresses)
            self._again(tuple(members), f"group {self._gid} does not serve shard {shard}")
            return
        self.answered += len(members)
        if max(reply.statuses) <= Status.CAS_FAILED:  # the usual case, judged at C speed
            self._owner.answered(members, reply.statuses, reply.values)
            return
        moved: list[Operation] = []
        late: list[Operation] = []
        rest: list[Operation] = []
        early: dict[int, list[Operation]] = {}
        for operation, status, value in zip(members, reply.statuses, reply.values, strict=True):
            if status <= Status.CAS_FAILED:
                self._owner.answered([operation], bytes([status]), [value])
            elif status == Status.WRONG_SHARD:
                moved.append(operation)
            elif status == Status.NOT_ANSWERED:
                rest.append(operation)
            elif status == Status.SESSION_EXPIRED and not operation.doubt:
                late.append(operation)
            elif status >= FIRST_BUSY:
                early.setdefault(status, []).append(operation)
            elif status < FIRST_UNRECORDED:
                # Recorded: it will not be done later either.
                self._owner.ended(operation, self._judged(operation, status))
            else:
                operation.doubt |= status > max(Status)  # a newer server's: who knows what it means
                self._owner.refused_now(operation, self._judged(operation, status))
        if rest:
            self.answered -= len(rest)
            self._again(
                tuple(rest), "the answers before it were large", at_once=True, progress=len(rest) < len(members)
            )
        for status, refused in early.items():
            self.answered -= len(refused)
            wait = busy_seconds(status)
            self._come_back(tuple(refused), busy_text("the quota of a prefix is used up", wait), wait)
        if late:
            # Sent once and not done: our idea of the time was behind this group's, and its
            # reply has mended that. Only what was sent before may have been done before.
            for operation in late:
                operation.issued_ms = 0
            self._again(tuple(late), "our clock was behind")
        if moved:
            self._owner.refused(shard, self._gid, 0, ())
            self._again(tuple(moved), f"shard {shard} was split")

    def _refuse(
        self, operations: Iterable[Operation], refusal: Callable[[str], ShardKVError], text: str
    ) -> None:
        for operation in operations:
            self._owner.refused_now(operation, refusal(f"{self._named(operation)}: {text}"))

    def _named(self, operation: Operation) -> str:
        return f"key {quoted(operation.key)} (shard {operation.shard}, group {self._gid})"

    def _judged(self, operation: Operation, status: int) -> ShardKVError:
        error = error_of(status)
        return type(error)(f"{self._named(operation)}: {error}")

    def _come_back(self, operations: tuple[Operation, ...], why: str, wait: float) -> None:
        """The server is busy, and says for how long (0: it does not). Who cannot wait so long is told at once."""
        pause = wait * self._rng.uniform(1.0, 1.1)  # not all at once
        late = asyncio.get_running_loop().time() + pause
        hurried = [each for each in operations if wait and each.deadline <= late]
        self._refuse(hurried, lambda text: Busy(text, wait), why)
        if later := tuple(each for each in operations if not wait or each.deadline > late):
            self._again(later, why, at_least=pause)

    def _again(
        self,
        operations: tuple[Operation, ...],
        why: str,
        at_once: bool = False,
        doubt: bool = False,
        progress: bool = False,
        at_least: float = 0.0,
    ) -> None:
        """Not done here, or (`doubt`) not known: back to the clerk, who looks for the lane again.

        `progress`: others of the frame were answered, so that asking at once does not go on for ever.
        """
        refusals = 0
        for operation in operations:
            operation.why = why
            operation.doubt = operation.doubt or doubt
            operation.sent = operation.doubt
            if not operation.doubt:
                operation.issued_ms = 0  # surely not done: the next attempt is the first
            operation.refusals = 0 if progress else operation.refusals + 1
            refusals = max(refusals, operation.refusals)
        pause = 0.0
        if not (at_once and refusals <= 2):
            pause = backoff.spread(backoff.after(refusals - 1, BACKOFF_SECONDS), self._rng)
        self._owner.route_again(list(operations), max(pause, at_least))

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_shape(sections: dict[SectionKey, list[Operation]], replies: list[SectionReply]) -> None:
    """Raises MalformedFrame for a reply that is not to what was asked."""
    asked = [len(members) for members in sections.values()]
    told = [len(reply.statuses) for reply in replies]
    if len(asked) != len(told) or any(
        reply.status is SectionStatus.OK and a != t for reply, a, t in zip(replies, asked, told, strict=True)
    ):
        raise MalformedFrame("a reply to something else")


def _may_go(operation: Operation, frame: int) -> bool:
    """Whether a write may be sent in this frame: the one before it to its key is over, or ahead of it there.

    Else that one holds it, and lets it go when it is over.
    """
    before = operation.before()
    if before is None:
        return True
    if before.frame == frame and before.shard == operation.shard and before.numbering is operation.numbering:
        return True  # a section is applied in order
    before.held = operation
    return False
