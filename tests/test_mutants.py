"""The judges are judged: classic bugs, planted one at a time, must be found by the simulations.

Each mutant is a small patch to production code. It runs against seeds of one of three
stories (random walks over bare cores, a group, a cluster) until one fails; more seeds
than stated means that the simulation is too kind. `python -m tests.test_mutants` prints
how many each took.
"""

from __future__ import annotations

import asyncio
import inspect
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from shardkv import shardkv_pb2 as pb
from shardkv.client.lane import Lane
from shardkv.raft import codec, sealed, wal
from shardkv.raft.incarnations import KnownDisks
from shardkv.raft.protocol import core, quorum, roles
from shardkv.raft.protocol.core import Raft
from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.membership import Memberships
from shardkv.raft.protocol.messages import AppendEntries, Envelope, RequestVote
from shardkv.raft.protocol.outbox import Outbox, Promise
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.reads import lease_start
from shardkv.raft.protocol.ready import Write
from shardkv.raft.protocol.roles import Leader
from shardkv.raft.replica import Replica
from shardkv.raft.snapshot import SnapshotReceiver
from shardkv.raft.state_file import InMemoryMachine
from shardkv.server import giver as lending
from shardkv.server.errands import Migrator
from shardkv.shardctrler.claims import Claims
from shardkv.state import commands, journal, layout
from shardkv.state.cursor import JOURNAL, Cursor
from shardkv.state.machine import ShardMachine
from shardkv.state.ownership import Ownership
from shardkv.state.records import Records
from shardkv.state.row import Row, State
from shardkv.storage import tables
from shardkv.storage.memory import MemoryEngine
from tests import (
    test_disk_hangs,
    test_promises,
    test_repair,
    test_rocks,
    test_snapshots,
    test_take_back,
    test_units,
)
from tests.sim import loop, lost_groups, raft_soak, raft_walk, soak, take_back
from tests.sim.disk import SimDirectory, SimFile
from tests.sim.world import Process, World

Patch = Callable[[pytest.MonkeyPatch], None]


def raft_orders(seed: int) -> None:
    raft_walk.run_seed(seed)


def raft_story(seed: int) -> None:
    raft_soak.run_seed(seed)


def directed(test: Callable[..., object], *arguments: object) -> Callable[[int], None]:
    """One test of one law, where the order of events that it needs is too rare for the walks."""

    def story(seed: int) -> None:
        given = (Path(tempfile.mkdtemp()),) if "tmp_path" in inspect.signature(test).parameters else ()
        try:
            test(*arguments, *given)
        finally:
            for path in given:
                shutil.rmtree(path)

    return story


def cluster_story(seed: int) -> None:
    loop.run(soak.story(seed), limit=soak.LIMIT_SECONDS)


def take_back_story(seed: int) -> None:
    take_back.run_seed(seed)


def lost_groups_story(seed: int) -> None:
    loop.run(lost_groups.story(seed), limit=lost_groups.LIMIT_SECONDS)


# ---- Raft


def a_term_is_forgotten_in_a_crash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(wal, "_pack_hard_state", lambda s: wal.HARD_STATE.pack(wal.RECORD_HARD_STATE, 0, 0))


def a_vote_is_forgotten_in_a_crash(patch: pytest.MonkeyPatch) -> None:
    original = Raft.__init__

    def init(self: Raft, *arguments) -> None:  # type: ignore[no-untyped-def]
        original(self, *arguments)
        self.voted_for = 0

    patch.setattr(Raft, "__init__", init)


def votes_for_everybody(patch: pytest.MonkeyPatch) -> None:
    original = Raft._on_request_vote

    def on_request_vote(self: Raft, sender: int, term: int, message: RequestVote) -> None:
        if not message.pre and not self.is_leader:
            self.voted_for = 0
        original(self, sender, term, message)

    patch.setattr(Raft, "_on_request_vote", on_request_vote)


def compares_lengths_before_terms(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Log, "is_up_to_date", lambda self, i, t: (i, t) >= (self.last_index, self.last_term))


def votes_for_shorter_logs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Log, "is_up_to_date", lambda self, index, term: True)


