"""Calls between processes: one long-lived TCP stream to each address, any number of calls out at once.

This is the caller's end: a `Connection` dials when it is needed, and again after its stream broke.
The bytes are in `framing.py`, the server's end in `server_stream.py`. Why the inner traffic is not gRPC
is told, with figures, in docs/performance.md.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable

from shardkv.wire.address import split_address
from shardkv.wire.auth import LOGIN, Who
from shardkv.wire.calls import Code, Unreachable, refuse
from shardkv.wire.framing import ANSWER, ASK, CALL, HERE, POST, MalformedStream
from shardkv.wire.handshake import Channel, Dialling, Refused
from shardkv.wire.keepalive import ASK_SECONDS
from shardkv.wire.stream import MAX_QUEUED_BYTES, Stream
from shardkv.wire.tls import Tls
from shardkv.wire.tls_files import TlsFiles, contexts

log = logging.getLogger(__name__)

CONNECT_SECONDS = 2.0
RETRY_SECONDS = 0.05  # a peer that refused is not asked again before


Posted = Callable[[bytes], None]


class _ClientStream(Stream):
    """A connection's stream. Until the other end has proven what we ask of it, it hears only our hello."""

    def __init__(self, connection: Connection, dialling: Dialling) -> None:
        super().__init__()
        self._connection, self._dialling = connection, dialling
        self._paused = True  # records queue until we are welcome
        self._welcomed = False
        self._channel = Channel()
        self.why = "the connection broke"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self._transport is not None
        self._channel = Channel.of(transport)
        self._transport.write(self._dialling.begin(self._channel))

    def resume_writing(self) -> None:
        if self._welcomed:
            super().resume_writing()

    def data_received(self, data: bytes) -> None:
        self.silence.heard_at = self._loop.time()
        self._parser.feed(data)
        try:
            if not self._welcomed and not self._welcome():
                return
            for kind, number, _, payload in self._parser.records():
                if kind == ANSWER:
                    self._connection.answered(number, payload or b"")
                elif kind == POST:
                    self._connection.on_post(payload or b"")
                elif kind == ASK:
                    self.put(HERE, 0, "", b"")
        except Refused as error:
            self.why = str(error)
            self._connection.refused(self, self.why, error.denied)
            self.abort()
        except MalformedStream as error:
            self.why = str(error)
            log.warning("closed the stream to %s: %s", self._connection.address, error)
            self.abort()

    def _welcome(self) -> bool:
        """Whether the other end's welcome is whole, and it has proven who it is. Raises Refused, MalformedStream."""
        welcome = self._parser.hello()
        if welcome is None:
            return False
        proof = self._dialling.welcomed(*welcome, self._channel)
        self._welcomed, self._paused = True, False
        queued, self._queued = self._queued, []
        if proof:
            self.put(CALL, 0, LOGIN, proof)  # before any call; it has no answer
        self._queued += queued
        self._flush()
        self._connection.welcomed()
        return True

    def _gone(self) -> None:
        self.why = "the peer is silent"
        log.warning("closed the stream to %s: the peer is silent", self._connection.address)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._connection.broke(self, self.why)


