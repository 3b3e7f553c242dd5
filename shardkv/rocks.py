"""The engine on RocksDB: ordered, larger than memory, its own log off, for the raft log is the log.

    DIR/CURRENT          name of the database in use; replaced by rename
    DIR/db-<number>/     a RocksDB database; any that CURRENT does not name is removed at start
    DIR/incoming-…/      a snapshot being received; removed at start
    DIR/outgoing-…/      a checkpoint being sent (hard links); removed at start

Flushes, checkpoints and compactions run on one background thread; RocksDB lets go
of the GIL meanwhile, and writes go on. The applied index is written in the same
batch as the effects, so whatever a crash leaves is one consistent point of the log.

A snapshot travels as one stream: length of the manifest, the manifest (JSON: names
and sizes), then the files one after the other.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import shutil
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    BottommostLevelCompaction,
    Cache,
    Checkpoint,
    CompactOptions,
    DBCompressionType,
    Options,
    Rdict,
    ReadOptions,
    WriteBatch,
    WriteOptions,
)

from raft.errors import StorageError
from raft.snapshot import SnapshotSink
from raft.types import Index, SnapshotMeta
from shardkv.engine import Range, ViewGone

log = logging.getLogger(__name__)

APPLIED_KEY = b"a"  # sorts outside of what the machine stores
APPLIED = struct.Struct("<QQ")
CURRENT = "CURRENT"
MANIFEST_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class RocksOptions:
    """Memory for one replica's database, in bytes."""

    write_buffer_bytes: int = 64 << 20
    block_cache_bytes: int = 64 << 20


class RocksEngine:
    """See `engine.Engine`. Raises StorageError where the directory holds something else."""

    def __init__(self, directory: Path, options: RocksOptions = RocksOptions()) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._options = directory, options
        self._cache = Cache(options.block_cache_bytes)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="rocks")
        self._open = threading.Lock()  # held by background work, so that the database stays open
        self._numbered = 0
        self._views: WeakSet[RocksView] = WeakSet()
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
        self._applied = _read_applied(self._db)
        self._durable = self._applied.index
        self._writing = WriteOptions()
        self._writing.disable_wal = True

    def _open_database(self, path: Path) -> Rdict:
        try:
            return Rdict(str(path), _rocks_options(self._options, self._cache))
        except Exception as error:  # rocksdict raises plain Exception
            raise StorageError(f"{path}: RocksDB cannot open it: {error}") from None

    def _point_to(self, name: str) -> None:
        """Make `name` the current database, durably: one rename decides."""
        temporary = self._directory / (CURRENT + ".tmp")
        with temporary.open("w") as file:
            file.write(name + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._directory / CURRENT)
        _sync_directory(self._directory)

    # ---- reading and writing

    @property
    def applied(self) -> SnapshotMeta:
        return self._applied

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._db.get(key)
        return value

    def multi_get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        values: list[bytes | None] = self._db.get(list(keys))
        return values

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        reading = ReadOptions()
        reading.set_iterate_upper_bound(end)
        yield from self._db.items(from_key=start, read_opt=reading)

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
        except Exception as error:  # rocksdict raises plain Exception
            raise _disk_error(error) from None
        self._applied = applied

    def reclaim(self, start: bytes, end: bytes) -> None:
        def compact() -> None:
            with self._open:
                options = CompactOptions()
                options.set_bottommost_level_compaction(BottommostLevelCompaction.force())
                self._db.flush()
                self._db.compact_range(start, end, options)

        self._background.submit(compact).add_done_callback(_log_failure)

    async def flush(self) -> Index:
        applied = self._applied.index

        def flush() -> None:
            with self._open:
                try:
                    self._db.flush()
                except Exception as error:
                    raise _disk_error(error) from None

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
            # A disk that is full or broken. Nothing is lost: the raft log has what is not in tables.
            log.error("the database was not closed in order: %s", error)

    # ---- snapshots

    def estimate(self, start: bytes, end: bytes) -> int:
        """From the tables' borders: of one that lies across a border, the part that its keys make likely."""
        size = 0.0
        for table in self._db.live_files():
            low, high = table["start_key"], table["end_key"]
            if low < end and start <= high:
                size += table["size"] * _overlap(low, high, start, end)
        return int(size)

    def view(self) -> RocksView:
        view = RocksView(self._applied, self._db.iter())
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
            with self._open:
                Checkpoint(self._db).create_checkpoint(str(path))
            return CheckpointSource(path, self._options)

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
            self._applied = _read_applied(self._db)
            self._durable = self._applied.index
        self._background.submit(shutil.rmtree, self._directory / old).add_done_callback(_log_failure)


