"""Crashes and snapshots: MIT 6.824 labs 2C and 2D (scenarios R-P1, R-P2, R-S1 to R-S5)."""

from __future__ import annotations

import asyncio
import errno
from itertools import permutations

import pytest

from shardkv.raft.errors import RaftError
from shardkv.raft.protocol.messages import InstallSnapshot
from shardkv.raft.protocol.roles import Leader
from tests.sim import loop
from tests.sim.network import Weather
from tests.sim.raft_world import RaftWorld, in_world


@in_world(3)
async def test_r_p1_crashes_in_every_order_keep_term_vote_and_log(world: RaftWorld) -> None:
    count = 0
    for order in permutations(world.ids):
        for upto in (1, 2, 3):
            before = {node: world.core(node).term for node in world.ids}
            for node in order[:upto]:
                await world.crash([node])
            for node in order[:upto]:
                await world.start([node])
                assert world.core(node).term >= before[node], "a term is never forgotten"
            count += 1
            await world.propose(f"{count}")
    await world.converge()
    assert world.values(1) == [str(n) for n in range(1, count + 1)]


@in_world(3, seed=3)
async def test_r_p1_no_second_vote_in_a_term_after_a_restart(world: RaftWorld) -> None:
    """Crash voters right after they voted, many times: Election Safety is checked every turn."""
    for _ in range(40):
        await world.crash([world.rng.choice(world.ids)])
        await asyncio.sleep(world.rng.uniform(0, 0.05))
        down = [node for node in world.ids if node not in world.replicas]
        await world.start(down)
        await asyncio.sleep(world.rng.uniform(0, 2.0))
    await world.propose("end")


async def _churn(world: RaftWorld) -> None:
    """Clients propose all the while that replicas come and go."""
    acknowledged: list[str] = []
    stop = False

    async def client(number: int) -> None:
        turn = 0
        while not stop:
            turn += 1
            value = f"{number}-{turn}"
            for node in world.leaders_now():
                try:
                    await world.replicas[node].propose(value.encode())
                    acknowledged.append(value)
                    break
                except RaftError:
                    pass
            await asyncio.sleep(world.rng.uniform(0, 0.05))

    clients = [asyncio.ensure_future(client(n)) for n in range(3)]
    for _ in range(60):
        node = world.rng.choice(world.ids)
        if node in world.replicas and len(world.replicas) > 3:
            await world.crash([node])
        elif node not in world.replicas:
            await world.start([node])
        elif world.rng.random() < 0.5:
            world.isolate(node)
        else:
            world.network.heal()
        await asyncio.sleep(world.rng.uniform(0, 0.7))
    world.network.heal()
    world.network.weather = Weather()
    await world.start([node for node in world.ids if node not in world.replicas])
    stop = True
    await asyncio.gather(*clients)
    await world.propose("end")
    await world.converge()
    values = world.values(1)
    assert len(acknowledged) > 50
    for value in acknowledged:
        assert values.count(value) == 1, f"{value} was acknowledged and is there {values.count(value)} times"


@in_world(5, seed=21, compact_bytes=2000)
async def test_r_p2_churn(world: RaftWorld) -> None:
    await _churn(world)


@in_world(5, seed=22, compact_bytes=2000, weather=Weather(loss=0.1, repeat=0.05, long_delay=0.1))
async def test_r_p2_churn_on_a_bad_network(world: RaftWorld) -> None:
    await _churn(world)


@in_world(3, compact_bytes=100)
async def test_r_s1_the_log_stays_bounded_in_memory_and_on_disk(world: RaftWorld) -> None:
    for n in range(300):
        await world.propose(f"{n:010}")
    await world.converge()
    await asyncio.sleep(1.0)
    for node in world.ids:
        assert world.core(node).log.size_bytes <= 8 * 100
        logs = sum(len(data) for name, data in world.disks[node].files.items() if name.startswith("wal-"))
        assert logs <= 4 * 4096, "what is compacted is gone from the disk too"


async def _leader_of_equals(world: RaftWorld) -> int:
    """The leader, once it has heard that everybody has what it has: it keeps no log for a snapshot's receiver then."""
    async with asyncio.timeout(10.0):
        while True:
            leader = await world.leader()
            role = world.core(leader).role
            if isinstance(role, Leader) and not any(peer.catching_up for peer in role.progress.values()):
                return leader
            await asyncio.sleep(0.01)


async def _left_behind(world: RaftWorld, crash: bool) -> None:
    for turn in range(5):
        leader = await _leader_of_equals(world)
        away = next(node for node in world.ids if node != leader)
        if crash:
            await world.crash([away])
        else:
            world.isolate(away)
        rest = [node for node in world.ids if node != away]
        for n in range(40):
            await world.propose(f"{turn}-{n}", rest)
        leader = await world.leader(rest)
        assert world.core(leader).log.base_index > (0 if crash else world.core(away).log.last_index)
        if crash:
            await world.start([away])
        world.network.heal()
        await world.propose(f"{turn}-back")
        await world.converge()
        assert any(isinstance(envelope.message, InstallSnapshot) for envelope in world.mail)
        world.mail.clear()