class Connection:
    """Calls to one address. Connects when needed, and again after it broke."""

    def __init__(
        self,
        address: str,
        cluster: Callable[[], str],
        on_break: Callable[[], None],
        tls: Callable[[], ssl.SSLContext] | None = None,
        who: Who = None,
        expected: tuple[int, int] | None = None,
        on_post: Posted = lambda payload: None,
    ) -> None:
        """`expected`: which group and replica must be at `address`. `on_post`: gets what it posts to us."""
        self.address, self._tls, self._who, self._expected = address, tls, who, expected
        self._cluster, self._on_break, self.on_post = cluster, on_break, on_post
        self._refusals = 0
        self._denial: bytes | None = None  # what calls are answered that come before we may dial again
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._next = 0
        self._stream: _ClientStream | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._refused_until = 0.0
        self._closed = False

    def post(self, method: str, payload: bytes) -> None:
        """Send without an answer; dropped while nobody is there, or too much is queued."""
        stream = self._open()
        if stream is not None and stream.queued_bytes < MAX_QUEUED_BYTES:
            stream.put(POST, 0, method, payload)

    async def call(self, method: str, payload: bytes, timeout: float) -> bytes:
        """The answer. Raises Unreachable within `timeout` seconds."""
        stream = self._open()
        if stream is None:
            if self._denial is not None:
                return self._denial
            raise Unreachable(f"{self.address}: connection refused")
        if stream.queued_bytes >= MAX_QUEUED_BYTES:
            raise Unreachable(f"{self.address}: too much is queued")
        self._next += 1
        number = self._next
        future: asyncio.Future[bytes] = self._loop.create_future()
        self._calls[number] = future
        stream.put(CALL, number, method, payload)
        timer = self._loop.call_later(timeout, self._time_out, number, timeout)
        try:
            return await future
        finally:
            timer.cancel()
            self._calls.pop(number, None)

    def _time_out(self, number: int, timeout: float) -> None:
        future = self._calls.pop(number, None)
        if future is not None and not future.done():
            future.set_exception(Unreachable(f"{self.address}: no answer within {timeout:.3g} s"))
        stream = self._stream
        if stream is not None and self._loop.time() - stream.silence.heard_at >= max(timeout, 2 * ASK_SECONDS):
            stream.abort()  # nothing else came either, though it was asked: the next call dials again

    def answered(self, number: int, payload: bytes) -> None:
        future = self._calls.pop(number, None)
        if future is not None and not future.done():
            future.set_result(payload)

    def _open(self) -> _ClientStream | None:
        """The stream, perhaps still connecting; None while the peer is known to be away."""
        if self._stream is None and not self._closed and self._loop.time() >= self._refused_until:
            dialling = Dialling(self._who, self._cluster(), self.address, self._expected)
            self._stream = _ClientStream(self, dialling)
            self._connecting = self._loop.create_task(self._connect(self._stream))
        return self._stream

    async def _connect(self, stream: _ClientStream) -> None:
        try:
            host, port = split_address(self.address)
            async with asyncio.timeout(CONNECT_SECONDS):
                context = self._tls() if self._tls is not None else None
                # TLS, if there is any, checks that the certificate is for this host.
                await self._loop.create_connection(lambda: stream, host, port, ssl=context)
        except (OSError, TimeoutError) as error:  # a certificate that is refused is an OSError, too
            self.broke(stream, f"cannot connect: {error or 'no answer'}")
        except Exception as error:  # whatever it is, what is queued must not wait for ever
            log.warning("cannot connect to %s: %s", self.address[:64], error)
            self.broke(stream, f"cannot connect: {error}")

    def welcomed(self) -> None:
        self._refusals, self._denial = 0, None

    def refused(self, stream: _ClientStream, why: str, denied: bool) -> None:
        """The two ends do not take each other. A call that is denied because of who we are is told so."""
        self._refusals += 1
        # At 1, 2, 4, 8, …: posts dial again all the time. Whoever calls is told by the answer.
        if not self._calls and self._refusals & (self._refusals - 1) == 0:
            log.warning("no stream to %s (%d times): %s", self.address, self._refusals, why)
        answer = refuse(Code.DENIED, why) if denied else None
        if answer is not None:
            for number in list(self._calls):
                self.answered(number, answer)
        self.broke(stream, why)
        self._denial = answer

    def broke(self, stream: _ClientStream, why: str) -> None:
        """The stream ended: what was on it is lost, or done and not told."""
        if self._stream is not stream:
            return
        self._stream, self._denial = None, None
        self._refused_until = self._loop.time() + RETRY_SECONDS
        calls, self._calls = self._calls, {}
        for future in calls.values():
            if not future.done():
                future.set_exception(Unreachable(f"{self.address}: {why}"))
        self._on_break()

    async def close(self) -> None:
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        stream = self._stream
        if stream is not None:
            self.broke(stream, "closed by us")
            stream.abort()


class TcpDialer:
    """A `Dialer` of real connections: one `Connection` for each address."""

    def __init__(self, cluster: str = "", tls: Tls | TlsFiles | None = None, login: Who = None) -> None:
        """Raises BadCertificate."""
        self._who = login
        self._tls = contexts(tls)
        self.cluster = cluster  # may be learnt after the first call; empty is accepted by every server
        self._connections: dict[str, Connection] = {}

    async def call(self, address: str, method: str, payload: bytes, timeout: float) -> bytes:
        connection = self._connections.get(address)
        if connection is None:
            connection = Connection(address, lambda: self.cluster, lambda: None, self._tls, self._who)
            self._connections[address] = connection
        return await connection.call(method, payload, timeout)

    async def close(self) -> None:
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.close()
