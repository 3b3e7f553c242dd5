"""A disk that hangs says nothing: its replica stops to lead, keeps following, and says so (D-5)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench.live import LiveCluster
from shardkv.observe.overview import role_of
from shardkv.raft.machine import STAMP
from shardkv.raft.protocol.core import Raft
from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.membership import Memberships
from shardkv.raft.protocol.messages import AppendEntries, Envelope, RequestVote, RequestVoteReply, TimeoutNow
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.ready import Options
from shardkv.raft.protocol.types import Entry, HardState, Kind
from tests.sim.raft_world import RaftWorld, in_world

pytestmark = pytest.mark.timeout(120)


def timeouts(world: RaftWorld, count: int) -> float:
    return count * world.options.node.core.election_ticks * world.options.node.tick_seconds


@in_world(3)
async def test_d5_a_leader_whose_disk_hangs_is_replaced_within_two_timeouts(world: RaftWorld) -> None:
    old = await world.leader()
    await world.propose("before")
    await world.converge()
    world.disks[old].faults.hang = True
    doubtful = asyncio.create_task(world.replicas[old].propose(b"doubtful"))
    loop = asyncio.get_running_loop()
    began = loop.time()
    others = [node for node in world.ids if node != old]
    await world.leader(others, timeout=timeouts(world, 2))
    await world.propose("answered", others)
    assert loop.time() - began < timeouts(world, 2)
    with pytest.raises(Exception, match="leadership was lost"):
        await doubtful
    assert "has not answered for" in world.replicas[old].node.disk
    assert world.replicas[old].node.disk_silent_seconds >= timeouts(world, 1)

    await asyncio.sleep(600)  # ten minutes: it follows, does not campaign, and nothing piles up
    leaders = dict(world.leaders)
    assert world.leaders_now() and not world.core(old).is_leader
    assert len(world.leaders) <= 2 and world.replicas[old].node.queued_writes < 100
    await world.propose("still", others)

    world.disks[old].faults.hang = False
    await world.converge()
    assert world.replicas[old].node.disk == "ok" and world.leaders == leaders, "its return disturbs nobody"


@in_world(3)
async def test_a_follower_whose_disk_hangs_holds_nobody_up(world: RaftWorld) -> None:
    leader = await world.leader()
    slow = next(node for node in world.ids if node != leader)
    world.disks[slow].faults.hang = True
    for n in range(50):
        await world.propose(str(n), [node for node in world.ids if node != slow])
    await asyncio.sleep(60)
    assert world.leaders_now() == [leader], "it does not campaign, and the leader does not care"
    assert world.replicas[slow].node.queued_writes < 200
    world.disks[slow].faults.hang = False
    await world.converge()


@in_world(1)
async def test_a_replica_that_is_alone_leads_on(world: RaftWorld) -> None:
    """Nobody else could: it goes on as soon as its disk does."""
    await world.propose("1")
    world.disks[1].faults.hang = True
    waiting = asyncio.create_task(world.replicas[1].propose(b"2"))
    await asyncio.sleep(30)
    assert world.core(1).is_leader and not waiting.done()
    world.disks[1].faults.hang = False
    await waiting


@in_world(3)
async def test_a_slow_disk_that_works_through_its_queue_does_not_hang(world: RaftWorld) -> None:
    """Thirty writes of a fifth of a second each are out for seconds, but the disk answers all the time."""
    leader = await world.leader()
    world.disks[leader].faults.sync_seconds = (0.2, 0.2)
    for n in range(30):
        world.replicas[leader].node.propose(STAMP.pack(0, 0) + str(n).encode())
        await asyncio.sleep(0.1)
    await world.converge()
    assert world.leaders_now() == [leader]


@pytest.mark.quick
def test_a_replica_whose_disk_hangs_neither_campaigns_nor_takes_over() -> None:
    memberships = Memberships(0, Membership(frozenset({1, 2, 3})))
    raft = Raft(1, memberships, Log(), HardState(), 0, Random(1), Options())
    raft.step(Envelope(2, 1, 1, AppendEntries(0, 0, (Entry(1, 1, Kind.NOOP, b""),), 1, 0)))
    write = raft.ready(0.0).write
    assert write is not None
    for _ in range(4 * raft.options.election_ticks):
        raft.tick(0.0)
    raft.step(Envelope(2, 1, 1, TimeoutNow()))
    asked = [mail for mail in raft.ready(0.0).messages if isinstance(mail.message, RequestVote)]
    assert raft.term == 1 and len(asked) <= 2, "one pre-vote round before it knew, and none since"
    raft.written(write)
    for _ in range(2 * raft.options.election_ticks):
        raft.tick(0.0)
    asked = [mail for mail in raft.ready(0.0).messages if isinstance(mail.message, RequestVote)]
    assert asked, "with its disk back it campaigns like any other"
    raft.step(Envelope(2, 1, 2, RequestVoteReply(True, True)))


@pytest.mark.quick
def test_people_are_told() -> None:
    said = {"role": "follower", "disk": "the disk has not answered for 3.2 s"}
    assert role_of(said) == "follower, disk HANGS"


class OnFreezableDisks(LiveCluster):
    """One group of three, each replica on an ext4 file system of its own, which `fsfreeze` can make hang."""

    def __init__(self) -> None:
        super().__init__(groups=1, replicas=3, controllers=1, shards=2)
        self.disks = [self.directory / f"group-1-{n}" for n in range(3)]
        for disk in self.disks:
            image = disk.with_suffix(".image")
            with image.open("wb") as file:
                file.truncate(192 << 20)
            subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
            disk.mkdir()
            subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)
            (disk / "lost+found").rmdir()

    def freeze(self, replica: int, frozen: bool) -> None:
        subprocess.run(["fsfreeze", "-f" if frozen else "-u", str(self.disks[replica])], check=True)

    def remove(self) -> None:
        for disk in self.disks:
            subprocess.run(["fsfreeze", "-u", str(disk)], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(["umount", "-l", str(disk)], check=True)
        super().remove()

    def replicas(self) -> dict[str, dict[str, Any]]:
        said: dict[str, dict[str, Any]] = self.json("admin", "status")["groups"]["1"]
        return said


def can_freeze() -> bool:
    return os.geteuid() == 0 and Path("/dev/loop-control").exists() and Path("/usr/sbin/fsfreeze").exists()


@pytest.mark.skipif(not can_freeze(), reason="freezing a file system takes root and loop devices")
def test_d5_on_real_processes_with_a_frozen_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDKV_GROUP_RESERVE_MB", "20")
    with OnFreezableDisks() as cluster, cluster.clerk() as clerk:
        clerk.put("before", "1")
        addresses = sorted(cluster.replicas())
        leader = next(address for address, said in cluster.replicas().items() if said["role"] == "leader")
        frozen = addresses.index(leader)
        cluster.freeze(frozen, True)
        try:
            began = time.monotonic()
            clerk.put("during", "2")
            took = time.monotonic() - began
            print(f"the first write after the freeze took {took:.2f} s")
            assert took < 5, "two election time-outs, and the clerk's way to the new leader"
            assert clerk.get("before") == b"1"
            said = cluster.run("admin", "status")
            assert "the disk has not answered for" in said and "disk HANGS" in said
            assert cluster.replicas()[leader]["role"] == "follower"
        finally:
            cluster.freeze(frozen, False)
        end = time.monotonic() + 20
        while (cluster.replicas()[leader] or {}).get("disk") != "ok":
            assert time.monotonic() < end, "the disk is back, and the replica does not say so"
        clerk.put("after", "3")
