"""Snapshots on their way: read in chunks at the leader, checked and installed at a follower (§7).

The stream is stop-and-wait, so a slow disk or network slows it down and nothing
piles up. Any message may be lost: the sender repeats the chunk that was not
answered, the receiver answers with the offset that it wants. A snapshot is
installed whole, by the state machine's own rename, or not at all; what a crash
leaves of an unfinished one is removed at the next start.

Each sending has a number of its own, `stream`, for two senders' snapshots of the same state
differ in their bytes. The receiver takes one stream at a time, and the newest:

    newer term               the stream takes the place of the one that is being received
    older term               dropped: its sender learns of the newer term by the core's rule, and stops
    same term, not seen yet  the one leader of that term began anew: takes the place
    same term, replaced      dropped: a chunk of it that was late, whose sender has ended
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import google_crc32c

from shardkv.raft.protocol.messages import InstallSnapshot, InstallSnapshotReply
from shardkv.raft.protocol.types import Index, NodeId, SnapshotMeta, Term

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
        """All bytes are in: prove that they are whole, durably. It may take long. Raises ValueError."""

    def abort(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StreamOptions:
    chunk_bytes: int = 256 << 10
    answer_seconds: float = 1.0  # after that a chunk is sent again
    attempts: int = 10  # after that the stream is given up, and begun anew if still needed
    restarts: int = 3  # so often the receiver may begin anew; then the snapshot itself may be bad


Send = Callable[[NodeId, InstallSnapshot], None]
PROVING_SECONDS = 0.3  # the receiver answers after so long, whether it has read the snapshot through or not
REPLACED_STREAMS = 16  # of which the receiver keeps the numbers


class SnapshotSender:
    """Streams one snapshot to one follower."""

    def __init__(
        self, peer: NodeId, source: SnapshotSource, send: Send, options: StreamOptions, stream: int
    ) -> None:
        self._peer, self._source, self._send, self._options = peer, source, send, options
        self._stream = stream
        self._answers: asyncio.Queue[InstallSnapshotReply] = asyncio.Queue(16)
        self._given_up = False
        self._waiting: asyncio.Timeout | None = None

    def answered(self, reply: InstallSnapshotReply) -> None:
        """The follower's word. Beyond the bound it is dropped, as if lost."""
        if reply.stream == self._stream and not self._answers.full():
            self._answers.put_nowait(reply)

    def give_up(self) -> None:
        """End at once: the follower is no member or cannot be reached, or we do not lead."""
        self._given_up = True
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> Index:
        """The index that the follower now has, 0 if the stream was given up."""
        offset, attempts, restarts = 0, 0, 0
        meta, total = self._source.meta, self._source.size
        try:
            while attempts < self._options.attempts and not self._given_up:
                data = await self._source.read(offset, self._options.chunk_bytes)
                crc = int(google_crc32c.value(data))
                chunk = InstallSnapshot(meta.index, meta.term, total, offset, data, crc, self._stream)
                self._send(self._peer, chunk)
                attempts += 1
                reply = await self._answer_to(offset)
                if reply is None:
                    continue
                if reply.done:
                    return meta.index
                attempts = 0
                if reply.offset < offset:
                    restarts += 1
                    if restarts > self._options.restarts:
                        log.warning(
                            "snapshot at %d: replica %d refuses it again and again", meta.index, self._peer
                        )
                        return 0  # the next stream is of another snapshot, which is read through anew
                offset = min(reply.offset, total)
            return 0
        finally:
            self._source.close()

    async def _answer_to(self, offset: int) -> InstallSnapshotReply | None:
        """What the follower says to the chunk at `offset`; None if nothing came in time."""
        proving: InstallSnapshotReply | None = None
        try:
            async with asyncio.timeout(self._options.answer_seconds) as self._waiting:
                while True:
                    reply = await self._answers.get()
                    if reply.done or (reply.chunk_offset == offset and reply.offset != offset):
                        return reply
                    if reply.chunk_offset == offset == self._source.size:
                        proving = reply  # it has everything, and reads it through: ask again after a while
        except TimeoutError:
            return proving
        finally:
            self._waiting = None


class SnapshotReceiver:
    """Takes chunks, writes them aside, and hands a complete snapshot on for installing."""

    def __init__(
        self,
        wanted: Callable[[Index], bool],
        open_sink: Callable[[SnapshotMeta], SnapshotSink],
        install: Callable[[SnapshotMeta, SnapshotSink], None],
    ) -> None:
        self._wanted, self._open_sink, self._install = wanted, open_sink, install
        self._term: Term = 0
        self._stream = 0
        self._replaced: deque[int] = deque(maxlen=REPLACED_STREAMS)
        self._meta: SnapshotMeta | None = None
        self._sink: SnapshotSink | None = None
        self._offset = 0
        self._proving: asyncio.Task[None] | None = None
        self.refused = ""  # why the last snapshot was not taken; empty once one was installed

    async def receive(self, chunk: InstallSnapshot, term: Term) -> InstallSnapshotReply | None:
        """Take a chunk of `term`'s leader in; None: no answer. Raises OSError when our own disk fails."""
        meta = SnapshotMeta(chunk.last_index, chunk.last_term)

        def reply(offset: int, done: bool = False) -> InstallSnapshotReply:
            return InstallSnapshotReply(meta.index, chunk.offset, offset, done, chunk.stream)

        if not self._wanted(meta.index):
            # Stale, repeated, or overtaken by the log: never roll the state back.
            if chunk.stream == self._stream:
                self.abort()
            return reply(0, done=True)
        if not self._is_newest(chunk.stream, term):
            return None
        if self._sink is None or meta != self._meta:
            self.abort()
            self._meta, self._sink = meta, self._open_sink(meta)
        try:
            if self._proving is None:
                if chunk.offset == self._offset and google_crc32c.value(chunk.data) == chunk.crc:
                    await self._sink.write(chunk.data)
                    self._offset += len(chunk.data)
                if self._offset < chunk.total:
                    return reply(self._offset)
                self._proving = asyncio.get_running_loop().create_task(self._sink.finish())
            # Meanwhile the sender must hear from us, or it would take us for gone.
            await asyncio.wait({self._proving}, timeout=PROVING_SECONDS)
            if not self._proving.done():
                return reply(chunk.total)
            self._proving.result()
            if not self._wanted(meta.index):  # the log has caught up while it was read through
                self.abort()
                return reply(chunk.total, done=True)
            self._install(meta, self._sink)
        except ValueError as error:
            if not self.refused:  # else it was said, and status says it
                log.warning("snapshot at %d refused: %s; asking for it again", meta.index, error)
            self.refused = str(error)
            self.abort()
            return reply(0)
        self._sink, self._meta, self._offset, self._proving, self.refused = None, None, 0, None, ""
        return reply(chunk.total, done=True)

    def _is_newest(self, stream: int, term: Term) -> bool:
        """Whether to take this stream's chunks. A stream that is new takes the place of the one before."""
        if (term, stream) == (self._term, self._stream):
            return True
        if term < self._term or (term == self._term and stream in self._replaced):
            return False
        self.abort()
        self._replaced.append(self._stream)
        self._term, self._stream = term, stream
        return True

    def abort(self) -> None:
        """Forget what was received so far."""
        if self._proving is not None:
            self._proving.cancel()
            self._proving.add_done_callback(_forget)
        if self._sink is not None:
            self._sink.abort()
        self._sink, self._meta, self._offset, self._proving = None, None, 0, None


def _forget(proving: asyncio.Task[None]) -> None:
    """What a snapshot that nobody wants any more turned out to be does not matter."""
    if not proving.cancelled():
        proving.exception()


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
