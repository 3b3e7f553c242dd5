"""Agreement: MIT 6.824 lab 2B and the paper's figures 7 and 8 (scenarios R-A1 to R-A10)."""

from __future__ import annotations

import asyncio
from functools import partial
from random import Random

import pytest

from shardkv.raft.errors import OutcomeUnknown, RaftError
from shardkv.raft.protocol.core import Raft
from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.membership import Memberships
from shardkv.raft.protocol.messages import AppendEntries, AppendReply, Envelope
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.ready import Options
from shardkv.raft.protocol.types import Entry, HardState, Kind
from shardkv.raft.replica import Replica
from tests.sim.network import Weather
from tests.sim.raft_world import RaftWorld, in_world


@in_world(3)
async def test_r_a1_entries_in_turn_reach_all_in_one_order(world: RaftWorld) -> None:
    for value in ("a", "b", "c"):
        assert value not in world.values(1), "nothing is applied before it is proposed"
        await world.propose(value)
    await world.converge()
    assert world.values(1) == world.values(2) == world.values(3) == ["a", "b", "c"]


@in_world(3)
async def test_r_a2_each_entry_goes_to_each_peer_once(world: RaftWorld) -> None:
    leader = await world.leader()
    before = world.network.sent["bytes"]
    for n in range(10):
        await world.replicas[leader].propose(f"{n}".encode() * 5000)
    await world.converge()
    assert world.network.sent["bytes"] - before <= 3 * 10 * 5000 + 50_000


@in_world(3)
async def test_r_a3_a_follower_away_catches_up(world: RaftWorld) -> None:
    leader = await world.leader()
    away = next(node for node in world.ids if node != leader)
    world.isolate(away)
    for n in range(5):
        await world.propose(f"without-{n}", [node for node in world.ids if node != away])
    world.network.heal()
    await world.propose("with")
    await world.converge()
    assert len(world.values(away)) == 6


@in_world(5)
async def test_r_a4_without_a_quorum_nothing_commits(world: RaftWorld) -> None:
    leader = await world.leader()
    away = [node for node in world.ids if node != leader][:3]
    world.isolate(*away)
    with pytest.raises(OutcomeUnknown):
        await world.replicas[leader].propose(b"stranded")
    assert all("stranded" not in world.values(node) for node in world.ids)
    world.network.heal()
    await world.propose("after")
    await world.converge()
    assert world.values(1).count("stranded") <= 1


@in_world(3)
async def test_r_a5_concurrent_proposals_commit_at_distinct_slots(world: RaftWorld) -> None:
    leader = await world.leader()
    replies = await asyncio.gather(*(world.replicas[leader].propose(b"%d" % n) for n in range(5)))
    assert sorted(replies) == [b"1", b"2", b"3", b"4", b"5"]
    assert sorted(world.values(leader)) == ["0", "1", "2", "3", "4"]


@in_world(3)
async def test_r_a6_the_tail_of_a_leader_cut_off_is_replaced(world: RaftWorld) -> None:
    await world.propose("shared")
    first = await world.leader()
    rest = [node for node in world.ids if node != first]
    world.isolate(first)
    stranded = [asyncio.ensure_future(world.replicas[first].propose(b"lost-%d" % n)) for n in range(3)]
    await world.propose("kept", rest)
    world.network.heal()
    assert all(isinstance(e, RaftError) for e in await asyncio.gather(*stranded, return_exceptions=True))
    await world.propose("last")
    await world.converge()
    assert world.values(first) == ["shared", "kept", "last"]


@in_world(5)
async def test_r_a7_long_conflicts_are_backed_up_by_term(world: RaftWorld) -> None:
    """Leaders strand 50 entries each, several times over; then all agree, in few rounds."""
    await world.propose("start")
    for turn in range(4):
        leader = await world.leader()
        friend = next(node for node in world.ids if node != leader)
        others = [node for node in world.ids if node not in (leader, friend)]
        world.partition([leader, friend], others)
        doomed = [
            asyncio.ensure_future(world.replicas[leader].propose(b"%d-%d" % (turn, n))) for n in range(50)
        ]
        await world.propose(f"kept-{turn}", others)
        await asyncio.gather(*doomed, return_exceptions=True)
        world.mail.clear()
        world.network.heal()
        await world.propose(f"after-{turn}")
        await world.converge()
        rejections = [
            e for e in world.mail if isinstance(e.message, AppendReply) and e.message.rejected_index > 0
        ]
        assert len(rejections) <= 20, "backtracking goes by terms, not by the 50 entries"
    assert [v for v in world.values(1) if v.startswith("kept")] == [f"kept-{n}" for n in range(4)]


