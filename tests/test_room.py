"""Disks fill up: the group turns read-only before they are full, says so, and goes on when there is room."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.live import LiveCluster
from shardkv.client import ShardClerk
from shardkv.client.errors import OutcomeUnknown, OutOfSpace
from shardkv.raft.protocol.space import Room, has_room, judge
from tests.sim.world import World, in_world

pytestmark = pytest.mark.timeout(120)


@pytest.mark.quick
def test_a_disk_at_the_bound_does_not_flap() -> None:
    assert judge(1000, 1000, Room.PLENTY) is Room.PLENTY
    assert judge(999, 1000, Room.PLENTY) is Room.LOW
    assert judge(1050, 1000, Room.LOW) is Room.LOW
    assert judge(1100, 1000, Room.LOW) is Room.PLENTY
    assert judge(249, 1000, Room.PLENTY) is Room.FULL
    assert judge(260, 1000, Room.FULL) is Room.FULL
    assert judge(275, 1000, Room.FULL) is Room.LOW


async def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@in_world(groups=(1,))
async def test_a_quorum_without_room_takes_deletes_only_and_recovers(world: World) -> None:
    clerk = world.clerk()
    await clerk.put(b"before", b"1")
    members = world.of(1)
    for process in members[:2]:
        world.set_room(process, Room.LOW)
    leader = members[2]  # the only one with room leads
    await wait_for(lambda: leader.rsm.is_leader and not has_room(leader.rsm.core))
    with pytest.raises(OutOfSpace, match="nearly full"):
        await clerk.put(b"during", b"2")
    assert await clerk.get(b"before") == b"1"
    assert await clerk.delete(b"before") is True
    for process in members:
        world.set_room(process, Room.PLENTY)
    await wait_for(lambda: has_room(leader.rsm.core))
    await clerk.put(b"after", b"3")
    assert await clerk.get(b"during") is None, "what was refused was not done"


@in_world(groups=(1,))
async def test_one_full_replica_holds_nobody_up_and_catches_up_later(world: World) -> None:
    clerk = world.clerk()
    await clerk.put(b"first", b"0")
    full = next(p for p in world.of(1) if p.rsm.is_leader)
    world.set_room(full, Room.FULL)
    await wait_for(lambda: any(p.rsm.is_leader for p in world.of(1) if p is not full))
    stood = full.rsm.core.log.last_index
    for n in range(50):
        await clerk.put(b"key-%d" % n, b"x" * 100)
    assert full.rsm.core.log.last_index <= stood + 2, "nothing for a disk that has no room"
    world.set_room(full, Room.PLENTY)
    leader = next(p for p in world.of(1) if p.rsm.is_leader)
    await wait_for(lambda: full.rsm.machine.applied.index >= leader.rsm.core.commit_index)


@in_world(groups=(1, 2))
async def test_shards_leave_a_group_without_room_but_do_not_come(world: World) -> None:
    clerk = world.clerk()
    for n in range(20):
        await clerk.put(bytes([33 + 4 * n]), b"%d" % n)
    for process in world.of(1):
        world.set_room(process, Room.LOW)
    await world.leave(1)
    for n in range(20):
        key = bytes([33 + 4 * n])
        await clerk.put(key, b"new")
        assert await clerk.get(key) == b"new"


class OnSmallDisks(LiveCluster):
    """One group of three, each replica on a file system of its own of 96 MB."""

    def __init__(self) -> None:
        super().__init__(groups=1, replicas=3, controllers=1, shards=2)
        self.disks = [self.directory / f"group-1-{n}" for n in range(3)]
        for disk in self.disks:
            disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "small", str(disk)], check=True)

    def remove(self) -> None:
        for disk in self.disks:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        super().remove()

    def replicas(self) -> list[dict[str, Any]]:
        return list(self.json("admin", "status")["groups"]["1"].values())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_real_disks_fill_up_and_get_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDKV_GROUP_RESERVE_MB", "40")
    with OnSmallDisks() as cluster, cluster.clerk() as clerk:
        clerk.put("before", "1")
        ballast = [disk / "somebody-elses-file" for disk in cluster.disks]
        for disk, file in zip(cluster.disks, ballast, strict=True):
            fill(disk, file, leave=20 << 20)
        refused(clerk)
        assert clerk.get("before") == b"1"
        said = cluster.run("admin", "status")
        assert "! group 1 is READ-ONLY but for deletes: a quorum's disks are nearly full" in said
        assert any(said["read_only"] for said in cluster.replicas())
        for file in ballast:
            file.unlink()
        taken(clerk)

        # Filled up in one go to the last byte: that replica stops, waits, and comes back by itself.
        fill(cluster.disks[0], ballast[0], leave=0)
        for n in range(300):
            clerk.put(b"key-%d" % n, bytes(20_000))
        ballast[0].unlink()
        taken(clerk)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            applied = [said["applied_index"] if said else 0 for said in cluster.replicas()]
            if max(applied) - min(applied) < 10:
                return
        raise AssertionError(f"the replicas do not come together again: {applied}")


def fill(disk: Path, file: Path, leave: int) -> None:
    there = os.statvfs(disk)
    with file.open("wb") as out:
        left = there.f_bavail * there.f_frsize - leave
        while left > 0:
            left -= out.write(bytes(min(left, 1 << 20)))


def refused(clerk: ShardClerk) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            clerk.put("during", "2")
        except OutOfSpace:
            return
        except OutcomeUnknown:
            pass  # it was out when the leader without room handed over: the next one says it
    raise AssertionError("the group went on to take writes")


def taken(clerk: ShardClerk) -> None:
    end = time.monotonic() + 20
    while True:
        try:
            clerk.put("after", "3")
            return
        except (OutOfSpace, OutcomeUnknown):
            assert time.monotonic() < end, "the group stayed read-only"