def answers_before_its_disk(patch: pytest.MonkeyPatch) -> None:
    def promise(self: Outbox, to: int, term: int, message: Promise) -> None:
        if isinstance(message, RequestVote):
            self._promises.append(Envelope(self._id, to, term, message))
        else:
            self._messages.append(Envelope(self._id, to, term, message))

    patch.setattr(Outbox, "promise", promise)


def does_not_truncate_a_conflict(patch: pytest.MonkeyPatch) -> None:
    original = Raft._on_append_entries

    def on_append(self: Raft, sender: int, message: AppendEntries) -> None:
        fresh = tuple(entry for entry in message.entries if entry.index > self.log.last_index)
        if fresh:
            start = fresh[0].index - 1
            message = replace(
                message,
                prev_log_index=start,
                prev_log_term=self.log.term_at(start) or 0,
                entries=tuple(replace(e, term=max(e.term, self.log.last_term)) for e in fresh),
            )
        original(self, sender, message)

    patch.setattr(Raft, "_on_append_entries", on_append)


def an_old_append_truncates(patch: pytest.MonkeyPatch) -> None:
    original = Raft._on_append_entries

    def on_append(self: Raft, sender: int, message: AppendEntries) -> None:
        end = message.prev_log_index + len(message.entries)
        if message.entries and self.commit_index <= end < self.log.last_index:
            self.log.truncate(max(end, self.commit_index) + 1)
        original(self, sender, message)

    patch.setattr(Raft, "_on_append_entries", on_append)


def a_minority_is_enough(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quorum, "majority", lambda count: max(1, count // 2))


def commits_older_terms_by_counting(patch: pytest.MonkeyPatch) -> None:
    """Figure 8."""
    original = Raft._advance_commit

    def advance(self: Raft) -> None:
        if isinstance(self.role, Leader):
            match = {node: peer.match_index for node, peer in self.role.progress.items()}
            match[self.id] = self.log.durable_index
            old = min(quorum.quorum_index(self.membership, match), self.role.term_start - 1)
            self.commit_index = max(self.commit_index, old)
        original(self)

    patch.setattr(Raft, "_advance_commit", advance)


def counts_itself_before_its_disk(patch: pytest.MonkeyPatch) -> None:
    original = quorum.quorum_index

    def counting(membership, match):  # type: ignore[no-untyped-def]
        leader = sys._getframe(1).f_locals.get("self")
        if sys._getframe(1).f_code.co_name == "_advance_commit":
            assert leader is not None
            match = match | {leader.id: leader.log.last_index}
        return original(membership, match)

    patch.setattr(core, "quorum_index", counting)
    written = Raft._on_match

    def on_match(self: Raft, leader, sender, peer, index):  # type: ignore[no-untyped-def]
        written(self, leader, sender, peer, index)
        self._advance_commit()

    patch.setattr(Raft, "_on_match", on_match)
    # What is applied need not be on our own disk either, or the other guard would hide it.
    patch.setattr(Raft, "_take_committed", _take_without_disk)


def _take_without_disk(self: Raft):  # type: ignore[no-untyped-def]
    if self.commit_index <= self.handed_index:
        return ()
    entries = self.log.slice(self.handed_index + 1, self.commit_index + 1, self.options.max_apply_bytes)
    self.handed_index = entries[-1].index
    return entries


def a_snapshot_rolls_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Raft, "wants_snapshot", lambda self, index: True)

    def wanted(self: SnapshotReceiver, chunk, term):  # type: ignore[no-untyped-def]
        self._wanted = lambda index: True
        return received(self, chunk, term)

    received = SnapshotReceiver.receive
    patch.setattr(SnapshotReceiver, "receive", wanted)


def a_torn_tail_is_left(patch: pytest.MonkeyPatch) -> None:
    async def rewrite_tail(self, name: str, offset: int, data: bytes) -> None:  # type: ignore[no-untyped-def]
        return None

    patch.setattr(SimDirectory, "rewrite_tail", rewrite_tail)


def the_log_goes_before_the_state_is_durable(patch: pytest.MonkeyPatch) -> None:
    async def flush(self: InMemoryMachine) -> int:
        return self.applied.index

    patch.setattr(InMemoryMachine, "flush", flush)


def the_applied_index_runs_ahead_of_the_data(patch: pytest.MonkeyPatch) -> None:
    """etcd #13766: the two are saved apart."""

    async def flush(self: InMemoryMachine) -> int:
        async with self._writing:
            data = self.dump()
            await asyncio.sleep(0.01)
            await self._make_durable(self._applied, lambda: data)
            return self._durable

    patch.setattr(InMemoryMachine, "flush", flush)


def the_data_runs_ahead_of_the_applied_index(patch: pytest.MonkeyPatch) -> None:
    """So entries are applied twice after a crash. Exactly-once records hide it from a cluster's clients."""

    async def flush(self: InMemoryMachine) -> int:
        async with self._writing:
            meta = self._applied
            await asyncio.sleep(0.01)
            await self._make_durable(meta, self.dump)
            return self._durable

    patch.setattr(InMemoryMachine, "flush", flush)


# ---- reads, records, shards


def a_new_leader_answers_reads_at_once(patch: pytest.MonkeyPatch) -> None:
    """Before its first own entry it does not know what is committed (§8)."""
    original = Raft._become_leader

    def become(self: Raft) -> None:
        original(self)
        assert isinstance(self.role, Leader)
        self.role.term_start = 0

    patch.setattr(Raft, "_become_leader", become)


def a_lease_without_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Raft, "_lease_holds", lambda self, leader: self.options.lease_seconds > 0)


