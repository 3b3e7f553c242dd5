"""Backups by count and digest: what was written is what two replicas hold, and a list of chunks is whole."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench.live import LiveCluster, attempt
from shardkv.backup import catalog
from shardkv.backup.chunks import Chunker
from shardkv.backup.confirm import SourceDiffers, confirm
from shardkv.backup.create import Backup
from shardkv.backup.errors import BackupError, Damaged, Missing
from shardkv.backup.manifest import GroupPart, Manifest, RangePart, name_of
from shardkv.backup.source import GroupView, SourceLost
from shardkv.backup.store import Found, Store, chunk_name
from shardkv.backup.whole import Wholeness
from shardkv.observe.compare import Begun, GroupCheck, Said
from shardkv.state.digests import Digest, Digester, Part
from shardkv.storage.memory import MemoryEngine, MemoryView
from tests.sim.world import Process, World, in_world

# ---- pure: who confirms it

PART = Part(4, b"", b"")
WHOLE: dict[Part | None, Digest] = {PART: Digest(100, b"w"), None: Digest(5, b"r")}
HALF: dict[Part | None, Digest] = {PART: Digest(50, b"h"), None: Digest(5, b"r")}
THIRD: dict[Part | None, Digest] = {PART: Digest(33, b"t"), None: Digest(5, b"r")}
SILENT = Said(why_not="no answer")


def said(**replicas: Said) -> GroupCheck:
    return GroupCheck(1, Begun(b"i", 7, 1, (PART,), tuple(replicas)), replicas)


@pytest.mark.quick
def test_what_a_majority_holds_is_confirmed_and_who_differs_is_named() -> None:
    all_same = confirm(1, "a", WHOLE, said(a=Said(WHOLE), b=Said(WHOLE), c=SILENT))
    assert all_same.replicas == ["a", "b"] and not all_same.alone and not all_same.differing
    one_off = confirm(1, "a", WHOLE, said(a=Said(WHOLE), b=Said(WHOLE), c=Said(HALF)))
    assert one_off.replicas == ["a", "b"] and list(one_off.differing) == ["c"]
    assert "shard 4: 50 pairs with digest 68, the others have 100 with 77" in one_off.differing["c"]


@pytest.mark.quick
def test_a_source_that_differs_from_the_majority_is_left() -> None:
    with pytest.raises(SourceDiffers, match="at a differs from the others in shard 4: 50 pairs") as left:
        confirm(1, "a", HALF, said(a=Said(HALF), b=Said(WHOLE), c=Said(WHOLE)))
    assert left.value.address == "a"
    with pytest.raises(SourceDiffers):  # it computes right what it did not give
        confirm(1, "a", HALF, said(a=Said(WHOLE), b=Said(WHOLE)))


@pytest.mark.quick
@pytest.mark.parametrize(
    "found",
    [
        said(a=Said(HALF), b=Said(WHOLE)),
        said(a=Said(HALF), b=Said(WHOLE), c=Said(THIRD)),
        said(a=Said(HALF), b=Said(WHOLE), c=SILENT),
        said(a=Said(WHOLE)),  # one replica, and not even it says what was written
    ],
)
def test_without_a_majority_nothing_is_called_a_backup(found: GroupCheck) -> None:
    with pytest.raises(BackupError, match="no majority") as refused:
        confirm(1, "a", HALF, found)
    assert not isinstance(refused.value, SourceDiffers) and "group 1" in str(refused.value)


@pytest.mark.quick
def test_a_replica_that_did_not_answer_confirms_nothing() -> None:
    assert "has only one" in confirm(1, "a", WHOLE, said(a=Said(WHOLE))).alone
    assert "b: no answer" in confirm(1, "a", WHOLE, said(a=Said(WHOLE), b=SILENT)).alone
    with pytest.raises(SourceLost):
        confirm(1, "a", WHOLE, said(a=SILENT, b=Said(WHOLE)))


# ---- pure: whether a list of chunks is whole

PAIRS = [(b"dk%04d" % n, b"%d" % n * 20) for n in range(300)] + [(b"mclock", b"1"), (b"s1", b"2")]


def chunked(pairs: list[tuple[bytes, bytes]]) -> list[bytes]:
    chunker = Chunker(target_bytes=1500, max_bytes=6000)
    return [*chunker.add(pairs), *chunker.rest()]


def part_of(pairs: list[tuple[bytes, bytes]]) -> GroupPart:
    parts = [Part(1, b"", b"k0100"), Part(2, b"k0100", b"")]
    digester = Digester(parts)
    digester.add(pairs)
    size = sum(len(key) + len(value) for key, value in pairs)
    part = GroupPart(
        7, 2, "0f" * 8, [InMemory().packed(chunk)[0] for chunk in chunked(pairs)], len(pairs), size
    )
    part.last = part.index
    part.ranges = [RangePart.of(*found) for found in zip(parts, digester.parts(), strict=True)]
    part.rest_pairs, part.rest_digest = digester.rest().pairs, digester.rest().value.hex()
    return part


def read(part: GroupPart, chunks: list[bytes]) -> None:
    whole = Wholeness("b-1", 3, part)
    for n, chunk in enumerate(chunks):
        whole.add(f"chunk-{n}", chunk)
    whole.finish()


@pytest.mark.quick
def test_chunks_that_are_all_of_it_pass() -> None:
    read(part_of(PAIRS), chunked(PAIRS))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda chunks: chunks[1:], "group 3, shard 1: its chunks hold .* pairs, 100 were backed up"),
        (lambda chunks: chunks[:2] + chunks[3:], "group 3, shard 1: its chunks hold"),
        (lambda chunks: chunks[:-1], "not whole"),
        (lambda chunks: [*chunks[:3], *chunks[2:]], "chunk-3 is out of order, or comes a second time"),
        (lambda chunks: [chunks[1], chunks[0], *chunks[2:]], "chunk-1 is out of order"),
        (lambda chunks: chunks[: len(chunks) // 2], "shard 2: its chunks hold"),
        (
            lambda chunks: chunked([*PAIRS[:50], (PAIRS[50][0], b"other"), *PAIRS[51:]]),
            "shard 1: .* other pairs",
        ),
        (lambda chunks: chunked([*PAIRS[:-1], (PAIRS[-1][0], b"x")]), "its own records: .* other pairs"),
        (lambda chunks: [], "shard 1: its chunks hold 0 pairs"),
    ],
)
def test_chunks_that_are_not_all_of_it_are_refused_by_name(
    damage: Callable[[list[bytes]], list[bytes]], message: str
) -> None:
    with pytest.raises(Damaged, match=message) as refused:
        read(part_of(PAIRS), damage(chunked(PAIRS)))
    assert "backup b-1: group 3" in str(refused.value)


@pytest.mark.quick
def test_a_manifest_of_another_format_is_refused_by_its_number() -> None:
    data = Manifest("id", "cluster", 3, 1000, 2, {1: part_of(PAIRS)}).encode()
    assert Manifest.decode("x", data).groups[1] == part_of(PAIRS)
    body = json.loads(data)["backup"] | {"format": 2}
    text = json.dumps(body, sort_keys=True)
    old = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "backup": body}).encode()
    with pytest.raises(Damaged, match="x has format 2, and this version of shardkv reads format 4"):
        Manifest.decode("x", old)


# ---- in simulation: an engine whose scans end early, and call that the end


class InMemory(Store):
    def __init__(self) -> None:
        super().__init__("memory:")
        self.objects: dict[str, bytes] = {}

    async def put(self, name: str, data: bytes) -> None:
        self.objects[name] = data

    async def put_new(self, name: str, data: bytes) -> bool:
        if name in self.objects:
            return False
        self.objects[name] = data
        return True

    async def get(self, name: str) -> bytes:
        if name not in self.objects:
            raise Missing(f"{name} is missing")
        return self.objects[name]

    async def delete(self, name: str) -> None:
        self.objects.pop(name, None)

    async def list(self, prefix: str) -> AsyncIterator[Found]:
        for name, data in list(self.objects.items()):
            if name.startswith(prefix):
                yield Found(name, len(data), datetime.now(UTC))


class EndsEarly(MemoryView):
    """Half of the data is not there, and no error says so."""

    def scan(self, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        for key, value in super().scan(start):
            if not b"dk5" <= key < b"e":
                yield key, value


def end_scans_early(process: Process) -> None:
    engine = process.group.machine.engine
    assert isinstance(engine, MemoryEngine)
    sound = engine.view
    engine.view = lambda: EndsEarly(engine.applied, sound()._pairs)  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated loop has none, and those of a store only save time."""

    async def inline(work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", inline)


async def filled(world: World) -> None:
    clerk = world.clerk()
    await asyncio.gather(*(clerk.put(b"k%d" % n, b"value %d" % n) for n in range(100)))


def backup_of(world: World, store: Store, seed: int) -> Backup:
    return Backup(world.controller, world._dialer, store, Random(seed))


@pytest.mark.parametrize("seed", range(4))
def test_a_replica_whose_scans_end_early_is_left_for_a_sound_one(seed: int) -> None:
    begun_anew: list[str] = []

    @in_world(groups=(1,), controllers=1, seed=seed)
    async def story(world: World) -> None:
        await filled(world)
        damaged = world.rng.choice(world.of(1))
        end_scans_early(damaged)
        store = InMemory()
        work = backup_of(world, store, seed)
        tried: list[str] = []
        copy = work._copy

        async def noted(view: GroupView, *more: Any) -> None:
            tried.append(view.address)
            await copy(view, *more)

        work._copy = noted  # type: ignore[method-assign, assignment]
        work._on_note = lambda line: begun_anew.extend([line] if "begun anew" in line else [])
        manifest = await work.create()
        # An operator hears why it takes twice as long.
        assert all("attempt 2 of 5" in line and damaged.address in line for line in begun_anew)
        assert len(begun_anew) == (tried[0] == damaged.address)
        assert sum(found.pairs for found in manifest.groups[1].ranges) == 100
        assert len(manifest.groups[1].replicas) == 2 and damaged.address not in manifest.groups[1].replicas
        (warning,) = work.warnings
        assert damaged.address in warning and "shard" in warning
        await catalog.verify(store, manifest)

    story()


@in_world(groups=(1,), controllers=1, replicas=2)
async def test_where_nothing_tells_who_is_right_no_backup_is_made(world: World) -> None:
    await filled(world)
    end_scans_early(world.of(1)[0])
    store = InMemory()
    with pytest.raises(BackupError, match="no majority of g1-1:1, g1-2:1"):
        await backup_of(world, store, 1).create()
    assert not [name for name in store.objects if name.startswith("backups/")]


@in_world(groups=(1, 2), controllers=1)
async def test_a_backup_says_whose_digests_are_those_of_its_chunks(world: World) -> None:
    await filled(world)
    store = InMemory()
    for number in range(2):  # the second one reuses the chunks of the first
        work = backup_of(world, store, number)
        manifest = await work.create()
        assert [len(part.replicas) for part in manifest.groups.values()] == [3, 3] and not work.warnings
        assert sum(found.pairs for part in manifest.groups.values() for found in part.ranges) == 100
        await catalog.verify(store, manifest)
    part = manifest.groups[1]
    for changed in (
        replace(part, chunks=part.chunks[1:]),
        replace(part, chunks=[*part.chunks, part.chunks[-1]]),
        replace(part, last=part.last + 1),
    ):
        manifest.groups[1] = changed
        with pytest.raises(Damaged, match="group 1"):
            await catalog.verify(store, manifest)


@in_world(groups=(1,), controllers=1, replicas=1)
async def test_a_group_with_one_replica_is_backed_up_and_called_unconfirmed(world: World) -> None:
    await filled(world)
    work = backup_of(world, InMemory(), 1)
    manifest = await work.create()
    assert manifest.groups[1].replicas == ["g1-1:1"]
    assert work.warnings == ["group 1: no second replica confirmed it, for the group has only one"]


# ---- as processes


def test_the_command_line_refuses_a_manifest_that_lists_too_few_chunks(tmp_path: Path) -> None:
    with LiveCluster(groups=1, replicas=3, controllers=1, shards=2) as cluster:
        with cluster.clerk() as clerk, clerk.batch() as batch:
            for n in range(5000):
                batch.put(bytes([n % 256]) + b"/%d" % n, Random(n).randbytes(500))
        url = f"file://{tmp_path}"
        made = json.loads(attempt(cluster, "backup", "create", url, "-o", "json").stdout)
        assert len(made["replicas"]["1"]) == 3 and made["warnings"] == []
        sound = attempt(None, "backup", "verify", url)
        assert sound.returncode == 0 and "the counts and digests of their shards" in sound.stdout
        path = tmp_path / name_of(made["id"])
        manifest = Manifest.decode("it", path.read_bytes())
        whole = list(manifest.groups[1].chunks)
        assert len(whole) > 1 and (tmp_path / chunk_name(whole[0])).exists()
        for chunks in (whole[:-1], whole[1:], [*whole[:1], *whole], whole[: len(whole) // 2]):
            manifest.groups[1].chunks = chunks
            path.write_bytes(manifest.encode())
            for command in (["backup", "verify", url], ["restore", url]):
                refused = attempt(cluster, *command)
                assert refused.returncode == 1 and f"backup {made['id']}: group 1" in refused.stderr
