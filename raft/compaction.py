"""How far the log may be compacted: what followers still need stays, as long as that is not too much. Pure.

A follower that is only a little behind is spared a snapshot. One that takes a snapshot in, or has just done so, needs the log
from there on: were that compacted before it has come to the end, it would need the next snapshot, and under load one
after the other for ever (seed 542 of the soak). A follower that is gone, that answers no chunk,
or whose snapshot failed, holds nothing up.
"""

from __future__ import annotations

from collections.abc import Iterable

from shardkv.raft.protocol.progress import Mode, Progress
from shardkv.raft.protocol.types import Index

# Of log in memory and on disk, in units of `compact_bytes`; beyond, it goes whoever needs it.
KEEPING_UP = 4  # for followers that are a little behind
CATCHING_UP = 16  # for those that a snapshot brings up: as much as is written while it travels


def compact_to(durable: Index, log_bytes: int, compact_bytes: int, followers: Iterable[Progress]) -> Index:
    """The last entry that may go. `durable`: the last one that the state machine has on its disk."""
    index = durable
    for peer in followers:
        if peer.catching_up and log_bytes < CATCHING_UP * compact_bytes:
            needed = peer.snapshot_index if peer.mode is Mode.SNAPSHOT else peer.match_index
        elif peer.mode is Mode.REPLICATE and log_bytes < KEEPING_UP * compact_bytes:
            needed = peer.match_index
        else:
            continue
        index = min(index, needed)
    return index
