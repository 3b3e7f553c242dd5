"""Elections: MIT 6.824 lab 2A and what the thesis adds (scenarios R-E1 to R-E6)."""

from __future__ import annotations

import asyncio

import pytest

from shardkv.raft.errors import OutcomeUnknown, RaftError
from tests.sim.raft_world import RaftWorld, in_world

TIMEOUT = 1.4  # seconds: the longest election timeout of the default options


@in_world(3)
async def test_r_e1_one_leader_and_no_new_term_while_nothing_fails(world: RaftWorld) -> None:
    await world.leader()
    term = {world.core(node).term for node in world.ids}
    await asyncio.sleep(20 * TIMEOUT)
    assert len(world.leaders_now()) == 1
    assert {world.core(node).term for node in world.ids} == term


@in_world(3)
async def test_r_e2_leaders_cut_off_return_without_disturbance(world: RaftWorld) -> None:
    first = await world.leader()
    world.isolate(first)
    rest = [node for node in world.ids if node != first]
    second = await world.leader(rest)
    term = world.core(second).term
    world.network.heal()
    await world.until(lambda: world.core(first).term == term)
    await asyncio.sleep(3 * TIMEOUT)
    assert world.leaders_now() == [second], "the returning leader disturbed nobody"
    world.isolate(*world.ids)  # no quorum anywhere
    await asyncio.sleep(3 * TIMEOUT)
    assert world.leaders_now() == []
    world.network.heal()
    await world.leader()
    assert len(world.leaders_now()) == 1


@in_world(7)
async def test_r_e3_ten_rounds_with_three_random_replicas_cut_off(world: RaftWorld) -> None:
    await world.leader()
    for _ in range(10):
        away = world.rng.sample(world.ids, 3)
        world.isolate(*away)
        await world.leader([node for node in world.ids if node not in away])
        world.network.heal()


@in_world(3)
async def test_r_e4_an_isolated_replica_returns_with_its_old_term(world: RaftWorld) -> None:
    leader = await world.leader()
    lonely = next(node for node in world.ids if node != leader)
    term = world.core(lonely).term
    world.isolate(lonely)
    await asyncio.sleep(100 * TIMEOUT)
    assert world.core(lonely).term == term, "pre-votes do not raise the term"
    world.network.heal()
    await asyncio.sleep(5 * TIMEOUT)
    assert world.leaders_now() == [leader]
    assert world.core(leader).term == term


@in_world(3)
async def test_r_e5_a_leader_without_a_quorum_steps_down_and_says_unknown(world: RaftWorld) -> None:
    leader = await world.leader()
    world.isolate(leader)
    replica = world.replicas[leader]
    pending = asyncio.ensure_future(replica.propose(b"stranded"))
    reading = asyncio.ensure_future(replica.read_barrier())
    with pytest.raises(OutcomeUnknown):
        await pending
    with pytest.raises(RaftError):
        await reading
    assert not world.core(leader).is_leader
    with pytest.raises(RaftError):
        await replica.read_barrier()


@in_world(5)
async def test_r_e6_split_votes_resolve(world: RaftWorld) -> None:
    for _ in range(10):
        leader = await world.leader()
        before = world.core(leader).term
        await world.crash([leader])
        after = await world.leader()
        assert world.core(after).term - before <= 4, "contention resolves within a few terms"
        await world.start([leader])


def test_r_e6_timeouts_rarely_coincide() -> None:
    from random import Random

    from shardkv.raft.protocol.ready import Options

    options, rng = Options(), Random(1)
    for n in (3, 5, 7):
        draws = [
            [rng.randrange(options.election_ticks, 2 * options.election_ticks) for _ in range(n)]
            for _ in range(2000)
        ]
        together = sum(1 for draw in draws if max(draw) - min(draw) <= 1) / len(draws)
        assert together < 0.30
