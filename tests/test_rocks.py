"""Damage in RocksDB's files: every read path raises, no damaged checkpoint travels, the scrub finds the rest."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shardkv.raft.errors import DamagedState, StorageError
from shardkv.raft.protocol.types import SnapshotMeta
from shardkv.storage import tables
from shardkv.storage.checkpoint import CheckpointSink, CheckpointSource, read_manifest
from shardkv.storage.engine import ViewGone
from shardkv.storage.rocks import RocksEngine
from shardkv.storage.scrub import Scrub
from shardkv.storage.sums import Sums, hash_file, is_covered
from shardkv.storage.tables import RocksOptions, at_once, verify_range

KEYS = 4000
META = SnapshotMeta(7, 2)


def filled(directory: Path) -> RocksEngine:
    """An engine whose keys are all in one table."""
    engine = RocksEngine(directory)
    engine.write([], {b"d%06d" % n: b"%d" % n * 20 for n in range(KEYS)}, META)
    asyncio.run(engine.flush())
    return engine


def table_of(directory: Path) -> Path:
    (table,) = directory.glob("db-*/*.sst")
    return table


def flip(path: Path, at: int, count: int = 16) -> None:
    data = bytearray(path.read_bytes())
    for offset in range(at, min(at + count, len(data))):
        data[offset] ^= 0x5A
    path.write_bytes(bytes(data))


def reopened_after(directory: Path, damage: Callable[[Path], None]) -> RocksEngine:
    """An engine with nothing in its cache, over a table that was damaged."""
    filled(directory).close()
    damage(table_of(directory))
    return RocksEngine(directory)


READS: dict[str, Callable[[RocksEngine], object]] = {
    "scan": lambda engine: list(engine.scan(b"d", b"e")),
    "scan of a part": lambda engine: list(engine.scan(b"d000900", b"d003000")),
    "get": lambda engine: [engine.get(b"d%06d" % n) for n in range(KEYS)],
    "multi_get": lambda engine: engine.multi_get([b"d%06d" % n for n in range(KEYS)]),
    "view": lambda engine: list(engine.view().scan(b"")),
}


@pytest.mark.quick
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_read_that_meets_damage_raises_and_never_ends_early(
    tmp_path: Path, read: Callable[[RocksEngine], object]
) -> None:
    engine = reopened_after(tmp_path, lambda table: flip(table, table.stat().st_size // 2))
    heard: list[BaseException] = []
    engine.on_fault = heard.append
    with pytest.raises(DamagedState) as raised:
        read(engine)
    assert raised.value.file == str(table_of(tmp_path))
    assert isinstance(heard[0], DamagedState), "the owner hears of it as well"
    engine.close()


@pytest.mark.quick
def test_a_fault_from_before_its_owner_is_told_when_the_owner_comes(tmp_path: Path) -> None:
    engine = reopened_after(tmp_path, lambda table: flip(table, 100_000))
    with pytest.raises(DamagedState):
        list(engine.scan(b"d", b"e"))
    heard: list[BaseException] = []
    engine.on_fault = heard.append
    assert isinstance(heard[0], DamagedState)
    engine.close()


@pytest.mark.quick
def test_damage_anywhere_in_the_blocks_of_a_table_is_met_by_a_scan_or_at_the_start(tmp_path: Path) -> None:
    """Filters excepted: a scan does not read them."""
    engine = filled(tmp_path / "whole")
    whole = list(engine.scan(b"d", b"e"))
    engine.close()
    silent = []
    size = table_of(tmp_path / "whole").stat().st_size
    for number, at in enumerate(range(0, size, size // 40)):
        directory = tmp_path / str(number)
        try:
            engine = reopened_after(directory, lambda table, at=at: flip(table, at))  # type: ignore[misc]
        except DamagedState:
            continue
        try:
            assert list(engine.scan(b"d", b"e")) == whole
            silent.append(at)
        except DamagedState:
            pass
        engine.close()
    assert len(silent) <= 3, "the filter of 5,000 bytes"


@pytest.mark.quick
@pytest.mark.parametrize("loss", ["unlinked", "cut"])
def test_a_table_that_is_gone_or_cut_is_damage(tmp_path: Path, loss: str) -> None:
    def damage(table: Path) -> None:
        if loss == "unlinked":
            table.unlink()
        else:
            table.write_bytes(table.read_bytes()[:-100])

    with pytest.raises(DamagedState) as raised:
        reopened_after(tmp_path, damage)
    assert str(tmp_path) in raised.value.file


def test_a_compaction_that_meets_damage_tells_the_owner(tmp_path: Path) -> None:
    engine = reopened_after(tmp_path, lambda table: flip(table, 20_000))
    heard: list[BaseException] = []
    engine.on_fault = heard.append
    engine.write([(b"d000000", b"d000500")], {}, SnapshotMeta(8, 2))
    engine.reclaim(b"d000000", b"d004000")
    engine.close()  # which waits for the background thread
    assert isinstance(heard[0], DamagedState), heard
    assert heard[0].file.endswith("/db-1/000008.sst")


@pytest.mark.quick
def test_the_disk_failing_is_not_taken_for_damage(tmp_path: Path) -> None:
    engine = filled(tmp_path)
    for text, number in (
        ("IO error: No space left on device: While appending to file: /x/000008.sst", errno.ENOSPC),
        ("IO error: While fdatasync: /x/000008.sst: Input/output error", errno.EIO),
    ):
        fault = engine._failed(Exception(text))
        assert isinstance(fault, OSError) and fault.errno == number
    assert not isinstance(engine._failed(Exception("IO error: …")), StorageError)
    engine.close()


# ---- the hashes of files


def test_every_flipped_byte_of_every_file_is_found_by_the_scrub_and_named(tmp_path: Path) -> None:
    engine = filled(tmp_path)
    for path in sorted((tmp_path / "db-1").iterdir()):
        if not is_covered(path.name):
            continue
        whole = path.read_bytes()
        for at in {
            0,
            len(whole) // 3,
            len(whole) // 2,
            len(whole) - 1,
            *range(len(whole) - 6000, len(whole), 500),
        }:
            if at < 0:
                continue
            flip(path, at, 1)
            with pytest.raises(DamagedState) as raised:
                check_all(engine)
            assert raised.value.file == str(path)
            path.write_bytes(whole)
    check_all(engine)
    engine.close()


def check_all(engine: RocksEngine) -> None:
    engine.note_files()
    for name in engine.files():
        engine.check_file(name, at_once)


@pytest.mark.quick
@pytest.mark.parametrize(
    "name", ["CURRENT", "IDENTITY", "MANIFEST", "OPTIONS", "rocksdict-config", "SUMS", "*"]
)
def test_a_file_that_rocksdb_reads_at_the_start_is_checked_before(tmp_path: Path, name: str) -> None:
    filled(tmp_path).close()
    (path,) = tmp_path.glob("db-1/*.sst") if name == "*" else list(tmp_path.glob(f"db-1/{name}*"))[-1:]
    flip(path, path.stat().st_size - 2, 1)
    with pytest.raises(DamagedState) as raised:
        RocksEngine(tmp_path)
    assert raised.value.file == str(path)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["CURRENT", "db-1/CURRENT", "db-1/IDENTITY", "db-1/SUMS"])
def test_a_lost_file_does_not_make_a_new_and_empty_database(tmp_path: Path, name: str) -> None:
    filled(tmp_path).close()
    (tmp_path / name).unlink()
    with pytest.raises(DamagedState) as raised:
        RocksEngine(tmp_path)
    assert raised.value.file == str(tmp_path / name)
    assert table_of(tmp_path).exists(), "what is left stays, for whoever wants to look at it"


@pytest.mark.quick
def test_a_flipped_bit_in_current_removes_no_database(tmp_path: Path) -> None:
    filled(tmp_path).close()
    (tmp_path / "CURRENT").write_bytes((tmp_path / "CURRENT").read_bytes().replace(b"db-1", b"db-3"))
    with pytest.raises(DamagedState):
        RocksEngine(tmp_path)
    assert table_of(tmp_path).exists()


def test_a_table_from_just_before_a_crash_is_read_before_its_hash_is_noted(tmp_path: Path) -> None:
    engine = filled(tmp_path)
    known = dict(engine._sums.files)
    name = table_of(tmp_path).name
    engine.close()
    Sums.create(tmp_path / "db-1", {other: known[other] for other in known if other != name})
    flip(table_of(tmp_path), 100_000)
    engine = RocksEngine(tmp_path)
    heard: list[BaseException] = []
    engine.on_fault = heard.append
    wait_until(lambda: heard)
    engine.close()
    assert isinstance(heard[0], DamagedState)
    assert name not in Sums.load(tmp_path / "db-1").files


def test_damage_between_two_looks_is_not_taken_for_a_change_of_rocksdb(tmp_path: Path) -> None:
    engine = filled(tmp_path)
    for name in ("IDENTITY", "CURRENT", "MANIFEST*"):
        (path,) = (tmp_path / "db-1").glob(name)
        whole = path.read_bytes()
        flip(path, 9, 1)
        with pytest.raises(DamagedState) as raised:
            note_and_check(engine)
        assert raised.value.file == str(path)
        path.write_bytes(whole)
    engine.close()


def note_and_check(engine: RocksEngine) -> None:
    engine._sums.note(engine._tables())
    check_all(engine)


# ---- snapshots


async def stream_into(source: CheckpointSource, sink: CheckpointSink, spoil: Callable[[bytes], bytes]) -> None:
    data = spoil(await source.read(0, source.size))
    for offset in range(0, len(data), 10_000):
        await sink.write(data[offset : offset + 10_000])
    await sink.finish()


def test_a_damaged_database_is_not_shipped(tmp_path: Path) -> None:
    for at in (100_000, table_size(tmp_path) - 4000):  # a block; the filter, which no read tells of
        directory = tmp_path / str(at)
        engine = filled(directory)
        heard: list[BaseException] = []
        engine.on_fault = heard.append
        flip(table_of(directory), at, 1)
        with pytest.raises(DamagedState) as raised:
            asyncio.run(engine.open_snapshot())
        assert raised.value.file == str(table_of(directory))
        assert heard
        assert not list(directory.glob("outgoing-*")), "nothing is left of it"
        engine.close()


def table_size(tmp_path: Path) -> int:
    filled(tmp_path / "sized").close()
    return table_of(tmp_path / "sized").stat().st_size


def test_blocks_are_read_also_where_no_hash_is_known(tmp_path: Path) -> None:
    filled(tmp_path).close()
    flip(table_of(tmp_path), 100_000, 1)
    with pytest.raises(DamagedState):
        CheckpointSource.verified(tmp_path / "db-1", {}, RocksOptions())


def test_a_whole_stream_becomes_the_same_database(tmp_path: Path) -> None:
    giver, taker = filled(tmp_path / "giver"), RocksEngine(tmp_path / "taker")
    view = taker.view()

    async def move() -> None:
        source = await giver.open_snapshot()
        assert source.meta == META
        sink = taker.open_sink(META)
        await stream_into(source, sink, lambda data: data)
        taker.install(META, sink)
        source.close()

    asyncio.run(move())
    assert taker.applied == META
    assert list(taker.scan(b"", b"\xff")) == list(giver.scan(b"", b"\xff"))
    with pytest.raises(ViewGone):
        list(view.scan(b""))
    taker.write([], {b"dnew": b"1"}, SnapshotMeta(8, 2))
    taker.close()
    taker = RocksEngine(tmp_path / "taker")
    assert taker.get(b"dnew") == b"1" and taker.get(b"d000001") == b"1" * 20
    assert sorted(path.name for path in (tmp_path / "taker").iterdir()) == ["CURRENT", "db-2"]
    check_all(taker)
    taker.close()
    giver.close()


def test_the_receiver_refuses_a_stream_with_a_bad_byte_wherever_it_is(tmp_path: Path) -> None:
    giver, taker = filled(tmp_path / "giver"), RocksEngine(tmp_path / "taker")

    async def refuse(spoil: Callable[[bytes], bytes]) -> None:
        source = await giver.open_snapshot()
        sink = taker.open_sink(META)
        with pytest.raises(ValueError):
            await stream_into(source, sink, spoil)
        sink.abort()
        source.close()

    size = table_size(tmp_path)
    for at in (3, 40, size // 2, size - 3000, size, -1):
        asyncio.run(refuse(lambda data, at=at: swapped(data, at)))  # type: ignore[misc]
    asyncio.run(refuse(lambda data: data[:-1]))
    asyncio.run(refuse(lambda data: data + b"x"))
    assert not list((tmp_path / "taker").glob("incoming-*"))
    giver.close()
    taker.close()


def test_a_snapshot_that_does_not_fit_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    giver, taker = filled(tmp_path / "giver"), RocksEngine(tmp_path / "taker")
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)

    async def refuse() -> None:
        source = await giver.open_snapshot()
        sink = taker.open_sink(META)
        with pytest.raises(ValueError, match=r"it needs 0\.\d MB, and 0\.0 MB are free"):
            await stream_into(source, sink, lambda data: data)
        assert not list(sink.path.glob("*.sst"))
        sink.abort()
        source.close()

    asyncio.run(refuse())
    giver.close()
    taker.close()


def swapped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def test_a_checkpoint_of_another_entry_than_announced_is_refused(tmp_path: Path) -> None:
    giver, taker = filled(tmp_path / "giver"), RocksEngine(tmp_path / "taker")

    async def lie(announced: SnapshotMeta) -> None:
        source = await giver.open_snapshot()
        source = CheckpointSource(
            source._path, announced, {name: hash_file(source._path / name) for name, _ in source._files}
        )
        sink = taker.open_sink(announced)
        with pytest.raises(ValueError, match="not of"):
            await stream_into(source, sink, lambda data: data)
        sink.abort()

    asyncio.run(lie(SnapshotMeta(META.index + 65536, META.term)))
    giver.close()
    taker.close()


def test_a_sender_that_does_not_verify_is_found_out_by_the_receiver(tmp_path: Path) -> None:
    """Its hashes are those of damaged files, so only reading the blocks tells."""
    giver, taker = filled(tmp_path / "giver"), RocksEngine(tmp_path / "taker")

    async def send() -> None:
        source = await giver.open_snapshot()
        (table,) = source._path.glob("*.sst")
        flip(table, 100_000)
        spoilt = {name: hash_file(source._path / name) for name, _ in source._files}
        sink = taker.open_sink(META)
        with pytest.raises(ValueError, match="damaged"):
            await stream_into(CheckpointSource(source._path, META, spoilt), sink, lambda data: data)
        sink.abort()
        source.close()

    asyncio.run(send())
    giver.close()
    taker.close()


def test_an_install_under_another_entry_is_refused(tmp_path: Path) -> None:
    giver, taker = filled(tmp_path / "giver"), RocksEngine(tmp_path / "taker")

    async def send() -> None:
        source = await giver.open_snapshot()
        sink = taker.open_sink(META)
        await stream_into(source, sink, lambda data: data)
        with pytest.raises(ValueError, match="not of"):
            taker.install(SnapshotMeta(META.index + 1, META.term), sink)
        source.close()

    asyncio.run(send())
    assert taker.applied == SnapshotMeta(0, 0) and taker.get(b"d000001") is None
    giver.close()
    taker.close()


@pytest.mark.quick
@pytest.mark.parametrize(
    "files",
    [
        [["../x.sst", 1, "", ""]],
        [["SUMS", 1, "", ""]],
        [["/etc/passwd", 1, "", ""]],
        [["000001.sst", -1, "", ""]],
        [["000001.sst", 1 << 50, "", ""]],
        [["000001.sst", 1, "", ""], ["000001.sst", 1, "", ""]],
        [["000001.sst", 1]],
        [],
    ],
)
def test_a_manifest_is_not_trusted(files: list[list[object]]) -> None:
    current = [["CURRENT", 16, "", ""]] if files else []
    data = json.dumps({"applied": [7, 2], "files": files + current}).encode()
    with pytest.raises(ValueError):
        read_manifest(data, META)
    for nonsense in (b"", b"{", b"[]", b'{"applied": 1, "files": 2}', b"[" * 100_000, b"\xff\xfe"):
        with pytest.raises(ValueError):
            read_manifest(nonsense, META)


def test_an_install_that_fails_keeps_the_old_database_in_use(tmp_path: Path) -> None:
    """Damage after the proof: the received database is opened before CURRENT names it."""
    giver, taker = filled(tmp_path / "giver"), RocksEngine(tmp_path / "taker")
    taker.write([], {b"dold": b"1"}, SnapshotMeta(3, 1))

    async def attempt(damage: Callable[[Path], None]) -> None:
        source = await giver.open_snapshot()
        sink = taker.open_sink(META)
        await stream_into(source, sink, lambda data: data)
        damage(sink.path)
        with pytest.raises(ValueError):
            taker.install(META, sink)
        source.close()

    def in_table(path: Path) -> None:
        (table,) = path.glob("*.sst")
        flip(table, table.stat().st_size - 300)

    def in_manifest(path: Path) -> None:
        (manifest,) = path.glob("MANIFEST*")
        flip(manifest, 50)

    for damage in (in_table, in_manifest, lambda path: (path / "CURRENT").unlink()):
        asyncio.run(attempt(damage))
        assert taker.get(b"dold") == b"1" and taker.applied == SnapshotMeta(3, 1)
        taker.write([], {b"dold": b"1"}, SnapshotMeta(3, 1))
    taker.close()
    taker = RocksEngine(tmp_path / "taker")
    assert taker.get(b"dold") == b"1"
    taker.close()
    giver.close()


@pytest.mark.quick
def test_closing_lets_the_directory_go_even_when_it_meets_damage(tmp_path: Path) -> None:
    engine = filled(tmp_path)
    engine.write([], {b"dnew": b"1"}, SnapshotMeta(8, 2))
    (manifest,) = (tmp_path / "db-1").glob("MANIFEST*")
    flip(manifest, 20, 1)
    heard: list[BaseException] = []
    engine.on_fault = heard.append
    engine.close()
    assert isinstance(heard[0], DamagedState) and heard[0].file == str(manifest)
    flip(manifest, 20, 1)
    RocksEngine(tmp_path).close()


@pytest.mark.quick
def test_writes_meanwhile_are_no_damage_to_whoever_reads(tmp_path: Path) -> None:
    """A key appears behind the last that a reading saw, where the table ends with deleted keys."""
    engine = filled(tmp_path)

    def write(count: int) -> None:
        engine.write([], {b"d%06d" % (KEYS - 1): b"new"}, SnapshotMeta(9, 2))

    def scan() -> None:
        for _ in engine.scan(b"d", b"d%06d" % KEYS):
            write(0)

    for read in (lambda: verify_range(engine._db, b"d", b"e", write), scan):
        engine.write([], {b"d%06d" % n: None for n in range(KEYS - 10, KEYS)}, SnapshotMeta(8, 2))
        read()
    engine.close()


def test_an_install_whose_current_may_be_written_keeps_both_databases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    giver, taker = filled(tmp_path / "giver"), RocksEngine(tmp_path / "taker")
    sync = tables.sync_directory

    def fail(path: Path) -> None:
        if path == tmp_path / "taker" and b"db-1" not in (path / "CURRENT").read_bytes():
            raise OSError(errno.EIO, "the rename is not known to be durable")
        sync(path)

    async def attempt() -> None:
        source = await giver.open_snapshot()
        sink = taker.open_sink(META)
        await stream_into(source, sink, lambda data: data)
        monkeypatch.setattr(tables, "sync_directory", fail)
        with pytest.raises(OSError):
            taker.install(META, sink)
        monkeypatch.undo()
        source.close()

    asyncio.run(attempt())
    assert taker.applied == SnapshotMeta(0, 0)
    taker.close()
    taker = RocksEngine(tmp_path / "taker")  # CURRENT names the new one, which must be there
    assert taker.applied == META and taker.get(b"d000001") == b"1" * 20
    taker.close()
    giver.close()


@pytest.mark.quick
def test_what_a_hash_covers_is_durable_before_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    engine = filled(tmp_path)
    names = {name for name in engine.files() if not name.endswith(".sst")}
    engine.close()
    monkeypatch.setattr(os, "fsync", note)
    Sums(tmp_path / "db-1", {}).note(())
    assert len(names) >= 5 and names <= set(synced[: synced.index("SUMS.tmp")])


@pytest.mark.quick
def test_what_current_says_is_durable_before_another_database_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path).close()
    leftover = tmp_path / "db-2"
    leftover.mkdir()
    synced: list[Path] = []

    def note(path: Path) -> None:
        if leftover.exists():
            synced.append(path)

    monkeypatch.setattr("shardkv.storage.rocks.sync_directory", note)
    RocksEngine(tmp_path).close()
    assert {tmp_path, tmp_path / "db-1"} <= set(synced) and not leftover.exists()


# ---- the scrub


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_scrub_goes_round_and_stops_at_damage(tmp_path: Path) -> None:
    engine = filled(tmp_path)
    heard: list[BaseException] = []
    engine.on_fault = heard.append
    scrub = Scrub(engine, 100 << 20, rest_seconds=0.01)
    wait_until(lambda: scrub.progress["rounds"] >= 2)
    assert scrub.progress["bytes_total"] > table_of(tmp_path).stat().st_size
    assert time.time() - scrub.progress["last_round_at"] < 10
    assert not heard
    flip(table_of(tmp_path), table_of(tmp_path).stat().st_size - 4000, 1)  # the filter: no read would tell
    wait_until(lambda: heard)
    assert isinstance(heard[0], DamagedState) and heard[0].file == str(table_of(tmp_path))
    wait_until(lambda: scrub.progress["damaged"] == [table_of(tmp_path).name])
    scrub.stop()
    engine.close()


def test_the_scrub_keeps_to_its_rate_and_is_stopped_by_close(tmp_path: Path) -> None:
    engine = filled(tmp_path)
    engine.start_scrub(100_000)
    size = sum(engine.files().values())
    began = time.monotonic()
    wait_until(lambda: engine.scrub_progress()["bytes_checked"] > 50_000)
    assert engine.scrub_progress()["bytes_checked"] < size, "it has not rushed through"
    assert engine.scrub_progress()["bytes_total"] == size
    engine.close()
    assert time.monotonic() - began < 10


def test_the_scrub_meets_compactions_and_an_installed_snapshot_without_a_false_alarm(tmp_path: Path) -> None:
    giver, taker = filled(tmp_path / "giver"), RocksEngine(tmp_path / "taker")
    heard: list[BaseException] = []
    taker.on_fault = heard.append
    scrub = Scrub(taker, 1 << 30, rest_seconds=0.001)

    async def work() -> None:
        for turn in range(20):
            for n in range(3):
                taker.write(
                    [], {b"d%06d" % k: b"x" * 50 for k in range(500)}, SnapshotMeta(10 * turn + n + 8, 2)
                )
                await taker.flush()
            taker.reclaim(b"d", b"e")
            if turn % 5 == 4:
                giver.write([], {}, SnapshotMeta(10 * turn + 100, 2))
                source = await giver.open_snapshot()
                sink = taker.open_sink(source.meta)
                await stream_into(source, sink, lambda data: data)
                taker.install(source.meta, sink)
                source.close()

    asyncio.run(work())
    wait_until(lambda: scrub.progress["rounds"] >= 1)
    scrub.stop()
    assert not heard and not scrub.progress["damaged"]
    taker.close()
    giver.close()
    assert not heard
