"""A snapshot of a RocksDB database on its way: a checkpoint as one stream of bytes, and files again at the other end.

    stream     head, manifest, then the files in the manifest's order
    head       magic "SKVCHKP1" (the last letter is the format's version), length of the manifest (u64)
    manifest   JSON {"applied": [index, term], "files": [[name, bytes, hash, hash of the tail], ...]}

Neither end trusts the other, nor its own disk. The sender reads every block and every byte before
the first chunk leaves, and sends nothing of a database that is damaged. The receiver compares each
file with its hash, then reads every block as well, before anything of it is renamed in. The hashes
go into the new database's SUMS (sums.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardkv.raft.errors import DamagedState
from shardkv.raft.protocol.types import SnapshotMeta
from shardkv.raft.unreadable import as_damage
from shardkv.storage.sums import HASH_BYTES, SUMS, FileSum, Sums, hash_file, hash_tail, is_covered
from shardkv.storage.tables import Interrupted, Pace, RocksOptions, at_once, verify_blocks
from shardkv.wire.bounded_json import parse_json

HEAD = struct.Struct("<8sQ")
MAGIC = b"SKVCHKP1"
MAX_MANIFEST_BYTES = 16 << 20  # some hundred thousand files
MAX_FILE_BYTES = 1 << 40


class CheckpointSource:
    """A verified checkpoint as one stream of bytes. The directory goes when it is closed."""

    def __init__(
        self, path: Path, meta: SnapshotMeta, files: Mapping[str, FileSum], database: Path | None = None
    ) -> None:
        """`database`: of which this is the checkpoint, for faults to name; its tables are the same files."""
        self._path, self.meta, self._database = path, meta, database or path
        manifest = json.dumps(
            {"applied": [meta.index, meta.term], "files": [[name, *files[name]] for name in sorted(files)]}
        ).encode()
        self._head = HEAD.pack(MAGIC, len(manifest)) + manifest
        self._files = [(name, files[name].size) for name in sorted(files)]
        self.size = len(self._head) + sum(size for _, size in self._files)

    @classmethod
    def verified(
        cls,
        path: Path,
        known: Mapping[str, FileSum],
        options: RocksOptions,
        pace: Pace = at_once,
        database: Path | None = None,
    ) -> CheckpointSource:
        """Read all of it, and compare the files that it shares with the database with what is `known`.

        It takes seconds a gigabyte: for a thread. Raises DamagedState, OSError, Interrupted; then
        the directory is gone.
        """
        try:
            meta = verify_blocks(path, options, pace)  # also says what is applied: writes went on meanwhile
            files = {file.name: hash_file(file, pace=pace) for file in path.iterdir() if is_covered(file.name)}
            for name, found in files.items():
                if name.endswith(".sst") and name in known and known[name] != found:
                    raise DamagedState(str(path / name), "its bytes are not those that were written")
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return cls(path, meta, files, database)

    async def read(self, offset: int, length: int) -> bytes:
        """Raises DamagedState where the disk cannot read it any more, OSError."""
        return await asyncio.get_running_loop().run_in_executor(None, self._read, offset, length)

    def _read(self, offset: int, length: int) -> bytes:
        parts = [self._head[offset : offset + length]]
        length -= len(parts[0])
        offset = max(0, offset - len(self._head))
        for name, size in self._files:
            if length > 0 and offset < size:
                with as_damage(str(self._database / name)), (self._path / name).open("rb") as file:
                    file.seek(offset)
                    part = file.read(min(length, size - offset))
                parts.append(part)
                length -= len(part)
            offset = max(0, offset - size)
        return b"".join(parts)

    def close(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


class CheckpointSink:
    """Takes the stream apart into files again, and proves that they are whole.

    Nothing in the stream is trusted: neither names nor sizes, nor the bytes.
    """

    def __init__(self, path: Path, meta: SnapshotMeta, options: RocksOptions) -> None:
        path.mkdir()
        self.path, self._meta, self._options = path, meta, options
        self.sums: Sums | None = None  # once it is finished
        self._head = b""
        self._expected: list[tuple[str, FileSum]] | None = None  # as the manifest says
        self._next = 0  # of the expected files
        self._file: Any = None
        self._left = 0
        self._hash = hashlib.blake2b(digest_size=HASH_BYTES)
        self._aborted = False

    async def write(self, data: bytes) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._write, data)

    def _write(self, data: bytes) -> None:
        if self._expected is None:
            self._head += data
            end = self._manifest_end()
            if len(self._head) < end:
                return
            self._expected = read_manifest(self._head[HEAD.size : end], self._meta)
            self._check_room()
            data, self._head = self._head[end:], b""
        while self._next_file() and data:
            part = data[: self._left]
            self._file.write(part)
            self._hash.update(part)
            self._left -= len(part)
            data = data[len(part) :]
        if data:
            raise ValueError("the stream goes on after its last file")

    def _manifest_end(self) -> int:
        if len(self._head) < HEAD.size:
            return HEAD.size
        magic, length = HEAD.unpack_from(self._head)
        if magic != MAGIC:
            raise ValueError(f"the stream does not begin with {MAGIC.decode()}")
        if length > MAX_MANIFEST_BYTES:
            raise ValueError(f"a manifest of {length} bytes")
        return HEAD.size + int(length)

    def _check_room(self) -> None:
        assert self._expected is not None
        needed, free = sum(known.size for _, known in self._expected), shutil.disk_usage(self.path).free
        if needed > free:
            raise ValueError(
                f"it needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free on this replica's disk"
            )

    def _next_file(self) -> bool:
        """Whether a file is open that wants more bytes; opens and closes as sizes say."""
        assert self._expected is not None
        while self._left == 0:
            self._close_file()
            if self._next == len(self._expected):
                return False
            name, known = self._expected[self._next]
            self._next += 1
            self._left, self._hash = known.size, hashlib.blake2b(digest_size=HASH_BYTES)
            self._file = (self.path / name).open("xb")
        return True

    def _close_file(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        assert self._expected is not None
        name, known = self._expected[self._next - 1]
        try:
            found = self._hash.hexdigest(), hash_tail(self.path / name)
        except DamagedState as error:  # what was just written, and nothing of ours: it may be sent again
            raise ValueError(str(error)) from None
        if found != (known.hash, known.tail):
            raise ValueError(f"{name} does not match its hash in the manifest")

    async def finish(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._finish)

    def _finish(self) -> None:
        if self._expected is None or self._next_file():
            raise ValueError("the stream does not hold what its manifest names")
        try:
            applied = verify_blocks(self.path, self._options, self._pace)
        except DamagedState as error:
            raise ValueError(str(error)) from None
        except Interrupted:
            raise ValueError("it was given up") from None
        if applied != self._meta:
            raise ValueError(f"the database in it is of {applied}, not of {self._meta}")
        self.sums = Sums.create(self.path, dict(self._expected))  # which syncs the directory

    def _pace(self, count: int) -> None:
        if self._aborted:
            raise Interrupted

    def abort(self) -> None:
        self._aborted = True
        if self._file is not None:
            self._file.close()
            self._file = None
        shutil.rmtree(self.path, ignore_errors=True)


def read_manifest(data: bytes, meta: SnapshotMeta) -> list[tuple[str, FileSum]]:
    """The files that a stream will bring. Raises ValueError for what cannot be a checkpoint at `meta`."""
    try:
        manifest = parse_json(data)
        applied = SnapshotMeta(*map(int, manifest["applied"]))
        files = [
            (str(name), FileSum(int(size), str(digest), str(tail)))
            for name, size, digest, tail in manifest["files"]
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"a manifest that cannot be read: {error!r}") from None
    if applied != meta:
        raise ValueError(f"the checkpoint is of {applied}, and was announced as {meta}")
    names = {name for name, _ in files}
    if len(names) != len(files):
        raise ValueError("a manifest that names a file twice")
    for name, known in files:
        if not is_covered(name) or name == SUMS:
            raise ValueError(f"a manifest that names {name!r}, which is no file of a checkpoint")
        if not 0 <= known.size <= MAX_FILE_BYTES:
            raise ValueError(f"a manifest in which {name} has {known.size} bytes")
    if "CURRENT" not in names:
        raise ValueError("a manifest without CURRENT")
    return files
