"""The interfaces through which the world reaches this code: disk, network, and calls between processes.

Time is the event loop's clock, and chance a `random.Random` handed in. Production
implements them by real files and TCP streams (`disk.py`, `transport.py`, `dialer.py`);
the simulator implements them by numbers, and runs everything else unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # clients use these interfaces too, and need no messages of Raft
    from shardkv.raft.protocol.messages import Envelope
    from shardkv.raft.protocol.types import NodeId


class File(Protocol):
    """A file that only grows. Read back, it may end in zeros that nobody appended."""

    async def append(self, data: bytes) -> None:
        """Durable on return. Raises OSError, after which the file must not be used again:
        what a failed sync left behind is unknown, and a second sync may lie (fsyncgate)."""

    def close(self) -> None: ...


class Directory(Protocol):
    """One flat directory of files, all of whose changes are durable on return.

    To open a directory makes durable which files are in it: a process that was killed may have
    renamed or removed some without a sync, and what is found now is rested on.
    """

    def names(self) -> list[str]:
        """The files in it, sorted. Unfinished temporary files are not shown."""

    def read(self, name: str) -> bytes:
        """Raises Unreadable (`unreadable.py`) where the disk has lost a part of the file, and says where."""

    async def create(self, name: str, data: bytes) -> File:
        """A new file that begins with `data`. After a crash it is there with all of `data`, or not at all."""

    async def replace(self, name: str, data: bytes) -> None:
        """The file's content becomes `data`, wholly or, after a crash, not at all."""

    async def rename(self, name: str, other: str) -> None:
        """The file has the other name, in the place of what had it. It needs no room, and need not be readable."""

    async def rewrite_tail(self, name: str, offset: int, data: bytes) -> None:
        """From `offset` on the file is `data` and nothing more, whatever an earlier sync did or failed to do.

        `data` must be what can be read there: a crash leaves those bytes as they are.
        """

    async def remove(self, names: Sequence[str]) -> None:
        """In the order given: a crash leaves a rest of `names` that begins anywhere and has no gap."""


class Transport(Protocol):
    """Carries envelopes to the other replicas of a group. May lose, delay, reorder and repeat."""

    def send(self, envelopes: Sequence[Envelope]) -> None: ...

    def set_peers(self, addresses: Mapping[NodeId, str], incarnations: Mapping[NodeId, int]) -> None:
        """These are the group's replicas now, and their disks as the log knows them.

        Others are forgotten, until they are heard from.
        """
