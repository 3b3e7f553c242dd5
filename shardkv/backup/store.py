"""Where backups lie: an object store, or a directory. What fails there says which object it was.

    chunks/ab/<digest>                        compressed; named by what is in it: SHA-256, or a keyed digest (`keys.py`)
    backups/<id>.json                         a backup: which chunks make it
    pending/<id>                              one that is being made: nothing is cleaned up meanwhile
    cleaning/now                              a deletion cleans up: no backup begins meanwhile
    archive/<cluster>/<gid>-<incarnation>/<first>-<last>-<digest>   the log of a group, entries first to last
    archive/<cluster>/<gid>-<incarnation>/watermark                 how far that goes

    encryption.json                           the id of the key that seals all of these, where there is one (`sealed.py`)

What puts them there is in `objects.py`.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from shardkv import shardkv_pb2 as pb
from shardkv.backup.errors import Damaged
from shardkv.raft.protocol.types import Kind

PLACES = ("chunks", "backups", "pending", "cleaning", "archive")  # the first part of every object's name
MAX_CONTENT_BYTES = 128 << 20  # of one chunk or segment: 8 MiB, and one entry or pair that may be larger
MAX_OBJECT_BYTES = 512 << 20  # of any object: a manifest of some terabytes
LEVEL = 1  # of zlib: more costs more time than the space is worth


@dataclass(frozen=True, slots=True)
class Found:
    name: str
    size: int
    changed: datetime.datetime


class Store(ABC):
    """One place for the backups of one cluster. Get it from `open_store`. Every call may raise BackupError."""

    key_id = ""  # of the key that seals what goes in here; empty: it is stored as it is

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    async def put(self, name: str, data: bytes) -> None:
        """Whole, or not at all."""

    @abstractmethod
    async def put_new(self, name: str, data: bytes) -> bool:
        """As `put`, but only where there is no such object: False where there is one. One of two at once wins."""

    @abstractmethod
    async def get(self, name: str) -> bytes:
        """Raises Missing where there is no such object."""

    @abstractmethod
    async def delete(self, name: str) -> None:
        """It may be gone already."""

    @abstractmethod
    def list(self, prefix: str) -> AsyncIterator[Found]:
        """All objects below a prefix, in no order."""

    @property
    def plain(self) -> Store:
        """The store below, where this one seals what goes into it; else this one."""
        return self

    # ---- chunks

    def digest(self, content: bytes) -> str:
        """What tells a content from every other one, in 64 hexadecimal digits."""
        return hashlib.sha256(content).hexdigest()

    def packed(self, content: bytes) -> tuple[str, bytes]:
        """(digest, what is stored)."""
        return self.digest(content), zlib.compress(content, LEVEL)

    def unpacked(self, name: str, digest: str, stored: bytes) -> bytes:
        """Raises Damaged where the content is not what its name says, or larger than a chunk can be."""
        unpacker = zlib.decompressobj()
        try:
            content = unpacker.decompress(stored, MAX_CONTENT_BYTES)
        except zlib.error as error:
            raise Damaged(f"{self.url}: {name} is damaged: {error}") from None
        if unpacker.unconsumed_tail:
            raise Damaged(f"{self.url}: {name} is damaged: it holds more than {MAX_CONTENT_BYTES:,} bytes")
        if not unpacker.eof:
            raise Damaged(f"{self.url}: {name} is damaged: it is cut short")
        if self.digest(content) != digest:
            raise Damaged(f"{self.url}: {name} is damaged: it is not what its name says")
        return content

    async def get_chunk(self, digest: str) -> bytes:
        """Raises Damaged where the content does not match its name."""
        name = chunk_name(digest)
        return await asyncio.to_thread(self.unpacked, name, digest, await self.get(name))


def chunk_name(digest: str) -> str:
    return f"chunks/{digest[:2]}/{digest}"


def log_entries(where: str, content: bytes) -> Sequence[pb.LoggedEntry]:
    """Of a chunk of a log. Raises Damaged, with `where`."""
    try:
        entries = pb.LogChunk.FromString(content).entries
        for entry in entries:
            Kind(entry.kind)
    except (DecodeError, ValueError) as error:
        raise Damaged(f"{where} is damaged: {error}") from None
    return entries
