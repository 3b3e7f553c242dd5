"""RocksDB as this project opens and reads it: its options, and how to read all of a database.

RocksDB checks the checksum of each block that it reads, but an iterator that meets damage
just ends. Whoever iterates must ask the iterator for its status afterwards.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    DBCompressionType,
    Options,
    Rdict,
    ReadOptions,
)

from shardkv.raft.protocol.types import SnapshotMeta
from shardkv.storage.faults import fault_of

APPLIED_KEY = b"a"  # sorts outside of what the machine stores
APPLIED = struct.Struct("<QQ")
VERIFY_KEYS = 2000  # in one piece of half a millisecond, for the interpreter is held meanwhile

Pace = Callable[[int], None]  # called before so many bytes are read; it may wait, or raise Interrupted


class Interrupted(Exception):
    """The work was called off."""


def at_once(count: int) -> None:
    """No pace: go on."""


@dataclass(frozen=True, slots=True)
class RocksOptions:
    """Memory for one replica's database, in bytes, and how many of its files are kept open."""

    write_buffer_bytes: int = 64 << 20
    block_cache_bytes: int = 64 << 20
    scratch: bool = False  # it lives as long as this process: no hashes of files, and no compactions
    open_files: int = 256


def rocks_options(options: RocksOptions, cache: Cache | None) -> Options:
    rocks = Options(raw_mode=True)
    rocks.create_if_missing(True)
    rocks.set_paranoid_checks(True)
    rocks.set_write_buffer_size(options.write_buffer_bytes)
    rocks.set_max_write_buffer_number(3)
    # What is young is merged again soon: compressing it would cost more than the space is worth.
    none, lz4 = DBCompressionType.none(), DBCompressionType.lz4()
    rocks.set_compression_per_level([none, none, lz4, lz4, lz4, lz4, lz4])
    rocks.set_level_compaction_dynamic_level_bytes(True)
    rocks.set_max_background_jobs(2)
    if options.scratch:
        rocks.set_disable_auto_compactions(True)
    rocks.set_bytes_per_sync(1 << 20)  # write back as it goes, rather than all at the file's end
    rocks.set_keep_log_file_num(2)
    rocks.set_max_open_files(options.open_files)
    table = BlockBasedOptions()
    table.set_bloom_filter(10, False)
    if cache is not None:
        table.set_block_cache(cache)
    rocks.set_block_based_table_factory(table)
    return rocks


def read_applied(database: Rdict) -> SnapshotMeta:
    """The last entry whose effects are in the database. Raises what RocksDB raises."""
    value = database.get(APPLIED_KEY)
    return SnapshotMeta(*APPLIED.unpack(value)) if value is not None else SnapshotMeta(0, 0)


def verify_blocks(path: Path, options: RocksOptions, pace: Pace = at_once) -> SnapshotMeta:
    """Read every key of the database at `path`, which nobody writes; returns what it had applied.

    Every block that holds a key is read and checked. Raises DamagedState, OSError, Interrupted.
    """
    try:
        database = Rdict(str(path), rocks_options(options, None), access_type=AccessType.read_only())
        try:
            verify_range(database, b"", None, pace)
            return read_applied(database)
        finally:
            database.close()
    except Exception as error:
        raise fault_of(error, path) from None


def verify_range(database: Rdict, start: bytes, end: bytes | None, pace: Pace = at_once) -> None:
    """Read every key in [start, end). Raises what RocksDB raises, Interrupted.

    The database may be written to meanwhile: what is read is as it was at the call. The work is done in small pieces with a rest as long between them, so that other threads go on.
    """
    reading = ReadOptions()
    reading.set_verify_checksums(True)
    if end is not None:
        reading.set_iterate_upper_bound(end)
    iterator = database.iter(reading)
    iterator.seek(start)
    valid, move = iterator.valid, iterator.next
    while valid():
        pace(0)
        began = time.perf_counter()
        for _ in range(VERIFY_KEYS):
            if not valid():
                break
            move()
        time.sleep(min(0.01, time.perf_counter() - began))
    check_ended(iterator)


def read_to_end(iterator: Any) -> Iterator[tuple[bytes, bytes]]:
    """The pairs from where the iterator stands. Raises what RocksDB raises."""
    valid, key, value, move = iterator.valid, iterator.key, iterator.value, iterator.next
    while valid():
        yield key(), value()
        move()
    check_ended(iterator)


def read_keys_to_end(iterator: Any) -> Iterator[bytes]:
    """The keys from where the iterator stands; the values stay in RocksDB. Raises what RocksDB raises."""
    valid, key, move = iterator.valid, iterator.key, iterator.next
    while valid():
        yield key()
        move()
    check_ended(iterator)


def read_back(iterator: Any, start: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The pairs from where the iterator stands down to `start`. Raises what RocksDB raises.

    The bound is looked at here: `set_iterate_lower_bound` of rocksdict 0.3.29 sets the upper one.
    """
    valid, key, value, move = iterator.valid, iterator.key, iterator.value, iterator.prev
    while valid():
        found = key()
        if found < start:
            return
        yield found, value()
        move()
    check_ended(iterator)


def check_ended(iterator: Any) -> None:
    """An iterator that is not valid any more met the end, and no damage. Raises what RocksDB raises.

    The same iterator is asked that was read: another may see what was written since. rocksdict's
    fast iterators (`items`, `keys`) hide an error as the end, and cannot be asked.
    """
    iterator.status()


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(path: Path, data: bytes) -> None:
    """A crash leaves the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_directory(path.parent)


def overlap(low: bytes, high: bytes, start: bytes, end: bytes) -> float:
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
