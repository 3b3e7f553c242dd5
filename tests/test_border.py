"""What a peer says is checked at the border; what a replica itself believes is asserted, and stops it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random

import pytest

from shardkv.raft.codec import MalformedMail, decode_mail, encode_mail
from shardkv.raft.errors import PeerFault, Stopped
from shardkv.raft.protocol.bounds import MAX_NUMBER, MAX_TERM_JUMP
from shardkv.raft.protocol.core import Raft
from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.membership import Memberships
from shardkv.raft.protocol.messages import (
    AppendEntries,
    AppendReply,
    Envelope,
    InstallSnapshot,
    InstallSnapshotReply,
    Message,
    ReadIndex,
    RequestVote,
    RequestVoteReply,
    TimeoutNow,
)
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.ready import Options
from shardkv.raft.protocol.types import Entry, HardState, Kind
from tests.sim.raft_world import RaftWorld, in_world


def core(id: int = 1) -> Raft:
    memberships = Memberships(0, Membership(frozenset({1, 2, 3})))
    return Raft(id, memberships, Log(), HardState(), 0, Random(id), Options())


def settle(raft: Raft) -> list[Envelope]:
    sent: list[Envelope] = []
    while True:
        ready = raft.ready(0.0)
        sent += ready.messages
        if ready.write is None:
            return sent
        sent += [promise for promise in ready.write.promises if promise.to != raft.id]
        raft.written(ready.write)


def leader() -> Raft:
    """Replica 1 leads term 1, and has committed its no-op and one command with replica 2."""
    raft = core()
    while not raft.is_leader:
        raft.tick(0.0)
        mail = settle(raft)
        while mail:
            envelope = mail.pop(0)
            if envelope.to == 2 and isinstance(envelope.message, RequestVote):
                raft.step(Envelope(2, 1, envelope.term, RequestVoteReply(envelope.message.pre, True)))
                mail += settle(raft)
    raft.propose(b"command")
    settle(raft)
    raft.step(Envelope(2, 1, raft.term, AppendReply(True, 2, 0)))
    settle(raft)
    assert raft.commit_index == 2
    return raft


def follower() -> Raft:
    """Replica 1 follows replica 2 in term 2, with two entries of which the first is committed."""
    raft = core()
    entries = (Entry(1, 2, Kind.NOOP, b""), Entry(2, 2, Kind.COMMAND, b"x"))
    raft.step(Envelope(2, 1, 2, AppendEntries(0, 0, entries, 1, 0)))
    settle(raft)
    assert raft.commit_index == 1
    return raft


def picture(raft: Raft) -> tuple[object, ...]:
    """All that a message could change in the log and in who leads."""
    progress = str(getattr(raft.role, "progress", ""))
    log = raft.log.slice(1, raft.log.last_index + 1, 1 << 30)
    return raft.term, raft.voted_for, raft.leader, raft.commit_index, log, raft.log.durable_index, progress


def refused(raft: Raft, envelope: Envelope, why: str) -> None:
    before = picture(raft)
    with pytest.raises(PeerFault, match=why) as caught:
        raft.step(envelope)
    assert caught.value.sender == envelope.sender
    assert picture(raft) == before and not settle(raft), "what is refused changes nothing and is not answered"


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (AppendReply(True, 65592, 0), "replica 3 says that it stores entry 65592; the leader's log ends at 2"),
        (AppendReply(False, 0, 0, 3, 0, 3), "rejects entry 3"),
        (AppendReply(True, 1, 7), "confirms read round 7"),
        (AppendReply(False, 0, 0, 1, 0, 2), "explains a rejection"),
        (InstallSnapshotReply(9, 0, 0, True), "answers for a snapshot at 9"),
        (AppendEntries(2, 1, (), 0, 0), "claims to lead term 1, which replica 1 leads"),
        (InstallSnapshot(9, 1, 3, 0, b"abc", 0), "claims to lead term 1"),
    ],
)
def test_a_leader_refuses_what_no_sound_follower_says(reply: Message, why: str) -> None:
    raft = leader()
    refused(raft, Envelope(3, 1, raft.term, reply), why)
    assert raft.is_leader, "one damaged peer does not depose a leader"


def test_a_follower_keeps_to_the_first_leader_of_a_term() -> None:
    """So of two leaders in one term at most one gets a quorum's acknowledgements."""
    raft = follower()
    refused(raft, Envelope(3, 1, 2, AppendEntries(2, 2, (), 2, 0)), "claims to lead term 2")
    raft.unreachable(2)
    refused(raft, Envelope(3, 1, 2, AppendEntries(2, 2, (), 2, 0)), "claims to lead term 2")
    raft.step(Envelope(3, 1, 2, TimeoutNow()))
    assert raft.term == 2, "only the leader of the term hands over"
    raft.step(Envelope(3, 1, 3, AppendEntries(2, 2, (), 2, 0)))
    assert raft.leader == 3 and raft.commit_index == 2, "a newer term has a leader of its own"


