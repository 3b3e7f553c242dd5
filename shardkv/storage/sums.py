"""What the files of a database looked like when they were whole: a hash of each, in the file SUMS beside them.

RocksDB checks the blocks that it reads. It says nothing of a damaged filter (it reads on
without), of files that it reads only at the start, and of an end of its MANIFEST that looks torn.
With SUMS every flipped byte of every file is noticed: the ends of tables and all small files at
the start, everything by the scrub, and everything before a checkpoint is shipped.

    SUMS   magic "SKVSUMS1" (the last letter is the format's version), BLAKE2b-128 of what follows,
           then JSON {name: [bytes covered, hash of them, hash of the last 64 KiB of them]}

Tables never change once they are written. A MANIFEST grows, so its hash covers its first bytes.
CURRENT names the MANIFEST; RocksDB makes both anew whenever it opens, as it does OPTIONS.

BLAKE2b with 128 bits: Python computes it without holding the interpreter, some 0.9 GB/s on one
core whatever the processor, and damage that it does not notice is not to be expected in the age of
the universe; a CRC of 32 bits would miss one in four billion, which is too many for a cluster's files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from shardkv.raft.errors import DamagedState
from shardkv.raft.unreadable import as_damage
from shardkv.storage.tables import Pace, at_once, replace_durably
from shardkv.wire.bounded_json import parse_json

SUMS = "SUMS"
MAGIC = b"SKVSUMS1"
HASH_BYTES = 16
TAIL_BYTES = 64 << 10  # holds what RocksDB reads of a table at the start: deleted ranges, properties, footer
PIECE_BYTES = 256 << 10
TABLE = re.compile(r"\d{6,12}\.sst")
MANIFEST = re.compile(r"MANIFEST-(\d{6,12})")
OTHERS = re.compile(r"CURRENT|IDENTITY|OPTIONS-\d{6,12}|rocksdict-config\.json")

NEVER_GONE = ("CURRENT", "IDENTITY", "rocksdict-config.json")


class FileSum(NamedTuple):
    size: int
    hash: str
    tail: str


def is_covered(name: str) -> bool:
    """Whether SUMS covers a file of this name. LOG, LOCK and the unused write-ahead log are not covered."""
    return any(pattern.fullmatch(name) for pattern in (TABLE, MANIFEST, OTHERS))


def hash_file(path: Path, size: int | None = None, pace: Pace = at_once) -> FileSum:
    """The hashes of the file's first `size` bytes; `pace` is called before each piece that is read.

    Bytes come from the disk, not from the page cache, as far as the system permits. Raises
    DamagedState where the disk cannot read them, OSError.
    """
    whole, tail = hashlib.blake2b(digest_size=HASH_BYTES), hashlib.blake2b(digest_size=HASH_BYTES)
    with as_damage(str(path)), path.open("rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size if size is None else size
        tail_from, offset = max(0, end - TAIL_BYTES), 0
        while offset < end:
            length = min(PIECE_BYTES, end - offset)
            pace(length)
            os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)
            data = file.read(length)
            if not data:
                break
            whole.update(data)
            if offset + len(data) > tail_from:
                tail.update(data[max(0, tail_from - offset) :])
            offset += len(data)
    return FileSum(offset, whole.hexdigest(), tail.hexdigest())


def hash_tail(path: Path) -> str:
    """Raises DamagedState, OSError as `hash_file`."""
    with as_damage(str(path)), path.open("rb", buffering=0) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        return hashlib.blake2b(file.read(), digest_size=HASH_BYTES).hexdigest()


class Sums:
    """The hashes of one database's files. Methods may be called on any thread."""

    def __init__(self, directory: Path, files: dict[str, FileSum]) -> None:
        self._directory, self.files = directory, files
        self._saving = threading.Lock()

    @classmethod
    def create(cls, directory: Path, files: dict[str, FileSum]) -> Sums:
        """For a new database, or one whose files' hashes are known from elsewhere. Durable on return."""
        sums = cls(directory, files)
        sums._save()
        return sums

    @classmethod
    def load(cls, directory: Path) -> Sums:
        """Raises DamagedState, also where SUMS is missing: a database is never named before it has one."""
        path = directory / SUMS
        try:
            with as_damage(str(path)):
                packed = path.read_bytes()
        except FileNotFoundError:
            raise DamagedState(str(path), "the file is missing") from None
        magic, digest, body = (
            packed[: len(MAGIC)],
            packed[len(MAGIC) : len(MAGIC) + HASH_BYTES],
            packed[len(MAGIC) + HASH_BYTES :],
        )
        if magic != MAGIC:
            raise DamagedState(str(path), f"it does not begin with {MAGIC.decode()}")
        if hashlib.blake2b(body, digest_size=HASH_BYTES).digest() != digest:
            raise DamagedState(str(path), "it does not match its hash")
        try:
            return cls(directory, {name: FileSum(*entry) for name, entry in parse_json(body).items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise DamagedState(str(path), str(error)) from None

    def _save(self) -> None:
        body = json.dumps(self.files).encode()
        digest = hashlib.blake2b(body, digest_size=HASH_BYTES).digest()
        replace_durably(self._directory / SUMS, MAGIC + digest + body)

    def are_complete(self) -> bool:
        """Whether the directory has the files that are known, and no others: then none has changed."""
        return self._present() == self.files.keys()

    def _present(self) -> set[str]:
        with as_damage(str(self._directory)):
            return {path.name for path in self._directory.iterdir() if is_covered(path.name)}

    def note(self, tables: Collection[str]) -> None:
        """Add what RocksDB has made since, and forget what it has removed. Durable on return.

        `tables` are those in use and known to be whole. What is known already stays as it is, for
        it may be damaged by now. Raises DamagedState, OSError.
        """
        with self._saving:
            present = self._present()
            files = {name: known for name, known in self.files.items() if name in present or name in NEVER_GONE}
            for name in sorted(present):
                try:
                    if self._is_news(name, tables):
                        files[name] = self._durable_hash(name)
                except FileNotFoundError:  # removed meanwhile
                    files.pop(name, None)
            if files != self.files:
                self.files = files
                self._save()

    def _durable_hash(self, name: str) -> FileSum:
        """The file's hash, once all bytes that it covers are durable: SUMS must not know of more than a crash leaves.

        RocksDB syncs its tables before it uses them, but appends to its MANIFEST on a thread of its own.
        """
        path = self._directory / name
        found = hash_file(path)
        if not TABLE.fullmatch(name):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return found

    def _is_news(self, name: str, tables: Collection[str]) -> bool:
        """Whether the file is new, or has changed as only RocksDB changes it. Raises DamagedState."""
        if name not in self.files:
            return not TABLE.fullmatch(name) or name in tables
        if MANIFEST.fullmatch(name) or name == "CURRENT":
            self.check(name)  # what is old must not be damaged when what is new is noted with it
            return True
        return False

    def check(self, name: str, pace: Pace = at_once) -> None:
        """Compare a whole file with what it was. Raises DamagedState, FileNotFoundError, OSError."""
        known, path = self.files[name], self._directory / name
        found = hash_file(path, known.size if MANIFEST.fullmatch(name) else None, pace)
        if name == "CURRENT" and found != known:
            self._check_current(self._newest_manifest() + 1)
        elif found.size != known.size:
            raise DamagedState(str(path), f"{found.size} bytes, it had {known.size}")
        elif found.hash != known.hash:
            raise DamagedState(str(path), "its bytes are not those that were written")

    def check_before_open(self) -> None:
        """What RocksDB is about to rely on without a look of its own. Raises DamagedState, OSError."""
        for name, known in self.files.items():
            with as_damage(str(self._directory / name)):
                self._check_before_open(name, known)

    def _check_before_open(self, name: str, known: FileSum) -> None:
        path = self._directory / name
        if TABLE.fullmatch(name):
            # One that is gone may have been compacted away: RocksDB knows whether it still needs it.
            if path.exists() and (path.stat().st_size != known.size or hash_tail(path) != known.tail):
                raise DamagedState(str(path), "its last bytes are not those that were written")
        elif name == "CURRENT":
            self._check_current(self._newest_manifest())
        elif path.exists():
            self.check(name)
        elif name in NEVER_GONE:
            raise DamagedState(str(path), "the file is missing")

    def _newest_manifest(self) -> int:
        return max((int(match[1]) for name in self.files if (match := MANIFEST.fullmatch(name))), default=0)

    def _check_current(self, least: int) -> None:
        """A crash between RocksDB's start and our next look leaves a newer MANIFEST than we know."""
        path = self._directory / "CURRENT"
        with as_damage(str(path)):
            text = path.read_bytes().decode(errors="replace") if path.exists() else ""
        named = MANIFEST.fullmatch(text.removesuffix("\n"))
        if named is None or not (self._directory / named[0]).exists() or int(named[1]) < least:
            raise DamagedState(str(path), f"it holds {text!r}, which names no manifest that can be in use")
