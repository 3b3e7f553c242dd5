"""What etcd's suites add: ReadIndex, leases, leadership transfer, flow control, a group of one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from shardkv.raft.errors import Busy, NotLeader, RaftError, Transferring
from shardkv.raft.protocol.core import Raft
from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.membership import Memberships
from shardkv.raft.protocol.messages import (
    AppendEntries,
    AppendReply,
    Envelope,
    InstallSnapshot,
    ReadIndex,
    ReadIndexReply,
    RequestVote,
    RequestVoteReply,
    TimeoutNow,
)
from shardkv.raft.protocol.progress import Mode
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.ready import Options
from shardkv.raft.protocol.types import HardState, NodeId
from tests.sim.disk import DiskFaults
from tests.sim.network import Weather
from tests.sim.raft_world import RaftWorld, in_world

# ---- the bare core, driven by hand


def core(id: int = 1, voters: int = 3, **options: object) -> Raft:
    memberships = Memberships(0, Membership(frozenset(range(1, voters + 1))))
    return Raft(id, memberships, Log(), HardState(), 0, Random(id), Options(**options))  # type: ignore[arg-type]


def settle(raft: Raft, now: float = 0.0) -> list[Envelope]:
    """Carry out its work with an instant disk; returns all messages."""
    sent: list[Envelope] = []
    while True:
        ready = raft.ready(now)
        sent += ready.messages
        if ready.write is None:
            return sent
        sent += [promise for promise in ready.write.promises if promise.to != raft.id]
        raft.written(ready.write)


def elect(raft: Raft) -> None:
    """Make it the leader of the next term, with the vote of replica 2."""
    while not raft.is_leader:
        raft.tick(0.0)
        mail = settle(raft)
        while mail:
            envelope = mail.pop(0)
            if envelope.to == 2 and isinstance(envelope.message, RequestVote):
                raft.step(Envelope(2, 1, envelope.term, RequestVoteReply(envelope.message.pre, True)))
                mail += settle(raft)
    settle(raft)


def acknowledge(raft: Raft, peer: int, index: int, read_seq: int = 0) -> None:
    raft.step(Envelope(peer, raft.id, raft.term, AppendReply(True, index, read_seq)))


def test_a_new_leader_answers_no_read_before_its_first_own_commit() -> None:
    raft = core()
    elect(raft)
    raft.read(7, 0.0)
    ready = raft.ready(0.0)
    assert not ready.reads
    acknowledge(raft, 2, 1)
    settle(raft)
    acknowledge(raft, 2, 1, read_seq=1)
    assert raft.ready(0.0).reads == ((7, 1),)


def test_one_round_serves_all_reads_queued_before_it() -> None:
    raft = core()
    elect(raft)
    acknowledge(raft, 2, 1)
    settle(raft)
    for ticket in range(100):
        raft.read(ticket, 0.0)
    assert len(settle(raft)) == 2, "one message a follower"
    raft.read(100, 0.0)
    assert settle(raft) == [], "the next round waits for this one"
    acknowledge(raft, 3, 1, read_seq=1)
    ready = raft.ready(0.0)
    assert [ticket for ticket, _ in ready.reads] == list(range(100))
    assert len(ready.messages) == 2, "and then begins"


def test_a_deposed_leader_s_read_fails() -> None:
    raft = core()
    elect(raft)
    acknowledge(raft, 2, 1)
    settle(raft)
    raft.read(1, 0.0)
    settle(raft)
    raft.step(Envelope(3, 1, raft.term + 1, AppendEntries(0, 0, (), 0, 0)))
    assert raft.ready(0.0).failed_reads == (1,)


def test_a_follower_s_lost_read_request_is_asked_again() -> None:
    raft = core(id=2)
    raft.step(Envelope(1, 2, 1, AppendEntries(0, 0, (), 0, 0)))
    settle(raft)
    raft.read(5, 0.0)
    (first,) = (e.message for e in settle(raft) if isinstance(e.message, ReadIndex))
    for _ in range(raft.options.heartbeat_ticks):
        raft.tick(0.0)
    (again,) = (e.message for e in settle(raft) if isinstance(e.message, ReadIndex))
    assert again == first
    raft.step(Envelope(3, 2, 1, ReadIndexReply(first.seq, 9)))
    assert not raft.ready(0.0).reads, "only the leader's answer counts"
    raft.step(Envelope(1, 2, 1, ReadIndexReply(first.seq, 9)))
    assert raft.ready(0.0).reads == ((5, 9),)
    with pytest.raises(NotLeader):
        core().read(1, 0.0)


def leased(now: float) -> Raft:
    """A leader whose last round was sent and confirmed at `now`."""
    raft = core(lease_seconds=0.5)
    for _ in range(20):
        raft.tick(0.0)
    elect(raft)
    acknowledge(raft, 2, 1)
    settle(raft, now)
    raft.read(0, now)
    settle(raft, now)
    acknowledge(raft, 2, 1, read_seq=raft.role.reads.seq)  # type: ignore[union-attr]
    settle(raft, now)
    return raft


def test_a_lease_is_counted_from_the_sending_and_a_pause_ends_it() -> None:
    raft = leased(10.0)
    raft.read(1, 10.4)
    assert raft.ready(10.4).reads == ((1, 1),), "no round is needed"
    raft.read(2, 10.6)  # as after a pause: no tick has passed, but time has
    assert raft.ready(10.6).reads == ()


def test_a_transfer_forfeits_the_lease_for_good() -> None:
    raft = leased(10.0)
    raft.transfer(2)
    raft.read(1, 10.1)
    assert raft.ready(10.1).reads == ()
    for _ in range(raft.options.election_ticks):
        raft.tick(10.2)
    raft.read(2, 10.2)
    assert all(ticket != 2 for ticket, _ in raft.ready(10.2).reads)


def test_a_restarted_replica_gives_no_vote_that_a_lease_may_rest_on() -> None:
    raft = core(id=2, lease_seconds=0.5)
    assert raft._hears_a_leader()
    for _ in range(raft.options.election_ticks):
        raft.tick(0.0)
    assert not raft._hears_a_leader() or raft.leader


def test_a_probed_follower_gets_one_message_until_it_answers() -> None:
    raft = core()
    elect(raft)
    for _ in range(5):
        raft.propose(b"x")
        settle(raft)
    to_three = raft.role.progress[3]  # type: ignore[union-attr]
    assert to_three.mode is Mode.PROBE and to_three.probe_sent
    acknowledge(raft, 3, 1)
    assert to_three.mode is Mode.REPLICATE
    sent = [e for e in settle(raft) if e.to == 3 and isinstance(e.message, AppendEntries)]
    assert sum(len(e.message.entries) for e in sent) == 5


def test_an_old_answer_does_not_end_a_probe() -> None:
    """Seed 1823: reordered messages, each rejection bringing another window of them, without end."""
    raft = core(max_append_bytes=1, window_messages=8)
    elect(raft)
    acknowledge(raft, 2, 1)
    acknowledge(raft, 3, 1)
    for _ in range(8):
        raft.propose(b"x")
    settle(raft)
    peer = raft.role.progress[3]  # type: ignore[union-attr]
    sent = 0
    for _ in range(50):  # each time: "I lack what comes before", and a repeated "I have the first"
        raft.step(Envelope(3, 1, raft.term, AppendReply(False, 0, 0, 5, 0, 2)))
        acknowledge(raft, 3, 1)
        sent += sum(e.to == 3 and isinstance(e.message, AppendEntries) for e in settle(raft))
    assert peer.mode is Mode.PROBE
    assert sent <= 2, f"{sent} messages for answers that told nothing new"
    acknowledge(raft, 3, 2)
    assert peer.mode is Mode.REPLICATE


@in_world(3, seed=1220, compact_bytes=200, weather=Weather(repeat=0.5))
async def test_repeated_answers_do_not_multiply_a_snapshot_s_chunks(world: RaftWorld) -> None:
    """Seed 1220: each repeated answer made a chunk, and each chunk an answer."""
    for replica in world.replicas.values():
        options = replica.node._options
        replica.node._options = replace(options, snapshots=replace(options.snapshots, chunk_bytes=50))
    await world.crash([3])
    for n in range(200):
        await world.propose(f"{n:020}", among=[1, 2])
    size = max(len(world.machine(node).dump()) for node in world.replicas)
    chunks = 0

    def count(source: str, target: str, mail: Sequence[Envelope]) -> None:
        nonlocal chunks
        chunks += sum(isinstance(envelope.message, InstallSnapshot) for envelope in mail)

    world.network.on_mail = count
    await world.start([3])
    await world.converge()
    assert chunks > size // 50, "it came by snapshot"
    assert chunks < 3 * (size // 50 + 10), f"{chunks} chunks for {size // 50}"


def test_the_window_bounds_what_is_in_flight_and_losing_it_all_is_noticed() -> None:
    """Found by simulation (seed 70): everything in flight lost, and then compacted."""
    raft = core(window_messages=4)
    elect(raft)
    acknowledge(raft, 2, 1)
    acknowledge(raft, 3, 1)
    for _ in range(10):
        raft.propose(b"x")
        settle(raft)
        acknowledge(raft, 2, raft.log.last_index)
        settle(raft)
    peer = raft.role.progress[3]  # type: ignore[union-attr]
    assert len(peer.in_flight) == 4
    raft.compact(raft.handed_index)
    wanted: list[NodeId] = []
    for _ in range(3):
        raft.tick(0.0)
        ready = raft.ready(0.0)
        wanted += ready.snapshots_wanted
    assert wanted == [3] and peer.mode is Mode.SNAPSHOT
    raft.propose(b"y")
    assert not [
        e for e in settle(raft) if e.to == 3 and isinstance(e.message, AppendEntries) and e.message.entries
    ], "appends pause"
    raft.snapshot_reported(3, raft.log.base_index)
    assert [
        e for e in settle(raft) if e.to == 3 and isinstance(e.message, AppendEntries) and e.message.entries
    ], "and go on after it"


def test_uncommitted_bytes_are_bounded_but_never_refuse_the_first() -> None:
    raft = core(max_uncommitted_bytes=100)
    elect(raft)
    raft.propose(b"x" * 1000)
    with pytest.raises(Busy):
        raft.propose(b"y")
    settle(raft)
    acknowledge(raft, 2, raft.log.last_index)
    raft.propose(b"y")
    raft.check()


def test_a_lone_replica_commits_at_once_but_not_before_its_disk() -> None:
    raft = core(voters=1)
    while not raft.is_leader:
        raft.tick(0.0)
        settle(raft)
    raft.propose(b"x")
    ready = raft.ready(0.0)
    assert not ready.committed and ready.write is not None, "the single node goes through the same gate"
    raft.written(ready.write)
    assert [entry.data for entry in raft.ready(0.0).committed] == [
        b"x"
    ] or raft.commit_index == raft.log.last_index


def test_a_candidate_s_own_vote_counts_from_its_disk_on() -> None:
    raft = core()
    while raft.term == 0:
        raft.tick(0.0)
        ready = raft.ready(0.0)
        for envelope in ready.messages:
            if getattr(envelope.message, "pre", False) and envelope.to == 2:
                raft.step(Envelope(2, 1, envelope.term, RequestVoteReply(True, True)))
    ready = raft.ready(0.0)
    raft.step(Envelope(2, 1, raft.term, RequestVoteReply(False, True)))
    assert not raft.is_leader, "one vote of three, and ours is not yet durable"
    assert ready.write is not None
    raft.written(ready.write)
    assert raft.is_leader


# ---- the group in virtual time


@in_world(3)
async def test_leadership_is_transferred_to_a_caught_up_replica(world: RaftWorld) -> None:
    for n in range(5):
        await world.propose(f"{n}")
    leader = await world.leader()
    target = next(node for node in world.ids if node != leader)
    loop = asyncio.get_running_loop()
    began = loop.time()
    world.replicas[leader].node.transfer(target)
    with pytest.raises(Transferring):
        await world.replicas[leader].propose(b"refused")
    assert await world.leader([target]) == target
    assert loop.time() - began < 0.1
    assert any(isinstance(envelope.message, TimeoutNow) for envelope in world.mail)
    await world.propose("on")
    with pytest.raises(ValueError, match="no voter"):
        world.replicas[target].node.transfer(9)


@in_world(3)
async def test_a_transfer_to_a_dead_replica_is_given_up(world: RaftWorld) -> None:
    leader = await world.leader()
    target = next(node for node in world.ids if node != leader)
    await world.crash([target])
    world.replicas[leader].node.transfer(target)
    with pytest.raises(Transferring):
        await world.replicas[leader].propose(b"refused")
    await asyncio.sleep(0.05 * (world.core(leader).options.election_ticks + 2))
    await world.replicas[leader].propose(b"accepted again")
    assert world.core(leader).is_leader


@in_world(3, seed=4, weather=Weather(loss=0.1, long_delay=0.1))
async def test_reads_on_followers_see_all_that_was_acknowledged(world: RaftWorld) -> None:
    for n in range(30):
        await world.propose(f"{n}")
        node = world.rng.choice(world.ids)
        try:
            await world.replicas[node].read_barrier()
        except RaftError:
            continue
        assert f"{n}" in world.values(node)


@in_world(3)
async def test_a_leader_with_a_slow_disk_sends_before_its_own_write_is_down(world: RaftWorld) -> None:
    await world.propose("warm")
    leader = await world.leader()
    world.disks[leader].faults = DiskFaults(sync_seconds=(0.3, 0.3))
    pending = asyncio.ensure_future(world.replicas[leader].propose(b"x"))
    await asyncio.sleep(0.1)
    others = [node for node in world.ids if node != leader]
    assert all(world.core(node).log.last_index == world.core(leader).log.last_index for node in others)
    assert not pending.done()
    await pending


@in_world(3)
async def test_a_replica_whose_disk_fails_stops_and_the_others_go_on(world: RaftWorld) -> None:
    await world.propose("before")
    leader = await world.leader()
    world.disks[leader].faults.failing = True
    with pytest.raises(RaftError):
        await world.replicas[leader].propose(b"doomed")
    await world.until(lambda: world.replicas[leader].node.fault is not None)
    with pytest.raises(RaftError):
        await world.replicas[leader].read_barrier()
    await world.propose("after", [node for node in world.ids if node != leader])
    world.disks[leader].faults.failing = False
    await world.restart(leader)
    await world.converge()


@in_world(3, compact_bytes=100)
async def test_a_leader_s_log_waits_for_followers_only_so_long(world: RaftWorld) -> None:
    leader = await world.leader()
    away = next(node for node in world.ids if node != leader)
    world.isolate(away)
    for n in range(200):
        await world.propose(f"{n:08}", [node for node in world.ids if node != away])
    assert world.core(leader).log.size_bytes <= 8 * 100
    world.network.heal()
    await world.converge()
