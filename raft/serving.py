"""The server's end of a stream: says welcome, asks the gate, and hands calls to the handler."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from raft.doors import Handler
from raft.framing import ANSWER, ASK, CALL, HERE, POST, PROTOCOL_VERSION, MalformedStream, pack_hello
from raft.gate import LOGIN, Caller, Gate, OpenGate
from raft.stream import MAX_QUEUED_BYTES, Stream

log = logging.getLogger(__name__)

MAX_CALLS_AT_ONCE = 512  # of one stream at a server; beyond, it is not read from

Post = Callable[[str, bytes], None]


class ServerStream(Stream):
    """The server's side of one stream: gives each call to `handler`, each post to `on_post`."""

    def __init__(self, cluster: str, handler: Handler, on_post: Post, gate: Gate | None = None) -> None:
        super().__init__()
        self._cluster, self._handler, self._on_post = cluster, handler, on_post
        self._gate: Gate = gate or OpenGate()
        self._caller = Caller()
        self._welcomed = False
        self._calls: set[asyncio.Task[None]] = set()
        self._peer = "?"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._peer = ":".join(map(str, (transport.get_extra_info("peername") or ("?",))[:2]))
        self._caller = Caller.of(self._peer, transport.get_extra_info("peercert"))

    def data_received(self, data: bytes) -> None:
        self.silence.heard_at = self._loop.time()
        self._parser.feed(data)
        try:
            if not self._welcomed and not self._welcome():
                return
            for kind, number, method, payload in self._parser.records():
                if method == LOGIN:
                    self._caller = self._caller.logged_in(payload)
                    self._reply(number, b"\0")
                elif kind == POST:
                    if self._gate.refusal(self._caller, method, payload) is None:
                        self._on_post(method, payload)
                elif kind == CALL:
                    refusal = self._gate.refusal(self._caller, method, payload)
                    if refusal is None:
                        self._begin(number, method, self._gate.admitted(self._caller, method, payload))
                    else:
                        self._reply(number, refusal)
                elif kind == ASK:
                    self.put(HERE, 0, "", b"")
        except MalformedStream as error:
            log.warning("closed a stream from %s: %s", self._peer, error)
            self.abort()

    def _welcome(self) -> bool:
        """Answer the hello, once it is whole. Raises MalformedStream."""
        assert self._transport is not None
        hello = self._parser.hello()
        if hello is None:
            return False
        version, cluster = hello
        refusal = ""
        if version != PROTOCOL_VERSION:
            refusal = f"protocol version {version}, this server speaks {PROTOCOL_VERSION}"
        elif cluster and cluster != self._cluster:
            refusal = f"this server belongs to cluster {self._cluster!r}, not {cluster!r}"
        self._transport.write(pack_hello(1 if refusal else 0, refusal))
        if refusal:
            log.warning("refused a stream from %s: %s", self._peer, refusal)
            self._transport.close()
            return False
        self._welcomed = True
        return True

    def _begin(self, number: int, method: str, payload: bytes) -> None:
        task = self._loop.create_task(self._answer(number, method, payload))
        self._calls.add(task)
        task.add_done_callback(self._ended)
        if len(self._calls) == MAX_CALLS_AT_ONCE and self._transport is not None:
            self._transport.pause_reading()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        if len(self._calls) == MAX_CALLS_AT_ONCE - 1 and self._transport is not None:
            self._transport.resume_reading()

    async def _answer(self, number: int, method: str, payload: bytes) -> None:
        try:
            answer = await self._handler(method, payload)
        except Exception:  # a handler answers bad input itself: this is our bug; the caller times out
            log.exception("%s failed", method)
            return
        self._reply(number, answer)

    def _reply(self, number: int, answer: bytes) -> None:
        self.put(ANSWER, number, "", answer)
        if self.queued_bytes > MAX_QUEUED_BYTES:
            log.warning("closed a stream from %s: it does not read its answers", self._peer)
            self.abort()

    def _deaf(self) -> bool:
        return len(self._calls) >= MAX_CALLS_AT_ONCE

    def _gone(self) -> None:
        log.info("closed a stream from %s: the peer is silent", self._peer)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        for task in self._calls:
            task.cancel()
