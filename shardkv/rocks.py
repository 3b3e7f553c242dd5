"""The engine on RocksDB: ordered, larger than memory, its own log off, for the raft log is the log.

    DIR/CURRENT          name of the database in use; replaced by rename
    DIR/db-<number>/     a RocksDB database; any that CURRENT does not name is removed at start
    DIR/incoming-…/      a snapshot being received; removed at start
    DIR/outgoing-…/      a checkpoint being sent (hard links); removed at start

Flushes, checkpoints and compactions run on one background thread; RocksDB lets go
of the GIL meanwhile, and writes go on. The applied index is written in the same
batch as the effects, so whatever a crash leaves is one consistent point of the log.

A snapshot travels as a checkpoint: checkpoint.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakSet

from rocksdict import (
    BottommostLevelCompaction,
    Cache,
    Checkpoint,
    CompactOptions,
    Rdict,
    ReadOptions,
    WriteBatch,
    WriteOptions,
)

from raft.errors import StorageError
from raft.snapshot import SnapshotSink
from raft.types import Index, SnapshotMeta
from shardkv.checkpoint import CheckpointSink, CheckpointSource
from shardkv.engine import Range, ViewGone
from shardkv.tables import (
    APPLIED,
    APPLIED_KEY,
    RocksOptions,
    check_ended,
    fault_of,
    read_applied,
    rocks_options,
    sync_directory,
)

log = logging.getLogger(__name__)

CURRENT = "CURRENT"


class RocksEngine:
    """See `engine.Engine`. Raises StorageError where the directory holds something else."""

    def __init__(self, directory: Path, options: RocksOptions | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._options = directory, options or RocksOptions()
        self._cache = Cache(self._options.block_cache_bytes)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="rocks")
        self._open = threading.Lock()  # held by background work, so that the database stays open
        self._numbered = 0
        self._views: WeakSet[RocksView] = WeakSet()
        self.fault: BaseException | None = None
        self._on_fault: Callable[[BaseException], None] | None = None
        current = directory / CURRENT
        name = current.read_text().strip() if current.exists() else ""
        for leftover in directory.iterdir():
            if leftover.is_dir() and leftover.name != name:
                shutil.rmtree(leftover)
        if not name:
            name = "db-1"
            (directory / name).mkdir()
            self._point_to(name)
        self._name = name
        self._db = self._open_database(directory / name)
        self._applied = self._read_applied(self._db)
        self._durable = self._applied.index
        self._writing = WriteOptions()
        self._writing.disable_wal = True

    def _open_database(self, path: Path) -> Rdict:
        try:
            return Rdict(str(path), rocks_options(self._options, self._cache))
        except Exception as error:
            if "lock" in str(error):
                raise StorageError(f"{path}: RocksDB cannot open it: {error}") from None
            raise self._failed(error, path) from None

    def _read_applied(self, database: Rdict) -> SnapshotMeta:
        try:
            return read_applied(database)
        except Exception as error:
            raise self._failed(error) from None

    # ---- faults

    @property
    def on_fault(self) -> Callable[[BaseException], None] | None:
        """See `engine.Engine.on_fault`."""
        return self._on_fault

    @on_fault.setter
    def on_fault(self, hear: Callable[[BaseException], None] | None) -> None:
        self._on_fault = hear
        if self.fault is not None and hear is not None:
            hear(self.fault)

    def _failed(self, error: Exception, where: Path | None = None) -> Exception:
        """Tell the owner of a fault; returns the typed error to raise in place of RocksDB's."""
        fault = fault_of(error, where or self._directory / self._name)
        self._report(fault)
        return fault

    def _report(self, fault: BaseException) -> None:
        if not isinstance(fault, StorageError | OSError):
            return
        if self.fault is None:
            self.fault = fault
            log.error("the database failed: %s", fault)
        if self._on_fault is not None:
            self._on_fault(fault)

    def _submit(self, work: Callable[[], object]) -> None:
        """Have the background thread do it. Nobody waits, so a fault goes to the owner."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                if not isinstance(self._failed(error), StorageError | OSError):
                    log.exception("background work on the database failed")

        self._background.submit(run)

    def _point_to(self, name: str) -> None:
        """Make `name` the current database, durably: one rename decides."""
        temporary = self._directory / (CURRENT + ".tmp")
        with temporary.open("w") as file:
            file.write(name + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._directory / CURRENT)
        sync_directory(self._directory)

    # ---- reading and writing

    @property
    def applied(self) -> SnapshotMeta:
        return self._applied

    def get(self, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._db.get(key)
        except Exception as error:
            raise self._failed(error) from None
        return value

    def multi_get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        try:
            values: list[bytes | None] = self._db.get(list(keys))
        except Exception as error:
            raise self._failed(error) from None
        return values

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        reading = ReadOptions()
        reading.set_iterate_upper_bound(end)
        last = None
        for last in self._db.items(from_key=start, read_opt=reading):
            yield last
        try:
            # `items` hides an error as the end, but an iterator that can be asked takes a third longer.
            check_ended(self._db, reading, start if last is None else last[0] + b"\0")
        except Exception as error:
            raise self._failed(error) from None

    def write(
        self, deleted: Sequence[Range], changes: dict[bytes, bytes | None], applied: SnapshotMeta
    ) -> None:  # hot: runs per operation
        batch = WriteBatch(raw_mode=True)
        for start, end in deleted:
            batch.delete_range(start, end)
        put, delete = batch.put, batch.delete
        for key, value in changes.items():
            if value is None:
                delete(key)
            else:
                put(key, value)
        put(APPLIED_KEY, APPLIED.pack(applied.index, applied.term))
        try:
            self._db.write(batch, self._writing)
        except Exception as error:
            raise self._failed(error) from None
        self._applied = applied

    def reclaim(self, start: bytes, end: bytes) -> None:
        def compact() -> None:
            with self._open:
                options = CompactOptions()
                options.set_bottommost_level_compaction(BottommostLevelCompaction.force())
                self._db.flush()
                self._db.compact_range(start, end, options)
                self._check_background()

        self._submit(compact)

    def _check_background(self) -> None:
        """rocksdict hides what a compaction met, but RocksDB counts it, and refuses writes from then on."""
        if self.property("background-errors"):
            self._db.write(WriteBatch(raw_mode=True), self._writing)

    async def flush(self) -> Index:
        applied = self._applied.index

        def flush() -> None:
            with self._open:
                try:
                    self._db.flush()
                    self._check_background()
                except Exception as error:
                    raise self._failed(error) from None

        await asyncio.get_running_loop().run_in_executor(self._background, flush)
        self._durable = max(self._durable, applied)
        return self._durable

    def property(self, name: str) -> int:
        """One of RocksDB's integer properties, 0 if it has no such."""
        return int(self._db.property_int_value(f"rocksdb.{name}") or 0)

    def close(self) -> None:
        self._background.shutdown(wait=True)
        self._end_views()
        try:
            self._db.close()  # it writes its tables first
        except Exception as error:
            # Nothing is lost: the raft log has what is not in tables. But the owner should know of damage.
            log.error("the database was not closed in order: %s", self._failed(error))

    # ---- snapshots

    def estimate(self, start: bytes, end: bytes) -> int:
        """From the tables' borders: of one that lies across a border, the part that its keys make likely."""
        size = 0.0
        try:
            tables = self._db.live_files()
        except Exception as error:
            raise self._failed(error) from None
        for table in tables:
            low, high = table["start_key"], table["end_key"]
            if low < end and start <= high:
                size += table["size"] * _overlap(low, high, start, end)
        return int(size)

    def view(self) -> RocksView:
        try:
            view = RocksView(self._applied, self._db.iter(), self._failed)
        except Exception as error:
            raise self._failed(error) from None
        self._views.add(view)
        return view

    def _end_views(self) -> None:
        """They are of a database that is about to be closed."""
        for view in list(self._views):
            view.close()

    async def open_snapshot(self) -> CheckpointSource:
        self._numbered += 1
        path = self._directory / f"outgoing-{self._numbered}"

        def checkpoint() -> CheckpointSource:
            try:
                with self._open:
                    Checkpoint(self._db).create_checkpoint(str(path))
                return CheckpointSource(path, self._options)
            except Exception as error:
                raise self._failed(error) from None

        return await asyncio.get_running_loop().run_in_executor(self._background, checkpoint)

    def open_sink(self, meta: SnapshotMeta) -> CheckpointSink:
        self._numbered += 1
        return CheckpointSink(self._directory / f"incoming-{self._numbered}")

    def install(self, meta: SnapshotMeta, sink: SnapshotSink) -> None:
        """The received database becomes ours: renamed, then named in CURRENT, then opened."""
        assert isinstance(sink, CheckpointSink)
        old, number = self._name, int(self._name.rpartition("-")[2]) + 1
        self._name = f"db-{number}"
        sink.path.rename(self._directory / self._name)
        self._end_views()
        with self._open:
            self._db.close()
            self._point_to(self._name)
            self._db = self._open_database(self._directory / self._name)
            self._applied = self._read_applied(self._db)
            self._durable = self._applied.index
        self._submit(lambda: shutil.rmtree(self._directory / old))