class CheckpointSource:
    """A checkpoint as one stream of bytes. Made on the background thread."""

    def __init__(self, path: Path, options: RocksOptions) -> None:
        self._path = path
        database = Rdict(str(path), _rocks_options(options, None), access_type=AccessType.read_only())
        self.meta = _read_applied(database)  # writes went on while the checkpoint was made
        database.close()
        names = sorted(file.name for file in path.iterdir() if file.name not in ("LOG", "LOCK"))
        files = [(name, (path / name).stat().st_size) for name in names]
        manifest = json.dumps(files).encode()
        self._head = MANIFEST_LENGTH.pack(len(manifest)) + manifest
        self._files = files
        self.size = len(self._head) + sum(size for _, size in files)

    async def read(self, offset: int, length: int) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(None, self._read, offset, length)

    def _read(self, offset: int, length: int) -> bytes:
        parts = [self._head[offset : offset + length]]
        length -= len(parts[0])
        offset = max(0, offset - len(self._head))
        for name, size in self._files:
            if length > 0 and offset < size:
                with (self._path / name).open("rb") as file:
                    file.seek(offset)
                    part = file.read(min(length, size - offset))
                parts.append(part)
                length -= len(part)
            offset = max(0, offset - size)
        return b"".join(parts)

    def close(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


class CheckpointSink:
    """Takes the stream apart into files again. The network is not trusted with names."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        self._head = b""
        self._files: list[tuple[str, int]] | None = None  # what is still to come
        self._file: Any = None
        self._left = 0

    async def write(self, data: bytes) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._write, data)

    def _write(self, data: bytes) -> None:
        if self._files is None:
            self._head += data
            if len(self._head) < MANIFEST_LENGTH.size:
                return
            end = MANIFEST_LENGTH.size + MANIFEST_LENGTH.unpack_from(self._head)[0]
            if len(self._head) < end:
                return
            self._files = [
                (str(name), int(size)) for name, size in json.loads(self._head[MANIFEST_LENGTH.size : end])
            ]
            if any("/" in name or name.startswith(".") for name, _ in self._files):
                raise ValueError("a snapshot that names files outside of itself")
            data = self._head[end:]
        while self._next_file() and data:
            part = data[: self._left]
            self._file.write(part)
            self._left -= len(part)
            data = data[len(part) :]

    def _next_file(self) -> bool:
        """Whether a file is open that wants more bytes; opens and closes as sizes say."""
        while self._left == 0:
            self._close_file()
            if not self._files:
                return False
            name, self._left = self._files.pop(0)
            self._file = (self.path / name).open("xb")
        return True

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    async def finish(self) -> None:
        def finish() -> None:
            complete = self._files is not None and not self._next_file()
            if not complete or not (self.path / "CURRENT").exists():
                raise ValueError("the stream does not hold what its manifest names")
            _sync_directory(self.path)

        await asyncio.get_running_loop().run_in_executor(None, finish)

    def abort(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        shutil.rmtree(self.path, ignore_errors=True)


class RocksView:
    """One iterator of RocksDB: wherever it is put, it shows the database as it was when it was made.

    It keeps what it needs from being compacted away until it is closed. (A `Snapshot` of
    rocksdict 0.3.29 will not do: its gets show the old state, but its iterators the newest.)
    """

    def __init__(self, applied: SnapshotMeta, iterator: Any) -> None:
        self.applied, self._iterator = applied, iterator

    def scan(self, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        iterator = self._iterator
        if iterator is None:
            raise ViewGone("the replica has taken another's snapshot in")
        # Above the key of the applied index, which is the engine's own.
        iterator.seek(max(start, APPLIED_KEY + b"\0"))
        while iterator.valid():
            yield iterator.key(), iterator.value()
            iterator.next()

    def close(self) -> None:
        self._iterator = None


def _rocks_options(options: RocksOptions, cache: Cache | None) -> Options:
    rocks = Options(raw_mode=True)
    rocks.create_if_missing(True)
    rocks.set_write_buffer_size(options.write_buffer_bytes)
    rocks.set_max_write_buffer_number(3)
    # What is young is merged again soon: compressing it would cost more than the space is worth.
    none, lz4 = DBCompressionType.none(), DBCompressionType.lz4()
    rocks.set_compression_per_level([none, none, lz4, lz4, lz4, lz4, lz4])
    rocks.set_level_compaction_dynamic_level_bytes(True)
    rocks.set_max_background_jobs(2)
    rocks.set_bytes_per_sync(1 << 20)  # write back as it goes, rather than all at the file's end
    rocks.set_keep_log_file_num(2)
    rocks.set_max_open_files(256)
    table = BlockBasedOptions()
    table.set_bloom_filter(10, False)
    if cache is not None:
        table.set_block_cache(cache)
    rocks.set_block_based_table_factory(table)
    return rocks


def _read_applied(database: Rdict) -> SnapshotMeta:
    value = database.get(APPLIED_KEY)
    return SnapshotMeta(*APPLIED.unpack(value)) if value is not None else SnapshotMeta(0, 0)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _disk_error(error: Exception) -> OSError:
    """What RocksDB could not write, as the operating system would have said it."""
    full = "No space left on device" in str(error)
    return OSError(errno.ENOSPC if full else errno.EIO, f"RocksDB: {error}")


def _log_failure(future: Any) -> None:
    """Background work that only saves space: what fails is said, and tried again by the next."""
    if not future.cancelled() and future.exception() is not None:
        log.error("background work on the database failed: %r", future.exception())
