"""Calls between processes: one long-lived TCP stream to each address, any number of calls out at once.

    hello    magic "SKV", version u8, length u16, cluster id (empty: not known yet)
    welcome  magic "SKV", 0 or 1, length u16, text: why not, when it is 1
    record   kind u8, number u64, length of method u16, length of payload u32; method; payload

After the hello a stream is a sequence of records in both directions. A `post` wants
no answer (raft's mail); a `call` is answered by its number, in any order. An end that hears
nothing sends an `ask`, which the other answers with a `here` (`keepalive.py`). What queued
while the peer was slow to read leaves in one write.

A stream of another version or cluster is refused with a reason. Malformed bytes end
the stream: it is logged, and nobody else is harmed. The same port speaks gRPC to
those who do (`frontdoor.py`); why the inner traffic does not is told, with figures,
in docs/performance.md.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import struct
from collections.abc import Callable, Iterator
from typing import cast

from raft.address import split_address
from raft.doors import Handler, Unreachable
from raft.gate import LOGIN, Caller, Gate, Login, OpenGate
from raft.keepalive import ASK_SECONDS, Silence, watch_socket
from raft.tls import Tls

log = logging.getLogger(__name__)

MAGIC = b"SKV"
PROTOCOL_VERSION = 2
HELLO = struct.Struct("<3sBH")
RECORD = struct.Struct("<BQHI")
POST, CALL, ANSWER, ASK, HERE = 1, 2, 3, 4, 5
MAX_METHOD_BYTES = 64
MAX_PAYLOAD_BYTES = 64 << 20
MAX_QUEUED_BYTES = 64 << 20  # to one peer; beyond, calls fail as Unreachable and posts are dropped
MAX_CALLS_AT_ONCE = 512  # of one stream at a server; beyond, it is not read from
CONNECT_SECONDS = 2.0
RETRY_SECONDS = 0.05  # a peer that refused is not asked again before


class MalformedStream(Exception):
    """Bytes that are no hello, or no sequence of records."""


def pack_hello(version: int, cluster: str) -> bytes:
    name = cluster.encode()
    return HELLO.pack(MAGIC, version, len(name)) + name


class Parser:
    """Cuts what arrives into a hello and records; keeps what is not whole yet."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def hello(self) -> tuple[int, str] | None:
        """(version or status, text) once it is whole. Raises MalformedStream."""
        buffer = self._buffer
        if buffer[:3] != MAGIC[: len(buffer[:3])]:
            raise MalformedStream(f"{bytes(buffer[:16])!r} where a hello belongs")
        if len(buffer) < HELLO.size:
            return None
        _, version, length = HELLO.unpack_from(buffer)
        if len(buffer) < HELLO.size + length:
            return None
        text = bytes(buffer[HELLO.size : HELLO.size + length]).decode(errors="replace")
        del buffer[: HELLO.size + length]
        return version, text

    def records(self) -> Iterator[tuple[int, int, str, bytes]]:
        """(kind, number, method, payload) of each whole record. Raises MalformedStream."""
        buffer, offset = self._buffer, 0
        try:
            while len(buffer) - offset >= RECORD.size:
                kind, number, method_length, length = RECORD.unpack_from(buffer, offset)
                if not POST <= kind <= HERE or method_length > MAX_METHOD_BYTES or length > MAX_PAYLOAD_BYTES:
                    raise MalformedStream(f"a record of kind {kind} with {method_length} + {length} bytes")
                start = offset + RECORD.size
                end = start + method_length + length
                if end > len(buffer):
                    break
                method = bytes(buffer[start : start + method_length]).decode("ascii", errors="replace")
                payload = bytes(buffer[start + method_length : end])
                offset = end
                yield kind, number, method, payload
        finally:
            del buffer[:offset]


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


class _ClientStream(Stream):
    """A connection's stream: hello first, answers after."""

    def __init__(self, connection: Connection, hello: bytes, login: bytes) -> None:
        super().__init__()
        self._connection, self._hello = connection, hello
        if login:
            self.put(CALL, 0, LOGIN, login)  # before any other call; its answer says nothing
        self._welcomed = False
        self._why = "the connection broke"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self._transport is not None
        self._transport.write(self._hello)
        self._flush()

    def data_received(self, data: bytes) -> None:
        self.silence.heard_at = self._loop.time()
        self._parser.feed(data)
        try:
            if not self._welcomed:
                welcome = self._parser.hello()
                if welcome is None:
                    return
                if welcome[0] != 0:
                    raise MalformedStream(f"refused: {welcome[1]}")
                self._welcomed = True
            for kind, number, _, payload in self._parser.records():
                if kind == ANSWER:
                    self._connection.answered(number, payload)
                elif kind == ASK:
                    self.put(HERE, 0, "", b"")
        except MalformedStream as error:
            self._why = str(error)
            log.warning("closed the stream to %s: %s", self._connection.address, error)
            self.abort()

    def _gone(self) -> None:
        self._why = "the peer is silent"
        log.warning("closed the stream to %s: the peer is silent", self._connection.address)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._connection.broke(self, self._why)


class Connection:
    """Calls to one address. Connects when needed, and again after it broke."""

    def __init__(
        self,
        address: str,
        cluster: Callable[[], str],
        on_break: Callable[[], None],
        tls: ssl.SSLContext | None = None,
        login: bytes = b"",
    ) -> None:
        self.address, self._tls, self._login = address, tls, login
        self._cluster, self._on_break = cluster, on_break
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
            hello = pack_hello(PROTOCOL_VERSION, self._cluster())
            self._stream = _ClientStream(self, hello, self._login)
            self._connecting = self._loop.create_task(self._connect(self._stream))
        return self._stream

    async def _connect(self, stream: _ClientStream) -> None:
        try:
            host, port = split_address(self.address)
            async with asyncio.timeout(CONNECT_SECONDS):
                # TLS, if there is any, checks that the certificate is for this host.
                await self._loop.create_connection(lambda: stream, host, port, ssl=self._tls)
        except (OSError, TimeoutError) as error:  # a certificate that is refused is an OSError, too
            self.broke(stream, f"cannot connect: {error or 'no answer'}")
        except Exception as error:  # whatever it is, what is queued must not wait for ever
            log.warning("cannot connect to %s: %s", self.address[:64], error)
            self.broke(stream, f"cannot connect: {error}")

    def broke(self, stream: _ClientStream, why: str) -> None:
        """The stream ended: what was on it is lost, or done and not told."""
        if self._stream is not stream:
            return
        self._stream = None
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
    """Real calls behind the `Dialer` door: one `Connection` for each address."""

    def __init__(self, cluster: str = "", tls: Tls | None = None, login: Login | None = None) -> None:
        """Raises BadCertificate."""
        self._login = login.encode() if login is not None else b""
        self._tls = tls.client() if tls is not None else None
        self.cluster = cluster  # may be learnt after the first call; empty is accepted by every server
        self._connections: dict[str, Connection] = {}

    async def call(self, address: str, method: str, payload: bytes, timeout: float) -> bytes:
        connection = self._connections.get(address)
        if connection is None:
            connection = Connection(address, lambda: self.cluster, lambda: None, self._tls, self._login)
            self._connections[address] = connection
        return await connection.call(method, payload, timeout)

    async def close(self) -> None:
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.close()


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
