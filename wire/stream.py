"""What both ends of a stream do: put records out, hold them back while the other end is slow, and watch for silence."""

from __future__ import annotations

import asyncio
from typing import cast

from shardkv.wire.framing import ASK, RECORD, Parser
from shardkv.wire.keepalive import ASK_SECONDS, Silence, watch_socket

MAX_QUEUED_BYTES = 64 << 20  # to one peer; beyond, calls fail as Unreachable and posts are dropped


class Stream(asyncio.Protocol):
    """One side of a connection. A record leaves at once: it is a batch already, of one turn's mail or one frame.

    While the peer is slow to read, records queue, and leave together.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = Parser()
        self._queued: list[bytes] = []
        self._paused = False
        self._transport: asyncio.Transport | None = None
        self.queued_bytes = 0
        self.silence = Silence(self._loop.time())
        self._watching: asyncio.TimerHandle | None = None

    def put(self, kind: int, number: int, method: str, payload: bytes) -> None:
        name = method.encode("ascii")
        self._queued += (RECORD.pack(kind, number, len(name), len(payload)), name, payload)
        self.queued_bytes += RECORD.size + len(name) + len(payload)
        self._flush()

    def _flush(self) -> None:
        if self._queued and not self._paused and self._transport is not None:
            data, self._queued, self.queued_bytes = b"".join(self._queued), [], 0
            self._transport.write(data)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        # uvloop keeps what is written until the turn ends, unless it is above the high-water mark:
        # out with it at once, for later in the turn a disk may be synced.
        if transport.get_extra_info("ssl_object") is None:  # that layer takes 0 for "always full"
            self._transport.set_write_buffer_limits(high=0)
        watch_socket(transport)
        self.silence = Silence(self._loop.time())
        self._watching = self._loop.call_later(ASK_SECONDS / 2, self._watch)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._watching is not None:
            self._watching.cancel()

    def _watch(self) -> None:
        """Ask the other end when it is silent; end the stream when it is gone."""
        ask, gone = self.silence.look(self._loop.time())
        if gone and not self._deaf():
            self._gone()
            self.abort()
            return
        if ask and not self._paused and self._welcomed:  # paused: what is queued asks already
            self.put(ASK, 0, "", b"")
        self._watching = self._loop.call_later(ASK_SECONDS / 2, self._watch)

    _welcomed = False  # whether both ends have said hello

    def _deaf(self) -> bool:
        """Whether it is this end that does not read."""
        return False

    def _gone(self) -> None:
        """The other end was silent for too long."""

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
