"""When a snapshot stream begins, when it ends, and what its end promises."""

from __future__ import annotations

import asyncio
from random import Random

import google_crc32c
import pytest

from shardkv.raft.interfaces import Directory
from shardkv.raft.protocol.messages import Envelope, InstallSnapshot, InstallSnapshotReply
from shardkv.raft.protocol.progress import MOST_PAUSE, Mode, Progress
from shardkv.raft.protocol.roles import Leader
from shardkv.raft.protocol.types import SnapshotMeta
from shardkv.raft.sealed import seal
from shardkv.raft.snapshot import SnapshotReceiver
from shardkv.raft.state_file import FORMAT_VERSION, MAGIC, META, InMemoryMachine
from shardkv.shardctrler.machine import ControllerMachine
from shardkv.storage.memory import MemoryEngine
from tests.sim.disk import SimDisk
from tests.sim.raft_world import RaftWorld, in_world


def count_opened(world: RaftWorld, node: int) -> list[int]:
    """The index of each snapshot that `node` opens from now on."""
    opened: list[int] = []
    machine = world.replicas[node].machine
    original = machine.open_snapshot

    async def counting():  # type: ignore[no-untyped-def]
        opened.append(machine.applied.index)
        return await original()

    machine.open_snapshot = counting  # type: ignore[method-assign]
    return opened


async def behind(world: RaftWorld) -> tuple[int, int]:
    """(leader, a follower that is down and needs entries that the leader has compacted)."""
    leader = await world.leader()
    gone = next(node for node in world.ids if node != leader)
    await world.converge()
    await world.crash([gone])
    others = [node for node in world.ids if node != gone]
    for n in range(200):
        await world.propose(f"{n:050}", others)
    await world.until(lambda: world.core(leader).log.base_index > 100)
    assert world.leaders_now() == [leader]
    return leader, gone


@in_world(3, compact_bytes=1000)
async def test_no_snapshot_is_opened_for_a_follower_that_is_gone(world: RaftWorld) -> None:
    """A checkpoint every ten seconds, for as long as it was gone: disk and work for nobody."""
    leader, gone = await behind(world)
    opened = count_opened(world, leader)
    await asyncio.sleep(300)
    assert not opened
    await world.start([gone])
    await world.converge()
    assert len(opened) == 1


@in_world(3, compact_bytes=1000)
async def test_a_follower_that_becomes_unreachable_ends_its_stream_at_once(world: RaftWorld) -> None:
    leader, gone = await behind(world)
    node = world.replicas[leader].node
    world.network.on_mail = lambda source, target, mail: None
    stopped = world.disks[gone].faults
    stopped.hang = True  # it answers heartbeats, and takes nothing to its disk
    starting = asyncio.create_task(world.start([gone]))
    stopped.hang = False
    await starting
    stopped.hang = True
    await world.until(lambda: node.snapshots_sending == 1)
    await world.crash([gone])
    node.unreachable(gone)
    await asyncio.sleep(0.01)
    assert node.snapshots_sending == 0
    stopped.hang = False
    await world.start([gone])
    await world.converge()


@in_world(3, compact_bytes=1000)
async def test_done_is_said_once_the_new_base_of_the_log_is_durable(world: RaftWorld) -> None:
    leader, late = await behind(world)
    done: list[Envelope] = []
    world.network.on_mail = lambda source, target, mail: done.extend(
        e
        for e in mail
        if isinstance(e.message, InstallSnapshotReply) and e.message.done and e.message.last_index > 100
    )
    await world.start([late])
    replica = world.replicas[late]
    original = replica.node._wal.set_base
    let_go = asyncio.Event()

    async def slow(index: int, term: int) -> None:
        if index > 100:  # that of the snapshot; an earlier one is a compaction's
            await let_go.wait()
        await original(index, term)

    replica.node._wal.set_base = slow  # type: ignore[method-assign]
    await world.until(lambda: replica.machine.applied.index > 100)
    await asyncio.sleep(5)
    assert not done, "installed in memory and on the state machine's disk, and the log still begins elsewhere"
    let_go.set()
    await world.until(lambda: done)
    await world.converge()
    role = world.core(leader).role
    assert isinstance(role, Leader) and role.progress[late].mode is Mode.REPLICATE


@in_world(3)
async def test_an_owner_that_comes_after_the_fault_hears_of_it(world: RaftWorld) -> None:
    """Between the start of its tasks and its owner's first look, a replica may meet a fault."""
    node = world.replicas[1].node
    node.on_fault = lambda error: None
    fault = OSError("the disk failed")
    node.fail(fault)
    heard: list[BaseException] = []
    node.on_fault = heard.append
    assert heard == [fault]