def a_lease_without_its_margin(patch: pytest.MonkeyPatch) -> None:
    """It lasts as long as the longest election timeout."""
    original = Raft._lease_holds

    def holds(self: Raft, leader) -> bool:  # type: ignore[no-untyped-def]
        options = self.options
        longest = 2 * options.election_ticks * 0.05
        self.options = replace(options, lease_seconds=longest if options.lease_seconds else 0.0)
        try:
            return original(self, leader)
        finally:
            self.options = options

    patch.setattr(Raft, "_lease_holds", holds)


def a_lease_outlives_a_transfer(patch: pytest.MonkeyPatch) -> None:
    original = Raft._lease_holds

    def holds(self: Raft, leader) -> bool:  # type: ignore[no-untyped-def]
        leader.lease_forfeited = False
        return original(self, leader)

    patch.setattr(Raft, "_lease_holds", holds)


def a_follower_reads_before_it_has_applied(patch: pytest.MonkeyPatch) -> None:
    original = Replica.reads_released

    def released(self: Replica, reads):  # type: ignore[no-untyped-def]
        original(self, [(ticket, 0) for ticket, _ in reads])

    patch.setattr(Replica, "reads_released", released)


def a_retry_is_a_new_write(patch: pytest.MonkeyPatch) -> None:
    original = Lane._again

    def again(self: Lane, operations, *rest, **more):  # type: ignore[no-untyped-def]
        for operation in operations:
            if operation.numbering is not None:
                operation.seq = operation.numbering.take()
        original(self, operations, *rest, **more)

    patch.setattr(Lane, "_again", again)


def records_do_not_merge(patch: pytest.MonkeyPatch) -> None:
    def inherit(self: Records, row: Row) -> bool:
        if row.folds:
            self._batch.delete_range(*layout.record_range(row.inherits))
        return True

    patch.setattr(Records, "inherit", inherit)


def reads_without_a_quorum(patch: pytest.MonkeyPatch) -> None:
    async def barrier(self: Replica) -> None:
        return None

    patch.setattr(Replica, "read_barrier", barrier)


def writes_are_not_remembered(patch: pytest.MonkeyPatch) -> None:
    original = ShardMachine._apply_section

    def apply(self, section, *rest):  # type: ignore[no-untyped-def]
        row = self.ownership.rows.get(section.shard)
        record = self._records.find(row, section.session) if row is not None else None
        if record is not None:
            record.replies.clear()
        return original(self, section, *rest)

    patch.setattr(ShardMachine, "_apply_section", apply)


def records_do_not_move(patch: pytest.MonkeyPatch) -> None:
    original = lending.pull

    def pull(machine, request, *rest):  # type: ignore[no-untyped-def]
        reply = original(machine, request, *rest)
        kept = [item for item in reply.items if not item.key.startswith(b"s")]
        del reply.items[:]
        reply.items.extend(kept)
        return reply

    patch.setattr(lending, "pull", pull)


