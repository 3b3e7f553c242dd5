"""A replica's driver: the only place where core, disk, network and clock meet.

One turn of the event loop may bring any number of facts to the core; `_pump`
then carries out what follows from all of them, once. A second task drains the
queued writes into one WAL append: what queued up during one sync shares the next.

When this replica's own disk or state machine fails, it stops for good (DESIGN §3):
`on_fault` is told, and the process is expected to end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

from shardkv.raft.errors import PeerFault, RaftError, Stopped, StorageError
from shardkv.raft.first_fault import FirstFault
from shardkv.raft.host import Host
from shardkv.raft.incarnations import KnownDisks
from shardkv.raft.interfaces import Transport
from shardkv.raft.protocol.core import Raft
from shardkv.raft.protocol.messages import Envelope, InstallSnapshot, InstallSnapshotReply
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.ready import Options, Ready, Write, joined
from shardkv.raft.protocol.space import Room, bearable
from shardkv.raft.protocol.types import Index, NodeId, SnapshotMeta, Term
from shardkv.raft.refusals import Refusals
from shardkv.raft.snapshot import SnapshotReceiver, SnapshotSender, SnapshotSink, StreamOptions
from shardkv.raft.wal import Wal

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NodeOptions:
    core: Options = field(default_factory=Options)
    tick_seconds: float = 0.05
    snapshots: StreamOptions = field(default_factory=StreamOptions)
    max_append_batch_bytes: int = 8 << 20  # one WAL batch; more waits for the next


@dataclass(frozen=True, slots=True)
class _NewBase:
    """A job for the disk: the log begins after this entry from now on."""

    index: Index
    term: Term
    installed: bool = False  # by a snapshot: whoever sent it waits for this


class Node(FirstFault):
    """Drives one `Raft`. All methods belong to the event loop's thread."""

    def __init__(
        self,
        core: Raft,
        wal: Wal,
        transport: Transport,
        host: Host,
        options: NodeOptions,
        rng: Random,
        disks: KnownDisks | None = None,
    ) -> None:
        super().__init__()
        self.core = core
        self.disks = disks or KnownDisks(core.id)
        self._wal, self._transport, self._host, self._options = wal, transport, host, options
        self._rng = rng  # for the numbers of snapshot streams
        self._loop = asyncio.get_running_loop()
        # Bounded by the core: uncommitted bytes at a leader, the window at a follower.
        self._jobs: asyncio.Queue[Write | _NewBase] = asyncio.Queue()
        self._chunks: asyncio.Queue[Envelope] = asyncio.Queue(16)
        self._senders: dict[NodeId, SnapshotSender] = {}
        self._opening: set[NodeId] = set()  # for these a snapshot is being opened
        self.receiver = SnapshotReceiver(core.wants_snapshot, host.open_sink, self._install)
        self._base_is_durable = asyncio.Event()  # no installed snapshot waits for its log to begin anew
        self._base_is_durable.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pump_scheduled = False
        self._deferred: deque[Ready] = deque()  # at most what one turn of the loop makes
        self._peers_known: Membership | None = None  # as told to the transport
        self.stopped = False
        self.receiving: tuple[NodeId, int, int] | None = None  # a snapshot: from whom, how much of it, its size
        self.room = Room.PLENTY
        self.free_bytes = 0  # on the disk; 0 where nobody looks
        self.spare_bytes: int | None = None  # of these, what is not reserved; None where nobody looks
        self.leader_changes = 0
        self.refusals = Refusals()
        self._disk_hung = False  # as last said in the log
        self._last_leader: NodeId = 0

    @property
    def queued_writes(self) -> int:
        """Jobs that wait for the disk."""
        return self._jobs.qsize()

    @property
    def disk_silent_seconds(self) -> float:
        """For how long a write has been out to the disk without an answer; 0 where none is out."""
        return self.core.disk.silent_ticks * self._options.tick_seconds

    @property
    def disk(self) -> str:
        """How the disk of the log does, for people."""
        if not self.core.disk_hangs:
            return "ok"
        return f"the disk has not answered for {self.disk_silent_seconds:.1f} s"

    @property
    def snapshots_sending(self) -> int:
        return len(self._senders)

    # ---- life

    def start(self) -> None:
        for work in (self._tick_forever(), self._write_forever(), self._receive_chunks_forever()):
            self.spawn(work)

    async def stop(self) -> None:
        """End all tasks and close the log. What was not synced is as after a crash."""
        self.stopped = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.receiver.abort()
        self._wal.close()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this beside everything else, until the replica stops. An exception out of it stops the replica."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.fail(task.exception())

    def fail(self, error: BaseException | None) -> None:
        """Our disk or our state machine failed: promise nothing more, answer nothing more."""
        if self.fault is not None or self.stopped:
            return
        assert error is not None
        self.fault, self.stopped = error, True
        told = isinstance(error, StorageError | OSError)  # else a bug of ours, and we want to know where
        log.critical("replica %d stops: %s", self.core.id, error, exc_info=None if told else error)
        for task in self._tasks:
            task.cancel()
        self._host.turn_ended()
        self.on_fault(error)

    # ---- facts

    def receive(self, envelopes: Iterable[Envelope]) -> None:
        """Messages from other replicas."""
        for envelope in bearable(envelopes, self.core, self.room):
            if self.stopped:
                return
            with suppress(Stopped):  # the fault is told where faults are: to the host and to `on_fault`
                try:
                    self._tell(self._step, envelope, refusals=(PeerFault,))
                except PeerFault as fault:
                    self.mail_refused(fault.sender, str(fault))

    def mail_refused(self, sender: NodeId, why: str) -> None:
        """A message was refused at the border. One that is damaged beyond its address has sender 0."""
        self.refusals.note(sender, why, self._loop.time())

    def _step(self, envelope: Envelope) -> None:
        """Mail between other disks than those that the log knows stays out. Raises PeerFault, WrongMembers."""
        if self.disks.admits(envelope, self.core.membership, self.core.term, self.core.commit_index):
            self.core.step(envelope)
        if self.disks.refusal(self.core.membership):
            self.core.stand_down()

    def propose(self, data: bytes) -> tuple[Index, Term]:
        """See `Raft.propose`."""
        self.check_running()
        return self._tell(self.core.propose, data)

    def read(self, ticket: int) -> None:
        """See `Raft.read`; the host hears `reads_released` or `reads_failed`."""
        self.check_running()
        self._tell(self.core.read, ticket, self._loop.time())

    def change_membership(self, target: Membership) -> tuple[Index, Term]:
        """See `Raft.change_membership`."""
        return self._tell(self.core.change_membership, target, refusals=(RaftError, ValueError))

    def transfer(self, to: NodeId) -> None:
        """See `Raft.transfer`."""
        self._tell(self.core.transfer, to, refusals=(RaftError, ValueError))

    def unreachable(self, peer: NodeId) -> None:
        """The connection to `peer` broke, or cannot be made."""
        if peer in self._senders:
            self._senders[peer].give_up()
        with suppress(Stopped):
            self._tell(self.core.unreachable, peer)

    def note_room(self, room: Room, free_bytes: int) -> None:
        """See `space_watch.py`."""
        self.room, self.free_bytes = room, free_bytes
        self.core.low = room is not Room.PLENTY

    def compact(self, index: Index) -> None:
        """The state machine is durable up to `index`: drop the log below, here and on disk."""
        self._tell(self.core.compact, index)
        self._jobs.put_nowait(_NewBase(self.core.log.base_index, self.core.log.base_term))

    def check_running(self) -> None:
        """Raises Stopped."""
        if self.stopped:
            raise Stopped("this replica has stopped")
        if self.disks.refusal(self.core.membership):
            raise Stopped("this replica takes no part: its group knows it with another disk")

    def _tell(
        self, fact: Callable[..., T], *arguments: Any, refusals: tuple[type[Exception], ...] = (RaftError,)
    ) -> T:
        """The one way into the core. Any exception that is not a refusal is a fault: the replica stops.

        A core that an assertion left half changed must not promise anything more. Raises the
        refusals, and Stopped.
        """
        if self.stopped:
            raise Stopped("this replica has stopped")
        try:
            result = fact(*arguments)
        except refusals:
            raise
        except Exception as error:
            self.fail(error)
            raise Stopped(f"this replica has stopped: {error!r}") from error
        self._changed()
        return result

    # ---- work

    def _changed(self) -> None:
        if not self._pump_scheduled:
            self._pump_scheduled = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Hand out the core's work: once a turn, however many facts the turn brought."""
        self._pump_scheduled = False
        if self.stopped:
            return
        try:
            self._serve_deferred()
            if self.disks.heard_more:
                self._record_disks()
            self._carry_out(self.core.ready(self._loop.time()))
        except BaseException as error:  # "any exception out of apply stops the replica"
            self.fail(error)
            return
        if self.core.has_more_to_apply():
            self._changed()

    def _carry_out(self, ready: Ready) -> None:
        """Messages, then the disk, then what this process does itself: each is under way before the next."""
        membership = self.core.membership
        if membership is not self._peers_known:
            self._peers_known = membership
            if membership.addresses:
                self._transport.set_peers(self.disks.addresses(membership), membership.incarnations)
        if ready.messages:
            self._transport.send(ready.messages)  # beside our own disk (thesis §10.2.1)
        if ready.write is None:
            self._serve(ready)
            return
        self._jobs.put_nowait(ready.write)
        if not ready.committed:
            self._serve(ready)
            return
        # Applying takes milliseconds, in which the disk would have nothing to do: `_write_forever`
        # was woken first, so it has handed the write over when our turn comes.
        self._deferred.append(ready)
        self._loop.call_soon(self._serve_later)

    def _serve_later(self) -> None:
        if self.stopped:
            return
        try:
            self._serve_deferred()
        except BaseException as error:
            self.fail(error)

    def _serve_deferred(self) -> None:
        while self._deferred:
            self._serve(self._deferred.popleft())

    def _serve(self, ready: Ready) -> None:
        if self.core.leader not in (0, self._last_leader):
            self._last_leader = self.core.leader
            self.leader_changes += 1
            log.info("replica %d: %d leads in term %d", self.core.id, self._last_leader, self.core.term)
        if ready.committed:
            self._host.apply(ready.committed)
        if ready.reads:
            self._host.reads_released(ready.reads)
        if ready.failed_reads:
            self._host.reads_failed(ready.failed_reads)
        membership = self.core.membership
        for peer, sender in self._senders.items():
            if not self.core.is_leader or peer not in membership.everyone():
                sender.give_up()
        for peer in ready.snapshots_wanted:
            if peer not in self._senders and peer not in self._opening:
                self.spawn(self._send_snapshot(peer))
        for envelope in ready.snapshot_mail:
            self._take_snapshot_mail(envelope)
        self._host.turn_ended()

    async def _tick_forever(self) -> None:
        # A pause of the process costs the ticks it slept through: they are not made up
        # for, so a replica that wakes up waits a whole timeout before it campaigns.
        while True:
            await asyncio.sleep(self._options.tick_seconds)
            self._tell(self._tick)
            self._note_disk()

    def _tick(self) -> None:
        if self.disks.refusal(self.core.membership):
            self.core.stand_down()  # and without a tick it does not campaign
            return
        self.core.tick(self._loop.time())
        self.disks.waited_ticks = self.disks.waited_ticks + 1 if self.core.is_leader else 0
        self._record_disks()

    def _record_disks(self) -> None:
        """What a leader has learned of its members' disks belongs into the log."""
        if self.core.is_leader and (target := self.disks.news(self.core.membership)) is not None:
            try:
                self.core.change_membership(target)
            except RaftError:  # another change is under way, or nothing is committed yet
                self.disks.heard_more = True  # again with the next turn

    def _note_disk(self) -> None:
        """Say in the log when the disk stops to answer, and when it answers again."""
        hangs, id = self.core.disk_hangs, self.core.id
        if hangs and not self._disk_hung:
            log.error("replica %d: %s: this replica does not lead until the disk answers", id, self.disk)
        elif self._disk_hung and not hangs:
            log.warning("replica %d: the disk answers again", id)
        self._disk_hung = hangs

    async def _write_forever(self) -> None:
        """Group commit: what queued up during one sync shares the next."""
        while True:
            job = await self._jobs.get()
            if isinstance(job, _NewBase):
                await self._set_base(job)
                continue
            writes = [job]
            size = sum(len(entry.data) for entry in job.entries)
            new_base: _NewBase | None = None
            while not self._jobs.empty() and size < self._options.max_append_batch_bytes:
                following = self._jobs.get_nowait()
                if isinstance(following, _NewBase):
                    new_base = following
                    break
                writes.append(following)
                size += sum(len(entry.data) for entry in following.entries)
            await self._append(writes)
            if new_base is not None:
                await self._set_base(new_base)

    async def _set_base(self, base: _NewBase) -> None:
        await self._wal.set_base(base.index, base.term)
        if base.installed:
            self._base_is_durable.set()

    async def _append(self, writes: list[Write]) -> None:
        await self._wal.append(*joined(writes))
        promises: list[Envelope] = []
        for write in writes:
            self._tell(self.core.written, write)
            promises += [promise for promise in write.promises if promise.to != self.core.id]
        if promises:
            self._transport.send(promises)

    # ---- snapshots

    def _take_snapshot_mail(self, envelope: Envelope) -> None:
        match envelope.message:
            case InstallSnapshotReply() as reply:
                if envelope.sender in self._senders:
                    self._senders[envelope.sender].answered(reply)
            case InstallSnapshot(offset=offset, total=total):
                self.receiving = (envelope.sender, offset, total)
                if not self._chunks.full():  # else dropped, as if lost: the sender repeats it
                    self._chunks.put_nowait(envelope)
            case _:
                raise AssertionError(f"not about snapshots: {envelope}")

    async def _send_snapshot(self, peer: NodeId) -> None:
        def send(to: NodeId, chunk: InstallSnapshot) -> None:
            if self.core.is_leader:
                self._transport.send([Envelope(self.core.id, to, self.core.term, chunk)])

        self._opening.add(peer)
        try:
            source = await self._host.open_snapshot()  # which may read all of it first
        finally:
            self._opening.discard(peer)
        log.info(
            "replica %d: sending snapshot %s (%d bytes) to %d", self.core.id, source.meta, source.size, peer
        )
        stream = self._rng.getrandbits(64)
        self._senders[peer] = SnapshotSender(peer, source, send, self._options.snapshots, stream)
        try:
            index = await self._senders[peer].run()
        finally:
            self._senders.pop(peer, None)
        self._tell(self.core.snapshot_reported, peer, index)

    async def _receive_chunks_forever(self) -> None:
        while True:
            envelope = await self._chunks.get()
            assert isinstance(envelope.message, InstallSnapshot)
            reply = await self.receiver.receive(envelope.message, envelope.term)
            if reply is not None and reply.done:
                # A promise like any other: the leader counts us for all that is below from here on.
                await self._base_is_durable.wait()
                if self.core.log.durable_index < reply.last_index:
                    continue  # overtaken by a log that is not on our disk yet: the leader asks again
            if reply is not None:
                self._tell(self.core.answer_chunk, envelope.sender, envelope.term, reply)

    def _install(self, meta: SnapshotMeta, sink: SnapshotSink) -> None:
        """The state machine first, then the log: a crash between the two restarts from the former.

        Raises ValueError when the state machine refuses the snapshot; nothing has changed then.
        """
        self._serve_deferred()  # it is older than the snapshot
        membership = self._host.install(meta, sink)
        if self._tell(self.core.restore, meta.index, meta.term, membership):
            self._base_is_durable.clear()
            self._jobs.put_nowait(_NewBase(meta.index, meta.term, installed=True))
