"""Where backups lie: an object store, or a directory. What fails there says which object it was.

    chunks/ab/<sha256>                        compressed; named by what is in it
    backups/<id>.json                         a backup: which chunks make it
    pending/<id>                              one that is being made: nothing is cleaned up meanwhile
    archive/<cluster>/<gid>/<first>-<last>-<sha256>   the log of a group, entries first to last
    archive/<cluster>/<gid>/watermark                 up to when that is whole

The library is obstore (Rust's object_store): S3 and what speaks like it, and files. It tries
again what may pass (5xx, broken connections); credentials come from where AWS's own tools
look for them in the environment.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import obstore
    from obstore.exceptions import BaseError, NotFoundError
    from obstore.store import LocalStore, S3Store
except ImportError:  # the extra `backup` is not installed; open_store says so
    obstore = None

ATTEMPT_SECONDS = "60s"
LEVEL = 1  # of zlib: more costs more time than the space is worth


class BackupError(Exception):
    """A backup cannot be made or used; the text says why, and names the object if there is one."""


class Damaged(BackupError):
    """An object is not what was put there."""


@dataclass(frozen=True, slots=True)
class Found:
    name: str
    size: int
    changed: datetime.datetime


class Store:
    """One place for the backups of one cluster. Get it from `open_store`."""

    def __init__(self, url: str, inner: Any) -> None:
        self.url, self._inner = url, inner

    async def put(self, name: str, data: bytes) -> None:
        """Whole, or not at all: both kinds of stores see to that."""
        try:
            await obstore.put_async(self._inner, name, data)
        except (BaseError, OSError) as error:
            raise self._failed(name, "not written", error) from None

    async def get(self, name: str) -> bytes:
        try:
            result = await obstore.get_async(self._inner, name)
            return bytes(await result.bytes_async())
        except (NotFoundError, FileNotFoundError):
            raise Damaged(f"{self.url}: {name} is missing") from None
        except (BaseError, OSError) as error:
            raise self._failed(name, "not read", error) from None

    async def delete(self, name: str) -> None:
        try:
            await obstore.delete_async(self._inner, name)
        except (NotFoundError, FileNotFoundError):
            pass  # somebody else was faster
        except (BaseError, OSError) as error:
            raise self._failed(name, "not deleted", error) from None

    async def list(self, prefix: str) -> AsyncIterator[Found]:
        try:
            async for page in obstore.list(self._inner, prefix):
                for item in page:
                    yield Found(item["path"], item["size"], item["last_modified"])
        except (BaseError, OSError) as error:
            raise self._failed(prefix, "not listed", error) from None

    def _failed(self, name: str, what: str, error: Exception) -> BackupError:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return BackupError(f"{self.url}: {name} was {what}: {first}")

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
    if obstore is None:
        raise BackupError("backups need the package obstore: pip install 'shardkv[backup]'")
    try:
        if url.startswith("file://"):
            path = Path(url.removeprefix("file://"))
            if not path.is_absolute():
                raise BackupError(f"{url}: a path after file:// begins with /")
            return Store(url, LocalStore(path, automatic_cleanup=False, mkdir=True))
        if url.startswith("s3://"):
            options: dict[str, Any] = {}
            if endpoint:
                # Servers on one's own machines are spoken to without TLS and by path, if they are named so.
                options |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
            if region:
                options["region"] = region
            return Store(
                url,
                S3Store.from_url(
                    url,
                    **options,
                    client_options={"allow_http": endpoint.startswith("http://"), "timeout": ATTEMPT_SECONDS},
                ),
            )
    except (BaseError, ValueError, OSError) as error:
        raise BackupError(f"{url}: {error}") from None
    raise BackupError(f"{url}: give file:///directory or s3://bucket/prefix")
