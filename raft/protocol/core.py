"""The Raft protocol, and nothing else.

A `Raft` is a deterministic machine with no clock, disk, network or chance of
its own. Facts go in: a tick passed, a message came, a write reached the disk.
Work comes out when asked for, for many facts at once, as a `Ready`. Names are
the paper's (Figure 2); comments cite it where the obvious code would be wrong.

Rules for the driver:
  - carry out a `Ready` in full; messages in it may leave at once,
  - a `Write` goes to disk in the order given; only then may its `promises`
    leave, and `written` be called (`outbox.py` tells which messages these are),
  - `committed` entries are applied in order.
"""

from __future__ import annotations

from random import Random
from typing import assert_never

from shardkv.raft.errors import Busy, NotLeader, Transferring
from shardkv.raft.protocol.border import check
from shardkv.raft.protocol.disk_watch import DiskWatch
from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.membership import Memberships, first_step
from shardkv.raft.protocol.messages import (
    AppendEntries,
    AppendReply,
    Envelope,
    InstallSnapshot,
    InstallSnapshotReply,
    ReadIndex,
    ReadIndexReply,
    RequestVote,
    RequestVoteReply,
    TimeoutNow,
)
from shardkv.raft.protocol.outbox import Outbox, Promise, Statement
from shardkv.raft.protocol.progress import Mode, Progress
from shardkv.raft.protocol.quorum import Membership, Vote, has_quorum, quorum_index, tally
from shardkv.raft.protocol.reads import Ticket
from shardkv.raft.protocol.ready import Options, Ready, Write
from shardkv.raft.protocol.replication import back_up, entries_for, heartbeat_for, take_in
from shardkv.raft.protocol.roles import Candidate, Follower, Leader, Role, lease_holds, successor, waiting_reads
from shardkv.raft.protocol.types import NOBODY, Entry, HardState, Index, Kind, NodeId, Term


