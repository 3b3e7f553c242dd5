"""The server's end of a stream: says welcome, asks the gate, and hands calls to the handler."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from raft.answers import Code, refuse
from raft.audit import Audit, NoAudit
from raft.doors import Handler
from raft.framing import ANSWER, ASK, CALL, HERE, POST, PROTOCOL_VERSION, MalformedStream, pack_hello
from raft.gate import LOGIN, Caller, Gate, OpenGate, Standing
from raft.inbound import Inbound
from raft.stream import MAX_QUEUED_BYTES, Stream

log = logging.getLogger(__name__)

MAX_STRANGER_QUEUED_BYTES = 64 << 10  # answers that somebody unknown does not take
MAX_CALLS_AT_ONCE = 512  # of one stream at a server; beyond, it is not read from

Post = Callable[[str, bytes], None]


class ServerStream(Stream):
    """The server's side of one stream: gives each call to `handler`, each post to `on_post`."""

    def __init__(
        self,
        cluster: str,
        handler: Handler,
        on_post: Post,
        gate: Gate | None = None,
        inbound: Inbound | None = None,
        audit: Audit | None = None,
    ) -> None:
        super().__init__()
        self._cluster, self._handler, self._on_post = cluster, handler, on_post
        self._gate: Gate = gate or OpenGate()
        self._inbound = inbound or Inbound("?", "?", self._loop.time())
        self._audit = audit or NoAudit()
        self._caller = Caller()
        self._parser.small = True
        self._welcomed = False
        self._calls: set[asyncio.Task[None]] = set()
        self._under_way_bytes = 0  # of the payloads of these
        self._reading = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        inbound = self._inbound
        if inbound.address == "?":
            inbound.address = ":".join(map(str, (transport.get_extra_info("peername") or ("?",))[:2]))
        inbound.transport = transport
        self._caller = Caller.of(inbound.address, transport.get_extra_info("peercert"))

    def data_received(self, data: bytes) -> None:
        self.silence.heard_at = self._loop.time()
        self._parser.feed(data)
        try:
            if not self._welcomed and not self._welcome():
                return
            for kind, number, method, payload in self._parser.records():
                if kind == ASK:
                    self.put(HERE, 0, "", b"")
                    continue
                if kind not in (POST, CALL):
                    continue
                self._inbound.touched = True
                if method == LOGIN:
                    self._log_in(payload or b"")
                    self._reply(number, b"\0")
                elif payload is None:
                    self._refuse_unread(kind, number, method)
                elif kind == POST:
                    if self._gate.refusal(self._caller, method, payload) is None:
                        self._on_post(method, payload)
                    else:
                        self._settle()
                else:
                    refusal = self._gate.refusal(self._caller, method, payload)
                    if refusal is None:
                        self._begin(number, method, self._gate.admitted(self._caller, method, payload))
                    else:
                        self._settle()
                        self._reply(number, refusal)
            self._count()
        except MalformedStream as error:
            log.warning("closed a stream from %s: %s", self._inbound.address, error)
            self.abort()

    def _log_in(self, payload: bytes) -> None:
        self._caller = self._caller.logged_in(payload)
        standing = self._settle()
        known = standing is not Standing.STRANGER
        self._audit.note(
            "login",
            who=self._caller.name,
            address=self._inbound.address,
            door="stream",
            what="login",
            allowed=known,
            why="" if known else "no such user, or another token",
        )

    def _settle(self) -> Standing:
        """Tell the listener who the caller is, as far as the gate knows now."""
        standing, owner = self._gate.standing(self._caller)
        self._parser.small = standing is Standing.STRANGER
        self._inbound.settle(standing, owner)
        return standing

    def _refuse_unread(self, kind: int, number: int, method: str) -> None:
        """A large record of a stranger: the payload is skipped, and the gate refuses the call without it."""
        refusal = self._gate.refusal(self._caller, method, b"")
        if kind == CALL:
            self._reply(number, refusal or refuse(Code.RETRY, "the server knows its users since this moment"))

    def _count(self) -> None:
        """Tell the listener how much is in memory for this stream."""
        held = len(self._parser) + self._under_way_bytes
        if self._paused and self._transport is not None:
            held += self.queued_bytes + self._transport.get_write_buffer_size()
        self._inbound.hold(held)

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
            log.warning("refused a stream from %s: %s", self._inbound.address, refusal)
            self._transport.close()
            return False
        self._welcomed = True
        self._inbound.recheck = self._settle
        self._settle()
        return True

    def _begin(self, number: int, method: str, payload: bytes) -> None:
        task = self._loop.create_task(self._answer(number, method, payload))
        self._calls.add(task)
        self._under_way_bytes += len(payload)
        task.add_done_callback(partial(self._ended, len(payload)))
        full = len(self._calls) >= MAX_CALLS_AT_ONCE or self._inbound.listener.crowded
        if full and self._reading and self._transport is not None:
            self._reading = False
            self._transport.pause_reading()

    def _ended(self, size: int, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        self._under_way_bytes -= size
        if self._inbound.held_bytes:
            self._count()
        if not self._reading and self._may_read() and self._transport is not None:
            self._reading = True
            self._transport.resume_reading()

    def _may_read(self) -> bool:
        return len(self._calls) < MAX_CALLS_AT_ONCE and not (self._calls and self._inbound.listener.crowded)

    async def _answer(self, number: int, method: str, payload: bytes) -> None:
        try:
            answer = await self._handler(method, payload)
        except Exception:  # a handler answers bad input itself: this is our bug; the caller times out
            log.exception("%s failed", method)
            return
        self._reply(number, answer)

    def _reply(self, number: int, answer: bytes) -> None:
        self.put(ANSWER, number, "", answer)
        if self._paused:
            self._count()
            most = MAX_STRANGER_QUEUED_BYTES if self._parser.small else MAX_QUEUED_BYTES
            if self.queued_bytes > most:
                log.warning("closed a stream from %s: it does not read its answers", self._inbound.address)
                self.abort()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._count()

    def _deaf(self) -> bool:
        return not self._reading

    def _gone(self) -> None:
        log.info("closed a stream from %s: the peer is silent", self._inbound.address)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._inbound.ended()
        for task in self._calls:
            task.cancel()
