"""What is replicated: a deterministic state machine, and the stamp before each command in its log."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from shardkv.raft.protocol.types import Entry, Index, Kind, SnapshotMeta
from shardkv.raft.snapshot import SnapshotSink, SnapshotSource

STAMP = struct.Struct("<QQ")


class Stamp(NamedTuple):
    """What stands before each command in the log."""

    clock_ms: int  # the group's time (`clock.py`): sessions expire by it
    wall_ms: int  # the leader's wall clock, right or wrong: for people who restore a moment


class StateMachine(Protocol):
    """Deterministic: the same entries give the same state and replies on every replica.

    Refusals are replies. An exception out of `apply` is a bug or a broken disk, and
    stops the replica.
    """

    @property
    def applied(self) -> SnapshotMeta:
        """The last entry whose effects are in the state."""

    @property
    def clock_ms(self) -> int:
        """The largest `Stamp.clock_ms` that it has applied, 0 before the first."""

    @property
    def membership(self) -> bytes:
        """The data of the last applied entry of kind MEMBERSHIP; empty if there was none."""

    def apply(self, entries: Sequence[Entry]) -> list[bytes]:
        """One reply an entry; effects and applied index change together, or not at all."""

    async def flush(self) -> Index:
        """Make the state durable; return the index it is now durable up to."""

    async def open_snapshot(self) -> SnapshotSource: ...

    def open_sink(self, meta: SnapshotMeta) -> SnapshotSink: ...

    def install(self, meta: SnapshotMeta, sink: SnapshotSink) -> None:
        """Become the received state, durably: wholly, or after a crash not at all."""

    def close(self) -> None: ...


def unstamp(entry: Entry) -> tuple[Stamp, bytes]:
    """The stamp and the command of a committed entry; no time and b"" for what is not a command."""
    if entry.kind is not Kind.COMMAND:
        return Stamp(0, 0), b""
    return Stamp(*STAMP.unpack_from(entry.data)), entry.data[STAMP.size :]
