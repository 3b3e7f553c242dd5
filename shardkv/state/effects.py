"""What a change of a group's shards does to what lies in its engine: told by `ownership.py`, done by `machine.py`. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from shardkv.shardctrler.shard_map import ShardId


@dataclass(frozen=True, slots=True)
class Inherit:
    """Effect of a split and of a merge: the shard begins to take over the exactly-once records of another."""

    shard: ShardId


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


Effect = Inherit | Drop | DropJournal
