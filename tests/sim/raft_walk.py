"""Random walks over bare Raft cores: every order of events that the protocol permits is a few steps away.

There is no event loop and no codec here. A bag holds the messages under way, and each
step picks one thing that may happen next: any message arrives (or is lost, or arrives
and stays in the bag), a write reaches a disk, a clock ticks, a replica crashes and
comes back with what its disk had. A message may be older than three leaders, a disk a
hundred events late. That is far more disorder than the timed worlds produce, at a
hundredth of their cost, and so the place for bugs that need one particular order.

Judged at every step: Election Safety, Leader Completeness and State Machine Safety
(Figure 3); that votes and terms survive; that a read is given an index no lower than
all that was known to be committed when it was asked.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from shardkv.raft.errors import RaftError
from shardkv.raft.protocol.core import Raft
from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.membership import Memberships
from shardkv.raft.protocol.messages import Envelope, InstallSnapshot, TimeoutNow
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.ready import Options, Write, joined
from shardkv.raft.protocol.types import Entry, HardState, Index, Kind, NodeId, Term

STEPS = 4000
TICK = 0.05
BAG = 60  # messages under way; more are lost
DRIFT = (0.9, 1.1)  # how fast a replica's clock may run; leases must leave room for it


@dataclass
class Replica:
    """A core with the disk that it survives by."""

    core: Raft
    rate: float
    paused: bool = False
    clock: float = 0.0
    next_tick: float = TICK
    writes: deque[Write] = field(default_factory=deque)
    # The disk: hard state, log, and the state machine that goes with its base.
    saved: HardState = field(default_factory=HardState)
    base: tuple[Index, Term] = (0, 0)
    base_membership: Membership = field(default_factory=lambda: Membership(frozenset()))
    entries: list[Entry] = field(default_factory=list)
    machine_membership: Membership = field(default_factory=lambda: Membership(frozenset()))
    applied: Index = 0


class Walk:
    """One walk, drawn from `seed`."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = Random(seed)
        ticks = rng.choice([3, 6])
        self.options = Options(
            election_ticks=ticks,
            heartbeat_ticks=1,
            max_append_bytes=rng.choice([1, 1, 40]),
            window_messages=rng.choice([1, 2, 8]),
            lease_seconds=rng.choice([0.0, ticks * TICK * 0.7]),
        )
        count = rng.choice([1, 2, 3, 3, 3, 3, 4, 5])
        self.first = Membership(frozenset(range(1, count + 1)))
        self.replicas: dict[NodeId, Replica] = {}
        self.bag: list[Envelope] = []
        self.cut: set[NodeId] = set()
        self.now = 0.0
        self.leaders: dict[Term, NodeId] = {}
        self.committed: dict[Index, Entry] = {}
        self.commits: dict[
            Index, tuple[Term, Term]
        ] = {}  # index -> (the entry's term, that of who committed it)
        self.known = 0  # the highest index that anybody has known to be committed
        self.reads: dict[tuple[NodeId, int], Index] = {}
        self.count = 0
        for node in range(1, 6):
            self._boot(node, Replica(None, rng.uniform(*DRIFT)))  # type: ignore[arg-type]
        # Swarm: what is rare in one walk is common in another.
        kinds = {
            self._deliver: 60.0,
            self._write: 25.0,
            self._pass_time: rng.choice([3.0, 8.0, 20.0]),
            self._propose: 5.0,
            self._read: rng.choice([4.0, 15.0]),
            self._crash: rng.choice([0.0, 0.3, 2.0]),
            self._pause: rng.choice([0.0, 0.0, 0.5]),
            self._cut: rng.choice([0.0, 0.5, 2.0]),
            self._transfer: rng.choice([0.0, 0.0, 1.0]),
            self._change_members: rng.choice([0.0, 0.0, 1.0]),
            self._compact: rng.choice([0.0, 1.0]),
            self._offer_snapshot: rng.choice([0.0, 0.0, 0.5]),
        }
        self._kinds = {kind: weight for kind, weight in kinds.items() if weight}
        self._loss = rng.choice([0.0, 0.05, 0.3])
        self._repeat = rng.choice([0.0, 0.1])
        self._disorder = rng.choice([0.05, 0.5, 1.0])  # else the oldest message of the bag comes next
        drawn = rng.random()
        if drawn < 0.25:
            self._calm(ticks)
        elif drawn < 0.5:
            self._strand()
        elif drawn < 0.75:
            self._rearrange(ticks)

    def _calm(self, ticks: int) -> None:
        """Leases, leaders that are cut off or hand over, and little else: so that successors are quick."""
        self._loss = self._repeat = self._disorder = 0.0
        self._set_options(lease_seconds=ticks * TICK * 0.7, max_append_bytes=1 << 20)
        self._kinds = {
            self._deliver: 60.0,
            self._write: 40.0,
            self._pass_time: 3.0,
            self._propose: 3.0,
            self._read: 10.0,
            self._cut: 0.7,
            self._transfer: 0.3,
        }

    def _strand(self) -> None:
        """Leaders that crash or are cut off with a tail that few have, one entry a message: Figure 8."""
        self._loss = self._repeat = 0.0
        self._disorder = 0.05
        self._set_options(lease_seconds=0.0, max_append_bytes=1, window_messages=1)
        self._kinds = {
            self._deliver: 40.0,
            self._write: 30.0,
            self._pass_time: 6.0,
            self._propose: 8.0,
            self._crash: 1.0,
            self._cut: 1.0,
        }

    def _rearrange(self, ticks: int) -> None:
        """Members come and go under reads, leases and snapshots: each set of voters must be asked by each."""
        self._loss = self._repeat = 0.0
        self._disorder = self.rng.choice([0.0, 0.1])
        lease = self.rng.choice([0.0, ticks * TICK * 0.7])
        self._set_options(lease_seconds=lease, max_append_bytes=1 << 20)
        self._kinds = {
            self._deliver: 60.0,
            self._write: 40.0,
            self._pass_time: 4.0,
            self._propose: 3.0,
            self._read: 10.0,
            self._change_members: 1.5,
            self._cut: 1.0,
            self._crash: self.rng.choice([0.0, 0.3]),
            self._transfer: 0.2,
            self._compact: 0.5,
            self._offer_snapshot: 0.5,
        }

    def _set_options(self, **changes: Any) -> None:
        self.options = replace(self.options, **changes)
        for replica in self.replicas.values():
            replica.core.options = self.options

    def run(self, steps: int = STEPS) -> None:
        kinds, weights = list(self._kinds), list(self._kinds.values())
        for _ in range(steps):
            self.rng.choices(kinds, weights)[0]()
        self._settle()

    # ---- what may happen

    def _any(self) -> Replica:
        return self.replicas[self.rng.choice(sorted(self.replicas))]

    def _leader_or_any(self) -> Replica:
        leaders = [r for r in self.replicas.values() if r.core.is_leader]
        return self.rng.choice(leaders) if leaders and self.rng.random() < 0.7 else self._any()

    def _deliver(self) -> None:
        if not self.bag:
            self._pass_time()
            return
        at = self.rng.randrange(len(self.bag)) if self.rng.random() < self._disorder else 0
        mail = self.bag[at]
        if self.replicas[mail.to].paused:
            return
        if self.rng.random() >= self._repeat:
            del self.bag[at]
        if self.rng.random() < self._loss or mail.to in self.cut or mail.sender in self.cut:
            self._lose(mail)
            return
        self._arrives(mail)

    def _arrives(self, mail: Envelope) -> None:
        replica = self.replicas[mail.to]
        replica.core.step(mail)
        self._carry_out(replica)

    def _lose(self, mail: Envelope) -> None:
        if isinstance(mail.message, InstallSnapshot):
            self._report_snapshot(mail, 0)

    def _install(self, replica: Replica, mail: Envelope) -> None:
        """The whole snapshot is one message here; as the driver does, the state machine first, then the log."""
        snapshot = mail.message
        assert isinstance(snapshot, InstallSnapshot)
        if replica.core.wants_snapshot(snapshot.last_index):
            while replica.writes:
                self._finish_write(replica)
            membership = Membership.decode(snapshot.data)
            replica.applied, replica.machine_membership = snapshot.last_index, membership
            if replica.core.restore(snapshot.last_index, snapshot.last_term, membership):
                replica.base, replica.base_membership = (snapshot.last_index, snapshot.last_term), membership
                replica.entries.clear()
            self._judge_membership(replica)
        self._report_snapshot(mail, snapshot.last_index)

    def _report_snapshot(self, mail: Envelope, index: Index) -> None:
        """To the leadership that sent it; the driver's stream ends with its leadership."""
        sender = self.replicas[mail.sender]
        if sender.core.term == mail.term:
            sender.core.snapshot_reported(mail.to, index)
            self._carry_out(sender)

    def _write(self) -> None:
        replica = self._any()
        if replica.writes and not replica.paused:
            self._finish_write(replica)
            self._carry_out(replica)

    def _finish_write(self, replica: Replica) -> None:
        """One append of the writes that wait, or of the first of them, as the driver groups them."""
        count = self.rng.choice([1, 1, len(replica.writes)])
        writes = [replica.writes.popleft() for _ in range(count)]
        self._reaches_disk(replica, *writes)
        for write in writes:
            replica.core.written(write)
            self._post([promise for promise in write.promises if promise.to != replica.core.id])

    def _reaches_disk(self, replica: Replica, *writes: Write) -> None:
        hard_state, entries = joined(writes)
        if hard_state is not None:
            saved = replica.saved
            assert hard_state.term >= saved.term, "a term went back"
            if hard_state.term == saved.term and saved.voted_for:
                assert hard_state.voted_for == saved.voted_for, "a vote was taken back"
            replica.saved = hard_state
        for entry in entries:  # each takes the place of what was at its index and after, as recovery has it
            keep = entry.index - replica.base[0] - 1
            assert keep <= len(replica.entries), "a gap on disk"
            if keep >= 0:
                replica.entries[keep:] = [entry]

    def _pass_time(self) -> None:
        """Some of the time that a tick takes, for everybody; who is paused misses ticks."""
        self.now += TICK * self.rng.uniform(0, 1.5)
        for replica in self.replicas.values():
            replica.clock = self.now * replica.rate
            if replica.clock >= replica.next_tick and not replica.paused:
                replica.next_tick = replica.clock + TICK
                replica.core.tick(replica.clock)
                self._carry_out(replica)

    def _propose(self) -> None:
        replica = self._leader_or_any()
        if replica.core.is_leader and not replica.paused:
            self.count += 1
            try:
                replica.core.propose(b"%020d" % self.count)
            except RaftError:
                return
            self._carry_out(replica)

    def _read(self) -> None:
        replica = self._leader_or_any()
        if not replica.paused:
            self.count += 1
            self.reads[replica.core.id, self.count] = self.known
            try:
                replica.core.read(self.count, replica.clock)
            except RaftError:
                del self.reads[replica.core.id, self.count]
                return
            self._carry_out(replica)

    def _crash(self) -> None:
        """Of the writes under way a first part may be on disk; nothing was promised for them."""
        replica = self._leader_or_any()
        for write in list(replica.writes)[: self.rng.randrange(len(replica.writes) + 1)]:
            self._reaches_disk(replica, write)
        self._boot(replica.core.id, replica)
        if self.rng.random() < 0.5:  # its connections break: what it had sent is lost
            self.bag = [mail for mail in self.bag if mail.sender != replica.core.id]
        for other in self.replicas.values():  # they notice, or somebody only thinks so
            if self.rng.random() < 0.5:
                other.core.unreachable(replica.core.id)

    def _boot(self, node: NodeId, replica: Replica) -> None:
        begun = node in self.replicas
        if not begun and node in self.first.voters:
            replica.base_membership = replica.machine_membership = self.first
        replica.writes.clear()
        replica.applied = replica.base[0]
        replica.machine_membership = replica.base_membership
        replica.core = Raft(
            node,
            Memberships(replica.base[0], replica.base_membership, replica.entries),
            Log(*replica.base, replica.entries),
            replica.saved,
            replica.base[0],
            Random(self.rng.random()),
            self.options,
        )
        replica.core._now = replica.clock
        replica.paused = False
        self.replicas[node] = replica
        self.reads = {key: index for key, index in self.reads.items() if key[0] != node}

    def _pause(self) -> None:
        replica = self._leader_or_any()
        replica.paused = not replica.paused

    def _cut(self) -> None:
        """A leader is alone, or another; some time later the network is whole again."""
        if not self.cut:
            self.cut = {self._leader_or_any().core.id}
        elif self.rng.random() < 0.2:
            self.cut = set()

    def _transfer(self) -> None:
        """Half of the time the old leader is cut off as soon as its target knows: it hears of no successor."""
        replica = self._leader_or_any()
        if not replica.core.is_leader:
            return
        replica.core.transfer(self.rng.choice(sorted(replica.core.membership.voters)))
        self._carry_out(replica)
        if self.rng.random() < 0.5:
            for mail in [mail for mail in self.bag if isinstance(mail.message, TimeoutNow)]:
                self._arrives(mail)
                self.cut = {replica.core.id}

    def _change_members(self) -> None:
        """Any others as voters, if the leader would have it so: first learners, then voters."""
        replica = self._leader_or_any()
        if not replica.core.is_leader:
            return
        now = replica.core.membership
        wanted = frozenset(self.rng.sample(range(1, 6), self.rng.choice([1, 2, 3, 3, 4])))
        known = now.voters | now.learners
        target = Membership(wanted) if wanted <= known else Membership(now.voters, learners=wanted - now.voters)
        try:
            replica.core.change_membership(target)
        except (RaftError, ValueError):
            return
        self._carry_out(replica)

    def _compact(self) -> None:
        """The state machine is durable, and the log below goes."""
        replica = self._any()
        if replica.applied > replica.base[0]:
            while replica.writes:
                self._finish_write(replica)
            term = replica.core.log.term_at(replica.applied)
            assert term is not None
            del replica.entries[: replica.applied - replica.base[0]]
            replica.base, replica.base_membership = (replica.applied, term), replica.machine_membership
            replica.core.compact(replica.applied)
            self._carry_out(replica)

    def _offer_snapshot(self) -> None:
        """A leader may send its state at any time, also to a follower whose log goes beyond it."""
        replica = self._leader_or_any()
        if replica.core.is_leader and not replica.paused:
            for peer in replica.core.membership.everyone():
                if peer != replica.core.id and self.rng.random() < 0.5:
                    self._send_snapshot(replica, peer)

    # ---- the driver's part

    def _send_snapshot(self, replica: Replica, peer: NodeId) -> None:
        """Sent even where the state is not durable: what was applied was committed."""
        core = replica.core
        term = core.log.term_at(replica.applied)
        assert term is not None
        state = replica.machine_membership.encode()
        message = InstallSnapshot(replica.applied, term, len(state), 0, state, 0)
        self.bag = [mail for mail in self.bag if not _is_snapshot(mail, core.id, peer)]  # one stream a peer
        self.bag.append(Envelope(core.id, peer, core.term, message))

    def _post(self, mail: list[Envelope] | tuple[Envelope, ...]) -> None:
        self.bag.extend(mail)
        while len(self.bag) > BAG:
            at = self.rng.randrange(len(self.bag))
            if not isinstance(self.bag[at].message, InstallSnapshot):  # a lost one is sent again at once
                del self.bag[at]

    def _carry_out(self, replica: Replica) -> None:
        core = replica.core
        ready = core.ready(replica.clock)
        self._post(ready.messages)
        if ready.write is not None:
            replica.writes.append(ready.write)
        for entry in ready.committed:
            first = self.committed.setdefault(entry.index, entry)
            assert first == entry, f"two entries were committed at index {entry.index}"
            assert entry.index == replica.applied + 1, "a gap or a repetition"
            replica.applied = entry.index
            if entry.kind is Kind.MEMBERSHIP:
                replica.machine_membership = Membership.decode(entry.data)
        for number, index in ready.reads:
            asked = self.reads.pop((core.id, number))
            assert index >= asked, f"a read at {index} after {asked} was committed"
        for number in ready.failed_reads:
            self.reads.pop((core.id, number), None)
        for peer in ready.snapshots_wanted:
            self._send_snapshot(replica, peer)
        for mail in ready.snapshot_mail:
            self._install(replica, mail)
        self._judge(replica)
        if core.has_more_to_apply():
            self._carry_out(replica)

    def _judge(self, replica: Replica) -> None:
        core = replica.core
        if self.rng.random() < 0.1:
            core.check()
        durable = core.log.durable_index
        if durable > replica.base[0]:
            there = durable - replica.base[0] <= len(replica.entries)
            assert there, f"entry {durable} counts as durable, and is not on the disk"
            on_disk = replica.entries[durable - replica.base[0] - 1].term
            assert on_disk == core.log.term_at(durable), f"another entry {durable} is on the disk"
        if core.is_leader:
            leader = self.leaders.setdefault(core.term, core.id)
            assert leader == core.id, f"{leader} and {core.id} both led term {core.term}"
            for index in range(core.log.base_index + 1, self.known + 1):
                term, committed_in = self.commits[index]
                if committed_in < core.term:
                    assert core.log.term_at(index) == term, f"the leader lacks committed entry {index}"
        while self.known < core.commit_index:  # the leader that commits an entry is the first to know
            self.known += 1
            term_there = core.log.term_at(self.known)
            assert term_there is not None
            self.commits[self.known] = (term_there, core.term)

    def _judge_membership(self, replica: Replica) -> None:
        """The newest in the log is in force, and without one that of the state (thesis §4.1)."""
        core, newest = replica.core, replica.machine_membership
        if replica.applied < core.log.last_index:
            for entry in core.log.slice(replica.applied + 1, core.log.last_index + 1, 1 << 62):
                if entry.kind is Kind.MEMBERSHIP:
                    newest = Membership.decode(entry.data)
        assert core.membership == newest, f"{core.membership} is in force, the log says {newest}"

    # ---- the end

    def _settle(self) -> None:
        """Nothing goes wrong any more: within a bounded time all agree, and a new command commits."""
        self.cut.clear()
        self._loss = self._repeat = self._disorder = 0.0
        for replica in self.replicas.values():
            replica.paused = False
        for _ in range(400):
            for _ in range(200):
                if not self.bag and not any(replica.writes for replica in self.replicas.values()):
                    break
                if self.bag:
                    self._deliver()
                for replica in self.replicas.values():
                    while replica.writes:
                        self._finish_write(replica)
                    self._carry_out(replica)
            leaders = [r for r in self.replicas.values() if r.core.is_leader]
            if leaders:
                leader = max(leaders, key=lambda r: r.core.term)
                members = [self.replicas[node] for node in leader.core.membership.everyone()]
                if leader.core.commit_index == leader.core.log.last_index and all(
                    r.applied == leader.core.commit_index for r in members
                ):
                    return
            self._pass_time()
        raise AssertionError("the group does not settle")


def _is_snapshot(mail: Envelope, sender: NodeId, to: NodeId) -> bool:
    return isinstance(mail.message, InstallSnapshot) and (mail.sender, mail.to) == (sender, to)


def run_seed(seed: int) -> None:
    Walk(seed).run()


def main() -> None:
    import sys
    import time

    first, count = int(sys.argv[1]), int(sys.argv[2])
    began = time.monotonic()
    for seed in range(first, first + count):
        try:
            run_seed(seed)
        except BaseException:
            print(f"seed {seed} failed")
            raise
    print(f"{count} walks in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