@in_world(3)
async def test_r_a8_messages_are_few(world: RaftWorld) -> None:
    leader = await world.leader()
    assert world.network.sent["messages"] <= 30, "the first election"
    await asyncio.sleep(0.02)
    before = world.network.sent["messages"]
    for n in range(10):
        await world.replicas[leader].propose(b"%d" % n)
    assert world.network.sent["messages"] - before <= 42, "ten entries in turn"
    before = world.network.sent["messages"]
    await asyncio.gather(*(world.replicas[leader].propose(b"x") for _ in range(100)))
    assert world.network.sent["messages"] - before <= 30, "a batch of 100 does not cost 100 messages"
    before = world.network.sent["messages"]
    await asyncio.sleep(1.0)
    assert world.network.sent["messages"] - before <= 60, "an idle second"


async def _figure_8(world: RaftWorld, rounds: int) -> None:
    """Leaders append, crash before or after it commits, and others take over."""
    rng = world.rng
    down: set[int] = set()
    for n in range(rounds):
        for node in world.leaders_now():
            if node in world.replicas:
                task = asyncio.ensure_future(world.replicas[node].propose(b"%d" % n))
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.sleep(rng.uniform(0, 0.02) if rng.random() < 0.9 else rng.uniform(0, 1.5))
        leaders = [node for node in world.leaders_now() if node not in down]
        if leaders and len(down) < 2:
            victim = rng.choice(leaders)
            await world.crash([victim])
            down.add(victim)
        elif down:
            back = rng.choice(sorted(down))
            await world.start([back])
            down.discard(back)
    await world.start(sorted(down))
    world.network.weather = Weather()
    await world.propose("end")
    await world.converge()


@in_world(5, seed=8)
async def test_r_a9_figure_8_never_loses_a_committed_entry(world: RaftWorld) -> None:
    await _figure_8(world, 1000)


@in_world(5, seed=9, weather=Weather(loss=0.1, repeat=0.05, long_delay=0.2))
async def test_r_a9_figure_8_on_a_bad_network(world: RaftWorld) -> None:
    await _figure_8(world, 1000)


def _follower(entries: int) -> Raft:
    log = Log(0, 0, [Entry(n, 1, Kind.COMMAND, b"%d" % n) for n in range(1, entries + 1)])
    core = Raft(
        2, Memberships(0, Membership(frozenset({1, 2, 3}))), log, HardState(1, 1), 0, Random(1), Options()
    )
    core.step(Envelope(1, 2, 1, AppendEntries(0, 0, (), 0, 0)))
    core.ready(0.0)
    return core


def test_r_a10_an_old_append_does_not_truncate() -> None:
    core = _follower(5)
    old = AppendEntries(1, 1, (Entry(2, 1, Kind.COMMAND, b"2"),), 0, 0)
    for _ in range(2):
        core.step(Envelope(1, 2, 1, old))
    assert core.log.last_index == 5, "entries after a matching one stay"
    core.step(Envelope(1, 2, 1, AppendEntries(1, 1, (Entry(2, 1, Kind.NOOP, b""),), 0, 0)))
    assert core.log.last_index == 5, "equal terms at an index mean equal entries"


def test_r_a10_stale_terms_change_nothing_and_are_told_so() -> None:
    core = _follower(3)
    core.step(Envelope(3, 2, 4, AppendEntries(3, 1, (), 0, 0)))
    write = core.ready(0.0).write
    assert write is not None
    core.written(write)  # it speaks in the new term once its disk knows it
    core.step(Envelope(1, 2, 1, AppendEntries(0, 0, (Entry(1, 1, Kind.NOOP, b""),), 3, 0)))
    reply = core.ready(0.0).messages[-1]
    assert (reply.to, reply.term) == (1, 4), "the old leader hears of the new term"
    assert core.commit_index == 0 and core.log.last_index == 3


@in_world(3, weather=Weather(loss=0.1, repeat=0.3, long_delay=0.3))
async def test_r_a10_match_index_never_goes_back(world: RaftWorld) -> None:
    highest: dict[tuple[int, int, int], int] = {}

    def watch(replica: Replica) -> None:
        role = replica.core.role
        for peer, progress in getattr(role, "progress", {}).items():
            key = (replica.core.id, replica.core.term, peer)
            assert progress.match_index >= highest.get(key, 0)
            highest[key] = progress.match_index

    for replica in world.replicas.values():
        replica.on_turn.append(partial(watch, replica))
    for n in range(100):
        await world.propose(f"{n}")
    await world.converge()
