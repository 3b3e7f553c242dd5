"""All operations of one kind (reads or writes) to one group: a queue that batches by itself.

Whatever queued while the last frames were out is the next frame: no timer, and a
lone caller's frame holds one operation. A few frames may be out at once, so that a
slow answer does not hold up the rest. Who leads the group is learnt from answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Protocol

from client.errors import (
    BadRequest,
    KeyTooLarge,
    OutcomeUnknown,
    OutOfSpace,
    PermissionDenied,
    SessionExpired,
    ValueTooLarge,
)
from client.heard import HeardClocks
from client.operations import Numbering, Operation
from raft.answers import Code, parse
from raft.doors import Dialer, Unreachable
from shardctrler.shard_map import Gid
from shardkv import frames
from shardkv.frames import MalformedFrame, SectionReply, SectionStatus, Status

FRAMES_OUT = 2
FRAME_OPERATIONS = 1024
FEW_OPERATIONS = 4  # out: their callers are nearly alone
SPLIT_OPERATIONS = 64  # more than so many are spread over all frames that may go out
FRAME_BYTES = 1 << 20
ATTEMPT_SECONDS = 1.0
BACKOFF_SECONDS = (0.002, 0.05)

SectionKey = tuple[int, Numbering | None]


class Owner(Protocol):
    """What a lane needs of its clerk."""

    heard: HeardClocks

    def config_num(self) -> int: ...

    def addresses(self, gid: Gid) -> tuple[str, ...]: ...

    def refused(self, shard: int, gid: Gid, hint: Gid, addresses: tuple[str, ...]) -> None: ...

    def refresh(self) -> None:
        """Ask whether the map has changed."""

    def route_again(self, operations: list[Operation], pause: float) -> None:
        """These were not done here: find them a lane after `pause` seconds."""

    def answered(self, members: list[Operation], statuses: bytes, values: list[bytes]) -> None: ...

    def failed(self, operation: Operation, error: Exception) -> None: ...


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
        """The next frame's operations; those that are over already are dropped."""
        taken: list[Operation] = []
        size, queue = 0, self.queue
        free = self._most_frames - self._frames
        most = min(FRAME_OPERATIONS, max(SPLIT_OPERATIONS, -(-len(queue) // free)))
        while queue and len(taken) < most and size < FRAME_BYTES:
            operation = queue.popleft()
            if operation.waiter is not None:
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
            operation.sent = True
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
        )
        address = self._choose(addresses)
        try:
            code, body = parse(await self._dialer.call(address, self._method, frame, ATTEMPT_SECONDS))
            if code is Code.OK:
                clock_ms, replies = frames.unpack_reply(body)
                _check_shape(sections, replies)
        except (Unreachable, MalformedFrame, ValueError) as error:
            why = str(error)
            return lambda: self._unanswered(operations, why, addresses, address)
        if code is not Code.OK:
            text = body.decode(errors="replace")
            return lambda: self._refused_whole(operations, code, text, addresses, address)
        self._leader = address
        self._owner.heard.hear(self._gid, clock_ms)

        def settle() -> None:
            for (key, members), reply in zip(sections.items(), replies, strict=True):
                self._settle(key[0], members, reply)

        return settle

    def _unanswered(
        self, operations: tuple[Operation, ...], why: str, addresses: tuple[str, ...], address: str
    ) -> None:
        self._leader = self._next(addresses, address)
        self._owner.refresh()  # perhaps nobody is there any more, and the map says who is now
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
                error = _bad_request(text)
                for operation in operations:
                    self._owner.failed(operation, error)
            case Code.NO_ROOM | Code.DENIED:
                for operation in operations:
                    self._owner.failed(operation, _not_done(code, text, operation))
            case Code.BUSY:
                self._again(operations, f"{address}: {code.name} {text}")
            case Code.RETRY:
                self._again(operations, f"{address}: {code.name} {text}", doubt=True)
            case _:
                self._leader = self._next(addresses, address)
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
        for operation, status, value in zip(members, reply.statuses, reply.values, strict=True):
            if status <= Status.CAS_FAILED:
                self._owner.answered([operation], bytes([status]), [value])
            elif status == Status.WRONG_SHARD:
                moved.append(operation)
            elif status == Status.SESSION_EXPIRED and not operation.doubt:
                late.append(operation)
            else:
                self._owner.failed(operation, _error_of(status))
        if late:
            # Sent once and not done: our idea of the time was behind this group's, and its
            # reply has mended that. Only what was sent before may have been done before.
            for operation in late:
                operation.issued_ms = 0
            self._again(tuple(late), "our clock was behind")
        if moved:
            self._owner.refused(shard, self._gid, 0, ())
            self._again(tuple(moved), f"shard {shard} was split")

    def _again(
        self, operations: tuple[Operation, ...], why: str, at_once: bool = False, doubt: bool = False
    ) -> None:
        """Not done here, or (`doubt`) not known: back to the clerk, who finds the lane anew."""
        refusals = 0
        for operation in operations:
            operation.why = why
            operation.doubt = operation.doubt or doubt
            operation.sent = operation.doubt
            if not operation.doubt:
                operation.issued_ms = 0  # surely not done: the next attempt is the first
            operation.refusals += 1
            refusals = max(refusals, operation.refusals)
        pause = 0.0
        if not (at_once and refusals <= 2):
            low, high = BACKOFF_SECONDS
            pause = min(low * 2 ** min(refusals - 1, 10), high) * self._rng.uniform(0.5, 1.5)
        self._owner.route_again(list(operations), pause)

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


def _error_of(status: int) -> Exception:
    match status:
        case Status.SESSION_EXPIRED:
            return SessionExpired("the write is too old to be tried again safely")
        case Status.VALUE_TOO_LARGE:
            return ValueTooLarge("the value would be larger than the server takes")
        case _:
            return BadRequest(f"the server answered {Status(status).name}")


def _not_done(code: Code, text: str, operation: Operation) -> Exception:
    """Not done now; whether an earlier attempt was, is another question."""
    if operation.doubt and operation.numbering is not None:
        return OutcomeUnknown(f"{text}; an earlier attempt was not answered, and may have been done")
    return OutOfSpace(text) if code is Code.NO_ROOM else PermissionDenied(text)


def _bad_request(text: str) -> Exception:
    """The server's refusal of a whole frame, by the name it begins with."""
    kind, _, rest = text.partition(": ")
    match kind:
        case "KeyTooLargeError":
            return KeyTooLarge(rest)
        case "ValueTooLargeError":
            return ValueTooLarge(rest)
        case _:
            return BadRequest(text)
