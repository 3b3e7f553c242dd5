"""Leases, read rounds and writes in flight: what each of them may rest on, on bare cores."""

from __future__ import annotations

from random import Random

import pytest

from shardkv.raft.protocol.core import Raft
from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.membership import Memberships
from shardkv.raft.protocol.messages import (
    AppendEntries,
    AppendReply,
    Envelope,
    Message,
    ReadIndex,
    ReadIndexReply,
    RequestVote,
    RequestVoteReply,
)
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.ready import Options
from shardkv.raft.protocol.types import Entry, HardState, Kind

pytestmark = pytest.mark.quick
TICK = 0.05


class Replica:
    """A core with an instant disk; its mail goes nowhere by itself."""

    def __init__(self, id: int, membership: Membership, **options: object) -> None:
        self.core = Raft(
            id,
            Memberships(0, membership),
            Log(),
            HardState(),
            0,
            Random(id),
            Options(**options),  # type: ignore[arg-type]
        )
        self.now = 0.0
        self.sent: list[Envelope] = []
        self.reads: dict[int, int] = {}

    def work(self) -> None:
        while True:
            ready = self.core.ready(self.now)
            self.sent += ready.messages
            self.reads |= dict(ready.reads)
            if ready.write is None:
                return
            self.sent += [promise for promise in ready.write.promises if promise.to != self.core.id]
            self.core.written(ready.write)

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += TICK
            self.core.tick(self.now)
            self.work()

    def hear(self, *envelopes: Envelope) -> None:
        for envelope in envelopes:
            self.core.step(envelope)
            self.work()

    def take(self, to: int) -> list[Envelope]:
        """What it sent to `to`, which is delivered by whoever takes it."""
        taken = [envelope for envelope in self.sent if envelope.to == to]
        self.sent = [envelope for envelope in self.sent if envelope.to != to]
        return taken


def says(sender: int, to: Replica, message: Message) -> Envelope:
    return Envelope(sender, to.core.id, to.core.term, message)


def trio(**options: object) -> list[Replica]:
    return [Replica(node, Membership(frozenset({1, 2, 3})), **options) for node in (1, 2, 3)]


def elect(candidate: Replica, voter: Replica) -> None:
    while not candidate.core.is_leader:
        candidate.tick()
        voter.tick()
        for _ in range(3):
            voter.hear(*candidate.take(voter.core.id))
            candidate.hear(*voter.take(candidate.core.id))


@pytest.mark.parametrize("nudge", ["reply", "vote"])
def test_a_newer_term_does_not_end_the_promise_that_a_lease_rests_on(nudge: str) -> None:
    """A candidate's term came by an answer of its, and its voter forgot whom it had just heard: a stale read."""
    a, b, c = trio(lease_seconds=0.5)
    elect(a, b)
    for _ in range(3):
        b.hear(*a.take(2))
        c.hear(*a.take(3))
        a.hear(*b.take(1), *c.take(1))
    while (
        c.core.term <= a.core.term
    ):  # replica 3 hears nobody, and a pre-vote of an earlier time lets it campaign
        c.tick()
        c.hear(Envelope(2, 3, c.core.term + 1, RequestVoteReply(True, True)))
    requests = [mail for mail in c.take(2) if isinstance(mail.message, RequestVote) and not mail.message.pre]
    assert requests
    a.tick(a.core.options.heartbeat_ticks)
    b.hear(*a.take(2))
    a.hear(*b.take(1))
    a.core.read(2, a.now)
    a.work()
    assert 2 in a.reads, "the lease holds"
    # The late answer of replica 3 to a pre-vote of replica 2 brings the new term.
    answer = RequestVoteReply(True, False) if nudge == "vote" else AppendReply(False, 0, 0)
    b.hear(Envelope(3, 2, c.core.term, answer))
    assert b.core.term == c.core.term
    b.hear(*requests)
    c.hear(*b.take(3))
    a.core.read(3, a.now)
    a.work()
    assert 3 in a.reads, "the old leader heard of nothing, and its lease holds still"
    assert not c.core.is_leader, "so nobody else may lead, or that read may be stale"
    for _ in range(3):  # once the promise is over, replica 3 is elected
        b.tick(b.core.options.election_ticks)
        c.tick(3 * c.core.options.election_ticks)
        b.hear(*c.take(2))
        c.hear(*b.take(3))
        b.hear(*c.take(2))
        c.hear(*b.take(3))
    assert c.core.is_leader or b.core.is_leader


