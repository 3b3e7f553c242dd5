"""The few values that everything in `raft` speaks of.

Terms, indexes and node ids are plain ints: they are compared and hashed on
every message, and the names of the parameters say which is which.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import google_crc32c

Term = int
Index = int
NodeId = int
"""A replica's number within its Raft group, from 1. 0 means "nobody"."""

NOBODY: NodeId = 0

SLOT = struct.Struct("<QQB")  # index, term, kind: the head of what an entry's checksum covers
UNSEALED = -1  # no checksum yet
MAX_NODE: NodeId = (1 << 32) - 1


class Kind(IntEnum):
    """What an entry's data means to the layers above."""

    NOOP = 0  # a new leader's first entry (§8): commits what came before it
    COMMAND = 1  # opaque bytes for the state machine
    MEMBERSHIP = 2  # who the group's replicas are from here on (thesis §4.1)


@dataclass(frozen=True, slots=True)
class Entry:
    """One slot of the replicated log (§5.3), with a checksum from the proposer's memory to every disk.

    An entry that is made without a `crc` gets one: that is where the proposer's bytes enter. An
    entry that comes from the network or from a disk brings the `crc` that was sent or stored with
    it, and whoever takes it in asks `is_whole`.
    """

    index: Index
    term: Term
    kind: Kind
    data: bytes
    crc: int = UNSEALED

    def __post_init__(self) -> None:
        if self.crc == UNSEALED:
            object.__setattr__(self, "crc", self._checksum())

    def is_whole(self) -> bool:
        """Whether index, term, kind and data are what the proposer's replica sealed."""
        return self.crc == self._checksum()

    def _checksum(self) -> int:
        slot = SLOT.pack(self.index, self.term, self.kind)
        return int(google_crc32c.extend(google_crc32c.value(slot), self.data))


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
