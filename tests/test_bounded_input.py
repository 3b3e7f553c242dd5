"""What comes from outside has a bound: documents that are deep or huge, chunks that unpack to more than they may."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.live import attempt
from shardkv.backup.archive import ArchivedGroup, Watermark
from shardkv.backup.errors import BackupError, Damaged
from shardkv.backup.manifest import FORMAT, GroupPart, Manifest
from shardkv.backup.store import MAX_CONTENT_BYTES, log_entries
from shardkv.process.identity import Identity
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.types import SnapshotMeta
from shardkv.storage.checkpoint import read_manifest
from shardkv.wire.bounded_json import MAX_DEPTH, parse_json
from tests.test_backup_digests import InMemory

pytestmark = pytest.mark.quick
GROUP = ArchivedGroup(1, "0f" * 8)

READERS: dict[str, tuple[Callable[[bytes], object], type[Exception]]] = {
    "a backup's manifest": (lambda data: Manifest.decode("x", data), Damaged),
    "an archive's watermark": (lambda data: Watermark.decode("x", GROUP, data), Damaged),
    "an identity": (Identity.decode, ValueError),
    "a membership": (Membership.decode, ValueError),
    "a checkpoint's manifest": (lambda data: read_manifest(data, SnapshotMeta(1, 1)), ValueError),
    "any document": (parse_json, ValueError),
}


def deep(levels: int) -> bytes:
    return b'{"backup": ' + b"[" * levels + b"]" * levels + b', "sha256": "", "format": 2}'


HUGE_NUMBER = b'{"backup": {"format": ' + b"9" * 100_000 + b"}}"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("data", [deep(100_000), deep(900), deep(40), b"[" * 100_000, HUGE_NUMBER], ids=len)
def test_a_document_that_is_deep_or_huge_is_refused_by_a_typed_error(reader: str, data: bytes) -> None:
    read, error = READERS[reader]
    with pytest.raises(error):
        read(data)


def test_a_document_is_read_up_to_its_bounds() -> None:
    fits: Any = 1
    for _ in range(MAX_DEPTH):
        fits = [fits]
    assert parse_json(json.dumps(fits)) == fits
    for wrong in (json.dumps([fits]), json.dumps({"a": fits})):
        with pytest.raises(ValueError, match="deep"):
            parse_json(wrong)
    assert parse_json(b"[1]", 3) == [1]
    with pytest.raises(ValueError, match="more than"):
        parse_json(b"[1] ", 3)


def manifest_with(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A manifest that somebody else wrote, with a checksum that fits."""
    part = GroupPart(7, 2, "0f" * 8, ["a" * 64], 1, 10, ["b" * 64], 9)
    body = json.loads(Manifest("id", "cluster", 3, 1000, 2, {1: part}).encode())["backup"]
    change(body)
    packed = json.dumps(body, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(packed.encode()).hexdigest(), "backup": body}).encode()


def test_the_fields_of_a_manifest_are_what_they_should_be() -> None:
    assert Manifest.decode("x", manifest_with(lambda body: None)).groups[1].last == 9
    wrong: list[Callable[[dict[str, Any]], None]] = [
        lambda body: body.update(time_ms=1 << 62),
        lambda body: body.update(time_ms="now"),
        lambda body: body.update(shards=-1),
        lambda body: body.update(shards=True),
        lambda body: body.update(id=["x"]),
        lambda body: body.update(unknown=1),
        lambda body: body.update(groups=[]),
        lambda body: body["groups"].update({"9" * 5000: body["groups"]["1"]}),
        lambda body: body["groups"]["1"].update(chunks=["../../etc/passwd"]),
        lambda body: body["groups"]["1"].update(chunks="a" * 64),
        lambda body: body["groups"]["1"].update(log=[1]),
        lambda body: body["groups"]["1"].update(incarnation="0f"),
        lambda body: body["groups"]["1"].update(last=1.5),
        lambda body: body["groups"]["1"].update(ranges=[{"shard": 1, "start": "zz", "end": ""}]),
        lambda body: body["groups"]["1"].update(ranges=3),
    ]
    for change in wrong:
        with pytest.raises(Damaged, match="x is damaged"):
            Manifest.decode("x", manifest_with(change))
    with pytest.raises(Damaged, match=f"format 3, .* {FORMAT} alone"):
        Manifest.decode("x", manifest_with(lambda body: body.update(format=3)))


def test_a_chunk_unpacks_to_no_more_than_a_chunk_can_hold() -> None:
    packer = zlib.compressobj(9)
    piece = bytes(1 << 20)
    bomb = b"".join(packer.compress(piece) for _ in range((MAX_CONTENT_BYTES >> 20) + 1)) + packer.flush()
    assert len(bomb) < 1 << 20
    store = InMemory()
    with pytest.raises(Damaged, match="chunks/x is damaged: it holds more than"):
        store.unpacked("chunks/x", "0" * 64, bomb)
    content = b"content" * 1000
    digest, stored = store.packed(content)
    assert store.unpacked("chunks/x", digest, stored) == content
    for wrong in (stored[:-1], stored[:10], b"", b"not packed", zlib.compress(b"other")):
        with pytest.raises(Damaged, match="chunks/x is damaged"):
            store.unpacked("chunks/x", digest, wrong)


def test_a_process_on_an_identity_that_is_nested_too_deep_says_so_in_one_line(tmp_path: Path) -> None:
    identity = tmp_path / "identity.json"
    identity.write_bytes(b"[" * 100_000)
    identity.chmod(0o600)
    serve = ["serve", "controller", "--id", "1", "--peers", "127.0.0.1:1", "--data", str(tmp_path)]
    done = attempt(None, *serve)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "identity.json: damaged" in done.stderr, done.stderr


def test_a_log_that_is_none_is_damaged() -> None:
    for content in (b"\xff\xff\xff", b"\x0a\x03\x18\x7f\x08", bytes(10)):
        with pytest.raises(BackupError, match="the log is damaged"):
            log_entries("the log", content)
