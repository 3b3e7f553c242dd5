"""Learners and joint consensus: who votes changes while the group works (thesis §4, etcd's suites)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random

import pytest

from shardkv.raft.errors import Busy, NotLeader, Stopped
from shardkv.raft.protocol.core import Raft
from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.membership import Memberships
from shardkv.raft.protocol.messages import AppendEntries, AppendReply, Envelope, RequestVote, TimeoutNow
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.ready import Options
from shardkv.raft.protocol.types import Entry, HardState, Kind, SnapshotMeta
from shardkv.raft.reconfigure import reconfigure
from shardkv.raft.recover import make_alone
from shardkv.raft.replica import ReplicaOptions, open_replica
from shardkv.raft.state_file import InMemoryMachine
from shardkv.raft.wal import open_wal
from tests.sim.disk import SimDirectory, SimDisk
from tests.sim.loop import Host, run
from tests.sim.network import SimNetwork, SimTransport, Weather
from tests.sim.raft_world import RaftWorld, in_world


async def change(
    world: RaftWorld, voters: set[int], learners: frozenset[int] = frozenset(), timeout: float = 60.0
) -> None:
    """As an operator: ask whoever leads, again and again, until it is so."""
    addresses = {node: f"n{node}" for node in voters}
    learning = {node: f"n{node}" for node in learners}
    async with asyncio.timeout(timeout):
        while True:
            node = await world.leader()
            try:
                await reconfigure(world.replicas[node], addresses, learning)
                return
            except (NotLeader, Stopped):
                await asyncio.sleep(0.05)


@in_world(3)
async def test_a_newcomer_learns_first_and_then_votes(world: RaftWorld) -> None:
    for n in range(20):
        await world.propose(f"{n}")
    await world.add(4)
    await asyncio.sleep(3.0)
    assert world.core(4).term == 0, "who knows nobody campaigns nowhere"
    await change(world, {1, 2, 3, 4})
    await world.converge()
    assert world.core(4).membership.voters == {1, 2, 3, 4}
    await world.crash([1])
    await world.propose("three of four")
    await world.crash([2])
    with pytest.raises(TimeoutError):
        await world.propose("two of four", timeout=5.0)
    await world.start([1, 2])
    await world.converge()


@in_world(3)
async def test_a_learner_that_is_to_stay_one_does_not_vote_until_it_is_promoted(world: RaftWorld) -> None:
    await world.add(4)
    await change(world, {1, 2, 3}, frozenset({4}))
    for n in range(20):
        await world.propose(f"{n}")
    await world.converge()
    assert world.core(4).membership.learners == {4} and world.values(4)[-1] == "19"
    await change(world, {1, 2, 3}, frozenset({4}))  # asked for again: nothing to do
    with pytest.raises(ValueError, match="votes"):
        await reconfigure(world.replicas[await world.leader()], {1: "n1", 2: "n2"}, {3: "n3"})
    await world.add(5)
    await change(world, {1, 2, 3, 5}, frozenset({4}))  # beside another that comes to vote
    assert world.core(5).membership.learners == {4}
    await change(world, {1, 2, 3, 4, 5})
    await world.crash([1, 2])
    await world.propose("three of five, both newcomers among them")
    await world.start([1, 2])
    await world.converge()


@in_world(3, compact_bytes=100)
async def test_a_newcomer_catches_up_by_snapshot_which_tells_the_membership(world: RaftWorld) -> None:
    for n in range(100):
        await world.propose(f"{n:010}")
    await world.add(4)
    await change(world, {1, 2, 3, 4})
    for n in range(100):
        await world.propose(f"{n:010}")
    await world.add(5)
    await change(world, {3, 4, 5})
    await world.crash([1, 2])
    await world.converge([3, 4, 5])
    await world.restart(3, 4, 5)
    await world.propose("after a restart")
    assert all(world.core(node).membership.voters == {3, 4, 5} for node in (3, 4, 5))


@in_world(3)
async def test_all_voters_change_at_once_under_load(world: RaftWorld) -> None:
    for node in (4, 5, 6):
        await world.add(node)
    acknowledged: list[str] = []
    stop = False

    async def client() -> None:
        while not stop:
            value = f"{len(acknowledged)}"
            await world.propose(value)
            acknowledged.append(value)

    task = asyncio.ensure_future(client())
    await change(world, {4, 5, 6})
    stop = True
    await task
    await world.crash([1, 2, 3])
    await world.propose("by the new ones alone")
    await world.converge()
    assert world.values(4) == [*acknowledged, "by the new ones alone"]


@in_world(3)
async def test_a_leader_that_is_removed_hands_over_first(world: RaftWorld) -> None:
    await world.propose("x")
    leader = await world.leader()
    others = set(world.ids) - {leader}
    await change(world, others)
    assert not world.core(leader).is_leader
    term = world.core(await world.leader(others)).term
    await asyncio.sleep(10.0)
    assert world.core(await world.leader(others)).term == term, "who was removed disturbs nobody"


@in_world(5, seed=31, compact_bytes=1000, weather=Weather(loss=0.05, repeat=0.05, long_delay=0.1))
async def test_voters_come_and_go_while_everything_fails(world: RaftWorld) -> None:
    rng, voters, acknowledged = Random(31), {1, 2, 3, 4, 5}, []
    for turn in range(15):
        new = 6 + turn
        await world.add(new)
        old = rng.choice(sorted(voters))
        task = asyncio.ensure_future(change(world, voters | {new} - {old}))
        for _ in range(4):
            victim = rng.choice(sorted(world.replicas))
            await world.restart(victim)
            await world.propose(f"{turn}.{_}")
            acknowledged.append(f"{turn}.{_}")
        await task
        voters = voters | {new} - {old}
        await change(world, voters - {old})
        voters -= {old}
        await world.crash([old])
        world.ids.remove(old)
    world.network.weather = Weather()
    await world.converge()
    for value in acknowledged:
        assert world.values(await world.leader()).count(value) == 1


# ---- the bare core


def leader_of(voters: set[int]) -> Raft:
    raft = Raft(1, Memberships(0, Membership(frozenset({1}))), Log(), HardState(), 0, Random(1), Options())
    while not raft.is_leader:
        raft.tick(0.0)
        work(raft)
    work(raft)
    if voters != {1}:
        raft.change_membership(Membership(frozenset({1}), learners=frozenset(voters - {1})))
        work(raft)
        raft.change_membership(Membership(frozenset(voters)))
        work(raft)
    return raft


def work(raft: Raft) -> list[Envelope]:
    sent: list[Envelope] = []
    while (ready := raft.ready(0.0)).write is not None or ready.messages:
        sent += ready.messages
        if ready.write is not None:
            raft.written(ready.write)
    return sent


def answer(raft: Raft, node: int, index: int | None = None) -> None:
    """Replica `node` has stored everything up to `index`."""
    reply = AppendReply(True, raft.log.last_index if index is None else index, 0)
    raft.step(Envelope(node, raft.id, raft.term, reply))
    work(raft)


@pytest.mark.quick
def test_while_joint_both_majorities_must_store_an_entry() -> None:
    raft = leader_of({1})
    raft.change_membership(Membership(frozenset({1}), learners=frozenset({2, 3})))
    work(raft)
    index, _ = raft.change_membership(Membership(frozenset({1, 2, 3})))
    work(raft)
    assert raft.membership.is_joint and raft.commit_index < index, "the old majority alone is not enough"
    answer(raft, 2, index)
    assert raft.commit_index >= index
    assert not raft.membership.is_joint, "and then it is left by itself"
    assert raft.commit_index < raft.log.last_index, "the leaving needs the new majority"
    answer(raft, 3)
    assert raft.commit_index == raft.log.last_index


@pytest.mark.quick
def test_a_learner_neither_votes_nor_counts() -> None:
    raft = leader_of({1})
    raft.change_membership(Membership(frozenset({1}), learners=frozenset({2})))
    work(raft)
    index, _ = raft.propose(b"x")
    work(raft)
    assert raft.commit_index == index
    learner = Raft(
        2,
        Memberships(0, Membership(frozenset({1}), learners=frozenset({2}))),
        Log(),
        HardState(1),
        0,
        Random(2),
        Options(),
    )
    for _ in range(200):
        learner.tick(0.0)
    learner.step(Envelope(1, 2, 1, TimeoutNow()))
    assert learner.term == 1, "a learner campaigns for nothing"


@pytest.mark.quick
def test_one_change_at_a_time_and_only_sound_ones() -> None:
    raft = leader_of({1})
    with pytest.raises(ValueError, match="without having been learners"):
        raft.change_membership(Membership(frozenset({1, 2})))
    with pytest.raises(ValueError, match="plain membership"):
        raft.change_membership(Membership(frozenset()))
    raft.change_membership(Membership(frozenset({1}), learners=frozenset({2})))
    work(raft)
    raft.change_membership(Membership(frozenset({1, 2})))
    with pytest.raises(Busy):
        raft.change_membership(Membership(frozenset({1})))
    follower = Raft(
        2, Memberships(0, Membership(frozenset({1, 2}))), Log(), HardState(), 0, Random(1), Options()
    )
    with pytest.raises(NotLeader):
        follower.change_membership(Membership(frozenset({1})))


@pytest.mark.quick
def test_a_truncated_change_is_taken_back() -> None:
    """It held from when it was appended; now another leader's entry is in its place."""
    raft = Raft(
        2, Memberships(0, Membership(frozenset({1, 2, 3}))), Log(), HardState(1), 0, Random(1), Options()
    )
    joint = Membership(frozenset({1, 2, 4}), frozenset({1, 2, 3}))
    entry = Entry(1, 1, Kind.MEMBERSHIP, joint.encode())
    raft.step(Envelope(1, 2, 1, AppendEntries(0, 0, (entry,), 0, 0)))
    assert raft.membership == joint
    raft.step(Envelope(3, 2, 2, AppendEntries(0, 0, (Entry(1, 2, Kind.NOOP, b""),), 0, 0)))
    assert raft.membership.voters == {1, 2, 3} and not raft.membership.is_joint


