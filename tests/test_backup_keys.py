"""Encrypted backups: what the store shows of them, whose key opens what, and that no other key changes anything."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from pathlib import Path

import pytest

from bench.live import LiveCluster, attempt
from shardkv.backup.errors import BackupError, Damaged
from shardkv.backup.keys import BackupKey, WrongKey, make_key_file, read_key_file
from shardkv.backup.sealed import MARK, SealedStore, check_place
from tests.test_backup_digests import InMemory

pytestmark = pytest.mark.timeout(180)
ONE, OTHER = BackupKey(bytes(range(32))), BackupKey(bytes(32))
SECRET = b"the quick brown fox " * 50

# ---- objects


@pytest.mark.quick
def test_an_object_opens_under_its_own_name_with_its_own_key_alone() -> None:
    store = InMemory()
    sealed = SealedStore(store, ONE)

    async def story() -> None:
        await sealed.put("chunks/a", SECRET)
        await sealed.put("chunks/b", SECRET)
        assert await sealed.get("chunks/a") == SECRET
        assert store.objects["chunks/a"] != store.objects["chunks/b"], "the same content never looks the same"
        assert b"quick" not in store.objects["chunks/a"]
        with pytest.raises(WrongKey, match=f"chunks/a is encrypted with key {ONE.id}; .* has key {OTHER.id}"):
            await SealedStore(store, OTHER).get("chunks/a")
        store.objects["chunks/a"], store.objects["chunks/b"] = (
            store.objects["chunks/b"],
            store.objects["chunks/a"],
        )
        for name in ("chunks/a", "chunks/b"):
            with pytest.raises(Damaged, match="is another object"):
                await sealed.get(name)
        store.objects["plain"] = SECRET
        with pytest.raises(WrongKey, match="plain is not encrypted"):
            await sealed.get("plain")

    asyncio.run(story())


@pytest.mark.quick
def test_a_byte_that_changed_anywhere_is_noticed() -> None:
    whole = ONE.seal("n", b"value")
    assert ONE.open("here", "n", whole) == b"value"
    for at in range(len(whole)):
        with pytest.raises(BackupError):
            ONE.open("here", "n", whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for size in range(len(whole)):
        with pytest.raises(BackupError):
            ONE.open("here", "n", whole[:size])


@pytest.mark.quick
def test_the_name_of_a_chunk_tells_nothing_of_its_content() -> None:
    plain, one, other = InMemory(), SealedStore(InMemory(), ONE), SealedStore(InMemory(), OTHER)
    names = {store.packed(SECRET)[0] for store in (plain, one, other)}
    assert len(names) == 3 and all(len(name) == 64 for name in names)
    assert one.digest(SECRET) == SealedStore(InMemory(), ONE).digest(SECRET), "what is there is found again"
    assert plain.digest(SECRET) == hashlib.sha256(SECRET).hexdigest()


# ---- places


@pytest.mark.quick
def test_a_place_is_one_key_s_or_plain() -> None:
    async def story() -> None:
        store = InMemory()
        await check_place(SealedStore(store, ONE), writing=False)
        assert not store.objects, "who only reads changes nothing"
        await check_place(SealedStore(store, ONE), writing=True)
        assert json.loads(store.objects[MARK])["key"] == ONE.id
        await check_place(SealedStore(store, ONE), writing=True)
        before = dict(store.objects)
        for writing in (True, False):
            with pytest.raises(WrongKey, match=f"encrypted with key {ONE.id}: --key-file has key {OTHER.id}"):
                await check_place(SealedStore(store, OTHER), writing=writing)
            with pytest.raises(WrongKey, match=f"encrypted with key {ONE.id}: give its --key-file"):
                await check_place(store, writing=writing)
        assert store.objects == before

        # The mark is gone: the objects still say whose they are.
        del store.objects[MARK]
        await SealedStore(store, ONE).put("backups/x.json", b"{}")
        for wrong in (store, SealedStore(store, OTHER)):
            with pytest.raises(WrongKey, match=ONE.id):
                await check_place(wrong, writing=False)

        plain = InMemory()
        plain.objects["backups/x.json"] = b"{}"
        await check_place(plain, writing=True)
        for writing in (True, False):
            with pytest.raises(WrongKey, match="not encrypted: leave --key-file away"):
                await check_place(SealedStore(plain, ONE), writing=writing)
        assert list(plain.objects) == ["backups/x.json"]

    asyncio.run(story())


# ---- key files


@pytest.mark.quick
def test_a_key_file_is_its_owner_s_alone_and_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "key"
    made = make_key_file(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_key_file(file).id == made.id and read_key_file(file).digest(b"x") == made.digest(b"x")
    before = file.read_bytes()
    with pytest.raises(BackupError, match="is there"):
        make_key_file(file)
    assert file.read_bytes() == before


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a backup key"),
        ("hello", "not a backup key"),
        ("shardkv-backup-key-2:" + "0" * 64, "format 2"),
        ("shardkv-backup-key-1:" + "0" * 62, "62 digits, not 64"),
        ("shardkv-backup-key-1:" + "0" * 64 + "\nmore", "not a backup key"),
        ("\xff" * 10_000, "not a backup key|codec"),
    ],
)
def test_a_file_that_is_no_key_is_refused(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "key"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(BackupError, match=why):
        read_key_file(file)


# ---- real processes


def everything_in(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_an_encrypted_backup_is_made_archived_restored_and_deleted_with_its_key_alone(tmp_path: Path) -> None:
    place = tmp_path / "place"
    url = f"file://{place}"
    key, other = ["--key-file", str(tmp_path / "key")], ["--key-file", str(tmp_path / "other")]
    with LiveCluster(groups=1, controllers=1, replicas=1, shards=2) as source:
        rng = random.Random(1)
        ids = [source.json("backup", "key", path[1])["key"] for path in (key, other)]
        with source.clerk() as clerk:
            for n in range(20):
                clerk.put(b"secret-key-%02d" % n, SECRET)
                clerk.put(b"filler-%02d" % n, rng.randbytes(300_000))
        first = source.json("backup", "create", url, *key)
        assert first["key"] == ids[0]
        source.run("backup", "archive", url, "--once", *key)
        source.run("put", "later", "on")
        second = source.json("backup", "create", url, *key)
        assert second["new_chunks"] < second["chunks"], "what is there already is found by its keyed name"
        assert source.json("backup", "verify", url, *key)["id"] == second["id"]
        found = everything_in(place)
        assert not any(b"quick" in data or b"secret-key" in data for data in found.values())

        for wrong, told in ((other, f"encrypted with key {ids[0]}: --key-file has key {ids[1]}"), ([], ids[0])):
            for command in (
                ["backup", "create", url],
                ["backup", "list", url],
                ["backup", "verify", url],
                ["backup", "delete", url, str(first["id"])],
                ["backup", "archive", url, "--once"],
                ["restore", url],
            ):
                done = attempt(source, *command, *wrong)
                assert done.returncode == 1, command
                assert told in done.stderr and done.stderr.count("\n") == 1, (command, done.stderr)
        assert everything_in(place) == found, "and nothing has changed"

        source.run("backup", "delete", url, str(first["id"]), *key)
        assert [each["id"] for each in source.json("backup", "list", url, *key)] == [second["id"]]

    with LiveCluster(groups=1, controllers=1, replicas=1, shards=1) as target:
        target.run("restore", url, *key)
        with target.clerk() as clerk:
            assert clerk.get(b"secret-key-07") == SECRET and clerk.get(b"later") == b"on"
