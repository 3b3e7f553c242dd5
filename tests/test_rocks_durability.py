"""What the database side promises of its files: which syncs come before what, and whose look finds what."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shardkv.process.stores import ROCKS, ROCKS_ASIDE, RocksStore
from shardkv.raft.disk import RealDirectory
from shardkv.raft.errors import DamagedState
from shardkv.raft.protocol.types import SnapshotMeta
from shardkv.storage.rocks import RocksEngine
from shardkv.storage.scrub import Scrub
from shardkv.storage.sums import Sums
from shardkv.storage.tables import at_once, replace_durably
from tests.power import Power
from tests.test_rocks import META, filled, flip, reopened_after, stream_into, table_of, wait_until


@pytest.fixture
def power(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Power:
    (tmp_path / "disk").mkdir()
    return Power(monkeypatch, tmp_path / "disk")


def replaced(directory: str, name: str) -> list[str]:
    """The calls of a file that is replaced: a crash leaves the old one or the new one, whole."""
    return [f"fsync {directory}/{name}.tmp", f"rename {directory}/{name}.tmp", f"fsync {directory}"]


@pytest.mark.quick
def test_a_replaced_file_is_synced_before_its_rename_and_the_directory_after(power: Power) -> None:
    (power.root / "d").mkdir()
    power.taken()
    replace_durably(power.root / "d" / "CURRENT", b"db-1")
    assert power.taken() == replaced("d", "CURRENT")


@pytest.mark.quick
def test_a_new_database_is_durable_before_current_names_it(power: Power) -> None:
    engine = RocksEngine(power.root / "rocks")
    calls = power.taken()
    begin = calls.index("mkdir rocks/db-1")
    assert calls[begin:][:8] == [
        "mkdir rocks/db-1",
        *replaced("rocks/db-1", "SUMS"),
        "fsync rocks",
        *replaced("rocks", "CURRENT"),
    ]
    assert "fsync ." in calls[:begin], "the directory itself has its name"
    engine.close()


def test_a_received_database_is_durable_before_current_names_it(power: Power, tmp_path: Path) -> None:
    giver, taker = filled(tmp_path / "giver"), RocksEngine(power.root / "taker")

    async def move() -> None:
        source = await giver.open_snapshot()
        sink = taker.open_sink(META)
        await taker.flush()  # and everything before on the background thread
        power.taken()
        await stream_into(source, sink, lambda data: data)
        calls = power.taken()
        received = [name for name, _ in source._files]
        assert len(received) >= 5
        assert calls[: len(received)] == [f"fsync taker/incoming-1/{name}" for name in received]
        assert calls[len(received) :] == replaced("taker/incoming-1", "SUMS"), "with the names of all of them"
        taker.install(META, sink)
        calls = [call for call in power.taken() if not call.startswith("unlink")]
        assert calls[:2] == ["rename taker/incoming-1", "fsync taker"]
        current = calls.index("rename taker/CURRENT.tmp")
        assert calls[current - 1 : current + 2] == replaced("taker", "CURRENT")
        assert "rename taker/db-2/SUMS.tmp" in calls[:current], "with what RocksDB made when it opened"
        source.close()

    asyncio.run(move())
    taker.close()
    giver.close()


# ---- whose look finds what


def test_what_a_compaction_met_is_told_by_the_next_flush(tmp_path: Path) -> None:
    engine = reopened_after(tmp_path, lambda table: flip(table, 20_000))
    engine.write([(b"d000000", b"d000500")], {}, SnapshotMeta(8, 2))
    engine._db.flush()
    engine._db.compact_range(b"d000000", b"d004000")
    assert engine.property("background-errors"), "rocksdict raised nothing, but RocksDB counted it"
    heard: list[BaseException] = []
    engine.on_fault = heard.append
    with pytest.raises(DamagedState):
        asyncio.run(engine.flush())
    assert heard
    engine.close()


@pytest.mark.quick
def test_a_table_in_use_that_is_gone_is_found_by_the_scrub(tmp_path: Path) -> None:
    engine = filled(tmp_path)
    table = table_of(tmp_path)
    whole = table.read_bytes()
    table.unlink()
    with pytest.raises(DamagedState) as raised:
        engine.check_file(table.name, at_once)
    assert raised.value.file == str(table)
    table.write_bytes(whole)
    engine.close()


@pytest.mark.quick
def test_the_end_of_a_table_is_compared_before_it_is_opened(tmp_path: Path) -> None:
    """Deleted ranges and properties: RocksDB believes what it reads there at the start."""
    filled(tmp_path).close()
    table, sums = table_of(tmp_path), Sums.load(tmp_path / "db-1")
    size = table.stat().st_size
    sums.check_before_open()
    for at in (size - 1, size - 3000, size - 60_000):
        flip(table, at, 1)
        with pytest.raises(DamagedState, match="last bytes") as raised:
            sums.check_before_open()
        assert raised.value.file == str(table)
        flip(table, at, 1)
    sums.check_before_open()


def test_a_table_that_is_made_while_the_scrub_rests_has_its_hash_soon(tmp_path: Path) -> None:
    engine = filled(tmp_path)
    scrub = Scrub(engine, 1 << 30, rest_seconds=60.0)
    wait_until(lambda: scrub.progress["rounds"])
    engine.write([], {b"dnew": b"1"}, SnapshotMeta(8, 2))
    engine._db.flush()  # as RocksDB does by itself when its memory is full
    (new,) = engine._tables() - engine.files().keys()
    wait_until(lambda: new in engine.files())
    assert scrub.progress["rounds"] == 1
    scrub.stop()
    engine.close()


@pytest.mark.quick
def test_of_two_damaged_databases_the_older_one_is_kept(tmp_path: Path) -> None:
    """Until a repair has ended, it may be all that is left of the state."""
    directory = RealDirectory(tmp_path)
    store = RocksStore(directory, 1)
    for content in ("the state", "begun anew, and damaged too"):
        (tmp_path / ROCKS).mkdir()
        (tmp_path / ROCKS / "file").write_text(content)
        asyncio.run(store.set_aside())
        assert not (tmp_path / ROCKS).exists()
        assert (tmp_path / ROCKS_ASIDE / "file").read_text() == "the state"
    asyncio.run(store.drop_aside())
    assert not (tmp_path / ROCKS_ASIDE).exists()
    directory.close()
