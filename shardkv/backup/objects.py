"""Object stores and directories behind `store.Store`, by obstore (Rust's object_store).

It tries again what may pass (5xx, broken connections); credentials come from where AWS's own
tools look for them in the environment. Imported by `store.open_store`, and nobody else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
from obstore.store import LocalStore, S3Store

from shardkv.backup.errors import BackupError, Damaged, Missing
from shardkv.backup.store import MAX_OBJECT_BYTES, PLACES, Found, Store
from shardkv.raft.private import make_directory, tighten

ATTEMPT_SECONDS = "60s"


class ObjectStore(Store):
    def __init__(self, url: str, inner: Any) -> None:
        super().__init__(url)
        self._inner = inner

    async def put(self, name: str, data: bytes) -> None:
        """Whole, or not at all: both kinds of stores see to that."""
        try:
            await obstore.put_async(self._inner, name, data)
        except (BaseError, OSError) as error:
            raise self._failed(name, "not written", error) from None

    async def put_new(self, name: str, data: bytes) -> bool:
        try:
            # In one request: parts are put together without looking whether the object is there.
            await obstore.put_async(self._inner, name, data, mode="create", use_multipart=False)
            return True
        except (AlreadyExistsError, PreconditionError, FileExistsError):
            return False
        except (BaseError, OSError) as error:
            raise self._failed(name, "not written", error) from None

    async def get(self, name: str) -> bytes:
        try:
            result = await obstore.get_async(self._inner, name)
            if result.meta["size"] > MAX_OBJECT_BYTES:
                raise Damaged(
                    f"{self.url}: {name} has {result.meta['size']:,} bytes: no object of ours is so large"
                )
            return bytes(await result.bytes_async())
        except (NotFoundError, FileNotFoundError):
            raise Missing(f"{self.url}: {name} is missing") from None
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


def open_object_store(url: str, endpoint: str, region: str, create: bool) -> ObjectStore:
    """See `store.open_store`. Raises BackupError."""
    try:
        if url.startswith("file://"):
            path = Path(url.removeprefix("file://"))
            if not path.is_absolute():
                raise BackupError(f"{url}: a path after file:// begins with /")
            if create:
                make_directory(path)
            elif not path.is_dir():
                raise BackupError(f"{url}: there is no such directory, so no backup is in it")
            for below in PLACES:  # the directory itself may be shared with others; these are ours
                tighten(path / below, deep=False)
            return ObjectStore(url, LocalStore(path, automatic_cleanup=False, mkdir=True))
        if url.startswith("s3://"):
            options: dict[str, Any] = {}
            if endpoint:
                # Servers on one's own machines are spoken to without TLS and by path, if they are named so.
                options |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
            if region:
                options["region"] = region
            return ObjectStore(
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