def records_do_not_split(patch: pytest.MonkeyPatch) -> None:
    """The new shard answers no retry of what the whole has done."""
    original, looked_up = Records.inherit, Records._with_inherited

    def inherit(self: Records, row: Row) -> bool:
        return not row.folds or original(self, row)

    def with_inherited(self: Records, row: Row, session: bytes, own: bytes | None) -> bytes | None:
        return looked_up(self, row, session, own) if row.folds else own

    patch.setattr(Records, "inherit", inherit)
    patch.setattr(Records, "_with_inherited", with_inherited)


def records_are_not_in_the_snapshot(patch: pytest.MonkeyPatch) -> None:
    original = MemoryEngine.load

    def load(self: MemoryEngine, data: bytes) -> None:
        original(self, data)
        for key in list(self._pairs.irange(b"s", b"t")):
            del self._pairs[key]

    patch.setattr(MemoryEngine, "load", load)


def the_journal_is_not_replayed(patch: pytest.MonkeyPatch) -> None:
    def replay(engine, row, cursor, reply, size, limit):  # type: ignore[no-untyped-def]
        return Cursor(JOURNAL, b"", row.journal), size

    patch.setattr(lending, "_replay", replay)


def the_last_chunk_does_not_wait_for_the_freeze(patch: pytest.MonkeyPatch) -> None:
    original = lending.pull

    def pull(machine, request, *rest):  # type: ignore[no-untyped-def]
        reply = original(machine, request, *rest)
        reply.final = reply.ready and reply.next.phase == JOURNAL
        return reply

    patch.setattr(lending, "pull", pull)


def deletes_before_the_receiver_has_it(patch: pytest.MonkeyPatch) -> None:
    async def release(self: Migrator, shard: int, epoch: int) -> None:
        while (row := self._lent(shard, epoch)) is not None:
            step = commands.release if row.state is State.FROZEN else commands.keep
            await self._replica.propose(step(shard, epoch))

    patch.setattr(Migrator, "_release", release)


def serves_while_pulling(patch: pytest.MonkeyPatch) -> None:
    served = (State.PULLING, State.SERVING, State.LENDING)
    patch.setattr(Row, "serves", property(lambda self: self.state in served))


def a_joint_membership_is_skipped(patch: pytest.MonkeyPatch) -> None:
    """Voters change at once, however many: two majorities that need not meet."""

    def encode(self: Membership) -> bytes:
        return encoded(self.left() if self.is_joint else self)

    encoded = Membership.encode
    patch.setattr(Membership, "encode", encode)


def a_membership_holds_only_once_it_is_committed(patch: pytest.MonkeyPatch) -> None:
    """And a restart forgets what was committed, so an old majority may come to life again."""
    original, extend = Raft._take_committed, Memberships.extend

    def take(self: Raft):  # type: ignore[no-untyped-def]
        entries = original(self)
        if extend(self.memberships, entries):
            self._membership_changed()
            if isinstance(self.role, Leader):
                self._follow_change(self.role)
        return entries

    patch.setattr(Memberships, "extend", lambda self, entries: False)
    patch.setattr(Raft, "_take_committed", take)


def a_lost_disk_comes_back_as_if_nothing_was_lost(patch: pytest.MonkeyPatch) -> None:
    async def replace_disk(self: World, process: Process, timeout: float) -> None:
        self.kill(process)
        process.disk.wipe()
        await self.start(process)

    patch.setattr(World, "replace_disk", replace_disk)
    # The product refuses such a disk by itself. Without that, the simulation has to find it.
    patch.setattr(KnownDisks, "admits", lambda self, envelope, membership, term, commit_index=0: True)
    patch.setattr(KnownDisks, "refusal", lambda self, membership: 0)


def serves_when_frozen(patch: pytest.MonkeyPatch) -> None:
    served = (State.FROZEN, State.SERVING, State.LENDING)
    patch.setattr(Row, "serves", property(lambda self: self.state in served))


def a_chunk_is_installed_wherever_the_cursor_is(patch: pytest.MonkeyPatch) -> None:
    original = ShardMachine._install_chunk

    def install(self: ShardMachine, chunk: pb.Install):  # type: ignore[no-untyped-def]
        row = self.ownership.rows.get(chunk.shard)
        if row is not None and chunk.next.phase == 2:
            chunk.final = True
        return original(self, chunk)

    patch.setattr(ShardMachine, "_install_chunk", install)