class Raft:
    """One replica's consensus state. See the module's docstring for how to drive it."""

    def __init__(
        self,
        id: NodeId,
        memberships: Memberships,
        log: Log,
        hard_state: HardState,
        applied_index: Index,
        rng: Random,
        options: Options,
        state_lost: bool = False,
    ) -> None:
        assert log.base_index <= applied_index <= log.last_index
        self.id = id
        self.memberships = memberships
        self.log = log
        self.options = options
        self.term: Term = hard_state.term
        self.voted_for: NodeId = hard_state.voted_for
        self.term_leader: NodeId = NOBODY  # who was first heard to lead this term; kept while the term lasts
        self.commit_index: Index = applied_index
        self.handed_index: Index = applied_index  # last entry given out in Ready.committed
        self.role: Role = Follower()
        self.low = False  # our disk has little room; the driver's to set
        self.state_lost = state_lost  # until `restore`: we vote and store, but neither apply, answer nor lead
        self._rng = rng
        self._now = 0.0
        self._saved = hard_state
        self._elapsed = 0  # ticks since the timer was reset; what it times depends on the role
        self._heartbeat_elapsed = 0
        # Ticks since we heard a leader, of whatever term: a lease may rest on our silence until a timeout
        # has passed. A restart forgets whom we heard, so with leases it counts as if we had heard one.
        self._quiet_ticks = 0 if options.lease_seconds > 0 else options.election_ticks
        self.disk = DiskWatch()
        self._timeout = self._draw_timeout()
        self._out = Outbox(id, hard_state.term)

    # ---- what a driver may ask

    @property
    def leader(self) -> NodeId:
        """Who leads this term, as far as this replica knows; 0 for nobody."""
        if isinstance(self.role, Leader):
            return self.id
        return self.role.leader if isinstance(self.role, Follower) else NOBODY

    @property
    def is_leader(self) -> bool:
        return isinstance(self.role, Leader)

    @property
    def disk_hangs(self) -> bool:
        """Whether our disk has not answered for an election timeout: then others should lead."""
        return self.disk.silent_ticks >= self.options.election_ticks

    @property
    def membership(self) -> Membership:
        """The newest in the log, committed or not (thesis §4.1)."""
        return self.memberships.current

    # ---- facts

    def tick(self, now: float) -> None:
        """One tick passed. `now` is a monotonic clock in seconds, used for leases alone."""
        self._now = max(self._now, now)
        self._elapsed += 1
        self._quiet_ticks += 1
        self.disk.tick()
        match self.role:
            case Leader() as leader:
                self._tick_leader(leader)
            case Follower() as follower:
                if follower.reads.is_late(self.options.heartbeat_ticks) and follower.leader != NOBODY:
                    self._send(follower.leader, ReadIndex(follower.reads.seq))
            case Candidate():
                pass
            case _ as never:
                assert_never(never)
        if not self.is_leader and self._elapsed >= self._timeout:
            self._campaign(pre=True)

    def propose(self, data: bytes) -> tuple[Index, Term]:
        """Append a command to the leader's log; it is applied everywhere once it is committed.

        Raises NotLeader, Transferring, or Busy when too many bytes are uncommitted.
        """
        match self.role:
            case Leader() as leader:
                if leader.transfer_to != NOBODY:
                    raise Transferring
                # The first command always fits: a bound must not lock out a single large one.
                held = leader.uncommitted_bytes
                if held and held + len(data) > self.options.max_uncommitted_bytes:
                    raise Busy(f"{held} bytes are uncommitted")
                return self._append(leader, Kind.COMMAND, data), self.term
            case _:
                raise NotLeader(self.leader)

    def change_membership(self, target: Membership) -> tuple[Index, Term]:
        """Begin a change to `target`; where voters change, through a joint membership (thesis §4.3).

        The joint one is left by itself once it is committed. Raises NotLeader; Busy while
        another change is under way, or before this leader knows what is committed;
        ValueError for a voter that was no learner, or for a group without voters.
        """
        if not isinstance(self.role, Leader):
            raise NotLeader(self.leader)
        current = self.membership
        if current.is_joint or self.memberships.index > self.commit_index:
            raise Busy("another membership change is under way")
        if self.commit_index < self.role.term_start:
            raise Busy("the leader has yet to commit an entry of its own")
        return self._append(self.role, Kind.MEMBERSHIP, first_step(current, target).encode()), self.term

    def read(self, number: int, now: float) -> None:
        """Ask for the index that must be applied before read `number` may be answered.

        Raises NotLeader where no leader is known, Busy beyond the bound.
        """
        self._now = max(self._now, now)
        self._enqueue_read(Ticket(number))

    def transfer(self, to: NodeId) -> None:
        """Hand leadership to `to` once it has caught up (thesis §3.10).

        Given up after one election timeout. Raises NotLeader; ValueError for a
        replica that cannot lead.
        """
        if not isinstance(self.role, Leader):
            raise NotLeader(self.leader)
        if to in (self.id, self.role.transfer_to):
            return
        if to not in self.role.heirs(self.membership):
            raise ValueError(f"replica {to} cannot lead: it is no voter of this group, or is being repaired")
        self.role.transfer_to = to
        self.role.lease_forfeited = True
        self._elapsed = 0
        self._maybe_time_out_now(self.role, to)

    def written(self, write: Write) -> None:
        """The oldest write handed out is durable. The driver sends its promises to others."""
        self.log.written()
        self.disk.answered()
        if write.hard_state is not None:
            self._out.disk_knows(write.hard_state.term)
        for promise in write.promises:
            if promise.to == self.id:
                self._deliver(promise)  # our own vote: it counts from the disk on, like any other
        self._advance_commit()

    def compact(self, to: Index) -> None:
        """The state machine is durable up to `to`: the log below may go."""
        assert to <= self.handed_index and not self.state_lost
        self.log.compact(to)
        self.memberships.compact(to)

    def restore(self, index: Index, term: Term, membership: Membership) -> bool:
        """The state machine now is a snapshot whose last entry is (`index`, `term`).

        Returns whether the log was reset, and so must be on disk as well. A log that
        holds the entry keeps its suffix (§7). Ask `wants_snapshot` before.
        """
        assert self.wants_snapshot(index)
        self.handed_index, self.state_lost = index, False
        self.commit_index = max(self.commit_index, index)
        if self.log.term_at(index) == term:
            self.memberships.restore(index, membership)
            return False
        self.log.reset(index, term)
        self.memberships = Memberships(index, membership)
        return True

    def wants_snapshot(self, index: Index) -> bool:
        """Whether a snapshot at `index` brings this replica forward: without a state, any that the log goes on from."""
        return index >= self.log.base_index if self.state_lost else index > self.commit_index

    def answer_chunk(self, leader: NodeId, term: Term, reply: InstallSnapshotReply) -> None:
        """Answer a chunk in the term in which it was sent. A leader of a newer term asks for itself."""
        self._out.send(leader, term, reply)

    def snapshot_reported(self, peer: NodeId, index: Index) -> None:
        """The snapshot stream to `peer` ended: it holds everything up to `index` (0: it failed)."""
        if isinstance(self.role, Leader) and peer in self.role.progress:
            assert index <= self.log.last_index, "a follower ahead of its leader"
            self.role.progress[peer].snapshot_ended(index)

    def unreachable(self, peer: NodeId) -> None:
        """The connection to `peer` broke, or cannot be made: what was in flight may be lost.

        Most likely its process is gone. If it led, we soon ask for pre-votes: those who hear from
        it will say no. Not where leases are on: they rest on nobody voting before a timeout.
        """
        match self.role:
            case Leader(progress=progress) if peer in progress and progress[peer].mode is Mode.REPLICATE:
                progress[peer].become_probe()
            case Follower(leader=leader) if leader == peer and self.options.lease_seconds == 0:
                self._become_follower(self.term)
                self._quiet_ticks = self.options.election_ticks
                self._timeout = self._rng.randrange(1, self.options.election_ticks // 2 + 2)
            case _:
                pass

    def step(self, envelope: Envelope) -> None:
        """A message came: the term rule first (Figure 2). Raises PeerFault; then nothing changed."""
        # Also from replicas that are not in our membership: it may be ours that is old (thesis §4.1).
        if envelope.to == self.id and envelope.sender != self.id:
            check(self, envelope)
            self._deliver(envelope)

    def _deliver(self, envelope: Envelope) -> None:
        message, sender = envelope.message, envelope.sender
        if envelope.term > self.term and not self._take_newer_term(envelope):
            return
        if envelope.term < self.term:
            self._answer_older_term(envelope)
            return
        match message:
            case RequestVote():
                self._on_request_vote(sender, envelope.term, message)
            case RequestVoteReply():
                self._on_vote(sender, message)
            case AppendEntries():
                self._on_append_entries(sender, message)
            case AppendReply():
                self._on_append_reply(sender, message)
            case InstallSnapshot():
                # A chunk is word from the leader like any other; its bytes are the driver's.
                self._hear_leader(sender)
                self._out.pass_on(envelope)
            case InstallSnapshotReply():
                if isinstance(self.role, Leader) and sender in self.role.progress:
                    self.role.progress[sender].chunk_answered()
                    self._out.pass_on(envelope)
            case ReadIndex(seq=seq):
                # Only the leader can answer; a follower that is wrong about us asks again.
                # Beyond the bound it is dropped, as if lost.
                if isinstance(self.role, Leader):
                    ticket, reads = Ticket(seq, sender), self.role.reads
                    if ticket not in reads.out and len(reads.waiting) < self.options.max_waiting_reads:
                        reads.waiting.append(ticket)
            case ReadIndexReply():
                self._on_read_index_reply(sender, message)
            case TimeoutNow():
                # The leader wants us to lead; no pre-vote, for the others still hear from it.
                if isinstance(self.role, Follower) and self.term_leader in (NOBODY, sender):
                    self._campaign(pre=False, transfer=True)
            case _ as never:
                assert_never(never)

    def ready(self, now: float) -> Ready:
        """Drain the work that the facts since the last call have made."""
        self._now = max(self._now, now)
        if isinstance(self.role, Leader):
            self._replicate(self.role)
        write = self._take_write()
        return self._out.drain(write, self._take_committed())

    def has_more_to_apply(self) -> bool:  # `ready` stopped at `max_apply_bytes`
        return not self.state_lost and self.handed_index < min(self.commit_index, self.log.durable_index)

    # ---- the term rule

    def _take_newer_term(self, envelope: Envelope) -> bool:
        """A message of a newer term. False if it is to be ignored."""
        message = envelope.message
        if isinstance(message, RequestVote):
            if not message.transfer and self._hears_a_leader():
                return False  # leader stickiness: no vote against a leader we hear (§6, thesis §4.2.3)
            if message.pre:
                return True  # a question about a term, not the term itself
        if isinstance(message, RequestVoteReply) and message.pre and message.granted:
            return True  # echoes the term that we asked about
        self._become_follower(envelope.term)
        return True

    def _answer_older_term(self, envelope: Envelope) -> None:
        """Tell a stale leader or candidate our term, lest it waits forever; ignore the rest."""
        match envelope.message:
            case RequestVote(pre=pre):
                self._send(envelope.sender, RequestVoteReply(pre=pre, granted=False))
            case AppendEntries() | InstallSnapshot():
                self._send(envelope.sender, AppendReply(success=False, match_index=0, read_seq=0))
            case _:
                pass

    def _hears_a_leader(self) -> bool:
        return self.is_leader or self._quiet_ticks < self.options.election_ticks

    # ---- membership (thesis §4)

    def _others(self) -> list[NodeId]:
        return [node for node in self.membership.everyone() if node != self.id]

    def _membership_changed(self) -> None:
        """Who is new is sent to from here on; who is gone no longer is."""
        if isinstance(self.role, Leader):
            known = self.role.progress
            self.role.progress = {n: known.get(n) or Progress(self.log.last_index + 1) for n in self._others()}

    def _follow_change(self, leader: Leader) -> None:
        """A committed joint membership is left; a leader that is no member any more steps down."""
        if self.memberships.index > self.commit_index:
            return
        if self.membership.is_joint:
            self._append(leader, Kind.MEMBERSHIP, self.membership.left().encode())
        elif not self.membership.is_voter(self.id):
            self._become_follower(self.term)

    # ---- elections (§5.2)

    def _draw_timeout(self) -> int:
        return self._rng.randrange(self.options.election_ticks, 2 * self.options.election_ticks)

    def _reset_timer(self) -> None:
        self._elapsed = 0
        self._timeout = self._draw_timeout()

    def _become_follower(self, term: Term, leader: NodeId = NOBODY) -> None:
        assert term >= self.term, "terms only rise"
        if term > self.term:
            self.term, self.voted_for, self.term_leader = term, NOBODY, NOBODY
        self._fail_reads()
        self.role = Follower(leader)
        self._reset_timer()

    def _campaign(self, pre: bool, transfer: bool = False) -> None:
        self._fail_reads()
        self._reset_timer()
        if self.state_lost or self.disk_hangs or not self.memberships.may_campaign(self.id, self.commit_index):
            self.role = Follower()
            return
        self.role = Candidate(pre)
        asked = self.term + 1
        ballot = RequestVoteReply(pre=pre, granted=True)
        if pre:
            self._on_vote(self.id, ballot)  # a pre-vote promises nothing, so it needs no disk
        else:
            self.term, self.voted_for, self.term_leader = asked, self.id, NOBODY
            self._promise(self.id, ballot)  # our own vote counts once it is durable
        if not isinstance(self.role, Candidate) or self.role.pre != pre:
            return  # a group of one: the pre-vote was won on the spot
        request = RequestVote(pre, self.log.last_index, self.log.last_term, transfer)
        for node in self._others():
            if self.membership.is_voter(node):
                if pre:
                    self._out.ask(node, asked, request)
                else:
                    self._promise(node, request)

    def _on_request_vote(self, sender: NodeId, term: Term, message: RequestVote) -> None:
        up_to_date = self.log.is_up_to_date(message.last_log_index, message.last_log_term)
        if message.pre:
            # A pre-vote of our own term comes from one that lags: it learns so from the refusal.
            granted = up_to_date and term > self.term
            if granted:
                self._out.ask(sender, term, RequestVoteReply(pre=True, granted=True))
            else:
                self._send(sender, RequestVoteReply(pre=True, granted=False))
            return
        free = self.voted_for in (NOBODY, sender) and self.leader in (NOBODY, sender)
        # Also where another message brought the term: the leader before it may hold a lease.
        if free and up_to_date and (message.transfer or not self._hears_a_leader()):
            self.voted_for = sender
            self._reset_timer()
            self._promise(sender, RequestVoteReply(pre=False, granted=True))
        else:
            self._send(sender, RequestVoteReply(pre=False, granted=False))

    def _on_vote(self, sender: NodeId, message: RequestVoteReply) -> None:
        if not isinstance(self.role, Candidate) or self.role.pre != message.pre:
            return  # an answer to a round that is over
        if self.membership.is_voter(sender):  # else nobody asked it
            self.role.votes[sender] = message.granted
        match tally(self.membership, self.role.votes):
            case Vote.WON if message.pre:
                self._campaign(pre=False)
            case Vote.WON:
                self._become_leader()
            case Vote.LOST:
                self._become_follower(self.term)
            case Vote.PENDING:
                pass

    def _become_leader(self) -> None:
        begin = self.log.last_index + 1
        leader = self.role = Leader({node: Progress(begin) for node in self._others()}, begin)
        self.term_leader = self.id
        self._elapsed = self._heartbeat_elapsed = 0
        # Entries of older terms commit with this one, never by counting (§5.4.2, §8). The first of all
        # says who the first members are: from then on the log rules, whatever a replica is started with.
        first = self.memberships.index == 0
        kind, data = (Kind.MEMBERSHIP, self.membership.encode()) if first else (Kind.NOOP, b"")
        self._append(leader, kind, data)

    def stand_down(self) -> None:
        """Its group does not know this replica's disk: it does not lead on."""
        if not isinstance(self.role, Follower):
            self._become_follower(self.term)

    # ---- replication (§5.3)

    def _tick_leader(self, leader: Leader) -> None:
        if self.disk_hangs and (heir := successor(leader, self.membership)) != NOBODY:
            self._send(heir, TimeoutNow())  # if the message is lost, a timeout does it
            self._become_follower(self.term)
            return
        if self._elapsed >= self.options.election_ticks:
            self._elapsed = 0
            leader.transfer_to = NOBODY  # not done within a timeout: given up, proposals go on
            active = {node: peer.recently_active for node, peer in leader.progress.items()}
            if not has_quorum(self.membership, active | {self.id: True}):
                self._become_follower(self.term)  # CheckQuorum (thesis §6.2)
                return
            for peer in leader.progress.values():
                peer.end_of_round()
        self._heartbeat_elapsed += 1
        if self._heartbeat_elapsed >= self.options.heartbeat_ticks:
            self._broadcast_heartbeat(leader)

    def _broadcast_heartbeat(self, leader: Leader) -> None:
        self._heartbeat_elapsed = 0
        if self.options.lease_seconds > 0:
            leader.reads.mark(self._now)
        for node, peer in leader.progress.items():
            peer.heartbeat()
            if peer.mode is Mode.REPLICATE and self.log.term_at(peer.next_index - 1) is None:
                # All in flight was lost, and compacted since: an empty append could no longer
                # ask whether it arrived. Probing finds that a snapshot is needed.
                peer.become_probe()
            self._send_heartbeat(leader, node, peer)

    def _append(self, leader: Leader, kind: Kind, data: bytes) -> Index:
        entry = Entry(self.log.last_index + 1, self.term, kind, data)
        self.log.append([entry])
        leader.uncommitted_bytes += len(data) if kind is Kind.COMMAND else 0
        if self.memberships.extend([entry]):
            self._membership_changed()
        return entry.index

    def _replicate(self, leader: Leader) -> None:
        """Send what flow control allows, and begin the next read round."""
        new_round = False
        reads = leader.reads
        if reads.waiting and self.commit_index >= leader.term_start:
            if self._lease_holds(leader):
                released, reads.waiting = reads.waiting, []
                self._release(released, self.commit_index)
            elif not reads.out:
                reads.start_round(self.commit_index, self._now)
                new_round = True
        for node, peer in leader.progress.items():
            sent = self._send_entries(leader, node, peer)
            if new_round and not sent:
                self._send_heartbeat(leader, node, peer)
        if new_round:
            self._confirm_reads(leader)  # a group of one is its own quorum

    def _send_entries(self, leader: Leader, node: NodeId, peer: Progress) -> bool:
        """Pipeline entries to one follower. True if any message left."""
        sent, was = False, peer.mode
        for message in entries_for(peer, self.log, self.options, self.commit_index, leader.reads.seq):
            self._send(node, message)
            sent = True
        if peer.mode is Mode.SNAPSHOT and was is not Mode.SNAPSHOT and peer.begin_snapshot():
            self._out.want_snapshot(node)
        return sent

    def _send_heartbeat(self, leader: Leader, node: NodeId, peer: Progress) -> None:
        self._send(node, heartbeat_for(peer, self.log, self.commit_index, leader.reads.seq))

    def _hear_leader(self, sender: NodeId) -> None:
        """Word from the leader of our term: follow it, and start the clock anew."""
        assert self.term_leader in (NOBODY, sender) and not self.is_leader, "two leaders in a term"
        self.term_leader, self._quiet_ticks = sender, 0
        if self.leader != sender:
            self._become_follower(self.term, sender)
        else:
            self._reset_timer()

    def _on_append_entries(self, sender: NodeId, message: AppendEntries) -> None:
        self._hear_leader(sender)
        prev_index, prev_term, entries = message.prev_log_index, message.prev_log_term, message.entries
        if prev_index < self.log.base_index:
            # What our snapshot covers is committed, hence equal to the leader's.
            entries = entries[self.log.base_index - prev_index :]
            prev_index, prev_term = self.log.base_index, self.log.base_term
        if self.log.term_at(prev_index) != prev_term:
            conflict = self.log.conflict_at(prev_index)
            self._send(sender, self._append_reply(False, 0, message.read_seq, prev_index, *conflict))
            return
        take_in(entries, self.log, self.memberships, self.commit_index)
        match_index = prev_index + len(entries)
        self.commit_index = max(self.commit_index, min(message.leader_commit, match_index))
        assert self.commit_index <= self.log.last_index, "committed is what is in the log"
        if message.entries and match_index > self.log.durable_index and not self.disk_hangs:
            self._promise(sender, self._append_reply(True, match_index, message.read_seq))
        else:
            # A heartbeat is answered past a slow disk, for what is on it; past one that hangs, all appends are.
            durable = min(match_index, self.log.durable_index)
            self._send(sender, self._append_reply(True, durable, message.read_seq))

    def _append_reply(self, ok: bool, match: Index, seq: int, at: Index = 0, *conflict: int) -> AppendReply:
        term, index = conflict or (0, 0)
        return AppendReply(ok, match, seq, at, term, index, self.low, self.state_lost)

    def _on_append_reply(self, sender: NodeId, message: AppendReply) -> None:
        if not isinstance(self.role, Leader) or sender not in self.role.progress:
            return  # removed since, or this replica does not lead any more
        leader, peer = self.role, self.role.progress[sender]
        peer.recently_active, peer.low, peer.state_lost = True, message.low, message.state_lost
        if message.state_lost and peer.begin_repair():
            # Its log may match: entries go on, so that a quorum may rest on it, and the state goes beside them.
            self._out.want_snapshot(sender)
        if message.read_seq > peer.read_seq:
            peer.read_seq = message.read_seq
            peer.confirmed_at = max(peer.confirmed_at, leader.reads.sent_at.get(message.read_seq, 0.0))
            self._confirm_reads(leader)
        if message.success:
            self._on_match(leader, sender, peer, message.match_index)
        elif message.rejected_index > 0:
            back_up(peer, self.log, message)

    def _on_match(self, leader: Leader, sender: NodeId, peer: Progress, match_index: Index) -> None:
        assert match_index <= self.log.last_index, "a follower ahead of its leader"
        news = peer.matched(match_index)
        goal = peer.snapshot_index if peer.mode is Mode.SNAPSHOT else peer.probe_end
        if peer.mode is not Mode.REPLICATE and peer.match_index >= min(goal, self.log.last_index):
            peer.become_replicate()
        if news:
            self._advance_commit()
        peer.look_behind(self.commit_index)
        if leader.transfer_to == sender:
            self._maybe_time_out_now(leader, sender)

    def _advance_commit(self) -> None:
        """Commit what a quorum stores, if it is of our own term.

        Counting copies of an older term's entry loses a committed write in
        Figure 8; such entries commit along with the next one of ours (§5.4.2).
        """
        if not isinstance(self.role, Leader):
            return
        leader = self.role
        match = {node: peer.match_index for node, peer in leader.progress.items()}
        match[self.id] = self.log.durable_index
        index = quorum_index(self.membership, match)
        if index > self.commit_index and self.log.term_at(index) == self.term:
            for entry in self.log.slice(self.commit_index + 1, index + 1, 1 << 62):
                if entry.index >= leader.term_start and entry.kind is Kind.COMMAND:
                    leader.uncommitted_bytes -= len(entry.data)
            self.commit_index = index
            self._follow_change(leader)
        assert self.commit_index <= self.log.last_index

    # ---- leadership transfer (thesis §3.10)

    def _maybe_time_out_now(self, leader: Leader, to: NodeId) -> None:
        if to in leader.heirs(self.membership) and leader.progress[to].match_index == self.log.last_index:
            self._send(to, TimeoutNow())

    # ---- reads (thesis §6.4)

    def _enqueue_read(self, ticket: Ticket) -> None:
        if self.state_lost:
            raise NotLeader(self.leader)
        match self.role:
            case Leader() as leader:
                waiting = leader.reads.waiting
            case Follower(leader=leader_id, reads=reads) if leader_id != NOBODY:
                waiting = reads.waiting
            case _:
                raise NotLeader(NOBODY)
        if len(waiting) >= self.options.max_waiting_reads:
            raise Busy(f"{len(waiting)} reads wait")
        waiting.append(ticket)
        if isinstance(self.role, Follower) and not self.role.reads.out:
            self._ask_read_index(self.role)

    def _ask_read_index(self, follower: Follower) -> None:
        # A random number: no answer to an earlier request can be taken for this one's.
        follower.reads.ask(self._rng.getrandbits(62))
        self._send(follower.leader, ReadIndex(follower.reads.seq))

    def _on_read_index_reply(self, sender: NodeId, message: ReadIndexReply) -> None:
        if not isinstance(self.role, Follower) or self.role.leader != sender:
            return
        self._release(self.role.reads.answered(message.seq), message.index)
        if self.role.reads.waiting and not self.role.reads.out:
            self._ask_read_index(self.role)

    def _lease_holds(self, leader: Leader) -> bool:
        return lease_holds(leader, self.id, self.membership, self._now, self.options.lease_seconds)

    def _confirm_reads(self, leader: Leader) -> None:
        reads = leader.reads
        seqs = {node: peer.read_seq for node, peer in leader.progress.items()}
        seqs[self.id] = reads.seq
        self._release(reads.confirmed(quorum_index(self.membership, seqs)), reads.out_index)

    def _release(self, tickets: list[Ticket], index: Index) -> None:
        for ticket in tickets:
            if ticket.asker == NOBODY:
                self._out.release_read(ticket.number, index)
            else:
                self._send(ticket.asker, ReadIndexReply(ticket.number, index))
                if isinstance(self.role, Leader) and ticket.asker in self.role.progress:
                    # The follower must apply up to `index`, and may not know yet that it is committed.
                    self._send_heartbeat(self.role, ticket.asker, self.role.progress[ticket.asker])

    def _fail_reads(self) -> None:
        """The role ends: reads that wait in it are answered nowhere."""
        self._out.fail_reads(read.number for read in waiting_reads(self.role) if read.asker == NOBODY)

    # ---- work

    def _send(self, to: NodeId, message: Statement) -> None:
        if self._out.is_known(self.term) or not self.disk_hangs:  # else as if lost, lest repetitions pile up
            self._out.send(to, self.term, message)

    def _promise(self, to: NodeId, message: Promise) -> None:
        self._out.promise(to, self.term, message)

    def _take_write(self) -> Write | None:
        saved = self._saved
        changed = saved.term != self.term or saved.voted_for != self.voted_for
        if not changed and not self._out.has_promises and not self.log.has_unwritten():
            return None
        if changed:
            self._saved = HardState(self.term, self.voted_for)
        self.disk.handed()
        return Write(self._saved if changed else None, self.log.take_unwritten(), self._out.take_promises())

    def _take_committed(self) -> tuple[Entry, ...]:
        """Committed entries that are on our own disk too: the state machine never runs ahead of the log."""
        stop = min(self.commit_index, self.log.durable_index)
        if stop <= self.handed_index or self.state_lost:
            return ()
        entries = self.log.slice(self.handed_index + 1, stop + 1, self.options.max_apply_bytes)
        self.handed_index = entries[-1].index
        return entries

    def check(self) -> None:
        """All invariants, for tests and simulation."""
        self.log.check()
        assert self.log.base_index <= self.handed_index <= self.commit_index <= self.log.last_index
        assert self.log.last_term <= self.term, "an entry from the future"
        if isinstance(self.role, Leader):
            assert not self.state_lost, "a leader without a state"
            assert self.voted_for == self.id, "a leader voted for itself"
            assert self.role.uncommitted_bytes >= 0
            for peer in self.role.progress.values():
                peer.check()
