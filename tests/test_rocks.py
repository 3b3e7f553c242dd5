"""Damage in RocksDB's files: every read path raises, no damaged checkpoint travels, the scrub finds the rest."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from raft.errors import DamagedState, StorageError
from raft.types import SnapshotMeta
from shardkv.rocks import RocksEngine

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
        ("IO error: Input/output error: While pread offset 0 len 100: /x/000008.sst", errno.EIO),
    ):
        fault = engine._failed(Exception(text))
        assert isinstance(fault, OSError) and fault.errno == number
    assert not isinstance(engine._failed(Exception("IO error: …")), StorageError)
    engine.close()