def test_a_restart_keeps_the_promise_for_requests_of_its_own_term_too() -> None:
    memberships = Memberships(0, Membership(frozenset({1, 2, 3})))
    raft = Raft(2, memberships, Log(), HardState(term=4), 0, Random(1), Options(lease_seconds=0.5))
    raft.step(Envelope(3, 2, 4, RequestVote(False, 0, 0)))
    assert raft.voted_for == 0
    for _ in range(raft.options.election_ticks):
        raft.tick(0.0)
    raft.step(Envelope(3, 2, 4, RequestVote(False, 0, 0)))
    assert raft.voted_for == 3


@pytest.mark.parametrize("lease_seconds", [0.0, 0.5])
def test_a_connection_that_breaks_ends_no_promise_that_a_lease_rests_on(lease_seconds: float) -> None:
    """The leader may be alive, and answer reads by the lease that this promise is a part of."""
    a, b, _ = trio(lease_seconds=lease_seconds)
    elect(a, b)
    b.hear(Envelope(1, 2, a.core.term, AppendEntries(0, 0, (), 0, 0)))
    b.core.unreachable(1)
    b.hear(Envelope(3, 2, a.core.term + 1, RequestVote(False, 9, a.core.term)))
    assert b.core.voted_for == (1 if lease_seconds else 3), "1 in the term before"


def test_a_pre_vote_for_a_term_that_has_begun_is_refused() -> None:
    """Granted, it would let a replica campaign in a term in which this one may have voted."""
    memberships = Memberships(0, Membership(frozenset({1, 2, 3})))
    raft = Raft(2, memberships, Log(), HardState(term=4), 0, Random(1), Options())
    for term, granted in ((4, False), (5, True)):
        raft.step(Envelope(3, 2, term, RequestVote(True, 0, 0)))
        assert [e.message for e in raft.ready(0.0).messages] == [RequestVoteReply(True, granted)]


def test_a_transfer_may_pass_the_promise() -> None:
    a, b, _ = trio(lease_seconds=0.5)
    elect(a, b)
    b.hear(Envelope(3, 2, a.core.term + 1, RequestVote(False, 9, a.core.term, transfer=True)))
    assert b.core.voted_for == 3


# ---- quorums of reads and leases


def joint(**options: object) -> Replica:
    """Replica 1 leads; voters {1, 2, 3} become {1, 4, 5}; replica 6 learns. The change is not committed."""
    replica = Replica(1, Membership(frozenset({1, 2, 3}), learners=frozenset({4, 5, 6})), **options)
    while not replica.core.is_leader:
        replica.tick()
        for envelope in replica.take(2):
            if isinstance(envelope.message, RequestVote):
                vote = RequestVoteReply(envelope.message.pre, True)
                replica.hear(Envelope(2, 1, envelope.term, vote))
    replica.hear(says(2, replica, AppendReply(True, 1, 0)))
    replica.core.change_membership(Membership(frozenset({1, 4, 5}), learners=frozenset({6})))
    replica.work()
    assert replica.core.membership.is_joint
    return replica


def confirm(replica: Replica, *nodes: int) -> None:
    seq = replica.core.role.reads.seq  # type: ignore[union-attr]
    for node in nodes:
        replica.hear(says(node, replica, AppendReply(True, 1, seq)))


@pytest.mark.parametrize("half", [(2, 3), (4, 5)])
def test_a_read_while_joint_asks_both_halves(half: tuple[int, int]) -> None:
    replica = joint()
    replica.core.read(1, replica.now)
    replica.work()
    confirm(replica, *half)
    assert not replica.reads, "one half may have another leader by now"
    confirm(replica, 2, 4)
    assert replica.reads == {1: 1}


@pytest.mark.parametrize("half", [(2, 3), (4, 5)])
def test_a_lease_while_joint_asks_both_halves(half: tuple[int, int]) -> None:
    replica = joint(lease_seconds=0.5)
    replica.tick(3)  # a heartbeat whose answers count
    confirm(replica, *half)
    replica.core.read(1, replica.now)
    replica.work()
    assert not replica.reads, "one half may have another leader by now"
    confirm(replica, 2, 4)
    replica.core.read(2, replica.now)
    replica.work()
    assert 2 in replica.reads


