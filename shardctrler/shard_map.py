"""The shard map: contiguous ranges that cover every key, and what changes it. Pure.

A `Config` is one version of the map. It changes only by a `Change`, which says
what is different and nothing else: that is what travels, what is kept as history,
and what the groups act on. `apply` is the one place where a change is carried
out, at the controller, in a clerk and in a test alike.

`gid` says who serves a shard and `holder` who has its data. They differ only
while the last group has left: the data stays where it is until a group joins.

A group's number may be used again after the group has left. So a `Group` also says in
which configuration it joined: number and join together name one group, and at most one
incarnation (the state that one set of disks holds) may claim a join.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from sortedcontainers import SortedDict

from shardkv.shardctrler.key_range import KeyRange

ShardId = int
Gid = int
NO_GROUP: Gid = 0
Incarnation = int  # a random 64-bit number that a group's replicated state begins with; 0: none yet


@dataclass(frozen=True, slots=True)
class Shard(KeyRange):
    """A range of keys with an id that never changes, and who has it."""

    id: ShardId
    start: bytes
    end: bytes
    gid: Gid = NO_GROUP
    epoch: int = 0
    holder: Gid = NO_GROUP


@dataclass(frozen=True, slots=True)
class Group:
    gid: Gid
    addresses: tuple[str, ...]
    joined: int = 0  # the configuration in which it joined; 0 in a request to join


@dataclass(frozen=True, slots=True)
class Move(KeyRange):
    """A shard gets a new owner. `target` None: unassigned; `source` None: nobody held it."""

    shard: ShardId
    start: bytes
    end: bytes
    source: Group | None
    target: Group | None

    @property
    def hands_over(self) -> bool:
        """Whether data changes hands, or a first owner starts from nothing."""
        return self.target is not None and (self.source is None or self.source.gid != self.target.gid)


@dataclass(frozen=True, slots=True)
class Split:
    """`shard` keeps [start, key); `new_shard` is [key, end), with the same owner."""

    shard: ShardId
    key: bytes
    new_shard: ShardId
    holder: Gid


@dataclass(frozen=True, slots=True)
class Merge:
    """`shard` takes in its right neighbour `right`, which ends."""

    shard: ShardId
    right: ShardId
    holder: Gid


@dataclass(frozen=True, slots=True)
class Change:
    """What makes configuration `num` out of `num - 1`."""

    num: int
    joined: tuple[Group, ...] = ()
    left: tuple[Gid, ...] = ()
    moves: tuple[Move, ...] = ()
    split: Split | None = None
    merge: Merge | None = None
    initial: tuple[Shard, ...] = ()
    readdressed: tuple[Group, ...] = ()  # groups whose replicas are elsewhere now


@dataclass
class Config:
    """One version of the map. Number 0 is a single unassigned range."""

    num: int = 0
    groups: dict[Gid, Group] = field(default_factory=dict)
    by_id: dict[ShardId, Shard] = field(default_factory=lambda: {1: Shard(1, b"", b"")})
    # Which incarnation claimed its group's join. Not a part of the configuration: a claim makes no new one.
    claims: dict[Gid, Incarnation] = field(default_factory=dict, compare=False)
    _by_start: SortedDict = field(default_factory=lambda: SortedDict({b"": 1}))
    _flat: tuple[list[bytes], list[Shard]] | None = field(default=None, compare=False)  # for `lookup`

    @classmethod
    def of(cls, num: int, shards: list[Shard], groups: list[Group]) -> Config:
        config = cls(
            num,
            {group.gid: group for group in groups},
            {shard.id: shard for shard in shards},
            _by_start=SortedDict({shard.start: shard.id for shard in shards}),
        )
        config.check()
        return config

    def lookup(self, key: bytes) -> Shard:  # hot: runs per operation
        """The shard that contains `key`. O(log n); the first look after a change is O(n)."""
        starts, shards = self._flat or self._flatten()
        return shards[bisect_right(starts, key) - 1]

    def lookup_below(self, end: bytes) -> Shard:
        """The shard that contains the keys right below `end`; an empty end is open."""
        starts, shards = self._flat or self._flatten()
        return shards[bisect_left(starts, end) - 1] if end else shards[-1]

    def _flatten(self) -> tuple[list[bytes], list[Shard]]:
        self._flat = list(self._by_start.keys()), [self.by_id[id] for id in self._by_start.values()]
        return self._flat

    def shards(self, start: bytes = b"") -> Iterator[Shard]:
        """All shards in key order, from the one that contains `start`."""
        first = self.lookup(start).start
        return (self.by_id[self._by_start[key]] for key in self._by_start.irange(first))

    def right_neighbour(self, shard: Shard) -> Shard | None:
        return self.by_id[self._by_start[shard.end]] if shard.end else None

    def counts(self) -> dict[Gid, int]:
        """How many shards each live group serves."""
        counts = dict.fromkeys(self.groups, 0)
        for shard in self.by_id.values():
            if shard.gid:
                counts[shard.gid] += 1
        return counts

    def apply(self, change: Change) -> None:
        """Become the next configuration."""
        self._flat = None
        assert change.num == self.num + 1, f"change {change.num} does not follow configuration {self.num}"
        if change.initial:
            self.by_id = {shard.id: shard for shard in change.initial}
            self._by_start = SortedDict({shard.start: shard.id for shard in change.initial})
        for group in change.joined + change.readdressed:
            self.groups[group.gid] = group
        for move in change.moves:
            shard = self.by_id[move.shard]
            if move.target is None:
                self.by_id[move.shard] = replace(shard, gid=NO_GROUP)
            else:
                gid = move.target.gid
                epoch = change.num if move.hands_over else shard.epoch
                self.by_id[move.shard] = replace(shard, gid=gid, holder=gid, epoch=epoch)
        for gid in change.left:
            del self.groups[gid]
            self.claims.pop(gid, None)
        if change.split is not None:
            split = change.split
            old = self.by_id[split.shard]
            self.by_id[old.id] = replace(old, end=split.key)
            self._put(replace(old, id=split.new_shard, start=split.key))
        if change.merge is not None:
            left, right = self.by_id[change.merge.shard], self.by_id.pop(change.merge.right)
            del self._by_start[right.start]
            # The newer epoch: what either part was handed over with is older than the whole from here on.
            epoch = max(left.epoch, right.epoch)
            self.by_id[left.id] = replace(left, end=right.end, epoch=epoch)
        self.num = change.num

    def _put(self, shard: Shard) -> None:
        self.by_id[shard.id] = shard
        self._by_start[shard.start] = shard.id

    def check(self) -> None:
        """The ranges cover every key with no gap and no overlap; every owner is a live group."""
        assert self._by_start.keys()[0] == b"", "keys before the first shard"
        end: bytes = b""
        for position, (start, id) in enumerate(self._by_start.items()):
            shard = self.by_id[id]
            assert shard.start == start
            assert position == 0 or start == end, f"a gap or overlap at {start!r}"
            assert position == 0 or start > b"", "an open end in the middle"
            end = shard.end
            assert shard.gid == NO_GROUP or shard.gid in self.groups, f"shard {id} is on a dead group"
            assert shard.gid in (NO_GROUP, shard.holder)
        assert end == b"", "keys after the last shard"
        assert len(self.by_id) == len(self._by_start)