@pytest.mark.quick
def test_a_leader_that_is_no_member_any_more_leads_until_that_is_committed() -> None:
    raft = leader_of({1})
    raft.change_membership(Membership(frozenset({1}), learners=frozenset({2})))
    work(raft)
    index, _ = raft.change_membership(Membership(frozenset({2})))
    work(raft)
    answer(raft, 2, index)
    assert raft.is_leader and raft.membership.voters == {2}
    answer(raft, 2)
    assert not raft.is_leader


def test_a_replica_left_out_may_lead_until_that_is_committed() -> None:
    """Walk 97: only the one that the newest membership leaves out had the log to lead with (Figure 4.6)."""
    two = Membership(frozenset({1, 2}))
    left = Entry(1, 1, Kind.MEMBERSHIP, Membership(frozenset({2})).encode())
    raft = Raft(1, Memberships(0, two, [left]), Log(0, 0, [left]), HardState(1, 1), 0, Random(1), Options())
    assert raft.memberships.may_campaign(1, commit_index=0)
    assert not raft.memberships.may_campaign(1, commit_index=1)
    for _ in range(2 * raft.options.election_ticks):
        raft.tick(0.0)
    assert [e.to for e in raft.ready(0.0).messages if isinstance(e.message, RequestVote)] == [2]


