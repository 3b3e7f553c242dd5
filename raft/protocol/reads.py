"""Linearizable reads without the log: the leader proves that it still leads (thesis §6.4).

A read waits for a *round*: a number that rides on AppendEntries, confirmed when
a quorum echoed it. One round is out at a time; reads that come meanwhile share
the next one, so a thousand waiting reads cost what one costs. Under load the
number rides on entries that are sent anyway.

Each read is a `Ticket`: the node's own, or a follower's request passed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardkv.raft.protocol.quorum import Membership, quorum_index
from shardkv.raft.protocol.types import NOBODY, Index, NodeId


@dataclass(frozen=True, slots=True)
class Ticket:
    """Who waits for a read index: this replica's driver (`asker` 0), or a follower."""

    number: int
    asker: NodeId = NOBODY


@dataclass(slots=True)
class LeaderReads:
    """The reads of one leadership; lost with it."""

    seq: int = 0
    waiting: list[Ticket] = field(default_factory=list)
    out: list[Ticket] = field(default_factory=list)
    out_index: Index = 0
    round_seq: int = 0  # the number that the round that is out waits for
    sent_at: dict[int, float] = field(default_factory=dict)  # round -> when it was sent, for leases

    def start_round(self, commit_index: Index, now: float) -> None:
        """What waited becomes the round; its reads see at least `commit_index`."""
        assert not self.out, "one round is out at a time"
        self.out, self.waiting = self.waiting, []
        self.out_index = commit_index
        self.mark(now)
        self.round_seq = self.seq

    def mark(self, now: float) -> None:
        """Number a broadcast, so that its answers tell when it was sent."""
        self.seq += 1
        self.sent_at[self.seq] = now
        if len(self.sent_at) > 64:  # answers to anything older no longer renew a lease
            del self.sent_at[next(iter(self.sent_at))]

    def confirmed(self, seq: int) -> list[Ticket]:
        """A quorum echoed `seq`: the reads that this releases."""
        if not self.out or seq < self.round_seq:
            return []
        released, self.out = self.out, []
        return released


def lease_start(membership: Membership, confirmed_at: Mapping[NodeId, float]) -> float:
    """Since when a lease runs: when the newest round that a quorum confirmed was *sent*.

    No other leader can exist until a timeout after that. A pause of this process only
    makes its "now" later, so it can only end a lease.
    """
    # In µs, for quorum_index ranks integers.
    return quorum_index(membership, {node: int(at * 1e6) for node, at in confirmed_at.items()}) / 1e6


@dataclass(slots=True)
class FollowerReads:
    """Reads that this follower passes on to its leader: one request out, the rest share the next."""

    seq: int = 0
    waiting: list[Ticket] = field(default_factory=list)
    out: list[Ticket] = field(default_factory=list)
    asked_ticks_ago: int = 0

    def ask(self, seq: int) -> None:
        """What waited becomes the next request to the leader."""
        self.out, self.waiting = self.waiting, []
        self.seq, self.asked_ticks_ago = seq, 0

    def is_late(self, most_ticks: int) -> bool:
        """A tick passed: whether the request is to be repeated."""
        self.asked_ticks_ago += 1
        if not self.out or self.asked_ticks_ago < most_ticks:
            return False
        self.asked_ticks_ago = 0
        return True

    def answered(self, seq: int) -> list[Ticket]:
        """The reads that the answer to request `seq` releases."""
        if not self.out or seq != self.seq:
            return []
        released, self.out = self.out, []
        return released

    def everything(self) -> list[Ticket]:
        return self.out + self.waiting
