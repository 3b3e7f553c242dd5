"""What a node serves, as the node sees it: entries to apply, reads to release, snapshots to open and install."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.types import Entry, Index, SnapshotMeta
from shardkv.raft.snapshot import SnapshotSink, SnapshotSource


class Host(Protocol):
    """What a node serves: the replicated-state-machine layer."""

    def apply(self, entries: Sequence[Entry]) -> None: ...

    def reads_released(self, reads: Sequence[tuple[int, Index]]) -> None: ...

    def reads_failed(self, tickets: Sequence[int]) -> None: ...

    def turn_ended(self) -> None:
        """Everything of this turn is carried out; leadership may have changed."""

    async def open_snapshot(self) -> SnapshotSource: ...

    def open_sink(self, meta: SnapshotMeta) -> SnapshotSink: ...

    def install(self, meta: SnapshotMeta, sink: SnapshotSink) -> Membership:
        """Become the received state; returns the membership that it has."""
