"""The replicated-state-machine layer that both services share.

`propose` puts a command into the log and waits for what applying it returned;
`read_barrier` waits until this replica may answer a linearizable read. Commands
are opaque bytes. Each is stamped with the group's time and the leader's wall clock before
it enters the log: that is how the state machine learns the time without asking for it.

Compaction: when the log has grown by `compact_bytes`, the state machine makes
itself durable beside the running work, and the log below that goes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from shardkv.raft.compaction import compact_to
from shardkv.raft.damage import DamageBook
from shardkv.raft.errors import DamagedState, Lost, NoRoom, NotLeader, OutcomeUnknown, Stopped
from shardkv.raft.incarnations import KnownDisks
from shardkv.raft.interfaces import Directory, Transport
from shardkv.raft.machine import STAMP, StateMachine
from shardkv.raft.node import Node, NodeOptions
from shardkv.raft.protocol.clock import ReplicatedClock
from shardkv.raft.protocol.core import Raft
from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.membership import Memberships
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.roles import Leader
from shardkv.raft.protocol.space import has_room
from shardkv.raft.protocol.types import Entry, Index, NodeId, SnapshotMeta, Term
from shardkv.raft.snapshot import SnapshotSink, SnapshotSource
from shardkv.raft.wal import Recovered, Wal, open_wal

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """How one replica is run; the same for both services."""

    node: NodeOptions = field(default_factory=NodeOptions)
    compact_bytes: int = 64 << 20  # log in memory and on disk before the state machine is flushed
    segment_bytes: int = 32 << 20


class Replica:
    """One replica of a replicated state machine. Get one from `open_replica`."""

    def __init__(
        self,
        core: Raft,
        machine: StateMachine,
        bootstrap: Membership,
        clock_ms: Callable[[], int],
        compact_bytes: int,
    ) -> None:
        self.core = core
        self._bootstrap = bootstrap
        self.machine = machine
        self.node: Node  # set by open_replica: node and host need each other
        self.damage: DamageBook | None = None  # set by `repair.open_or_repair`
        self.log_cut: dict[str, int] | None = None  # what the start cut off the log, and when; for status
        self.on_repaired: Callable[[NodeId], Coroutine[Any, Any, None]] | None = None
        self.on_turn: list[Callable[[], None]] = []  # called when leadership or state may have changed
        self._clock = ReplicatedClock(clock_ms, asyncio.get_running_loop().time)
        self._compact_bytes = compact_bytes
        self._pending: dict[Index, tuple[Term, asyncio.Future[bytes]]] = {}
        self._barrier: asyncio.Future[None] | None = None
        self._tickets: dict[int, asyncio.Future[None]] = {}
        self._next_ticket = 0
        self._unapplied: list[tuple[Index, asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._turn: asyncio.Future[None] | None = None

    # ---- for the services

    @property
    def is_leader(self) -> bool:
        return self.core.is_leader and not self.node.stopped

    @property
    def leader(self) -> NodeId:
        return self.core.leader

    @property
    def state_lost(self) -> bool:
        """Whether the state is damaged and being repaired."""
        return self.core.state_lost

    @property
    def has_room(self) -> bool:
        """Whether a quorum has room on its disks, as far as this leader was told."""
        return has_room(self.core)

    @property
    def members(self) -> dict[str, dict[str, str]]:
        """Who votes and who learns, with addresses; for people and their tools."""
        membership = self.core.membership
        return {
            kind: {str(node): membership.addresses.get(node, "") for node in sorted(nodes)}
            for kind, nodes in (
                ("voters", membership.voters),
                ("outgoing", membership.outgoing),
                ("learners", membership.learners),
            )
        }

    @property
    def disks(self) -> dict[str, object]:
        """This replica's disk and the others', as the group knows them; for people and their tools."""
        return self.node.disks.tell(self.core.membership)

    @property
    def has_moved(self) -> bool:
        """Whether the voters, or their addresses, are not those any more that this replica was first started with."""
        now, first = self.core.membership, self._bootstrap
        return {node: now.addresses.get(node, "") for node in now.voters} != dict(first.addresses)

    @property
    def leader_address(self) -> str:
        """Where the leader listens, as far as this replica knows; else empty."""
        return self.core.membership.addresses.get(self.core.leader, "")

    def log_after(self, index: Index, limit: int) -> tuple[Index, Sequence[Entry]]:
        """Where the log begins, and the applied entries after `index`, some `limit` bytes; none if they are compacted."""
        log, applied = self.core.log, self.machine.applied.index
        return log.base_index, log.slice(
            index + 1, applied + 1, limit
        ) if log.base_index <= index < applied else ()

    @property
    def waiting_proposals(self) -> int:
        return len(self._pending)

    @property
    def waiting_reads(self) -> int:
        return len(self._tickets) + len(self._unapplied)

    def now_ms(self) -> int:
        """The group's time, as well as this replica can tell (`clock.py`); 0 before the group's first command."""
        return self._clock.now_ms(self.machine.clock_ms)

    def wall_ms(self) -> int:
        """This machine's wall clock, right or wrong."""
        return self._clock.wall_ms()

    @property
    def wall_ahead_ms(self) -> int:
        """How far this machine's wall clock is ahead of the group's time: where one replica differs, it is wrong."""
        return self.wall_ms() - now_ms if (now_ms := self.now_ms()) else 0

    async def propose(self, command: bytes, heard_ms: int = 0) -> bytes:
        """The reply of the state machine once `command` is committed and applied here.

        `heard_ms`: the highest time of any group that the command's sender has heard of.
        Raises NotLeader, Busy, Transferring, Stopped (nothing was queued), Lost (it
        will never apply) or OutcomeUnknown.
        """
        index, term = self.node.propose(
            STAMP.pack(self._clock.stamp_ms(self.machine.clock_ms, heard_ms), self._clock.wall_ms()) + command
        )
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._pending[index] = (term, future)
        return await future

    async def read_barrier(self) -> None:
        """Return once everything acknowledged before this call is applied here.

        Calls of one turn share a ticket. Raises NotLeader, Busy, Stopped.
        """
        if self._barrier is None:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._next_ticket += 1
            self.node.read(self._next_ticket)
            self._tickets[self._next_ticket] = future
            self._barrier = future  # until the turn ends and its round may begin
        await asyncio.shield(self._barrier)

    async def next_turn(self) -> None:
        """Return when this replica has next carried something out: at the latest after a tick."""
        if self._turn is None:
            self._turn = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._turn)

    def check_room(self) -> None:
        """To be asked before what makes the state grow. Raises NoRoom."""
        if self.core.is_leader and not has_room(self.core):
            raise NoRoom("the disks of this group are nearly full: it takes only deletes until there is room")

    def check_running(self) -> None:
        """Raises Stopped."""
        self.node.check_running()

    def check_serving(self) -> None:
        """To be asked before the state machine is looked into. Raises Stopped; NotLeader while the state is lost."""
        self.check_running()
        if self.core.state_lost:
            raise NotLeader(self.core.leader)

    def damage_status(self) -> dict[str, Any] | None:
        """What was found damaged here, and how far the repair is; None where nothing ever was."""
        if self.damage is None or not self.damage.history:
            return None
        core = self.core
        told = {**self.damage.told(self.wall_ms()), "state_lost": core.state_lost, "leader": core.leader}
        told["alone"] = (core.membership.voters or self._bootstrap.voters) == {core.id}
        told["refused"] = self.node.receiver.refused
        if core.state_lost and (at := self.node.receiving):
            told |= {"repairing_from": at[0], "percent": 100 * at[1] // max(1, at[2])}
        return told

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Around every look into the state machine: damage that is met there stops this replica.

        What rested on the damaged read goes nowhere. Raises Stopped, NotLeader.
        """
        self.check_serving()
        try:
            yield
        except DamagedState as error:
            self.node.fail(error)
            raise Stopped("this replica has stopped: its state is damaged") from None

    async def stop(self) -> None:
        await self.node.stop()
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.gather(self._flushing, return_exceptions=True)
        self._fail_everything(Stopped("this replica has stopped"))
        self._end_turn()
        self.machine.close()

    # ---- for the node

    def apply(self, entries: Sequence[Entry]) -> None:
        replies = self.machine.apply(entries)
        assert len(replies) == len(entries), "one reply an entry"
        assert self.machine.applied.index == entries[-1].index, "applied index behind its effects"
        if self._pending:
            for entry, reply in zip(entries, replies, strict=True):
                waiting = self._pending.pop(entry.index, None)
                if waiting is not None and not waiting[1].done():
                    term, future = waiting
                    if term == entry.term:
                        future.set_result(reply)
                    else:
                        future.set_exception(Lost(f"entry {entry.index} is another leader's"))
        self._release_applied()
        if self.core.log.size_bytes > self._compact_bytes and self._flushing is None:
            self._flushing = asyncio.get_running_loop().create_task(self._flush_and_compact())
            self._flushing.add_done_callback(self._flushed)

    def reads_released(self, reads: Sequence[tuple[int, Index]]) -> None:
        for ticket, index in reads:
            self._unapplied.append((index, self._tickets.pop(ticket)))
        self._release_applied()

    def reads_failed(self, tickets: Sequence[int]) -> None:
        for ticket in tickets:
            future = self._tickets.pop(ticket)
            if not future.done():
                future.set_exception(NotLeader(self.core.leader))
                future.exception()  # a caller that gave up does not need to hear it

    def turn_ended(self) -> None:
        self._barrier = None
        self._end_turn()
        if self.node.stopped:
            self._fail_everything(Stopped("this replica has stopped"))
        elif self._pending and not self.core.is_leader:
            self._fail_pending(OutcomeUnknown("leadership was lost with the entry in flight"))
        for callback in self.on_turn:
            callback()

    async def open_snapshot(self) -> SnapshotSource:
        return await self.machine.open_snapshot()

    def open_sink(self, meta: SnapshotMeta) -> SnapshotSink:
        return self.machine.open_sink(meta)

    def install(self, meta: SnapshotMeta, sink: SnapshotSink) -> Membership:
        self.machine.install(meta, sink)
        assert self.machine.applied == meta
        self._release_applied()
        if self.core.state_lost and self.on_repaired is not None:
            self.node.spawn(self.on_repaired(self.core.leader))
        return membership_of(self.machine, self._bootstrap)

    # ---- inside

    def _end_turn(self) -> None:
        if self._turn is not None:
            turn, self._turn = self._turn, None
            turn.set_result(None)

    def _release_applied(self) -> None:
        if self._unapplied:
            applied = self.machine.applied.index
            for index, future in self._unapplied:
                if index <= applied and not future.done():
                    future.set_result(None)
            self._unapplied = [waiting for waiting in self._unapplied if waiting[0] > applied]

    def _fail_pending(self, error: Exception) -> None:
        pending, self._pending = self._pending, {}
        for _, future in pending.values():
            if not future.done():
                future.set_exception(error)

    def _fail_everything(self, error: Exception) -> None:
        self._fail_pending(error)
        waiting = [*self._tickets.values(), *(future for _, future in self._unapplied)]
        self._tickets.clear()
        self._unapplied.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()

    async def _flush_and_compact(self) -> None:
        durable = await self.machine.flush()
        log, role = self.core.log, self.core.role
        followers = role.progress.values() if isinstance(role, Leader) else ()
        index = compact_to(min(durable, log.durable_index), log.size_bytes, self._compact_bytes, followers)
        if index > self.core.log.base_index and not self.node.stopped:
            self.node.compact(index)

    def _flushed(self, task: asyncio.Task[None]) -> None:
        self._flushing = None
        if not task.cancelled() and task.exception() is not None:
            self.node.fail(task.exception())  # the state machine's disk failed


def membership_of(machine: StateMachine, bootstrap: Membership) -> Membership:
    return Membership.decode(machine.membership) if machine.membership else bootstrap


async def entries_that_hold(wal: Wal, recovered: Recovered, applied: SnapshotMeta) -> list[Entry]:
    """The entries of a recovered log, or none where the state machine is ahead of that log.

    A snapshot was installed then, and the crash came before the log knew: what the log has is
    of an older term, was never committed, and says nothing of who the members are. `recovered`
    and the disk are brought to where the state machine is. Raises StorageError.
    """
    if applied.index < recovered.base_index:
        why = f"the state ends at entry {applied.index}, and the log begins after {recovered.base_index}"
        raise DamagedState("state machine", why)
    known = Log(recovered.base_index, recovered.base_term, recovered.entries)
    if known.term_at(applied.index) != applied.term:
        recovered.replay_base(applied.index, applied.term)
        assert not recovered.entries
        await wal.set_base(applied.index, applied.term)
    return recovered.entries


async def open_replica(
    id: NodeId,
    bootstrap: Membership,
    directory: Directory,
    transport: Transport,
    machine: StateMachine,
    rng: Random,
    clock_ms: Callable[[], int],
    options: ReplicaOptions,
    disks: KnownDisks | None = None,
    state_lost: bool = False,
) -> Replica:
    """Recover a replica from its disk and start it. Raises StorageError.

    `bootstrap` holds until a change of the membership is in the log or the state: all
    first replicas of a group share it. One that joins later has none: `Membership(frozenset())`.

    `state_lost`: `machine` is empty if its state was damaged and no snapshot came in since (repair.py).
    """
    wal, recovered = await open_wal(directory, rng, options.segment_bytes)
    applied = machine.applied
    known = membership_of(machine, bootstrap)
    lost = state_lost and applied.index == 0 < recovered.base_index
    if lost:
        # The memberships below the log's base went with the state. None has to be known: a replica that never
        # leads counts no votes, and whom it votes for or acknowledges does not depend on its own (thesis
        # §4.1). So it takes no guess, and begins like one that joins; the snapshot tells the rest.
        applied, known = SnapshotMeta(recovered.base_index, recovered.base_term), Membership(frozenset())
    try:
        entries = await entries_that_hold(wal, recovered, applied)
    except DamagedState:
        wal.close()
        raise
    core = Raft(
        id,
        Memberships(applied.index, known, entries),
        Log(recovered.base_index, recovered.base_term, entries),
        await wal.hard_state_beside(applied.term),
        applied.index,
        rng,
        options.node.core,
        lost,
    )
    replica = Replica(core, machine, bootstrap, clock_ms, options.compact_bytes)
    replica.log_cut = {"bytes": recovered.cut_bytes, "at_ms": clock_ms()} if recovered.cut_bytes else None
    replica.node = Node(core, wal, transport, replica, options.node, rng, disks)
    replica.node.start()
    return replica
