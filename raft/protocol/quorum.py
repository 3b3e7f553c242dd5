"""Majorities: who must agree, as pure functions of a membership.

This is the only file that knows what a quorum is. A membership may be *joint*
(thesis §4.3): then both the incoming and the outgoing voters must agree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from shardkv.raft.protocol.types import MAX_NODE, Index, NodeId
from shardkv.wire.bounded_json import parse_json

MAX_BYTES = 1 << 20  # of an encoded membership


class Vote(Enum):
    """The outcome of a round of votes so far."""

    WON = auto()
    LOST = auto()
    PENDING = auto()


@dataclass(frozen=True, slots=True)
class Membership:
    """The replicas of a group, where they listen, and which disk each of them has.

    `outgoing` is empty but while the membership is joint. No voters at all: this replica
    has yet to hear from its group who they are. A replica that `incarnations` does not
    name has not been heard from yet (`raft/incarnations.py`).
    """

    voters: frozenset[NodeId]
    outgoing: frozenset[NodeId] = frozenset()
    learners: frozenset[NodeId] = frozenset()
    addresses: Mapping[NodeId, str] = field(default_factory=dict, hash=False)
    incarnations: Mapping[NodeId, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        assert not self.learners & (self.voters | self.outgoing), "a learner does not vote"

    @classmethod
    def of(cls, addresses: Mapping[NodeId, str]) -> Membership:
        """A group of voters."""
        return cls(frozenset(addresses), addresses=dict(addresses))

    @property
    def is_joint(self) -> bool:
        return bool(self.outgoing)

    def left(self) -> Membership:
        """What a joint membership becomes: the incoming voters alone."""
        return Membership(
            self.voters, frozenset(), self.learners, self.addresses, self.incarnations
        ).members_only()

    def without(self, nodes: Set[NodeId]) -> Membership:
        """The same group without these replicas."""
        return Membership(
            self.voters - nodes, self.outgoing - nodes, self.learners - nodes, self.addresses, self.incarnations
        ).members_only()

    def members_only(self) -> Membership:
        """Without what is known of replicas that are no members."""
        kept = self.everyone()
        addresses = {node: self.addresses[node] for node in kept if node in self.addresses}
        incarnations = {node: self.incarnations[node] for node in kept if node in self.incarnations}
        return replace(self, addresses=addresses, incarnations=incarnations)

    def encode(self) -> bytes:
        """For an entry of kind MEMBERSHIP, and for state machines to keep."""
        fields = {
            "voters": sorted(self.voters),
            "outgoing": sorted(self.outgoing),
            "learners": sorted(self.learners),
            "addresses": {str(node): self.addresses[node] for node in sorted(self.addresses)},
            "incarnations": {str(node): in_hex(self.incarnations[node]) for node in sorted(self.incarnations)},
        }
        return json.dumps(fields).encode()

    @classmethod
    def decode(cls, data: bytes) -> Membership:
        """Raises ValueError for what `encode` did not make."""
        try:
            fields = parse_json(data, MAX_BYTES)
            disks = {int(node): int(disk, 16) for node, disk in fields.get("incarnations", {}).items()}
            if not all(0 < disk < 1 << 64 for disk in disks.values()):
                raise ValueError("an incarnation has 64 bits")
            return cls(
                _nodes(fields["voters"]),
                _nodes(fields["outgoing"]),
                _nodes(fields["learners"]),
                {int(node): str(address) for node, address in fields["addresses"].items()},
                disks,
            )
        except (KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
            raise ValueError(f"not a membership: {error!r}") from None

    def everyone(self) -> list[NodeId]:
        """All replicas that receive the log, in a fixed order."""
        return sorted(self.voters | self.outgoing | self.learners)

    def is_member(self, node: NodeId) -> bool:
        return self.is_voter(node) or node in self.learners

    def is_voter(self, node: NodeId) -> bool:
        return node in self.voters or node in self.outgoing

    def halves(self) -> list[frozenset[NodeId]]:
        """The sets of which each needs a majority of its own."""
        return [half for half in (self.voters, self.outgoing) if half]


def in_hex(incarnation: int) -> str:
    """An incarnation as people and JSON write it."""
    return f"{incarnation:016x}"


def _nodes(numbers: Iterable[object]) -> frozenset[NodeId]:
    """Raises ValueError for what cannot be the numbers of replicas."""
    for number in numbers:
        if type(number) is not int or not 0 < number <= MAX_NODE:
            raise ValueError(f"not a membership: {number!r} is no replica's number")
    return frozenset(numbers)  # type: ignore[arg-type]  # looked at above


def majority(count: int) -> int:
    """How many of `count` voters are more than half."""
    return count // 2 + 1


def quorum_index(membership: Membership, match: Mapping[NodeId, Index]) -> Index:
    """The highest index that a quorum has; also used for read rounds and times.

    Replicas missing from `match` count as having nothing.
    """
    result: Index | None = None
    for half in membership.halves():
        ranked = sorted((match.get(node, 0) for node in half), reverse=True)
        reached = ranked[majority(len(half)) - 1]
        result = reached if result is None else min(result, reached)
    return result or 0


def tally(membership: Membership, votes: Mapping[NodeId, bool]) -> Vote:
    """Whether the round is decided. A repeated vote counts once, since votes are kept by voter."""
    won = True
    for half in membership.halves():
        granted = sum(1 for node in half if votes.get(node) is True)
        refused = sum(1 for node in half if votes.get(node) is False)
        if len(half) - refused < majority(len(half)):
            return Vote.LOST
        won = won and granted >= majority(len(half))
    return Vote.WON if won and membership.voters else Vote.PENDING


def has_quorum(membership: Membership, active: Mapping[NodeId, bool]) -> bool:
    """Whether the replicas that are `active` form a quorum (CheckQuorum, thesis §6.2)."""
    return tally(membership, {node: up for node, up in active.items() if up}) is Vote.WON
