"""Backups: made while the cluster is written to, cut off, damaged, and put into clusters of other shapes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.live import SHARDKV, Appenders, LiveCluster, attempt, free_port_base
from shardkv.backup import create
from shardkv.backup import source as source_module
from shardkv.backup.chunks import Chunker, pairs_of
from shardkv.backup.errors import BackupError, Damaged
from shardkv.backup.manifest import GroupPart, Manifest, moment
from shardkv.backup.open import open_store
from shardkv.backup.source import Compacted
from shardkv.backup.store import LEVEL, chunk_name
from shardkv.client import BeingRestored
from shardkv.shardctrler.client import ControllerClient
from shardkv.wire.dialer import TcpDialer

pytestmark = pytest.mark.timeout(180)
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}

# ---- pure

Pairs = list[tuple[bytes, bytes]]


def chunks_of(pairs: Pairs, page: int = 100) -> list[bytes]:
    chunker = Chunker(target_bytes=2000, max_bytes=8000)
    chunks: list[bytes] = []
    for start in range(0, len(pairs), page):
        chunks += chunker.add(pairs[start : start + page])
    return [*chunks, *chunker.rest()]


@pytest.mark.quick
@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.binary(max_size=20), st.binary(max_size=300), max_size=200), st.integers(1, 50))
def test_chunks_hold_every_pair_and_do_not_depend_on_pages(found: dict[bytes, bytes], page: int) -> None:
    pairs = sorted(found.items())
    chunks = chunks_of(pairs, page)
    assert [pair for chunk in chunks for pair in pairs_of(chunk)] == pairs
    assert chunks == chunks_of(pairs, 7)


@pytest.mark.quick
def test_a_change_of_one_pair_changes_few_chunks() -> None:
    rng = random.Random(1)
    pairs = [(b"key-%06d" % n, rng.randbytes(100)) for n in range(5000)]
    before = chunks_of(pairs)
    sizes = [sum(map(len, (part for pair in pairs_of(chunk) for part in pair))) for chunk in before]
    assert 1000 < sum(sizes) / len(sizes) < 4000, "about the size that was asked for"
    changed = [*pairs]
    changed[2500] = (pairs[2500][0], rng.randbytes(100))
    del changed[100]
    changed.insert(4000, (b"key-003999x", b"new"))
    assert len(set(before) - set(chunks_of(changed))) <= 4


@pytest.mark.quick
def test_a_manifest_that_is_not_what_was_written_is_refused_by_name() -> None:
    part = GroupPart(7, 2, "0f" * 8, ["a" * 64], 1, 10, ["b" * 64], 9)
    data = Manifest("id", "cluster", 3, 1000, 2, {1: part}).encode()
    assert Manifest.decode("x", data).groups[1] == part
    for damaged in (
        data.replace(b'"last": 9', b'"last": 8'),
        data[:-5],
        b"",
        b"[]",
        b'{"backup": {}, "sha256": ""}',
    ):
        with pytest.raises(Damaged, match="the name is damaged"):
            Manifest.decode("the name", damaged)


@pytest.mark.quick
@pytest.mark.parametrize("url", ["ftp://x/y", "file://relative", "/tmp", "s3://"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(BackupError):
        open_store(url)


# ---- places to put them


@contextmanager
def object_server() -> Iterator[str]:
    """The address of a server that speaks S3's HTTP API."""
    port = free_port_base(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        endpoint, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT"), timeout=10)
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        yield endpoint
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with object_server() as endpoint:
        yield endpoint


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[str]]:
    """(URL, the options that go with it)"""
    if request.param == "file":
        return f"file://{tmp_path}/backups", []
    return f"s3://bucket/{tmp_path.name}", ["--endpoint", request.getfixturevalue("s3")]


@pytest.fixture(scope="module")
def source() -> Iterator[LiveCluster]:
    with LiveCluster(groups=2, replicas=3, controllers=1, shards=4) as cluster:
        yield cluster


