"""The few values that everything in `raft` speaks of.

Terms, indexes and node ids are plain ints: they are compared and hashed on
every message, and the names of the parameters say which is which.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

Term = int
Index = int
NodeId = int
"""A replica's number within its Raft group, from 1. 0 means "nobody"."""

NOBODY: NodeId = 0
MAX_NODE: NodeId = (1 << 32) - 1


class Kind(IntEnum):
    """What an entry's data means to the layers above."""

    NOOP = 0  # a new leader's first entry (§8): commits what came before it
    COMMAND = 1  # opaque bytes for the state machine
    MEMBERSHIP = 2  # who the group's replicas are from here on (thesis §4.1)


@dataclass(frozen=True, slots=True)
class Entry:
    """One slot of the replicated log (§5.3)."""

    index: Index
    term: Term
    kind: Kind
    data: bytes


@dataclass(frozen=True, slots=True)
class HardState:
    """What a replica must remember to keep its word: Figure 2's persistent state without the log."""

    term: Term = 0
    voted_for: NodeId = NOBODY


@dataclass(frozen=True, slots=True)
class SnapshotMeta:
    """The last entry that a snapshot replaces (§7)."""

    index: Index
    term: Term