@in_world(3, compact_bytes=100)
async def test_r_s2_a_follower_left_behind_gets_a_snapshot_then_the_log(world: RaftWorld) -> None:
    await _left_behind(world, crash=False)


@in_world(3, compact_bytes=100, weather=Weather(loss=0.1, repeat=0.1, long_delay=0.1))
async def test_r_s2_on_a_bad_network(world: RaftWorld) -> None:
    await _left_behind(world, crash=False)


@in_world(3, compact_bytes=100)
async def test_r_s2_after_a_crash(world: RaftWorld) -> None:
    await _left_behind(world, crash=True)


@in_world(3, compact_bytes=200)
async def test_r_s3_all_crash_right_after_a_snapshot_again_and_again(world: RaftWorld) -> None:
    written = []
    for turn in range(10):
        for n in range(20):
            written.append(f"{turn}-{n}")
            await world.propose(written[-1])
        bases = {node: world.core(node).log.base_index for node in world.ids}
        assert turn == 0 or max(bases.values()) > 0
        await world.restart(*world.ids)
        await world.leader()
        await world.converge()
        assert world.values(1) == written


@in_world(3, compact_bytes=100)
async def test_r_s4_a_stale_or_repeated_snapshot_never_rolls_back(world: RaftWorld) -> None:
    """Two snapshots in short succession, delivered again later and out of order (etcd #18055)."""
    leader = await world.leader()
    away = next(node for node in world.ids if node != leader)
    chunks = []
    for turn in range(2):
        await _leader_of_equals(world)
        world.isolate(away)
        for n in range(40):
            await world.propose(f"{turn}-{n}", [node for node in world.ids if node != away])
        world.network.heal()
        await world.converge()
        chunks += [e for e in world.mail if isinstance(e.message, InstallSnapshot) and e.to == away]
    ends = {chunk.message.last_index for chunk in chunks if isinstance(chunk.message, InstallSnapshot)}
    assert len(ends) >= 2
    before = world.values(away)[:]
    for chunk in reversed(chunks):
        world.replicas[away].node.receive([chunk])
    await asyncio.sleep(1.0)
    assert world.values(away) == before
    await world.propose("on")
    await world.converge()


@in_world(3)
async def test_r_s4_a_snapshot_inside_the_log_keeps_the_suffix(world: RaftWorld) -> None:
    for n in range(5):
        await world.propose(f"{n}")
    await world.converge()
    follower = next(node for node in world.ids if not world.core(node).is_leader)
    core = world.core(follower)
    last = core.log.last_index
    core.commit_index = core.handed_index = last - 3  # as if the last commits were not yet heard of
    term = core.log.term_at(last - 1)
    assert term is not None
    assert core.restore(last - 1, term, core.membership) is False
    assert core.log.last_index == last, "the entry after the snapshot stays"
    core.handed_index = core.commit_index = last


@in_world(3, seed=5, compact_bytes=100)
async def test_r_s5_a_crash_while_a_snapshot_is_taken_in_leaves_old_or_new(world: RaftWorld) -> None:
    for turn in range(30):
        leader = await world.leader()
        away = next(node for node in world.ids if node != leader)
        world.isolate(away)
        for n in range(10):
            await world.propose(f"{turn}-{n}", [node for node in world.ids if node != away])
        world.network.heal()
        await asyncio.sleep(world.rng.uniform(0, 0.3))
        await world.restart(away)
        after = world.values(away)
        assert after == world.values(leader)[: len(after)], "one whole state or another, never a mixture"
        await world.converge()
    names = {name for disk in world.disks.values() for name in disk.files}
    assert all(name == "state" or name.startswith("wal-") for name in names), "no temporary file is left"


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_fault_at_every_write_and_sync_stops_the_replica_and_loses_nothing(error: int) -> None:
    """Scenario "beyond them" 4: the log, its segments, the state file; one fault at each in turn."""

    async def faults_until_none_comes() -> int:
        at = 0
        while True:
            at += 1
            world = RaftWorld(1, seed=at, compact_bytes=60)
            await world.start()
            await world.leader()
            faults = world.disks[1].faults
            faults.fail_at, faults.error = at, error
            acknowledged: list[str] = []
            replica = world.replicas[1]
            for n in range(40):
                try:
                    await replica.propose(b"value %d" % n)
                except RaftError:
                    break
                acknowledged.append(f"value {n}")
            fault, pending = replica.node.fault, faults.fail_at
            faults.fail_at = 0
            await world.crash([1])
            if fault is not None:
                assert isinstance(fault, OSError) and fault.errno == error, "a clear error"
            await world.start([1])
            await world.propose("after")
            values = world.values(1)
            assert values[: len(acknowledged)] == acknowledged, f"fault {at}: an acknowledged entry is lost"
            assert len(set(values)) == len(values)
            await world.crash([1])
            if pending:
                return at  # it was beyond the last write of this story

    points = loop.run(faults_until_none_comes())
    assert points > 40, f"only {points} places to fail at: the log and the state file have more"
