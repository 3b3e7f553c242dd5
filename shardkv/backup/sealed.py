"""A store whose objects are sealed with a key, and the rule that one place holds objects of one key alone, or plain ones.

    encryption.json     {"format": 1, "cipher": "AES-256-GCM", "key": id}: the place is that key's; plain, as it must be

The first run that writes with a key puts that mark. Every command looks at it before it does anything else,
so that a wrong or missing key is told in one line and changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from shardkv.backup.errors import Damaged, Missing
from shardkv.backup.fields import hexadecimal
from shardkv.backup.keys import ID_BYTES, BackupKey, WrongKey, key_id_of
from shardkv.backup.store import Found, Store
from shardkv.wire.bounded_json import parse_json

MARK = "encryption.json"
FORMAT = 1
CIPHER = "AES-256-GCM"
HOLDING = ("backups/", "archive/", "chunks/")  # where objects lie that a key has sealed, or none has


class SealedStore(Store):
    """Seals what goes into another store, and opens what comes out. Every call may raise WrongKey, Damaged."""

    def __init__(self, inner: Store, key: BackupKey) -> None:
        super().__init__(inner.url)
        self._inner, self._key = inner, key
        self.key_id = key.id

    def digest(self, content: bytes) -> str:
        return self._key.digest(content)

    async def put(self, name: str, data: bytes) -> None:
        await self._inner.put(name, self._key.seal(name, data))

    async def put_new(self, name: str, data: bytes) -> bool:
        return await self._inner.put_new(name, self._key.seal(name, data))

    async def get(self, name: str) -> bytes:
        return self._key.open(self.url, name, await self._inner.get(name))

    async def delete(self, name: str) -> None:
        await self._inner.delete(name)

    def list(self, prefix: str) -> AsyncIterator[Found]:
        return self._inner.list(prefix)

    @property
    def plain(self) -> Store:
        return self._inner


async def check_place(store: Store, writing: bool) -> None:
    """Whether the place is this store's key's, or plain where the store has none; `writing` makes it so if it is new.

    Raises WrongKey, BackupError.
    """
    found = await _key_of_place(store.plain)
    if found is None and store.key_id and writing:
        body = {"format": FORMAT, "cipher": CIPHER, "key": store.key_id}
        if await store.plain.put_new(MARK, json.dumps(body).encode()):
            return
        found = await _key_of_place(store.plain)  # another run was faster
    if found is None or found == store.key_id:
        return
    if not found:
        raise WrongKey(
            f"{store.url} holds objects that are not encrypted: leave --key-file away, or give another URL"
        )
    given = f"--key-file has key {store.key_id}" if store.key_id else "give its --key-file"
    raise WrongKey(f"{store.url} is encrypted with key {found}: {given}")


async def _key_of_place(plain: Store) -> str | None:
    """The id of the key; empty for a plain place, None for an empty one."""
    try:
        data = await plain.get(MARK)
    except Missing:
        return await _key_of_objects(plain)
    try:
        body = parse_json(data, 4096)
        if not isinstance(body, dict) or (body.get("format"), body.get("cipher")) != (FORMAT, CIPHER):
            raise ValueError("this version of shardkv cannot read it")
        return hexadecimal(body.get("key"), 2 * ID_BYTES)
    except ValueError as error:
        raise Damaged(f"{plain.url}: {MARK} is damaged: {error}") from None


async def _key_of_objects(plain: Store) -> str | None:
    """By any object that is there: a place of an older version has no mark, and a mark may be lost."""
    for prefix in HOLDING:
        async for item in plain.list(prefix):
            return key_id_of(plain.url, item.name, await plain.get(item.name)) or ""
    return None