def thaws_without_asking(patch: pytest.MonkeyPatch) -> None:
    """By time alone: the last chunk may be on its way, or installed."""

    async def release(self: Migrator, shard: int, epoch: int) -> None:
        while (row := self._row(shard, epoch, State.FROZEN)) is not None:
            await asyncio.sleep(0.02)
            await self._replica.propose(commands.thaw(shard, epoch, row.attempt + 1))

    patch.setattr(Migrator, "_release", release)


def closes_for_a_taker_without_room_and_waits(patch: pytest.MonkeyPatch) -> None:
    """What it was: the giver closes, the taker does not install, and nobody serves."""
    original = lending.Closing.is_due

    def is_due(self, row, request):  # type: ignore[no-untyped-def]
        request.can_finish = True
        return original(self, row, request)

    patch.setattr(lending.Closing, "is_due", is_due)
    patch.setattr(Ownership, "abandoned", lambda self, shard, epoch, attempt: [])


def takes_back_what_was_not_given_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ownership, "has_given_up", lambda self, shard, epoch: True)


def a_configuration_is_skipped(patch: pytest.MonkeyPatch) -> None:
    original = Ownership.learn

    def learn(self, change):  # type: ignore[no-untyped-def]
        if change.num % 3 == 0:
            self.config_num = change.num
            return []
        return original(self, change)

    patch.setattr(Ownership, "learn", learn)


def the_journal_follows_the_batches(patch: pytest.MonkeyPatch) -> None:
    """The real bug of seed 47: positions that mean something else on another replica."""
    patch.setattr(journal, "note_changes", lambda batch, row, section: None)
    original = ShardMachine._commit

    def commit(self: ShardMachine, applied) -> None:  # type: ignore[no-untyped-def]
        self._records.store()
        for row in list(self.ownership.in_state(State.LENDING)):
            start, end = layout.data_range(row.start, row.end)
            low, high = layout.record_range(row.shard)
            for key in [k for k in self._batch.changes if start <= k < end or low <= k < high]:
                self._batch.put(layout.journal_key(row.shard, row.journal), key)
                row.journal += 1
                self.ownership.changed.add(row.shard)
        original(self, applied)

    patch.setattr(ShardMachine, "_commit", commit)


# ---- groups whose number is used again


def serves_before_its_claim_is_confirmed(patch: pytest.MonkeyPatch) -> None:
    async def claim(self: Migrator, joined: int) -> None:
        gid = self._machine.gid
        group = (await self._controller.query(None, 2.0)).groups.get(gid)
        if group is not None:
            await self._replica.propose(commands.claimed(self._machine.incarnation, group.joined))

    patch.setattr(Migrator, "_claim", claim)


def any_incarnation_may_claim_a_join(patch: pytest.MonkeyPatch) -> None:
    original = Claims.claim

    def claim(self: Claims, gid: int, incarnation: int, num: int) -> int:
        for join in self.joins.get(gid, []):
            join.incarnation = 0
        return original(self, gid, incarnation, num)

    patch.setattr(Claims, "claim", claim)


def learns_configurations_from_before_its_join(patch: pytest.MonkeyPatch) -> None:
    def claimed(self: Ownership, joined: int) -> bool:
        if joined <= self.joins[1]:
            return False
        self.joins = (1, joined)
        return True

    patch.setattr(Ownership, "claimed", claimed)


def a_pull_is_answered_by_another_incarnation(patch: pytest.MonkeyPatch) -> None:
    original = lending.pull

    def pull(machine, request, pace):  # type: ignore[no-untyped-def]
        reply = original(machine, request, pace)
        if reply.other_group:  # "I have nothing of it": as if the shard were empty
            reply = pb.PullReply(ready=True, final=True, clock_ms=machine.clock_ms)
            reply.next.phase = JOURNAL
        return reply

    patch.setattr(lending, "pull", pull)


# ---- what issue 10 found that no simulation saw


def joint_reads_ask_one_half(patch: pytest.MonkeyPatch) -> None:
    original = Raft._confirm_reads

    def confirm(self: Raft, leader: Leader) -> None:
        with _memberships(self, lambda membership: membership.left()):
            original(self, leader)

    patch.setattr(Raft, "_confirm_reads", confirm)


