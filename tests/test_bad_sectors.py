"""A sector that cannot be read is damage of that file: the replica is repaired, and does not start and stop for ever."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest

from shardkv.process.identity import IDENTITY, read_identity
from shardkv.raft.damage import DAMAGE_FILE, DamageBook
from shardkv.raft.disk import RealDirectory
from shardkv.raft.errors import CorruptLog, DamagedState, WrongDirectory
from shardkv.raft.interfaces import Directory
from shardkv.raft.protocol.types import Entry, HardState, Kind, SnapshotMeta
from shardkv.raft.state_file import STATE_ASIDE, STATE_FILE, InMemoryMachine, StateFile
from shardkv.raft.unreadable import NUMBERS, Unreadable
from shardkv.raft.wal import open_wal
from shardkv.storage.faults import fault_of
from shardkv.storage.rocks import RocksEngine
from shardkv.storage.scrub import Scrub
from shardkv.storage.tables import at_once
from tests import bad_sectors
from tests.bad_sectors import BadSectors
from tests.sim.raft_world import RaftWorld, in_world
from tests.test_repair import book, fill
from tests.test_rocks import READS, filled, stream_into, table_of, wait_until

real = pytest.mark.skipif(not bad_sectors.can_be_made, reason="a loop device takes root")


@pytest.fixture
def bad(tmp_path: Path) -> Iterator[BadSectors]:
    disk = BadSectors(tmp_path / "disks")
    yield disk
    disk.close()


# ---- RocksDB


def running(directory: Path, bad: BadSectors) -> RocksEngine:
    """An engine that was opened before the most of its one table went bad."""
    filled(directory).close()
    bad.move(table_of(directory))
    engine = RocksEngine(directory)
    bad.spoil(table_of(directory), 0.1)
    return engine


@real
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_read_that_meets_a_bad_sector_raises_damage(
    tmp_path: Path, bad: BadSectors, read: Callable[[RocksEngine], object]
) -> None:
    engine = running(tmp_path / "rocks", bad)
    heard: list[BaseException] = []
    engine.on_fault = heard.append
    with pytest.raises(DamagedState) as raised:
        read(engine)
    assert raised.value.file == str(table_of(tmp_path / "rocks")) and isinstance(heard[0], DamagedState)
    engine.close()


@real
def test_whatever_else_reads_a_table_tells_of_the_bad_sector(tmp_path: Path, bad: BadSectors) -> None:
    def compact(engine: RocksEngine) -> None:
        engine.write([(b"d000000", b"d000500")], {}, SnapshotMeta(8, 2))
        engine.reclaim(b"d000000", b"d004000")

    for number, work in enumerate(
        (
            lambda engine: engine.check_file("000008.sst", at_once),
            lambda engine: asyncio.run(engine.open_snapshot()),
            compact,
        )
    ):
        directory = tmp_path / str(number)
        engine = running(directory, bad)
        heard: list[BaseException] = []
        engine.on_fault = heard.append
        try:
            work(engine)
        except DamagedState:
            pass
        wait_until(partial(bool, heard))
        assert isinstance(heard[0], DamagedState) and heard[0].file == str(directory / "db-1" / "000008.sst"), (
            heard
        )
        assert not list(directory.glob("outgoing-*")), "nothing of it is sent"
        engine.close()


@real
def test_the_scrub_stops_at_a_bad_sector_and_names_the_file(tmp_path: Path, bad: BadSectors) -> None:
    engine = running(tmp_path / "rocks", bad)
    scrub = Scrub(engine, 100 << 20, rest_seconds=0.01)
    wait_until(lambda: scrub.progress["damaged"] == [table_of(tmp_path / "rocks").name])
    scrub.stop()
    engine.close()


@real
@pytest.mark.parametrize(
    "name",
    ["CURRENT", "db-1/CURRENT", "db-1/IDENTITY", "db-1/MANIFEST*", "db-1/OPTIONS*", "db-1/SUMS", "db-1/*.sst"],
)
def test_a_file_that_is_read_at_the_start_is_named(tmp_path: Path, bad: BadSectors, name: str) -> None:
    filled(tmp_path / "rocks").close()
    path = sorted((tmp_path / "rocks").glob(name))[-1]
    bad.lose(path, 0.0)
    with pytest.raises(DamagedState, match="cannot read it") as raised:
        RocksEngine(tmp_path / "rocks")
    assert raised.value.file == str(path)
    assert table_of(tmp_path / "rocks").is_symlink() or table_of(tmp_path / "rocks").exists(), (
        "nothing is removed"
    )


@real
def test_a_checkpoint_that_goes_bad_while_it_is_sent_names_our_database(
    tmp_path: Path, bad: BadSectors
) -> None:
    engine = filled(tmp_path / "rocks")

    async def send() -> None:
        source = await engine.open_snapshot()
        sent = source._path / table_of(tmp_path / "rocks").name
        bad.lose(sent, 0.2)
        with pytest.raises(DamagedState) as raised:
            await source.read(0, source.size)
        assert raised.value.file == str(table_of(tmp_path / "rocks"))
        source.close()

    asyncio.run(send())
    engine.close()


@real
def test_a_received_file_that_cannot_be_read_back_is_asked_for_again(tmp_path: Path) -> None:
    """It is no damage of our own state, which is whole."""
    giver, taker = filled(tmp_path / "giver"), RocksEngine(tmp_path / "taker")

    async def send(patch: pytest.MonkeyPatch) -> None:
        source = await giver.open_snapshot()
        sink = taker.open_sink(source.meta)

        def cannot(path: Path) -> str:
            raise DamagedState(str(path), "the disk cannot read it")

        patch.setattr("shardkv.storage.checkpoint.hash_tail", cannot)
        with pytest.raises(ValueError, match="cannot read it"):
            await stream_into(source, sink, lambda data: data)
        sink.abort()
        source.close()

    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(send(patch))
    giver.close()
    taker.close()


@pytest.mark.quick
@pytest.mark.parametrize("number", sorted(NUMBERS))
def test_only_a_failed_read_is_damage(number: int) -> None:
    why = os.strerror(number)
    for doing in (
        "While pread offset 0 len 100",
        "While open a file for random read",
        "While reading file sequentially",
    ):
        fault = fault_of(Exception(f"IO error: {doing}: /x/000008.sst: {why}"), Path("/x"))
        assert isinstance(fault, DamagedState) and fault.file == "/x/000008.sst"
    for doing in (
        "While appending to file",
        "While fdatasync",
        "While fsync",
        "While pwrite to file at offset 0",
    ):
        fault = fault_of(Exception(f"IO error: {doing}: /x/000008.sst: {why}"), Path("/x"))
        assert isinstance(fault, OSError) and fault.errno == errno.EIO
    for other in ("Too many open files", "Permission denied", "No space left on device"):
        fault = fault_of(Exception(f"IO error: While pread offset 0 len 9: /x/000008.sst: {other}"), Path("/x"))
        assert isinstance(fault, OSError) and not isinstance(fault, DamagedState)


# ---- the log, the state file, the notes


class Lines(InMemoryMachine):
    """A state that is one string of bytes."""

    def __init__(self, directory: Directory, data: bytes = b"") -> None:
        super().__init__(directory)
        self.data = data

    def dump(self) -> bytes:
        return self.data

    def load(self, data: bytes) -> None:
        self.data = data


@real
def test_a_bad_sector_of_the_log_is_refused_by_name_and_offset(tmp_path: Path, bad: BadSectors) -> None:
    directory = RealDirectory(tmp_path / "data")

    async def write() -> str:
        wal, _ = await open_wal(directory, Random(1))
        for n in range(1, 101):
            await wal.append(HardState(1), [Entry(n, 1, Kind.COMMAND, Random(n).randbytes(1000))])
        wal.close()
        return wal.segment_names[0]

    name = asyncio.run(write())
    offset = bad.lose(tmp_path / "data" / name)
    for _ in range(2):  # again and again
        with pytest.raises(CorruptLog, match="cannot read it") as raised:
            asyncio.run(open_wal(directory, Random(1)))
        assert (raised.value.file, raised.value.offset) == (name, offset)
        assert "member replace" in str(raised.value), "it says what to do"
    directory.close()


@real
def test_a_bad_sector_of_the_state_file_is_damage_and_the_file_is_kept(tmp_path: Path, bad: BadSectors) -> None:
    directory = RealDirectory(tmp_path / "data")

    async def story() -> None:
        machine = Lines(directory, b"x" * 100_000)
        machine._applied = SnapshotMeta(3, 1)
        await machine.flush()
        offset = bad.lose(tmp_path / "data" / STATE_FILE)
        with pytest.raises(DamagedState, match=f"at byte {offset}") as raised:
            Lines(directory).recover()
        assert raised.value.file == STATE_FILE
        store = StateFile(directory, lambda: Lines(directory))  # type: ignore[arg-type, return-value]
        await store.set_aside()
        assert directory.names() == [STATE_ASIDE], "it may be the last copy, and another program may read it"
        bad_file = os.readlink(tmp_path / "data" / STATE_ASIDE)
        later = Lines(directory, b"later")
        later._applied = SnapshotMeta(4, 1)
        await later.flush()
        await store.set_aside()
        assert os.readlink(tmp_path / "data" / STATE_ASIDE) == bad_file, "the older one stays"
        assert directory.names() == [STATE_ASIDE]
        await store.drop_aside()
        assert directory.names() == []

    asyncio.run(story())
    directory.close()


@real
def test_the_notes_beside_the_state_are_named_too(tmp_path: Path, bad: BadSectors) -> None:
    directory = RealDirectory(tmp_path / "data")
    (tmp_path / "data" / IDENTITY).write_bytes(b"{}")
    asyncio.run(DamageBook(directory).note_found(DamagedState("f", "w"), 1))
    bad.lose(tmp_path / "data" / DAMAGE_FILE)
    with pytest.raises(DamagedState, match="cannot read it"):
        DamageBook.load(directory)
    bad.lose(tmp_path / "data" / IDENTITY)
    with pytest.raises(WrongDirectory, match="cannot read it"):
        read_identity(directory, "data")
    with pytest.raises(Unreadable):
        directory.read(IDENTITY)
    directory.close()


# ---- a group in virtual time


@in_world(3, compact_bytes=100)
async def test_a_replica_on_a_bad_sector_is_repaired_by_its_peers(world: RaftWorld) -> None:
    await fill(world)
    await world.crash([2])
    world.disks[2].spoil(STATE_FILE)
    await world.start([2])
    assert world.core(2).state_lost
    await world.until(lambda: not world.core(2).state_lost)
    await world.converge()
    damage = book(world, 2)
    assert (damage.found, damage.repaired) == (1, 1) and "cannot read it" in damage.history[0].why
    await world.restart(2)
    await world.converge()
    assert book(world, 2).found == 1, "it does not start and stop for ever"


@in_world(3, compact_bytes=100)
async def test_where_every_replica_has_a_bad_sector_nothing_is_thrown_away(world: RaftWorld) -> None:
    await fill(world)
    await world.crash([1, 2, 3])
    for node in (1, 2, 3):
        world.disks[node].spoil(STATE_FILE)
    for _ in range(2):
        await world.start([1, 2, 3])
        await asyncio.sleep(20.0)
        assert all(world.core(node).state_lost for node in (1, 2, 3)) and not world.leaders_now()
        assert all(STATE_ASIDE in world.disks[node].files for node in (1, 2, 3))
        await world.crash([1, 2, 3])
    # The disk of one was only away: whoever knows that puts the file back.
    disk = world.disks[3]
    disk.put(STATE_FILE, disk.files[STATE_ASIDE])
    await world.start([1, 2, 3])
    await world.until(lambda: not any(world.core(node).state_lost for node in (1, 2, 3)))
    await world.converge()
    await world.propose("goes on")
