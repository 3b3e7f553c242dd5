"""A snapshot of a RocksDB database on its way: a checkpoint as one stream of bytes, and files again at the other end.

stream   length of the manifest (u64), the manifest (JSON: names and sizes), then the files in its order
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

from rocksdict import AccessType, Rdict

from shardkv.tables import RocksOptions, read_applied, rocks_options, sync_directory

MANIFEST_LENGTH = struct.Struct("<Q")


class CheckpointSource:
    """A checkpoint as one stream of bytes. Made on the background thread."""

    def __init__(self, path: Path, options: RocksOptions) -> None:
        self._path = path
        database = Rdict(str(path), rocks_options(options, None), access_type=AccessType.read_only())
        self.meta = read_applied(database)  # writes went on while the checkpoint was made
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
            sync_directory(self.path)

        await asyncio.get_running_loop().run_in_executor(None, finish)

    def abort(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        shutil.rmtree(self.path, ignore_errors=True)
