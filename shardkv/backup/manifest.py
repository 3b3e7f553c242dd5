"""What a backup is made of. Pure: JSON with a checksum over itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from shardkv.backup.errors import Damaged
from shardkv.backup.fields import digests, hexadecimal, text, texts, whole
from shardkv.state.digests import Digest, Part
from shardkv.wire.bounded_json import parse_json

MAX_BYTES = 512 << 20
LAST_MS = 253_402_300_799_999  # of the year 9999
FORMAT = 4  # 2: which incarnation a group was; 3: counts and digests of its shards; 4: its time


@dataclass(frozen=True)
class RangePart:
    """One shard in a group's part: how many pairs it has, and their digest (`shardkv/state/digests.py`)."""

    shard: int
    start: str  # keys as clients know them, in hexadecimal digits, as JSON has no bytes
    end: str
    pairs: int = 0
    digest: str = ""

    @property
    def part(self) -> Part:
        return Part(self.shard, bytes.fromhex(self.start), bytes.fromhex(self.end))

    @classmethod
    def of(cls, part: Part, digest: Digest) -> RangePart:
        return cls(part.shard, part.start.hex(), part.end.hex(), digest.pairs, digest.value.hex())


@dataclass
class GroupPart:
    """One group: its state after entry `index`, and the log from there to the backup's moment."""

    index: int
    term: int
    incarnation: str  # of the group, 16 hexadecimal digits: its number may be another group's later
    chunks: list[str] = field(default_factory=list)  # digests, in key order
    pairs: int = 0
    bytes: int = 0
    log: list[str] = field(default_factory=list)  # digests of chunks of entries
    last: int = 0  # the last entry at the backup's moment
    ranges: list[RangePart] = field(default_factory=list)  # in key order
    rest_pairs: int = 0  # all that is no shard's data
    rest_digest: str = ""
    replicas: list[str] = field(default_factory=list)  # addresses: these held the same, by count and digest
    clock_ms: int = 0  # the group's time at the backup's moment


@dataclass
class Manifest:
    id: str
    cluster: str
    config_num: int
    time_ms: int  # the moment that the backup shows, by the groups' clocks
    shards: int = 0
    groups: dict[int, GroupPart] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of keys and values, and of what a group keeps beside them."""
        return sum(part.bytes for part in self.groups.values())

    def digests(self) -> set[str]:
        return {digest for part in self.groups.values() for digest in (*part.chunks, *part.log)}

    def encode(self) -> bytes:
        body = {"format": FORMAT, **asdict(self)}
        packed = json.dumps(body, sort_keys=True)
        return json.dumps({"sha256": hashlib.sha256(packed.encode()).hexdigest(), "backup": body}).encode()

    @classmethod
    def decode(cls, name: str, data: bytes) -> Manifest:
        """Raises Damaged, with `name`, whatever is in `data`."""
        try:
            outer = parse_json(data, MAX_BYTES)
            body = outer["backup"]
            packed = json.dumps(body, sort_keys=True)
            if hashlib.sha256(packed.encode()).hexdigest() != outer["sha256"]:
                raise ValueError("it does not match its checksum")
            if (version := body.pop("format")) != FORMAT:
                raise Damaged(
                    f"{name} has format {version}, and this version of shardkv reads format {FORMAT} alone"
                )
            groups = {_gid(gid): _part(fields) for gid, fields in body.pop("groups").items()}
            checked = {name: CHECKS[name](value) for name, value in body.items()}
            return cls(**checked, groups=groups)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{name} is damaged: {error}") from None


def _gid(text: str) -> int:
    if not text.isdecimal() or len(text) > 10:
        raise ValueError(f"{text[:40]!r} is no group's number")
    return int(text)


def _time(value: Any) -> int:
    if whole(value) > LAST_MS:
        raise ValueError(f"{value} is no time")
    return whole(value)


# What each field has to be: whoever can write to the store may have written it.
CHECKS: dict[str, Callable[[Any], Any]] = {
    "id": text,
    "cluster": text,
    "config_num": whole,
    "time_ms": _time,
    "shards": whole,
}
PART_CHECKS: dict[str, Callable[[Any], Any]] = {
    "index": whole,
    "term": whole,
    "incarnation": lambda value: hexadecimal(value, 16),
    "chunks": digests,
    "pairs": whole,
    "bytes": whole,
    "log": digests,
    "last": whole,
    "rest_pairs": whole,
    "rest_digest": hexadecimal,
    "replicas": texts,
    "clock_ms": whole,
}
RANGE_CHECKS: dict[str, Callable[[Any], Any]] = {
    "shard": whole,
    "start": hexadecimal,
    "end": hexadecimal,
    "pairs": whole,
    "digest": hexadecimal,
}


def _part(fields: dict[str, Any]) -> GroupPart:
    ranges = [
        RangePart(**{name: RANGE_CHECKS[name](value) for name, value in found.items()})
        for found in fields.pop("ranges")
    ]
    return GroupPart(**{name: PART_CHECKS[name](value) for name, value in fields.items()}, ranges=ranges)


def moment(time_ms: int) -> str:
    """For people, and to be given back to `--at`."""
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def name_of(backup: str) -> str:
    return f"backups/{backup}.json"