@pytest.mark.parametrize(
    "append",
    [
        AppendEntries(1, 1, (Entry(2, 3, Kind.COMMAND, b"y"),), 2, 0),
        AppendEntries(0, 0, (Entry(1, 3, Kind.NOOP, b""),), 1, 0),
    ],
)
def test_committed_entries_are_not_replaced_by_a_leader_that_lacks_them(append: AppendEntries) -> None:
    refused(follower(), Envelope(3, 1, 3, append), "committed is the one of term 2")


def test_a_stale_answer_of_a_sound_peer_is_no_fault() -> None:
    raft = leader()
    raft.step(Envelope(2, 1, 1, AppendReply(False, 0, 0, 1, 0, 1)))
    raft.step(Envelope(3, 1, 0, AppendReply(True, 50, 9)))
    assert raft.is_leader


BAD = {
    "term": Envelope(2, 1, MAX_NUMBER + 1, TimeoutNow()),
    "sender": Envelope(0, 1, 1, TimeoutNow()),
    "receiver": Envelope(2, 0, 1, TimeoutNow()),
    "match": Envelope(2, 1, 1, AppendReply(True, MAX_NUMBER + 1, 0)),
    "seq": Envelope(2, 1, 1, ReadIndex(MAX_NUMBER + 1)),
    "conflict": Envelope(2, 1, 1, AppendReply(False, 0, 0, 1, 2, 1)),
    "candidate": Envelope(2, 1, 5, RequestVote(False, 9, 5)),
    "chunk": Envelope(2, 1, 5, InstallSnapshot(9, 5, 3, 1, b"abc", 0)),
    "snapshot": Envelope(2, 1, 5, InstallSnapshot(9, 6, 3, 0, b"abc", 0)),
    "falling terms": Envelope(2, 1, 5, AppendEntries(4, 3, (Entry(5, 2, Kind.NOOP, b""),), 0, 0)),
    "entry of the future": Envelope(2, 1, 5, AppendEntries(4, 3, (Entry(5, 6, Kind.NOOP, b""),), 0, 0)),
    "gap": Envelope(2, 1, 5, AppendEntries(4, 3, (Entry(6, 5, Kind.NOOP, b""),), 0, 0)),
    "no voters": Envelope(
        2, 1, 5, AppendEntries(4, 3, (Entry(5, 5, Kind.MEMBERSHIP, Membership(frozenset()).encode()),), 0, 0)
    ),
    "no numbers": Envelope(
        2,
        1,
        5,
        AppendEntries(
            0,
            0,
            (
                Entry(
                    1,
                    5,
                    Kind.MEMBERSHIP,
                    b'{"voters": [1, "x"], "outgoing": [], "learners": [], "addresses": {}}',
                ),
            ),
            0,
            0,
        ),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mail_that_contradicts_itself_is_malformed(name: str) -> None:
    sound = Envelope(2, 1, 5, AppendEntries(4, 3, (Entry(5, 5, Kind.NOOP, b""),), 4, 0))
    assert decode_mail("c", 1, encode_mail("c", 1, "a:1", [sound]))[1] == [sound]
    with pytest.raises(MalformedMail) as caught:
        decode_mail("c", 1, encode_mail("c", 1, "a:1", [sound, BAD[name]]))
    assert caught.value.sender == BAD[name].sender


@in_world(3)
async def test_a_replica_that_meets_a_bug_of_its_own_stops(world: RaftWorld) -> None:
    """An assertion on incoming mail used to be swallowed by the event loop, and the replica voted on."""
    node = await world.leader()
    replica = world.replicas[node]
    told: list[BaseException] = []
    replica.node.on_fault = told.append
    sound = replica.core.step

    def broken(envelope: Envelope) -> None:
        raise AssertionError("planted")

    replica.core.step = broken  # type: ignore[method-assign]
    waiting = asyncio.create_task(replica.propose(b"never"))
    await world.until(lambda: replica.node.stopped)
    assert [str(error) for error in told] == ["planted"]
    with pytest.raises((Stopped,)):
        await waiting
    with pytest.raises(Stopped):
        replica.node.propose(b"x")
    replica.core.step = sound  # type: ignore[method-assign]
    term = replica.core.term
    replica.node.receive([Envelope(3, node, term + 5, RequestVote(False, 99, term + 4, True))])
    await world.propose("the others go on", [other for other in world.ids if other != node])
    assert replica.core.term == term, "a stopped replica votes for nobody"
    del world.replicas[node]  # its fault is what this is about
    await replica.stop()


@pytest.mark.parametrize("entry", ["tick", "propose", "read", "written", "compact", "transfer", "unreachable"])
def test_every_way_into_the_core_stops_the_replica_on_a_fault(entry: str) -> None:
    @in_world(1)
    async def story(world: RaftWorld) -> None:
        await world.propose("1")
        replica = world.replicas[1]

        def broken(*arguments: object) -> None:
            raise AssertionError("planted")

        setattr(replica.core, entry, broken)
        calls = {
            "propose": lambda: replica.node.propose(b"x"),
            "read": lambda: replica.node.read(1),
            "compact": lambda: replica.node.compact(1),
            "transfer": lambda: replica.node.transfer(2),
            "written": lambda: replica.node.propose(b"x"),
        }
        if entry in ("propose", "read", "compact", "transfer"):
            with pytest.raises(Stopped):
                calls[entry]()
        elif entry == "written":
            calls[entry]()
        elif entry == "unreachable":
            replica.node.unreachable(2)
        await world.until(lambda: replica.node.stopped)
        assert str(replica.node.fault) == "planted"
        world.replicas.clear()
        await replica.stop()

    story()


@in_world(3)
async def test_refused_mail_is_counted_by_its_sender(world: RaftWorld) -> None:
    node = await world.leader()
    replica = world.replicas[node]
    other = next(n for n in world.ids if n != node)
    disk = world.replicas[other].node.disks.own
    lie = Envelope(other, node, replica.core.term, AppendReply(True, 1 << 40, 0), disk)
    for _ in range(3):
        replica.node.receive([lie, replace(lie, message=ReadIndex(1))])
    assert replica.node.refusals.by_sender == {other: 3}
    replica.node.refusals.by_sender.clear()
    assert not replica.node.stopped and replica.core.is_leader
    await world.propose("goes on")


@pytest.mark.quick
def test_a_term_that_is_far_ahead_is_refused_and_the_group_goes_on() -> None:
    """A term near the bound, taken once, left no term for the next election."""
    raft = core()
    raft.step(Envelope(2, 1, 5, RequestVote(False, 9, 4, False)))
    assert raft.term == 5
    for term in (MAX_NUMBER, 6 + MAX_TERM_JUMP):
        for message in (RequestVote(False, 9, 4, True), AppendEntries(0, 0, (), 0, 0), TimeoutNow()):
            with pytest.raises(PeerFault, match="names term"):
                raft.step(Envelope(2, 1, term, message))
    assert raft.term == 5
    raft.step(Envelope(2, 1, 5 + MAX_TERM_JUMP, AppendEntries(0, 0, (), 0, 0)))
    assert raft.term == 5 + MAX_TERM_JUMP