@contextmanager
def _memberships(raft: Raft, changed: Callable[[Membership], Membership]) -> Iterator[None]:
    """While this lasts, `raft` takes the membership in force for another."""
    kept = raft.memberships
    raft.memberships = Memberships(kept.index, changed(kept.current))
    try:
        yield
    finally:
        raft.memberships = kept


def learners_count_in_the_read_quorum(patch: pytest.MonkeyPatch) -> None:
    original = Raft._confirm_reads

    def confirm(self: Raft, leader: Leader) -> None:
        with _memberships(self, lambda m: Membership(m.voters | m.learners, m.outgoing, addresses=m.addresses)):
            original(self, leader)

    patch.setattr(Raft, "_confirm_reads", confirm)


def a_joint_lease_asks_one_half(patch: pytest.MonkeyPatch) -> None:
    original = lease_start
    patch.setattr(roles, "lease_start", lambda membership, at: original(membership.left(), at))


def a_lease_is_counted_from_the_receipt(patch: pytest.MonkeyPatch) -> None:
    original = Raft._on_append_reply

    def on_append_reply(self: Raft, sender, message) -> None:  # type: ignore[no-untyped-def]
        if isinstance(self.role, Leader) and sender in self.role.progress:
            peer = self.role.progress[sender]
            if message.read_seq > peer.read_seq:
                peer.confirmed_at = self._now
        original(self, sender, message)

    patch.setattr(Raft, "_on_append_reply", on_append_reply)


def a_snapshots_membership_is_lost(patch: pytest.MonkeyPatch) -> None:
    original = Raft.restore

    def restore(self: Raft, index: int, term: int, membership: Membership) -> bool:
        return original(self, index, term, self.membership)

    patch.setattr(Raft, "restore", restore)


def a_restore_forgets_the_memberships_of_the_kept_suffix(patch: pytest.MonkeyPatch) -> None:
    def restore(self: Memberships, index: int, membership: Membership) -> None:
        self._history = [(index, membership)]
        self.current = membership

    patch.setattr(Memberships, "restore", restore)


def writes_in_flight_are_clamped_one_too_high(patch: pytest.MonkeyPatch) -> None:
    original = Log.truncate

    def truncate(self: Log, index: int) -> None:
        in_flight = list(self._in_flight)
        original(self, index)
        self._in_flight = deque(min(last, index) for last in in_flight)

    patch.setattr(Log, "truncate", truncate)


def a_promise_is_stamped_with_a_newer_term(patch: pytest.MonkeyPatch) -> None:
    original = Raft.written

    def written(self: Raft, write: Write) -> None:
        original(self, write)
        promises = tuple(replace(promise, term=max(promise.term, self.term)) for promise in write.promises)
        object.__setattr__(write, "promises", promises)

    patch.setattr(Raft, "written", written)


def asks_for_votes_before_its_disk(patch: pytest.MonkeyPatch) -> None:
    original = Outbox.promise

    def promise(self: Outbox, to: int, term: int, message: Promise) -> None:
        if isinstance(message, RequestVote):
            self._messages.append(Envelope(self._id, to, term, message))
        else:
            original(self, to, term, message)

    patch.setattr(Outbox, "promise", promise)


def the_header_of_the_state_file_is_unchecked(patch: pytest.MonkeyPatch) -> None:
    original = sealed._checksum
    patch.setattr(sealed, "_checksum", lambda header, *parts: original(b"", *[p[16:] for p in parts]))


def the_status_of_an_iterator_is_unchecked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tables, "check_ended", lambda iterator: None)


def no_sync_at_append(patch: pytest.MonkeyPatch) -> None:
    async def append(self: SimFile, data: bytes) -> None:
        self._content.write(len(self._content.cached), data)
        await asyncio.sleep(0.001)

    patch.setattr(SimFile, "append", append)


def no_directory_sync_after_a_rename(patch: pytest.MonkeyPatch) -> None:
    async def sync_names(self: SimDirectory) -> None:
        await asyncio.sleep(0.001)

    patch.setattr(SimDirectory, "_sync_names", sync_names)


