"""What a change of a group's shards does to what lies in its engine: told by `ownership.py`, done by `machine.py`. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from shardctrler.shard_map import ShardId


@dataclass(frozen=True, slots=True)
class CopyRecords:
    """Effect of a split: both halves keep the exactly-once records."""

    source: ShardId
    target: ShardId


@dataclass(frozen=True, slots=True)
class MergeRecords:
    """Effect of a merge: the records of `source` join those of `target`, and end."""

    source: ShardId
    target: ShardId


@dataclass(frozen=True, slots=True)
class Drop:
    """Effect of a release, and of an attempt that ended: delete the shard's data, records and journal."""

    shard: ShardId
    start: bytes
    end: bytes


@dataclass(frozen=True, slots=True)
class DropJournal:
    """Effect of taking a shard back: nobody copies it any more."""

    shard: ShardId


Effect = CopyRecords | MergeRecords | Drop | DropJournal
