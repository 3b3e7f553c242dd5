"""RocksDB as this project opens and reads it: its options, what its errors mean, and whether a database is whole.

RocksDB checks the checksum of each block that it reads, but an iterator that meets damage
just ends. Whoever iterates must ask the iterator for its status afterwards.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    DbClosedError,
    DBCompressionType,
    Options,
    Rdict,
    ReadOptions,
)

from raft.errors import DamagedState
from raft.types import SnapshotMeta

APPLIED_KEY = b"a"  # sorts outside of what the machine stores
APPLIED = struct.Struct("<QQ")
VERIFY_KEYS = 2000  # in one piece of half a millisecond, for the interpreter is held meanwhile
IN_FILE = re.compile(r"(?: in |: )(/[^\n:]*?(?:\.sst|MANIFEST-\d+|CURRENT|IDENTITY))\b")


@dataclass(frozen=True, slots=True)
class RocksOptions:
    """Memory for one replica's database, in bytes."""

    write_buffer_bytes: int = 64 << 20
    block_cache_bytes: int = 64 << 20


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
    rocks.set_bytes_per_sync(1 << 20)  # write back as it goes, rather than all at the file's end
    rocks.set_keep_log_file_num(2)
    rocks.set_max_open_files(256)
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


def fault_of(error: Exception, directory: Path) -> Exception:
    """What an error of RocksDB means: DamagedState for its files, OSError for the disk under them.

    rocksdict raises plain Exception with RocksDB's text. A table that is missing is damage as
    well: the disk works, and peers have what is gone. Errors that are not RocksDB's stay as
    they are, for they are bugs of ours.
    """
    if type(error) is not Exception or isinstance(error, DbClosedError):
        return error
    text = str(error)
    missing = "No such file or directory" in text
    if text.startswith(("Corruption", "Not implemented", "Invalid argument")) or missing:
        named = IN_FILE.search(text)
        return DamagedState(named[1] if named else str(directory), text)
    full = "No space left on device" in text
    return OSError(errno.ENOSPC if full else errno.EIO, f"RocksDB: {text}")


def verify_blocks(path: Path, options: RocksOptions) -> SnapshotMeta:
    """Read every key of the database at `path`, which nobody writes; returns what it had applied.

    Every block that holds a key is read and checked. The work is done in small pieces with a
    rest as long between them, so that other threads go on. Raises DamagedState, OSError.
    """
    try:
        database = Rdict(str(path), rocks_options(options, None), access_type=AccessType.read_only())
    except Exception as error:
        raise fault_of(error, path) from None
    try:
        keys, count, last = database.keys(read_opt=_checking()), 0, b""
        while True:
            began = time.perf_counter()
            piece = deque(islice(keys, VERIFY_KEYS), maxlen=1)
            if not piece:
                break
            last = piece[0]
            time.sleep(min(0.01, time.perf_counter() - began))
            count += 1
        check_ended(database, _checking(), last + b"\0" if count else b"")
        return read_applied(database)
    except Exception as error:
        raise fault_of(error, path) from None
    finally:
        database.close()


def check_ended(database: Rdict, reading: ReadOptions, after: bytes) -> None:
    """There is nothing from `after` on, and RocksDB could see that. Raises what RocksDB raises, or OSError.

    rocksdict's fast iterators (`items`, `keys`) hide an error as the end. This asks again from
    where one ended, which meets the same damage.
    """
    iterator = database.iter(reading)
    iterator.seek(after)
    iterator.status()
    if iterator.valid():
        raise OSError(errno.EIO, "RocksDB: an iterator ended before its end; the disk failed for a moment")


def _checking() -> ReadOptions:
    reading = ReadOptions()
    reading.set_verify_checksums(True)
    return reading


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
