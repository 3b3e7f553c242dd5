"""Majorities: who must agree, as pure functions of a membership.

This is the only file that knows what a quorum is. A membership may be *joint*
(thesis §4.3): then both the incoming and the outgoing voters must agree. Today
groups start with a fixed membership; changing it needs no change elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from raft.types import Index, NodeId


class Vote(Enum):
    """The outcome of a round of votes so far."""

    WON = auto()
    LOST = auto()
    PENDING = auto()


@dataclass(frozen=True, slots=True)
class Membership:
    """The replicas of a group. `outgoing` is empty but while the membership is joint."""

    voters: frozenset[NodeId]
    outgoing: frozenset[NodeId] = frozenset()
    learners: frozenset[NodeId] = frozenset()

    def __post_init__(self) -> None:
        assert self.voters, "a group needs a voter"
        assert not self.learners & (self.voters | self.outgoing), "a learner does not vote"

    def everyone(self) -> list[NodeId]:
        """All replicas that receive the log, in a fixed order."""
        return sorted(self.voters | self.outgoing | self.learners)

    def is_voter(self, node: NodeId) -> bool:
        return node in self.voters or node in self.outgoing

    def halves(self) -> list[frozenset[NodeId]]:
        """The sets of which each needs a majority of its own."""
        return [half for half in (self.voters, self.outgoing) if half]


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
    assert result is not None
    return result


def tally(membership: Membership, votes: Mapping[NodeId, bool]) -> Vote:
    """Whether the round is decided. A repeated vote counts once, since votes are kept by voter."""
    won = True
    for half in membership.halves():
        granted = sum(1 for node in half if votes.get(node) is True)
        refused = sum(1 for node in half if votes.get(node) is False)
        if len(half) - refused < majority(len(half)):
            return Vote.LOST
        won = won and granted >= majority(len(half))
    return Vote.WON if won else Vote.PENDING


def has_quorum(membership: Membership, active: Mapping[NodeId, bool]) -> bool:
    """Whether the replicas that are `active` form a quorum (CheckQuorum, thesis §6.2)."""
    return tally(membership, {node: up for node, up in active.items() if up}) is Vote.WON
