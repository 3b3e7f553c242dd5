"""One group replica as a server: frames from clerks, questions from other groups, status.

It looks at a frame's lengths and passes its bytes on. It looks at operations only where some are to be refused.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from random import Random
from typing import ClassVar

from google.protobuf.message import DecodeError

from shardkv import shardkv_pb2 as pb
from shardkv.raft import figures
from shardkv.raft.errors import Busy, RaftError
from shardkv.raft.protocol.types import NodeId
from shardkv.raft.reconfigure import transfer
from shardkv.raft.replica import Replica
from shardkv.raft.service import change_members, refusal_of
from shardkv.server import giver
from shardkv.server.admission import Admission
from shardkv.server.checking import ID_BYTES, Checks
from shardkv.server.errands import Migrator
from shardkv.server.giver import PACE, Pace
from shardkv.server.reading import Reader
from shardkv.server.restore_calls import restore_chunk, restore_step
from shardkv.server.sizes import Sizes
from shardkv.server.views import Views, read_log
from shardkv.shardctrler.client import ControllerClient
from shardkv.state import commands
from shardkv.state.machine import ShardMachine
from shardkv.state.row import Row, State
from shardkv.storage.engine import ViewGone
from shardkv.wire import frames
from shardkv.wire.calls import Code, Dialer, answer, busy_text, refuse
from shardkv.wire.frames import Limits, MalformedFrame
from shardkv.wire.lines import Lines
from shardkv.wire.turns import OWNER

log = logging.getLogger(__name__)

MAX_READS = 8192  # frames under way at once, shared by users; beyond, Busy
BUSY_SECONDS = 0.1
COPYING = ("exactly-once records", "data", "changes since")  # by the phase of a hand-over


class GroupServer:
    """Answers the calls of one replica of a group."""

    def __init__(
        self,
        replica: Replica,
        controller: ControllerClient,
        dialer: Dialer,
        rng: Random,
        limits: Limits,
        pace: Pace = PACE,
    ) -> None:
        assert isinstance(replica.machine, ShardMachine)
        self.replica, self.machine = replica, replica.machine
        self._limits = limits
        self.about: Callable[[], dict[str, object]] = dict  # of this process, for its status
        self._pace, self._loans = pace, giver.Closing(pace)
        self._rng = rng
        self._reader = Reader(self.machine, replica.looking)
        self._reads = Lines(MAX_READS)
        self._checks = Checks(self.machine)
        self._views = Views(self.machine, self._checks)
        self._sizes = Sizes(self.machine)
        self._closing: dict[tuple[int, int, int], asyncio.Task[None]] = {}
        self.migrator = Migrator(replica, self.machine, controller, dialer, rng)
        replica.on_turn.append(self.migrator.turned)

    def now_ms(self) -> int:
        """The group's time, which sessions expire by."""
        return self.replica.now_ms()

    async def stop(self) -> None:
        self._views.close()
        await self._checks.stop()
        await self._sizes.stop()
        await self.migrator.stop()
        await self.replica.stop()

    async def handle(self, method: str, payload: bytes) -> bytes:
        """Answer one call; bad input is answered too."""
        answering = self.ANSWERS.get(method)
        if answering is None:
            return refuse(Code.BAD_REQUEST, f"a group has no call {method!r}")
        try:
            return await answering(self, payload)
        except (MalformedFrame, DecodeError, ValueError) as error:
            log.warning("refused a call of %s: %s", method, error)
            return refuse(Code.BAD_REQUEST, f"not a request: {error}")
        except ViewGone as error:
            return refuse(Code.RETRY, str(error))
        except RaftError as error:
            return refusal_of(error, self.replica)

    async def _on_write(self, payload: bytes) -> bytes:
        return answer(await self.write(payload))

    async def _on_read(self, payload: bytes) -> bytes:
        return answer(await self.read(payload))

    async def _on_stale(self, payload: bytes) -> bytes:
        return answer(await self.read_stale(payload))

    async def _on_pull(self, payload: bytes) -> bytes:
        return await self._pull(pb.PullRequest.FromString(payload))

    async def _on_serves(self, payload: bytes) -> bytes:
        return self._serves(pb.ServesRequest.FromString(payload))

    async def _on_status(self, payload: bytes) -> bytes:
        return answer(json.dumps(self.status()).encode())

    async def _on_members(self, payload: bytes) -> bytes:
        return await change_members(self.replica, payload)

    async def _on_view(self, payload: bytes) -> bytes:
        return answer(await self._view(pb.ViewRequest.FromString(payload)))

    async def _on_check(self, payload: bytes) -> bytes:
        return answer(await self._check(pb.CheckRequest.FromString(payload)))

    async def _on_restore(self, payload: bytes) -> bytes:
        return answer(await restore_step(self.replica, self.machine, payload))

    async def _on_restore_chunk(self, payload: bytes) -> bytes:
        return answer(await restore_chunk(self.replica, payload, self._limits))

    async def _on_log(self, payload: bytes) -> bytes:
        return answer((await read_log(self.replica, pb.LogRequest.FromString(payload))).SerializeToString())

    async def _on_transfer(self, payload: bytes) -> bytes:
        return self._transfer(int(payload or b"0"))

    ANSWERS: ClassVar[dict[str, Callable[[GroupServer, bytes], Awaitable[bytes]]]] = {
        "kv.write": _on_write,
        "kv.read": _on_read,
        "kv.stale": _on_stale,
        "kv.status": _on_status,
        "kv.transfer": _on_transfer,
        "kv.log": _on_log,
        "kv.view": _on_view,
        "kv.check": _on_check,
        "kv.restore": _on_restore,
        "kv.restore_chunk": _on_restore_chunk,
        "shard.pull": _on_pull,
        "shard.serves": _on_serves,
        "raft.members": _on_members,
    }

    async def write(self, frame: bytes) -> bytes:
        """Have a write frame applied. Raises MalformedFrame, RaftError."""
        header = frames.check_frame(frame, frames.WRITE, self._limits)
        room = self.replica.has_room or not self.replica.is_leader  # another replica refuses the frame anyway
        if header.plain and (room or frames.only_deletes(frame)):
            return await self._propose(frame, header)
        admission = Admission(frame, header, self._limits, room)
        taken = admission.frame
        answered = await self._propose(taken, header) if taken is not None else None
        return admission.reply(self.machine.clock_ms, answered, self._not_served)

    async def _propose(self, frame: bytes, header: frames.FrameHeader) -> bytes:
        return await self.replica.propose(commands.frame(frame, self._limits.value_bytes), header.heard_ms)

    def _not_served(self, shard: int) -> bytes | None:
        """The refusal of a shard that is not served here, as far as this replica knows; None if it is."""
        row = self.machine.ownership.rows.get(shard)
        return self.machine.refuse(row) if row is None or not row.serves else None

    async def read(self, frame: bytes) -> bytes:
        """Answer a read frame linearizably, on any replica. Raises MalformedFrame, RaftError."""
        header = frames.check_frame(frame, frames.READ, self._limits)
        owner = self._begin_read()
        try:
            await self.replica.read_barrier()
            return await self._read(frame, header)
        finally:
            self._reads.leave(owner)

    async def read_stale(self, frame: bytes) -> bytes:
        """Answer from what is applied here, however old. Raises MalformedFrame, RaftError."""
        header = frames.check_frame(frame, frames.READ, self._limits)
        self.replica.check_running()
        owner = self._begin_read()
        try:
            return await self._read(frame, header)
        finally:
            self._reads.leave(owner)

    def _begin_read(self) -> str:
        """Whose place the read takes. Raises Busy."""
        owner = OWNER.get()
        if not self._reads.enter(owner):
            raise Busy(busy_text(f"{self._reads.used} reads are under way", BUSY_SECONDS))
        return owner

    async def _read(self, frame: bytes, header: frames.FrameHeader) -> bytes:
        if header.plain:
            return await self._reader.read(frame)
        admission = Admission(frame, header, self._limits, True)
        taken = admission.frame
        answered = await self._reader.read(taken) if taken is not None else None
        return admission.reply(self.machine.clock_ms, answered, self._not_served)

    # ---- for other groups

    async def _pull(self, request: pb.PullRequest) -> bytes:
        self.replica.check_serving()
        row = giver.lent_row(self.machine, request)
        if row is not None and self._loans.is_due(row, request):
            if not self.replica.is_leader:
                # Only the leader can close. Send the taker there for the rest.
                return refuse(Code.NOT_LEADER, self.replica.leader_address)
            await self._close(request.shard, request.epoch, request.attempt)
        with self.replica.looking():
            return answer(giver.pull(self.machine, request, self._pace).SerializeToString())

    async def _close(self, shard: int, epoch: int, attempt: int) -> None:
        """Stop serving, once, however many requests ask for it."""
        key = (shard, epoch, attempt)
        if key not in self._closing:
            task = asyncio.get_running_loop().create_task(self._propose_close(shard, epoch, attempt))
            self._closing[key] = task
            task.add_done_callback(lambda _: self._closing.pop(key, None))
        await asyncio.shield(self._closing[key])

    async def _propose_close(self, shard: int, epoch: int, attempt: int) -> None:
        await self.replica.propose(commands.close(shard, epoch, attempt))

    def _serves(self, request: pb.ServesRequest) -> bytes:
        # Once true it stays true, so any replica may say it; "no" may only be old news.
        self.replica.check_serving()
        ownership = self.machine.ownership
        us = ownership.is_us(request.gid, request.joined)
        reply = pb.ServesReply(
            yes=us and ownership.serves_epoch(request.shard, request.epoch),
            incarnation=self.machine.incarnation,
            other_group=ownership.is_other(request.gid, request.joined),
            attempt=ownership.attempt_at(request.shard, request.epoch) if us else 0,
            given_up=us and ownership.has_given_up(request.shard, request.epoch),
        )
        if us and request.frozen:
            self.migrator.giver_waits(request.shard, request.epoch, request.attempt)
        return answer(reply.SerializeToString())

    # ---- for operators

    async def _view(self, request: pb.ViewRequest) -> bytes:
        if not request.id and not request.close and not request.check:
            await self.replica.read_barrier()  # all that was acknowledged before is in it
        with self.replica.looking():
            return self._views.answer(request).SerializeToString()

    async def _check(self, request: pb.CheckRequest) -> bytes:
        self.replica.check_serving()
        if request.id:
            return self._checks.answer(request).SerializeToString()
        self._checks.check_free()
        id = self._rng.getrandbits(8 * ID_BYTES).to_bytes(ID_BYTES, "big")
        await self.replica.propose(commands.check(id))
        reply = self._checks.answer(pb.CheckRequest(id=id))
        reply.members.extend(figures.everybody(self.replica))
        return reply.SerializeToString()

    def _transfer(self, to: NodeId) -> bytes:
        transfer(self.replica, to)
        return answer(b"")

    def _row_status(self, row: Row, sizes: Mapping[int, int]) -> dict[str, object]:
        machine = self.machine
        said: dict[str, object] = {
            "state": row.state.name if row.fence is None else "RESTORING",
            "epoch": row.epoch,
            "waiting": len(row.queue) + bool(row.inherits),
            "writes": machine.writes[row.shard],
            "reads": machine.reads[row.shard],
        }
        if row.fence is not None:
            said["restoring"] = row.fence.name
        if row.peer is not None:
            said["peer"] = row.peer.gid
        if row.state is State.PULLING:
            said["copying"] = COPYING[row.cursor.phase]
        if row.shard in sizes:
            said["bytes"] = sizes[row.shard]
        seconds, why = self.migrator.stuck(row.shard, row.epoch)
        return {**said, "stuck_seconds": seconds, "why": why} if why else said

    def status(self) -> dict[str, object]:
        """What one replica knows of itself, for `admin status` and for tests."""
        machine = self.machine
        sizes = self._sizes.all() if self.replica.is_leader else {}
        return {
            **self.about(),
            **figures.status(self.replica),
            "gid": machine.gid,
            "config_num": machine.ownership.config_num,
            "incarnation": f"{machine.incarnation:016x}" if machine.incarnation else None,
            "joined": machine.ownership.joins[1],
            "operations": machine.operations,
            "read_only": self.replica.is_leader and not self.replica.has_room,
            "scrub": machine.engine.scrub_progress(),
            "shards": {
                str(row.shard): self._row_status(row, sizes)
                for row in machine.ownership.rows.values()
                if row.state.name != "ABSENT" or row.queue
            },
        }