def shardkv(cluster: LiveCluster | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    return attempt(cluster, *arguments, **CREDENTIALS)


def done(cluster: LiveCluster | None, *arguments: str) -> Any:
    result = shardkv(cluster, *arguments, "-o", "json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def everything(cluster: LiveCluster) -> dict[bytes, bytes]:
    with cluster.clerk() as clerk:
        return dict(clerk.scan())


def fill(cluster: LiveCluster, count: int, size: int = 1000, seed: int = 1) -> None:
    rng = random.Random(seed)
    with cluster.clerk() as clerk:
        for start in range(0, count, 500):
            with clerk.batch() as batch:
                for n in range(start, min(count, start + 500)):
                    batch.put(bytes([0x21 + 90 * n // count]) + b"/key-%06d" % n, rng.randbytes(size))


def now() -> str:
    return datetime.now(UTC).isoformat()


# ---- stories


def test_a_backup_goes_into_a_cluster_of_another_shape_and_the_next_one_writes_little(
    source: LiveCluster, place: tuple[str, list[str]]
) -> None:
    url, options = place
    fill(source, 8000)
    first = done(source, "backup", "create", url, *options)
    assert first["new_chunks"] >= 4 and first["groups"] == 2
    with source.clerk() as clerk:
        clerk.put(b"\x21/key-000000", b"changed")
    second = done(source, "backup", "create", url, *options)
    assert second["new_chunks"] <= 4 and second["written_bytes"] < first["written_bytes"] / 2
    expected = everything(source)
    assert [found["id"] for found in done(None, "backup", "list", url, *options)] == [first["id"], second["id"]]
    assert done(None, "backup", "verify", url, *options)["id"] == second["id"]
    with LiveCluster(groups=3, replicas=1, controllers=1, shards=7) as other:
        restored = done(other, "restore", url, *options)
        assert restored["keys"] == len(expected)
        assert everything(other) == expected
        again = shardkv(other, "restore", url, *options)
        assert again.returncode == 1 and "into an empty one" in again.stderr
    done(None, "backup", "delete", url, first["id"], *options)
    assert done(None, "backup", "verify", url, second["id"], *options)["id"] == second["id"]
    missing = shardkv(None, "backup", "verify", url, first["id"], *options)
    assert missing.returncode == 1 and first["id"] in missing.stderr


def test_a_backup_is_one_moment_while_writers_go_on(source: LiveCluster, tmp_path: Path) -> None:
    """Each writer's appends go to shards in turn: what is in the backup of each is a prefix of what it did."""
    url = f"file://{tmp_path}"
    with source.clerk() as clerk:
        writers = Appenders(clerk, threads=4).start()
        try:
            done(source, "backup", "create", url)
        finally:
            assert writers.stop() > 0
    with LiveCluster(groups=1, replicas=1, controllers=1, shards=1) as other:
        done(other, "restore", url)
        found = everything(other)
    for number, appended in enumerate(writers.acknowledged):
        there = [
            any(token == part for part in found.get(key, b"").split(b";"))
            for key, token in ((key, token[:-1]) for key, token in appended)
        ]
        assert there == sorted(there, reverse=True), f"writer {number}: a later write without an earlier one"


def test_a_point_in_time_is_restored_from_the_archive(
    source: LiveCluster, place: tuple[str, list[str]]
) -> None:
    url, options = place
    with source.clerk() as clerk:
        clerk.put("clock", "0")
        for n in range(1, 4):
            clerk.delete(f"only-{n}")
        done(source, "backup", "create", url, *options)
        moments = []
        for n in range(1, 4):
            clerk.put("clock", str(n))
            clerk.put(f"only-{n}", "x")
            wait_past(source)
            moments.append(now())
            wait_past(source)
            assert shardkv(source, "backup", "archive", url, "--once", *options).returncode == 0
    with LiveCluster(groups=1, replicas=1, controllers=1, shards=2) as other:
        done(other, "restore", url, "--at", moments[1], *options)
        found = everything(other)
        assert found[b"clock"] == b"2" and b"only-2" in found and b"only-3" not in found
    late = shardkv(source, "restore", url, "--at", "2999-01-01", *options)
    assert late.returncode == 1 and "reaches to" in late.stderr, late.stderr
    early = shardkv(source, "restore", url, "--at", "2001-01-01", *options)
    assert early.returncode == 1 and "no backup is as old" in early.stderr


def wait_past(cluster: LiveCluster) -> None:
    """Until the servers' clocks, which are this machine's, show another millisecond than now."""
    before = time.time()
    while time.time() < before + 0.01:
        pass


def test_shards_that_moved_since_the_backup_are_restored_to_a_point_in_time(
    source: LiveCluster, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}"
    fill(source, 2000, seed=3)
    done(source, "backup", "create", url)
    config = done(source, "admin", "query")
    for shard in config["shards"]:
        done(source, "admin", "move", str(shard["id"]), "1" if shard["gid"] == 2 else "2", "--wait")
    with source.clerk() as clerk:
        clerk.put("after the moves", "1")
    wait_past(source)
    when = now()
    wait_past(source)
    expected = everything(source)
    assert shardkv(source, "backup", "archive", url, "--once").returncode == 0
    with LiveCluster(groups=1, replicas=1, controllers=1, shards=1) as other:
        done(other, "restore", url, "--at", when)
        assert everything(other) == expected


def test_an_upload_that_was_killed_goes_on_where_it_was(
    source: LiveCluster, place: tuple[str, list[str]]
) -> None:
    url, options = place
    fill(source, 12_000, seed=2)
    environment = os.environ | CREDENTIALS | source.environment
    command = [*SHARDKV, "backup", "create", url, "--rate", "2", *options]
    upload = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    store = open_in_background(url, options)
    wait_until(lambda: count(store, "chunks/") >= 3)
    assert upload.poll() is None, "it is throttled: it cannot be done yet"
    upload.send_signal(signal.SIGKILL)
    upload.wait()
    assert count(store, "backups/") == 0 and count(store, "pending/") == 1
    assert done(None, "backup", "list", url, *options) == []
    before = count(store, "chunks/")
    made = done(source, "backup", "create", url, *options)
    assert made["chunks"] - made["new_chunks"] >= before - 2, "what was there was not written again"
    assert done(None, "backup", "verify", url, *options)["id"] == made["id"]
    # While the mark of the killed run is young, nothing is cleaned up: it might be one that still runs.
    assert done(None, "backup", "delete", url, made["id"], *options)["postponed"]
    assert count(store, "chunks/") >= before


def open_in_background(url: str, options: list[str]) -> Any:
    os.environ.update(CREDENTIALS)
    return open_store(url, options[1] if options else "", "us-east-1")


def count(store: Any, prefix: str) -> int:
    async def run() -> int:
        return len([item async for item in store.list(prefix)])

    return asyncio.run(run())


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "that did not come to be"
        time.sleep(0.02)


def test_a_damaged_backup_is_refused_with_the_object_s_name_and_changes_nothing(
    source: LiveCluster, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}"
    fill(source, 4000, seed=4)
    made = done(source, "backup", "create", url)
    chunks = sorted(tmp_path.glob("chunks/*/*"))
    victim = chunks[len(chunks) // 2]
    whole = victim.read_bytes()
    with LiveCluster(groups=1, replicas=1, controllers=1, shards=1) as other:
        for broken in (
            bytes([whole[len(whole) // 2] ^ 1]).join((whole[: len(whole) // 2], whole[len(whole) // 2 + 1 :])),
            whole[:-10],
            zlib.compress(b"another chunk", LEVEL),
            None,
        ):
            if broken is None:
                victim.unlink()
            else:
                victim.write_bytes(broken)
            for command in (["backup", "verify", url], ["restore", url]):
                refused = shardkv(other, *command)
                assert refused.returncode == 1
                assert chunk_name(victim.name) in refused.stderr and len(refused.stderr.splitlines()) == 1
            assert everything(other) == {}
        victim.write_bytes(whole)
        manifest = tmp_path / "backups" / f"{made['id']}.json"
        manifest.write_bytes(manifest.read_bytes().replace(b'"pairs"', b'"pears"'))
        refused = shardkv(other, "restore", url)
        assert refused.returncode == 1 and f"backups/{made['id']}.json is damaged" in refused.stderr


def test_a_restore_that_was_cut_off_is_given_again(source: LiveCluster, tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    fill(source, 6000, seed=5)
    done(source, "backup", "create", url)
    expected = everything(source)
    with LiveCluster(groups=1, replicas=1, controllers=1, shards=1) as other:
        cut_off(other, url)
        assert is_refused(other), "what is there is not whole"
        done(other, "admin", "abort-restore")
        assert everything(other) == {}
        cut_off(other, url)
        done(other, "restore", url)
        assert everything(other) == expected


def cut_off(cluster: LiveCluster, url: str) -> None:
    """A restore that is killed while it writes."""
    environment = os.environ | cluster.environment
    cut = subprocess.Popen([*SHARDKV, "restore", url, "--rate", "1"], env=environment, cwd="/")
    wait_until(lambda: is_refused(cluster))
    assert cut.poll() is None, "it is throttled: it cannot be done yet"
    cut.send_signal(signal.SIGKILL)
    cut.wait()


def is_refused(cluster: LiveCluster) -> bool:
    with cluster.clerk() as clerk:
        try:
            clerk.get(b"k")
        except BeingRestored:
            return True
    return False


def test_a_log_that_is_compacted_under_the_backup_makes_it_begin_anew(
    source: LiveCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def read_log(*arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise Compacted(9, 3)
        return await source_module.read_log(*arguments, **options)

    async def run() -> Manifest:
        dialer = TcpDialer(login=source.operator)
        try:
            controller = ControllerClient(source.controllers, dialer, random.Random(1))
            return await create.Backup(
                controller, dialer, open_store(f"file://{tmp_path}"), random.Random(1)
            ).create()
        finally:
            await dialer.close()

    monkeypatch.setattr(create, "read_log", read_log)
    manifest = asyncio.run(run())
    assert asked >= 4 and len(manifest.groups) == 2
    assert done(None, "backup", "verify", f"file://{tmp_path}")["id"] == manifest.id


def test_a_gap_in_the_archive_is_said_and_refused(source: LiveCluster, tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    done(source, "backup", "create", url)
    for n in range(3):
        with source.clerk() as clerk:
            for key in ("!a", "zz"):
                clerk.put(key, str(n))
        assert shardkv(source, "backup", "archive", url, "--once").returncode == 0
    wait_past(source)
    when = now()
    wait_past(source)
    assert shardkv(source, "backup", "archive", url, "--once").returncode == 0
    for group in tmp_path.glob("archive/*/*"):
        lost = sorted(path for path in group.iterdir() if path.name != "watermark")[-2]
        lost.unlink()
    with LiveCluster(groups=1, replicas=1, controllers=1, shards=1) as other:
        refused = shardkv(other, "restore", url, "--at", when)
        assert refused.returncode == 1 and "has a gap" in refused.stderr, refused.stderr


def test_a_place_that_cannot_be_reached_is_said_in_one_line(source: LiveCluster) -> None:
    nowhere = f"http://127.0.0.1:{free_port_base(1)}"
    failed = shardkv(source, "backup", "list", "s3://bucket/x", "--endpoint", nowhere)
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1 and "s3://bucket/x" in failed.stderr


@pytest.mark.quick
def test_what_is_said_of_a_moment_can_be_given_back() -> None:
    said = moment(1_700_000_000_123)
    assert round(datetime.fromisoformat(said).timestamp() * 1000) == 1_700_000_000_123