def what_was_found_is_taken_for_durable(patch: pytest.MonkeyPatch) -> None:
    """B6: a killed process wrote and never synced; the next one rests on what it reads."""

    async def rewrite_tail(self: SimDirectory, name: str, offset: int, data: bytes) -> None:
        content = self._disk._names[name]
        content.cut(offset)
        content.cached[offset:] = data

    patch.setattr(SimDirectory, "rewrite_tail", rewrite_tail)


def the_checksum_of_mail_is_unchecked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(codec, "google_crc32c", SimpleNamespace(value=lambda body: 0))


def the_number_of_a_stream_is_unchecked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SnapshotReceiver, "_is_newest", lambda self, stream, term: True)


def campaigns_without_a_state(patch: pytest.MonkeyPatch) -> None:
    original = Raft._campaign

    def campaign(self: Raft, pre: bool, transfer: bool = False) -> None:
        self.state_lost = False
        original(self, pre, transfer)

    patch.setattr(Raft, "_campaign", campaign)


def leads_on_while_its_disk_hangs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Raft, "disk_hangs", property(lambda self: False))


# mutant -> (story, seeds within which it must be found)
MUTANTS: dict[Patch, tuple[Callable[[int], None], int]] = {
    serves_before_its_claim_is_confirmed: (lost_groups_story, 20),
    any_incarnation_may_claim_a_join: (lost_groups_story, 20),
    learns_configurations_from_before_its_join: (lost_groups_story, 20),
    a_pull_is_answered_by_another_incarnation: (lost_groups_story, 40),
    a_term_is_forgotten_in_a_crash: (cluster_story, 60),
    a_vote_is_forgotten_in_a_crash: (raft_orders, 1000),
    votes_for_everybody: (raft_orders, 1000),
    compares_lengths_before_terms: (raft_orders, 1000),
    votes_for_shorter_logs: (raft_orders, 1000),
    commits_older_terms_by_counting: (raft_orders, 1000),
    counts_itself_before_its_disk: (raft_orders, 1000),
    a_snapshot_rolls_back: (
        directed(test_snapshots.test_a_snapshot_that_the_log_overtook_while_it_was_proven_is_not_installed),
        1,
    ),
    a_torn_tail_is_left: (cluster_story, 60),
    the_log_goes_before_the_state_is_durable: (cluster_story, 60),
    the_applied_index_runs_ahead_of_the_data: (cluster_story, 60),
    the_data_runs_ahead_of_the_applied_index: (raft_story, 150),
    a_new_leader_answers_reads_at_once: (raft_orders, 1000),
    a_lease_without_end: (raft_orders, 1000),
    a_lease_without_its_margin: (raft_orders, 1000),
    a_lease_outlives_a_transfer: (raft_orders, 1000),
    a_follower_reads_before_it_has_applied: (cluster_story, 60),
    a_retry_is_a_new_write: (cluster_story, 60),
    records_do_not_merge: (cluster_story, 400),
    answers_before_its_disk: (raft_orders, 1000),
    does_not_truncate_a_conflict: (raft_orders, 1000),
    an_old_append_truncates: (raft_orders, 1000),
    a_minority_is_enough: (raft_orders, 1000),
    reads_without_a_quorum: (cluster_story, 60),
    writes_are_not_remembered: (cluster_story, 60),
    records_do_not_move: (cluster_story, 60),
    records_do_not_split: (cluster_story, 150),
    records_are_not_in_the_snapshot: (cluster_story, 60),
    the_journal_is_not_replayed: (cluster_story, 60),
    the_last_chunk_does_not_wait_for_the_freeze: (cluster_story, 60),
    deletes_before_the_receiver_has_it: (
        directed(test_take_back.test_a_frozen_giver_keeps_its_copy_until_the_taker_serves),
        1,
    ),
    serves_while_pulling: (cluster_story, 60),
    serves_when_frozen: (cluster_story, 60),
    a_joint_membership_is_skipped: (raft_orders, 1000),
    a_membership_holds_only_once_it_is_committed: (raft_orders, 1000),
    a_lost_disk_comes_back_as_if_nothing_was_lost: (cluster_story, 60),
    a_chunk_is_installed_wherever_the_cursor_is: (cluster_story, 60),
    a_configuration_is_skipped: (cluster_story, 60),
    thaws_without_asking: (take_back_story, 40),
    closes_for_a_taker_without_room_and_waits: (
        directed(
            test_take_back.test_a_giver_does_not_close_for_a_taker_that_lost_its_room_at_the_end_of_the_copy
        ),
        1,
    ),
    takes_back_what_was_not_given_up: (take_back_story, 40),
    the_journal_follows_the_batches: (
        directed(test_units.test_replicas_agree_however_entries_are_batched),
        1,
    ),
    joint_reads_ask_one_half: (directed(test_promises.test_a_read_while_joint_asks_both_halves, (4, 5)), 1),
    learners_count_in_the_read_quorum: (
        directed(test_promises.test_learners_confirm_neither_reads_nor_leases),
        1,
    ),
    a_joint_lease_asks_one_half: (directed(test_promises.test_a_lease_while_joint_asks_both_halves, (4, 5)), 1),
    a_lease_is_counted_from_the_receipt: (
        directed(test_promises.test_a_lease_begins_when_its_round_was_sent_not_when_the_answer_came),
        1,
    ),
    a_snapshots_membership_is_lost: (raft_orders, 1000),
    a_restore_forgets_the_memberships_of_the_kept_suffix: (raft_orders, 1000),
    writes_in_flight_are_clamped_one_too_high: (raft_orders, 1000),
    a_promise_is_stamped_with_a_newer_term: (raft_story, 60),
    asks_for_votes_before_its_disk: (raft_story, 60),
    the_header_of_the_state_file_is_unchecked: (
        directed(test_units.test_every_bit_of_a_state_file_is_inside_its_checksum),
        1,
    ),
    the_status_of_an_iterator_is_unchecked: (
        directed(test_rocks.test_damage_anywhere_in_the_blocks_of_a_table_is_met_by_a_scan_or_at_the_start),
        1,
    ),
    no_sync_at_append: (raft_story, 60),
    no_directory_sync_after_a_rename: (raft_story, 60),
    what_was_found_is_taken_for_durable: (raft_story, 60),
    the_checksum_of_mail_is_unchecked: (raft_story, 60),
    the_number_of_a_stream_is_unchecked: (
        directed(test_snapshots.test_two_streams_of_one_state_are_never_spliced),
        1,
    ),
    campaigns_without_a_state: (
        directed(test_repair.test_a_replica_without_a_state_never_leads_and_answers_no_reads),
        1,
    ),
    leads_on_while_its_disk_hangs: (
        directed(test_disk_hangs.test_d5_a_leader_whose_disk_hangs_is_replaced_within_two_timeouts),
        1,
    ),
}