def test_learners_confirm_neither_reads_nor_leases() -> None:
    replica = Replica(1, Membership(frozenset({1, 2, 3}), learners=frozenset({4, 5, 6})), lease_seconds=0.5)
    while not replica.core.is_leader:
        replica.tick()
        for envelope in replica.take(2):
            if isinstance(envelope.message, RequestVote):
                replica.hear(Envelope(2, 1, envelope.term, RequestVoteReply(envelope.message.pre, True)))
    replica.hear(says(2, replica, AppendReply(True, 1, 0)))
    replica.tick(3)
    replica.core.read(1, replica.now)
    replica.work()
    confirm(replica, 4, 5, 6)
    replica.core.read(2, replica.now)
    replica.work()
    assert not replica.reads, "three learners are no quorum"
    confirm(replica, 3)
    replica.core.read(3, replica.now)
    replica.work()
    assert set(replica.reads) == {1, 2, 3}


def test_a_lease_begins_when_its_round_was_sent_not_when_the_answer_came() -> None:
    replica = trio(lease_seconds=0.5)[0]
    elect(replica, Replica(2, Membership(frozenset({1, 2, 3}))))
    replica.hear(says(2, replica, AppendReply(True, 1, 0)))
    replica.tick(3)
    seq = replica.core.role.reads.seq  # type: ignore[union-attr]
    sent = replica.now
    replica.core.role.progress[3].match_index = 0  # type: ignore[union-attr]
    replica.now = sent + 0.45  # the answer was long under way
    replica.core.ready(replica.now)
    replica.hear(says(2, replica, AppendReply(True, 1, seq)))
    replica.now = sent + 0.55
    replica.core.read(1, replica.now)
    replica.work()
    assert not replica.reads, (
        "the follower's promise began when it heard the round, which may be at its sending"
    )


def test_an_answer_to_a_read_of_an_earlier_leadership_releases_no_later_one() -> None:
    """Request numbers are random: were they counted anew in each role, an old answer would be taken for a new one's."""
    replica = trio()[0]
    replica.hear(Envelope(2, 1, 1, AppendEntries(0, 0, (Entry(1, 1, Kind.NOOP, b""),), 1, 0)))
    replica.core.read(1, 0.0)
    replica.work()
    (first,) = [mail.message for mail in replica.take(2) if isinstance(mail.message, ReadIndex)]
    replica.core.unreachable(2)  # and it is back at once, in the same term
    replica.hear(Envelope(2, 1, 1, AppendEntries(1, 1, (), 1, 0)))
    replica.core.read(2, 0.0)
    replica.work()
    replica.hear(Envelope(2, 1, 1, ReadIndexReply(first.seq, 1)))
    assert 2 not in replica.reads, "what was committed since the first read was asked is missing in that answer"


# ---- snapshots and memberships


def test_a_snapshot_s_membership_holds_where_the_log_is_reset() -> None:
    replica = trio()[0]
    voters = Membership(frozenset({1, 4, 5}))
    assert replica.core.restore(10, 3, voters)
    assert replica.core.membership == voters and replica.core.memberships.index == 10


def test_a_snapshot_keeps_the_memberships_of_the_suffix_that_the_log_keeps() -> None:
    replica = trio()[0]
    later = Membership(frozenset({1, 2, 3}), learners=frozenset({7}))
    entries = (
        Entry(1, 1, Kind.NOOP, b""),
        Entry(2, 1, Kind.COMMAND, b"x"),
        Entry(3, 1, Kind.MEMBERSHIP, later.encode()),
    )
    replica.hear(Envelope(2, 1, 1, AppendEntries(0, 0, entries, 0, 0)))
    at_two = Membership(frozenset({1, 2, 3}), learners=frozenset({6}))
    assert not replica.core.restore(2, 1, at_two), "the log holds the entry and goes on"
    assert replica.core.membership == later, "what the log says beyond the snapshot still holds"
    replica.hear(Envelope(3, 1, 2, AppendEntries(2, 1, (Entry(3, 2, Kind.NOOP, b""),), 0, 0)))
    assert replica.core.membership == at_two, "and when that is truncated, the snapshot's does"


def test_a_write_in_flight_does_not_count_for_what_replaced_it() -> None:
    log = Log()
    log.append([Entry(n, 1, Kind.COMMAND, b"x") for n in (1, 2, 3)])
    log.take_unwritten()
    log.truncate(2)
    log.append([Entry(2, 2, Kind.COMMAND, b"y")])
    log.take_unwritten()
    log.written()
    assert log.durable_index == 1, "the write that reached the disk had another entry 2"
    log.written()
    assert log.durable_index == 2
