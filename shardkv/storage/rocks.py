"""The engine on RocksDB: ordered, larger than memory, its own log off, for the raft log is the log.

    DIR/CURRENT          name of the database in use and CRC32C of the name; replaced by rename
    DIR/db-<number>/     a RocksDB database; any that CURRENT does not name is removed at start
    DIR/incoming-…/      a snapshot being received; removed at start
    DIR/outgoing-…/      a checkpoint being sent (hard links); removed at start

Flushes, checkpoints and compactions run on one background thread; RocksDB lets go
of the GIL meanwhile, and writes go on. The applied index is written in the same
batch as the effects, so whatever a crash leaves is one consistent point of the log.

No damage passes silently: RocksDB checks the blocks that it reads, sums.py has the hashes of
whole files, scrub.py reads everything now and then, and a snapshot (checkpoint.py) is proven at
both ends. Whatever is found is raised where it is met, and the owner hears of it (faults.py).
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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

from shardkv.raft.errors import DamagedState, StorageError
from shardkv.raft.protocol.types import Index, SnapshotMeta
from shardkv.raft.snapshot import SnapshotSink
from shardkv.storage.checkpoint import CheckpointSink, CheckpointSource
from shardkv.storage.current import read_current, write_current
from shardkv.storage.engine import Range
from shardkv.storage.faults import Faults, fault_of
from shardkv.storage.rocks_view import RocksView
from shardkv.storage.scrub import Scrub
from shardkv.storage.sums import Sums
from shardkv.storage.tables import (
    APPLIED,
    APPLIED_KEY,
    Interrupted,
    RocksOptions,
    overlap,
    read_applied,
    read_back,
    read_keys_to_end,
    read_to_end,
    rocks_options,
    sync_directory,
    verify_range,
)

log = logging.getLogger(__name__)


class RocksEngine:
    """See `engine.Engine`. Raises DamagedState, OSError, or StorageError when another process has it open."""

    def __init__(self, directory: Path, options: RocksOptions | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        sync_directory(directory.parent)
        self._directory, self._options = directory, options or RocksOptions()
        self._cache = Cache(self._options.block_cache_bytes)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="rocks")
        self._closing = threading.Event()
        self._numbered = 0
        self._views: WeakSet[RocksView] = WeakSet()
        self._faults = Faults()
        self._scrub: Scrub | None = None
        self._writing = WriteOptions()
        self._writing.disable_wal = True
        self._name = read_current(directory) or self._create()
        # CURRENT and SUMS were perhaps renamed just before a crash: what they say must be durable
        # before the database that an older CURRENT names is removed.
        sync_directory(directory)
        sync_directory(self._path)
        for leftover in directory.iterdir():
            if leftover.is_dir() and leftover.name != self._name:
                shutil.rmtree(leftover)
        self._sums = Sums.load(self._path)
        self._sums.check_before_open()
        self._db = self._open_database(self._path)
        try:
            self._applied = read_applied(self._db)
            self._unproven = self._tables() - self._sums.files.keys()
        except Exception as error:
            self._db.close()
            raise self._failed(error) from None
        self._durable = self._applied.index
        self._submit(self._prove)

    @property
    def _path(self) -> Path:
        return self._directory / self._name

    def _create(self) -> str:
        """The first database, which is durable before CURRENT names it."""
        path = self._directory / "db-1"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        Sums.create(path, {})
        sync_directory(self._directory)
        write_current(self._directory, path.name)
        return path.name

    def _open_database(self, path: Path) -> Rdict:
        options = rocks_options(self._options, self._cache)
        # Without its CURRENT, RocksDB would take a database for a new one, and begin with nothing.
        options.create_if_missing(not self._sums.files)
        try:
            return Rdict(str(path), options)
        except Exception as error:
            if "lock" in str(error):
                raise StorageError(f"{path}: RocksDB cannot open it: {error}") from None
            raise self._faults.typed(error, path) from None

    # ---- faults and files

    @property
    def on_fault(self) -> Callable[[BaseException], None] | None:
        """See `engine.Engine.on_fault`."""
        return self._faults.hear

    @on_fault.setter
    def on_fault(self, hear: Callable[[BaseException], None] | None) -> None:
        self._faults.hear = hear

    def _failed(self, error: Exception) -> Exception:
        """Tell the owner; returns the typed error to raise."""
        return self._faults.typed(error, self._path)

    def _submit(self, work: Callable[[], object]) -> None:
        """Have the background thread do it. Nobody waits, so a fault goes to the owner."""

        def run() -> None:
            try:
                work()
            except Interrupted:
                pass
            except Exception as error:
                if not isinstance(self._failed(error), StorageError | OSError):
                    log.exception("background work on the database failed")

        self._background.submit(run)

    def _tables(self) -> set[str]:
        """The names of the tables in use. Raises what RocksDB raises."""
        return {table["name"].lstrip("/") for table in self._db.live_files()}

    def _pace(self, count: int) -> None:
        if self._closing.is_set():
            raise Interrupted

    def _prove(self) -> None:
        """Tables from just before a crash have no hash yet: read their blocks, then note their hashes."""
        database = self._db
        unproven = [table for table in database.live_files() if table["name"].lstrip("/") in self._unproven]
        if unproven:
            low = min(table["start_key"] for table in unproven)
            high = max(table["end_key"] for table in unproven) + b"\0"
            verify_range(database, low, high, self._pace)
            if database is self._db:
                self._unproven.clear()
        self.note_files()

    def note_files(self) -> None:
        """Note the hashes of files that RocksDB has made since. On any thread but the event loop's.

        Raises DamagedState, OSError.
        """
        sums, database = self._sums, self._db
        try:
            if self._options.scratch or sums.are_complete():
                return
            tables = {table["name"].lstrip("/") for table in database.live_files()}
            sums.note(tables - self._unproven)
        except Exception as error:
            if sums is self._sums:  # else another's snapshot has taken its place, and it is gone
                raise self._failed(error) from None

    def check_file(self, name: str, pace: Callable[[int], None]) -> None:
        """Read a whole file and compare it with its hash. On any thread but the event loop's.

        Raises DamagedState, OSError, Interrupted.
        """
        sums = self._sums
        try:
            sums.check(name, pace)
        except KeyError:
            return  # RocksDB has removed the file since
        except FileNotFoundError as error:
            if sums is self._sums and (not name.endswith(".sst") or name in self._tables()):
                raise self._failed(DamagedState(str(self._path / name), str(error))) from None
        except (DamagedState, OSError) as error:
            if sums is self._sums:
                raise self._failed(error) from None

    def files(self) -> dict[str, int]:
        """Names and sizes of the files whose hashes are known."""
        return {name: known.size for name, known in self._sums.files.items()}

    def start_scrub(self, bytes_per_second: int) -> None:
        """Read everything again and again; see `scrub.Scrub`."""
        assert self._scrub is None
        self._scrub = Scrub(self, bytes_per_second)

    def scrub_progress(self) -> dict[str, Any]:
        return self._scrub.progress if self._scrub is not None else {}

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
        iterator = self._below(end)
        iterator.seek(start)
        try:
            yield from read_to_end(iterator)
        except Exception as error:
            raise self._failed(error) from None

    def scan_back(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        iterator = self._below(end)
        iterator.seek_to_last()
        try:
            yield from read_back(iterator, start)
        except Exception as error:
            raise self._failed(error) from None

    def keys(self, start: bytes, end: bytes) -> Iterator[bytes]:
        iterator = self._below(end)
        iterator.seek(start)
        try:
            yield from read_keys_to_end(iterator)
        except Exception as error:
            raise self._failed(error) from None

    def _below(self, end: bytes) -> Any:
        """An iterator that sees nothing from `end` on."""
        reading = ReadOptions()
        reading.set_iterate_upper_bound(end)
        return self._db.iter(reading)

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
            options = CompactOptions()
            options.set_bottommost_level_compaction(BottommostLevelCompaction.force())
            self._db.flush()
            self._db.compact_range(start, end, options)
            self._check_background()
            self.note_files()

        self._submit(compact)

    def _check_background(self) -> None:
        """rocksdict hides what a compaction met, but RocksDB counts it, and refuses writes from then on."""
        if self.property("background-errors"):
            self._db.write(WriteBatch(raw_mode=True), self._writing)

    async def flush(self) -> Index:
        applied = self._applied.index

        def flush() -> None:
            try:
                self._db.flush()
                self._check_background()
            except Exception as error:
                raise self._failed(error) from None
            self.note_files()

        await asyncio.get_running_loop().run_in_executor(self._background, flush)
        self._durable = max(self._durable, applied)
        return self._durable

    def property(self, name: str) -> int:
        """One of RocksDB's integer properties, 0 if it has no such."""
        return int(self._db.property_int_value(f"rocksdb.{name}") or 0)

    def close(self) -> None:
        self._closing.set()
        if self._scrub is not None:
            self._scrub.stop()
        self._background.shutdown(wait=True)
        self._end_views()
        for work in (self._db.flush, self.note_files, self._db.close):
            try:
                work()
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
                size += table["size"] * overlap(low, high, start, end)
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
        """A checkpoint that was read whole. Raises DamagedState, OSError: then nothing may be sent."""
        self._numbered += 1
        path, given_up = self._directory / f"outgoing-{self._numbered}", threading.Event()
        loop = asyncio.get_running_loop()

        def pace(count: int) -> None:
            if given_up.is_set() or self._closing.is_set():
                raise Interrupted

        def checkpoint() -> None:
            Checkpoint(self._db).create_checkpoint(str(path))
            self.note_files()

        try:
            await loop.run_in_executor(self._background, checkpoint)
            # On another thread, for reading takes long, and flushes must go on.
            database, known = self._path, dict(self._sums.files)
            verify = partial(CheckpointSource.verified, path, known, self._options, pace, database)
            return await loop.run_in_executor(None, verify)
        except asyncio.CancelledError:
            given_up.set()
            raise
        except Interrupted:
            raise OSError("the database is being closed") from None
        except DamagedState as error:
            ours = error.file.replace(str(path), str(self._path))
            raise self._failed(DamagedState(ours, error.why)) from None
        except Exception as error:
            raise self._failed(error) from None

    def open_sink(self, meta: SnapshotMeta) -> CheckpointSink:
        self._numbered += 1
        return CheckpointSink(self._directory / f"incoming-{self._numbered}", meta, self._options)

    def install(self, meta: SnapshotMeta, sink: SnapshotSink) -> None:
        """The received database becomes ours: renamed, opened and looked at, and only then named in CURRENT.

        Raises ValueError when the received database cannot be used, and OSError when our disk
        fails; the old one then stays in use. Where writing CURRENT fails, CURRENT may name either
        database, so both stay until the next start has read it.
        """
        assert isinstance(sink, CheckpointSink) and sink.sums is not None
        old, old_path = self._db, self._path
        # Above every other number: CURRENT may name a database whose install failed late.
        name = f"db-{max(int(path.name[3:]) for path in self._directory.glob('db-*')) + 1}"
        path, database = self._directory / name, None
        try:
            sink.path.rename(path)
            sync_directory(self._directory)
            sums = Sums(path, sink.sums.files)
            sums.check_before_open()
            database = Rdict(str(path), rocks_options(self._options, self._cache))
            applied = read_applied(database)
            if applied != meta:
                raise ValueError(f"the received database is of {applied}, not of {meta}")
            sums.note(())  # the files that RocksDB has made when it opened
        except Exception as error:
            if database is not None:
                database.close()
            shutil.rmtree(path, ignore_errors=True)
            fault = fault_of(error, path)
            if isinstance(fault, DamagedState):
                raise ValueError(str(fault)) from None
            raise fault from None
        try:
            write_current(self._directory, name)
        except OSError:
            database.close()
            raise
        self._end_views()
        self._name, self._db, self._sums, self._unproven = name, database, sums, set()
        self._applied, self._durable = applied, applied.index

        def remove() -> None:
            try:
                old.close()
            except Exception as error:
                log.warning("the database that was replaced was not closed in order: %s", error)
            shutil.rmtree(old_path)

        self._submit(remove)