# ---- a snapshot was installed, and the crash came before the log knew


THREE = Membership.of({1: "n1", 2: "n2", 3: "n3"})
DROPPED = Membership.of({1: "n1"})  # uncommitted, in the part of the log that conflicts with the snapshot


async def installed_and_crashed(directory: SimDirectory) -> OneState:
    """A log that ends with an uncommitted membership; the state machine has a newer term's entry at 3."""
    wal, _ = await open_wal(directory, Random(1))
    entries = [Entry(index, 1, Kind.NOOP, b"") for index in (1, 2, 3)]
    await wal.append(HardState(1, 1), [*entries, Entry(4, 1, Kind.MEMBERSHIP, DROPPED.encode())])
    wal.close()
    return OneState(directory, SnapshotMeta(3, 2), THREE.encode())


class OneState(InMemoryMachine):
    """The state that a snapshot left; the membership in it is all that matters here."""

    def __init__(self, directory: SimDirectory, applied: SnapshotMeta, membership: bytes) -> None:
        super().__init__(directory)
        self._applied, self.membership = applied, membership
        self.clock_ms = 0

    def apply(self, entries: Sequence[Entry]) -> list[bytes]:
        self._applied = SnapshotMeta(entries[-1].index, entries[-1].term)
        for entry in entries:
            if entry.kind is Kind.MEMBERSHIP:
                self.membership = entry.data
        return [b""] * len(entries)

    def dump(self) -> bytes:
        return self.membership

    def load(self, data: bytes) -> None:
        self.membership = data


async def opened(directory: SimDirectory, machine: OneState) -> tuple[Membership, int]:
    """The membership that the replica starts with, and where its log ends."""
    host = Host("n1")
    transport = SimTransport(SimNetwork(Random(1)), "c", 1, host, {2: "n2", 3: "n3"})
    replica = await open_replica(
        1, THREE, directory, transport, machine, Random(1), lambda: 0, ReplicaOptions()
    )
    try:
        return replica.core.membership, replica.core.log.last_index
    finally:
        await replica.stop()


@pytest.mark.quick
def test_what_a_dropped_log_said_of_the_members_does_not_hold() -> None:
    async def story() -> None:
        directory = SimDisk(Random(1)).open()
        machine = await installed_and_crashed(directory)
        for _ in range(2):  # and the next start finds the same
            assert await opened(directory, machine) == (THREE, 3)

    run(story())


@pytest.mark.quick
def test_a_replica_that_was_made_alone_on_a_dropped_log_leads_at_every_start() -> None:
    async def story() -> None:
        directory = SimDisk(Random(1)).open()
        machine = await installed_and_crashed(directory)
        index, before = await make_alone(directory, Random(2), 1, 77, "", machine.applied, THREE)
        assert (index, before) == (4, THREE), "the dropped log does not count"
        for _ in range(2):
            membership, last = await opened(directory, machine)
            assert membership.incarnations == {1: 77}
            assert membership.voters == {1} and last >= 4, "its first start led alone, its second did not"

    run(story())
