"""Where backups lie: an object store, or a directory. What fails there says which object it was.

    chunks/ab/<sha256>                        compressed; named by what is in it
    backups/<id>.json                         a backup: which chunks make it
    pending/<id>                              one that is being made: nothing is cleaned up meanwhile
    cleaning/now                              a deletion cleans up: no backup begins meanwhile
    archive/<cluster>/<gid>-<incarnation>/<first>-<last>-<sha256>   the log of a group, entries first to last
    archive/<cluster>/<gid>-<incarnation>/watermark                 how far that goes

What puts them there is in `objects.py`.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass

from shardkv.backup.errors import BackupError, Damaged

PLACES = ("chunks", "backups", "pending", "cleaning", "archive")  # the first part of every object's name
LEVEL = 1  # of zlib: more costs more time than the space is worth


@dataclass(frozen=True, slots=True)
class Found:
    name: str
    size: int
    changed: datetime.datetime


class Store(ABC):
    """One place for the backups of one cluster. Get it from `open_store`. Every call may raise BackupError."""

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

    # ---- chunks

    async def get_chunk(self, digest: str) -> bytes:
        """Raises Damaged where the content does not match its name."""
        name = chunk_name(digest)
        return await asyncio.to_thread(unpacked, self.url, name, digest, await self.get(name))


def chunk_name(digest: str) -> str:
    return f"chunks/{digest[:2]}/{digest}"


def packed(content: bytes) -> tuple[str, bytes]:
    """(digest, what is stored)."""
    return hashlib.sha256(content).hexdigest(), zlib.compress(content, LEVEL)


def unpacked(url: str, name: str, digest: str, stored: bytes) -> bytes:
    """Raises Damaged."""
    try:
        content = zlib.decompress(stored)
    except zlib.error as error:
        raise Damaged(f"{url}: {name} is damaged: {error}") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise Damaged(f"{url}: {name} is damaged: it is not what its name says")
    return content


def open_store(url: str, endpoint: str = "", region: str = "") -> Store:
    """A store by its URL, `file:///…` or `s3://bucket/prefix`. Raises BackupError."""
    try:
        # Here, for it is large, and most commands do without.
        from shardkv.backup.objects import open_object_store
    except ImportError:
        raise BackupError("backups need the package obstore: pip install 'shardkv[backup]'") from None
    return open_object_store(url, endpoint, region)