class BrokenMutant(AssertionError):
    """The patch itself fails: nothing is shown about the simulation."""


def seeds_until_found(mutant: Patch) -> int | None:
    """How many seeds it took to find the mutant; None if it survived them all."""
    story, most = MUTANTS[mutant]
    with loop.silence(), pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        for seed in range(most):
            try:
                story(seed)
            except (TypeError, AttributeError, NameError) as error:
                # The production code has moved on under the patch. The bug was never planted.
                raise BrokenMutant(f"{mutant.__name__}, seed {seed}: {error!r}") from error
            except Exception:  # however it shows: an assertion, a wrong history, nothing settling
                return seed + 1
    return None


# A mutant that whole clusters have to find takes minutes: `make mutants` plants these.
CASES = [
    pytest.param(
        mutant,
        id=mutant.__name__,
        marks=[pytest.mark.soak] if story in (cluster_story, take_back_story, lost_groups_story) else [],
    )
    for mutant, (story, _) in MUTANTS.items()
]


@pytest.mark.parametrize("mutant", CASES)
@pytest.mark.timeout(1200)
def test_the_simulation_finds(mutant: Patch) -> None:
    found = seeds_until_found(mutant)
    assert found is not None, f"{mutant.__name__} survived {MUTANTS[mutant][1]} seeds"


@pytest.mark.parametrize("story", list(dict.fromkeys(story for story, _ in MUTANTS.values())))
def test_the_stories_pass_without_a_mutant(story: Callable[[int], None]) -> None:
    for seed in range(3):
        story(seed)


if __name__ == "__main__":
    for each in MUTANTS:
        print(f"{each.__name__}: {seeds_until_found(each) or 'SURVIVED'}", flush=True)
