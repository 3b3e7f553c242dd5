"""The server's end of a stream: says welcome, asks the authorizer, and hands calls to the handler."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from shardkv.wire.audit import Audit, NoAudit
from shardkv.wire.auth import LOGIN, STRANGER, AllowAll, Authorizer, Standing
from shardkv.wire.calls import Code, Handler, busy_text, refuse
from shardkv.wire.framing import ANSWER, ASK, CALL, HERE, POST, MalformedStream
from shardkv.wire.handshake import Channel, Greeter, Greeting
from shardkv.wire.inbound import OVER_QUOTA, Inbound
from shardkv.wire.stream import MAX_QUEUED_BYTES, Stream
from shardkv.wire.turns import OWNER

log = logging.getLogger(__name__)

MAX_STRANGER_QUEUED_BYTES = 64 << 10  # answers that somebody unknown does not take
LAST_ANSWER_SECONDS = 0.2
REST_SECONDS = 0.02  # without a look at the stream, for each call that is told to come back later
OVER_QUOTA_SECONDS = 1.0
MAX_CALLS_AT_ONCE = 512  # of one stream at a server; beyond, it is not read from

Post = Callable[[str, bytes, "ServerStream"], None]


class ServerStream(Stream):
    """The server's side of one stream: gives each call to `handler`, each post to `on_post`."""

    def __init__(
        self,
        greeter: Greeter,
        handler: Handler,
        on_post: Post,
        authorizer: Authorizer | None = None,
        inbound: Inbound | None = None,
        audit: Audit | None = None,
    ) -> None:
        super().__init__()
        self._greeter, self._handler, self._on_post = greeter, handler, on_post
        self._authorizer: Authorizer = authorizer or AllowAll()
        self._inbound = inbound or Inbound("?", "?", self._loop.time())
        self._audit = audit or NoAudit()
        self._greeting: Greeting | None = None
        self._channel = Channel()
        self.caller = STRANGER
        self._parser.small = True
        self._welcomed = False
        self._calls: set[asyncio.Task[None]] = set()
        self._under_way_bytes = 0  # of the payloads of these
        self._reading = True
        self._resting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._channel = Channel.of(transport)
        if self._inbound.address == "?":
            self._inbound.address = self._channel.peer
        self._inbound.transport = transport

    def data_received(self, data: bytes) -> None:
        self.silence.heard_at = self._loop.time()
        self._parser.feed(data)
        turned_back = 0
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
                if self._greeting is not None:
                    self._log_in(method, payload or b"")
                elif payload is None:
                    self._refuse_unread(kind, number, method)
                elif kind == POST:
                    if self._authorizer.refusal(self.caller, method, payload) is None:
                        self._on_post(method, payload, self)
                    else:
                        self._settle()
                else:
                    refusal = self._authorizer.refusal(self.caller, method, payload)
                    if refusal is not None:
                        self._settle()
                        self._reply(number, refusal)
                    elif why := self._why_busy(method, payload):
                        turned_back += 1
                        self._reply(number, refuse(Code.BUSY, why))
                    else:
                        self._begin(number, method, self._authorizer.admitted(self.caller, method, payload))
            self._count()
            if turned_back:
                self._rest(turned_back)
        except MalformedStream as error:
            log.warning("closed a stream from %s: %s", self._inbound.address, error)
            self.abort()

    def _settle(self) -> Standing:
        """Tell the listener who the caller is, as far as the authorizer knows now."""
        standing, owner = self._authorizer.standing(self.caller)
        self._inbound.settle(standing, owner)
        self._parser.small = standing is Standing.STRANGER or self._inbound.over_quota
        return standing

    def _why_busy(self, method: str, payload: bytes) -> str:
        if self._inbound.over_quota:
            self._settle()  # there may be room by now
            if self._inbound.over_quota:
                return busy_text(OVER_QUOTA, OVER_QUOTA_SECONDS)
        return self._authorizer.busy(self.caller, method, payload)

    def _rest(self, turned_back: int) -> None:
        """Who is told to come back later, and asks all the same, costs no more than this."""
        if self._resting is None and self._transport is not None:
            self._resting = self._loop.call_later(min(REST_SECONDS * turned_back, 1.0), self._rested)
            if self._reading:
                self._reading = False
                self._transport.pause_reading()

    def _rested(self) -> None:
        self._resting = None
        self._read_on()

    def _refuse_unread(self, kind: int, number: int, method: str) -> None:
        """A large record of a stranger: the payload is skipped, and the authorizer refuses the call without it."""
        refusal = self._authorizer.refusal(self.caller, method, b"")
        if refusal is None and self._inbound.over_quota:
            refusal = refuse(Code.BUSY, busy_text(OVER_QUOTA, OVER_QUOTA_SECONDS))
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
        greeting = self._greeter.greet(*hello, self._channel)
        self._transport.write(greeting.reply)
        if greeting.refusal:
            log.warning("refused a stream from %s: %s", self._inbound.address, greeting.refusal)
            self._transport.close()
            return False
        if greeting.awaits_proof:
            self._greeting = greeting
        else:
            self.caller = greeting.caller
        self._welcomed = True
        if self._greeting is None:
            self._let_in()
        return True

    def _let_in(self) -> None:
        """Who it is does not change any more; what the authorizer knows of it may."""
        self._inbound.recheck = self._settle
        self._settle()

    def _log_in(self, method: str, payload: bytes) -> None:
        """The first record of who has something to prove is the proof. Raises MalformedStream."""
        greeting, self._greeting = self._greeting, None
        assert greeting is not None
        try:
            if method != LOGIN:
                raise MalformedStream("a record before the proof")
            self.caller = greeting.proven(payload)
        except MalformedStream as error:
            self._note_login(greeting.caller.name, str(error))
            raise
        self._note_login(greeting.caller.name, "")
        self._let_in()

    def _note_login(self, who: str, why_not: str) -> None:
        self._audit.note(
            "login",
            who=who,
            address=self._inbound.address,
            door="stream",
            what="login",
            allowed=not why_not,
            why=why_not,
        )

    def recheck(self) -> None:
        """End the stream if its caller is not any more who it was: removed, or with another secret.

        From now on the authorizer refuses its calls. It may have made the change itself: its answer goes out first.
        """
        if self._welcomed and not self._authorizer.is_still(self.caller):
            self._loop.call_later(LAST_ANSWER_SECONDS, self._end_unless_known)

    def _end_unless_known(self) -> None:
        if self.is_open and not self._authorizer.is_still(self.caller):
            log.info("closed the stream of %s: it has to log in again", self._inbound.address)
            self.abort()

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    def post(self, method: str, payload: bytes) -> None:
        """Send to the end that dialled, without an answer; dropped where the other end is gone or too slow."""
        if self.is_open and self.queued_bytes < MAX_QUEUED_BYTES:
            self.put(POST, 0, method, payload)

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
        self._read_on()

    def _read_on(self) -> None:
        if not self._reading and self._may_read() and self._transport is not None:
            self._reading = True
            self._transport.resume_reading()

    def _may_read(self) -> bool:
        if self._resting is not None:
            return False
        return len(self._calls) < MAX_CALLS_AT_ONCE and not (self._calls and self._inbound.listener.crowded)

    async def _answer(self, number: int, method: str, payload: bytes) -> None:
        OWNER.set(self._inbound.owner)
        try:
            answer = await self._handler(method, payload)
        except Exception:  # a handler answers bad input itself: this is our bug; the caller times out
            log.exception("%s failed", method)
            return
        self._authorizer.answered(self.caller, len(answer))
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
        if self._resting is not None:
            self._resting.cancel()
        if self._greeting is not None:
            # It knows another secret, and has seen by our proof that we do not.
            self._note_login(self._greeting.caller.name, "it left without a proof")
            self._greeting = None
        for task in self._calls:
            task.cancel()
