"""The shard map at 1,000 groups and 100,000 shards: the controller's state machine and a clerk's lookup, on real files.

Groups are only names here. What is measured is what the controller does for one admin
request, what it ships to those who know the map before, how long a snapshot and a
restart take with the whole history, and a lookup as every operation of a clerk does it.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from shardkv.raft.disk import RealDirectory
from shardkv.raft.machine import STAMP
from shardkv.raft.protocol.types import Entry, Kind
from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.machine import ControllerMachine
from shardkv.shardctrler.shard_map import Config

GROUPS, SHARDS = 1_000, 100_000
LOOKUPS = 200_000


class Admin:
    """Applies admin requests to one controller's state machine, as its log would."""

    def __init__(self, machine: ControllerMachine) -> None:
        self.machine = machine
        self._index, self._seq = machine.applied.index, 0

    def ask(self, **operation: Any) -> float:
        """Seconds that the request took to plan, carry out and encode. Refusals are errors here."""
        self._index += 1
        self._seq += 1
        request = pb.AdminRequest(
            session=bytes(16), seq=self._seq, acked_below=self._seq, issued_ms=1, **operation
        )
        entry = Entry(self._index, 1, Kind.COMMAND, STAMP.pack(self._index, 0) + request.SerializeToString())
        began = time.perf_counter()
        (reply,) = self.machine.apply([entry])
        took = time.perf_counter() - began
        if reply:
            told = pb.AdminReply.FromString(reply)
            assert not told.refusal, told.message
        return took


def _group(gid: int) -> pb.Group:
    return pb.Group(gid=gid, addresses=[f"10.{gid // 250}.{gid % 250}.{n}:7400" for n in (1, 2, 3)])


def measure_map() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(_measure(Path(scratch)))


async def _measure(scratch: Path) -> None:
    directory = RealDirectory(scratch / "controller")
    machine = ControllerMachine(directory)
    admin = Admin(machine)
    admin.ask(initialize=pb.Initialize(shards=4096))
    admin.ask(join=pb.Join(groups=[_group(gid) for gid in range(1, GROUPS + 1)]))
    _split_up(admin)
    admin.ask(rebalance=pb.Rebalance())  # splits have left the groups uneven
    config = machine.config
    config.check()
    print(f"{len(config.groups):,} groups, {len(config.by_id):,} shards, configuration {config.num:,}")

    for name, operation in (
        ("join of one group", {"join": pb.Join(groups=[_group(GROUPS + 1)])}),
        ("leave of one group", {"leave": pb.Leave(gids=[7])}),
        ("move of one shard", {"move": pb.MoveShard(shard=1, gid=500)}),
    ):
        took = admin.ask(**operation)
        change = machine.changes_since(machine.config.num - 1, 1)[0]
        size = change.ByteSize()
        print(f"{name}: {took * 1000:.0f} ms; {len(change.moves)} shards move, {size:,} B are shipped")

    _time_lookups(config)
    began = time.perf_counter()
    await machine.flush()
    took = time.perf_counter() - began
    size = sum(path.stat().st_size for path in directory.path.iterdir())
    print(f"snapshot of the map and its whole history: {took:.2f} s, {size / 1e6:.1f} MB")
    again = ControllerMachine(directory)
    began = time.perf_counter()
    again.recover()
    print(f"restart from it: {time.perf_counter() - began:.2f} s")
    assert again.config.num == machine.config.num and again.config.by_id == machine.config.by_id
    directory.close()


def _split_up(admin: Admin) -> None:
    """Split shards at keys inside them until there are enough, level by level."""
    config = admin.machine.config
    began, splits, level = time.perf_counter(), 0, 0
    while len(config.by_id) < SHARDS:
        level += 1
        for shard in sorted(config.by_id.values(), key=lambda shard: shard.start):
            if len(config.by_id) >= SHARDS:
                break
            key = shard.start + b"/" + bytes([0x7E - level])
            if shard.contains(key):
                admin.ask(split=pb.SplitShard(shard=shard.id, key=key))
                splits += 1
    print(f"a split: {(time.perf_counter() - began) / splits * 1e6:.0f} us ({splits:,} of them)")


def _time_lookups(config: Config) -> None:
    rng = random.Random(1)
    keys = [b"%c%c/%d" % (rng.randrange(32, 127), rng.randrange(32, 127), n) for n in range(LOOKUPS)]
    began = time.perf_counter()
    config.lookup(keys[0])
    first = time.perf_counter() - began
    began = time.perf_counter()
    for key in keys:
        config.lookup(key)
    took = (time.perf_counter() - began) / LOOKUPS
    print(f"a clerk's lookup: {took * 1e6:.2f} us; the first one after a change: {first * 1000:.0f} ms")
