"""Which incarnation of a group each join belongs to. Pure.

A group's number names it in the map, but a number can come back without its data: all
disks of the group are lost and new ones start under the number, or the group leaves and
other replicas join under the number. The replicated state of a group therefore begins
with a random number, its *incarnation*, and each join is claimed by the first
incarnation that asks. The answer never changes, so a group may log it and rest on it.

The joins that one incarnation has claimed follow each other: once another incarnation
has claimed a later join of the number, an earlier one cannot claim any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from shardkv.shardctrler.planner import Refused
from shardkv.shardctrler.shard_map import Gid, Incarnation


@dataclass(slots=True)
class Join:
    """One join of a group, and who claimed it."""

    num: int  # the configuration that it made
    incarnation: Incarnation = 0  # 0: not claimed yet


@dataclass
class Claims:
    """All joins of all groups, in order."""

    joins: dict[Gid, list[Join]] = field(default_factory=dict)

    def joined(self, gid: Gid, num: int) -> None:
        """Note that the group joined in configuration `num`."""
        self.joins.setdefault(gid, []).append(Join(num))

    def claim(self, gid: Gid, incarnation: Incarnation, num: int) -> int:
        """Claim the join of configuration `num` for an incarnation, and return its number.

        `num` 0 asks for the first join that the incarnation may have: a group may have joined,
        left and joined again before its replicas first started, and owes its shards to those
        who took them over meanwhile. Asked again, the answer is the same. Raises Refused.
        """
        if not incarnation:
            raise Refused("BadRequest", "an incarnation is not zero")
        joins = self.joins.get(gid, [])
        if not joins:
            raise Refused("UnknownGroup", f"group {gid} has not joined")
        if num and num not in (join.num for join in joins):
            raise Refused("UnknownGroup", f"group {gid} did not join in configuration {num}")
        ours = [join.num for join in joins if join.incarnation == incarnation]
        if num in ours or (ours and not num):
            return num or ours[0]
        others = [join for join in joins if join.incarnation not in (0, incarnation)]
        first_free = others[-1].num + 1 if others else 0
        for join in joins:
            if join.num >= first_free and num in (0, join.num) and (not ours or ours[-1] >= first_free):
                join.incarnation = incarnation
                return join.num
        raise Refused(
            "OtherIncarnation",
            f"incarnation {incarnation:016x} asks to be group {gid}, which is {others[-1].incarnation:016x} "
            f"since configuration {others[-1].num}",
        )

    def holder(self, gid: Gid) -> Incarnation:
        """Who claimed the group's last join; 0 if nobody has yet."""
        joins = self.joins.get(gid)
        return joins[-1].incarnation if joins else 0

    def __iter__(self) -> Iterator[tuple[Gid, Join]]:
        return ((gid, join) for gid in sorted(self.joins) for join in self.joins[gid])