class Picky(InMemoryMachine):
    """Takes only what begins with b"good"."""

    def __init__(self, directory: Directory) -> None:
        super().__init__(directory)
        self.state = b"good"

    def dump(self) -> bytes:
        return self.state

    def load(self, data: bytes) -> None:
        if not data.startswith(b"good"):
            raise KeyError("a field of version 3")
        self.state = data


@in_world(1)
async def test_a_snapshot_that_is_refused_leaves_the_state_file_as_it_was(world: RaftWorld) -> None:
    directory = SimDisk(Random(1)).open()
    machine = Picky(directory)
    machine._applied = SnapshotMeta(5, 1)
    await machine.flush()

    def chunk(data: bytes, stream: int) -> InstallSnapshot:
        packed = seal(MAGIC, FORMAT_VERSION, META.pack(9, 1), data)
        crc = int(google_crc32c.value(packed))
        return InstallSnapshot(9, 1, len(packed), 0, packed, crc, stream)

    receiver = SnapshotReceiver(lambda i: i > machine.applied.index, machine.open_sink, machine.install)
    refused = await receiver.receive(chunk(b"bad", 1), 1)
    assert refused is not None and not refused.done and machine.state == b"good"
    again = Picky(directory)
    again.recover()
    assert again.applied == SnapshotMeta(5, 1)
    machine._applied = SnapshotMeta(8, 1)
    assert await machine.flush() == 8
    again.recover()
    assert again.applied == SnapshotMeta(8, 1), "what flush promised is on the disk"
    taken = await receiver.receive(chunk(b"good and new", 2), 1)
    assert taken is not None and taken.done
    again.recover()
    assert (again.applied, again.state) == (SnapshotMeta(9, 1), b"good and new")


@pytest.mark.quick
def test_both_machines_in_memory_refuse_what_they_cannot_read() -> None:
    directory = SimDisk(Random(1)).open()
    for machine in (ControllerMachine(directory), MemoryEngine(directory)):
        before = machine.dump()
        machine.check(before)
        with pytest.raises(ValueError, match="cannot be read"):
            machine.check(b"\xff" * 50)
        assert machine.dump() == before


@in_world(3)
async def test_a_snapshot_that_the_log_overtook_is_done_once_that_log_is_durable(world: RaftWorld) -> None:
    """The follower knew the entries to be committed, but had them in memory alone: a crash, and it lacked them."""
    leader = await world.leader()
    late = next(node for node in world.ids if node != leader)
    await world.propose("first")
    await world.converge()
    world.disks[late].faults.hang = True
    await world.propose("second", [node for node in world.ids if node != late])
    core = world.core(late)
    await world.until(lambda: core.commit_index > core.log.durable_index)
    done: list[Envelope] = []
    world.network.on_mail = lambda source, target, mail: done.extend(
        e for e in mail if isinstance(e.message, InstallSnapshotReply)
    )
    disk = world.replicas[leader].node.disks.own
    chunk = InstallSnapshot(core.commit_index, core.term, 3, 0, b"abc", 0, 7)
    world.replicas[late].node.receive([Envelope(leader, late, core.term, chunk, disk)])
    await asyncio.sleep(0.3)
    assert not done, "what a crash takes away is not promised"
    world.disks[late].faults.hang = False
    await world.until(lambda: core.commit_index <= core.log.durable_index)
    world.replicas[late].node.receive([Envelope(leader, late, core.term, chunk, disk)])
    await world.until(lambda: done)
    reply = done[0].message
    assert isinstance(reply, InstallSnapshotReply) and reply.done


@pytest.mark.quick
def test_failed_streams_wait_longer_each_time() -> None:
    peer = Progress(next_index=5)
    pauses = []
    for _ in range(12):
        assert peer.may_get_snapshot
        peer.become_snapshot(4)
        peer.snapshot_ended(0)
        count = 0
        while not peer.may_get_snapshot:
            peer.heartbeat()
            count += 1
        pauses.append(count)
    assert pauses[:4] == [2, 4, 8, 16] and pauses[-1] == MOST_PAUSE
    peer.become_snapshot(4)
    peer.snapshot_ended(4)
    assert peer.may_get_snapshot and peer.match_index == 4, "success forgets the failures"
    peer.recently_active = False
    assert not peer.may_get_snapshot
