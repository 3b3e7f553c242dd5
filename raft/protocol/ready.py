"""What goes into the core and what comes out of it: its options, and the work that it hands its driver.

The order that safety needs is in the types: messages that rest on the disk are
inside the `Write`, where a driver cannot send them early by accident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardkv.raft.protocol.messages import Envelope
from shardkv.raft.protocol.types import Entry, HardState, Index, NodeId


@dataclass(frozen=True, slots=True)
class Options:
    """How a replica behaves. All replicas of a group should share them."""

    election_ticks: int = 14  # a timeout is drawn from [election_ticks, 2 * election_ticks)
    heartbeat_ticks: int = 3
    max_append_bytes: int = 1 << 20  # payload of one AppendEntries (one larger entry still goes)
    window_messages: int = 64  # AppendEntries in flight to one follower
    window_bytes: int = 8 << 20
    max_uncommitted_bytes: int = 64 << 20  # beyond: Busy
    max_waiting_reads: int = 100_000  # beyond: Busy
    max_apply_bytes: int = 1 << 20  # handed out for applying at once, so that no turn grows long
    lease_seconds: float = 0.0  # > 0: reads under a leader lease of this length; less than an
    # election timeout by the margin for clock drift


@dataclass(frozen=True, slots=True)
class Write:
    """State bound for the disk, and the promises that rest on it.

    Votes, campaigns and append replies are promises: a crash must not break them.
    They are part of the write, so a driver cannot send them early (thesis §3.8).
    `outbox.py` argues for each kind of message.
    """

    hard_state: HardState | None
    entries: tuple[Entry, ...]
    promises: tuple[Envelope, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """Work for the driver, gathered since the last one."""

    messages: tuple[Envelope, ...]
    write: Write | None
    committed: tuple[Entry, ...]
    reads: tuple[tuple[int, Index], ...] = ()  # (ticket, index that must be applied before answering)
    failed_reads: tuple[int, ...] = ()  # leadership was lost, or no leader is known
    snapshots_wanted: tuple[NodeId, ...] = ()  # followers that need a snapshot streamed to them
    snapshot_mail: tuple[Envelope, ...] = ()  # chunks and answers, after the term rule


def joined(writes: Sequence[Write]) -> tuple[HardState | None, list[Entry]]:
    """What one append has to put on disk for several writes: the newest hard state, and all entries in order."""
    if len(writes) == 1:
        return writes[0].hard_state, list(writes[0].entries)
    hard_states = [write.hard_state for write in writes if write.hard_state is not None]
    return hard_states[-1] if hard_states else None, [entry for write in writes for entry in write.entries]
