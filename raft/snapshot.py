"""Snapshots on their way: read in chunks at the leader, checked and installed at a follower (§7).

The stream is stop-and-wait, so a slow disk or network slows it down and nothing
piles up. Any message may be lost: the sender repeats the chunk that was not
answered, the receiver answers with the offset that it wants. A snapshot is
installed whole, by the state machine's own rename, or not at all; what a crash
leaves of an unfinished one is removed at the next start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import google_crc32c

from raft.messages import InstallSnapshot, InstallSnapshotReply
from raft.types import Index, NodeId, SnapshotMeta

log = logging.getLogger(__name__)


class SnapshotSource(Protocol):
    """A state machine's state at one index, held still while it is streamed."""

    meta: SnapshotMeta
    size: int

    async def read(self, offset: int, length: int) -> bytes: ...

    def close(self) -> None: ...


class SnapshotSink(Protocol):
    """A snapshot being received. Not part of the state machine until it is installed."""

    async def write(self, data: bytes) -> None:
        """Take the next bytes. Raises ValueError if they cannot be part of a snapshot."""

    async def finish(self) -> None:
        """All bytes are in and durable. Raises ValueError if they are not a snapshot."""

    def abort(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StreamOptions:
    chunk_bytes: int = 256 << 10
    answer_seconds: float = 1.0  # after that a chunk is sent again
    attempts: int = 10  # after that the stream is given up, and begun anew if still needed


Send = Callable[[NodeId, InstallSnapshot], None]


class SnapshotSender:
    """Streams one snapshot to one follower."""

    def __init__(self, peer: NodeId, source: SnapshotSource, send: Send, options: StreamOptions) -> None:
        self._peer, self._source, self._send, self._options = peer, source, send, options
        self._answers: asyncio.Queue[InstallSnapshotReply] = asyncio.Queue(16)
        self._given_up = asyncio.Event()

    def answered(self, reply: InstallSnapshotReply) -> None:
        """The follower's word. Beyond the bound it is dropped, as if lost."""
        if reply.last_index == self._source.meta.index and not self._answers.full():
            self._answers.put_nowait(reply)

    def give_up(self) -> None:
        """Nobody wants it any more: the follower is no member, or we do not lead."""
        self._given_up.set()

    async def run(self) -> Index:
        """The index that the follower now has, 0 if the stream was given up."""
        offset, attempts = 0, 0
        meta, total = self._source.meta, self._source.size
        try:
            while attempts < self._options.attempts and not self._given_up.is_set():
                data = await self._source.read(offset, self._options.chunk_bytes)
                crc = int(google_crc32c.value(data))
                self._send(self._peer, InstallSnapshot(meta.index, meta.term, total, offset, data, crc))
                attempts += 1
                reply = await self._answer_to(offset)
                if reply is None:
                    continue
                if reply.done:
                    return meta.index
                attempts = 0
                offset = min(reply.offset, total)
            return 0
        finally:
            self._source.close()

    async def _answer_to(self, offset: int) -> InstallSnapshotReply | None:
        """What the follower says to the chunk at `offset`; None if that brought nothing new in time."""
        try:
            async with asyncio.timeout(self._options.answer_seconds):
                while True:
                    reply = await self._answers.get()
                    if reply.done or (reply.chunk_offset == offset and reply.offset != offset):
                        return reply
        except TimeoutError:
            return None


class SnapshotReceiver:
    """Takes chunks, writes them aside, and hands a complete snapshot on for installing."""

    def __init__(
        self,
        wanted: Callable[[Index], bool],
        open_sink: Callable[[SnapshotMeta], SnapshotSink],
        install: Callable[[SnapshotMeta, SnapshotSink], None],
    ) -> None:
        self._wanted, self._open_sink, self._install = wanted, open_sink, install
        self._meta: SnapshotMeta | None = None
        self._sink: SnapshotSink | None = None
        self._offset = 0

    async def receive(self, chunk: InstallSnapshot) -> InstallSnapshotReply:
        """Take a chunk in. Raises OSError when our own disk fails."""
        meta = SnapshotMeta(chunk.last_index, chunk.last_term)
        if not self._wanted(meta.index):
            # Stale, repeated, or overtaken by the log: never roll the state back.
            return InstallSnapshotReply(meta.index, chunk.offset, 0, done=True)
        if meta != self._meta:
            self.abort()
            self._meta, self._sink = meta, self._open_sink(meta)
        assert self._sink is not None
        try:
            if chunk.offset == self._offset and google_crc32c.value(chunk.data) == chunk.crc:
                await self._sink.write(chunk.data)
                self._offset += len(chunk.data)
            if self._offset < chunk.total:
                return InstallSnapshotReply(meta.index, chunk.offset, self._offset, done=False)
            await self._sink.finish()
        except ValueError as error:
            log.warning("snapshot at %d refused: %s; asking for it again", meta.index, error)
            self.abort()
            return InstallSnapshotReply(meta.index, chunk.offset, 0, done=False)
        sink, self._sink, self._meta, self._offset = self._sink, None, None, 0
        if self._wanted(meta.index):  # the log may have caught up while the last chunk was written
            self._install(meta, sink)
        else:
            sink.abort()
        return InstallSnapshotReply(meta.index, chunk.offset, chunk.total, done=True)

    def abort(self) -> None:
        """Forget what was received so far."""
        if self._sink is not None:
            self._sink.abort()
        self._sink, self._meta, self._offset = None, None, 0


class BytesSource:
    """A snapshot that is one string of bytes."""

    def __init__(self, meta: SnapshotMeta, data: bytes) -> None:
        self.meta, self._data, self.size = meta, data, len(data)

    async def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]

    def close(self) -> None:
        self._data = b""


class BytesSink:
    """Collects a snapshot that is one string of bytes, and `check`s it."""

    def __init__(self, check: Callable[[bytes], object]) -> None:
        self._check, self._parts, self.data = check, list[bytes](), b""

    async def write(self, data: bytes) -> None:
        self._parts.append(data)

    async def finish(self) -> None:
        self.data = b"".join(self._parts)
        self._check(self.data)

    def abort(self) -> None:
        self._parts.clear()