class RocksView:
    """One iterator of RocksDB: wherever it is put, it shows the database as it was when it was made.

    It keeps what it needs from being compacted away until it is closed. (A `Snapshot` of
    rocksdict 0.3.29 will not do: its gets show the old state, but its iterators the newest.)
    """

    def __init__(self, applied: SnapshotMeta, iterator: Any, failed: Callable[[Exception], Exception]) -> None:
        self.applied, self._iterator, self._failed = applied, iterator, failed

    def scan(self, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        iterator = self._iterator
        if iterator is None:
            raise ViewGone("the replica has taken another's snapshot in")
        # Above the key of the applied index, which is the engine's own.
        iterator.seek(max(start, APPLIED_KEY + b"\0"))
        while iterator.valid():
            yield iterator.key(), iterator.value()
            iterator.next()
        try:
            iterator.status()  # an iterator that met damage is not valid any more, as at the end
        except Exception as error:
            raise self._failed(error) from None

    def close(self) -> None:
        self._iterator = None


def _overlap(low: bytes, high: bytes, start: bytes, end: bytes) -> float:
    """Which part of a table from `low` to `high` lies in [start, end), if its keys are spread evenly."""
    shared = next(
        (n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high))
    )
    common = low[:shared]

    def place(key: bytes) -> int:
        if not key.startswith(common):
            return 0 if key < low else 1 << 64
        return int.from_bytes(key[len(common) : len(common) + 8].ljust(8, b"\0"), "big")

    whole = place(high) - place(low)
    part = min(place(high), place(end)) - max(place(low), place(start))
    return max(0.0, min(1.0, part / whole)) if whole > 0 else 1.0
