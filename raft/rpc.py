"""Calls between processes over gRPC: one long-lived stream to each address, many calls in each message.

A gRPC message costs Python hundreds of microseconds, whatever is in it. So a
stream carries *parcels*: what queued up while the last parcel was being sent is
the next. Inside are records of opaque bytes:

    record   kind (post, call, answer), number, length of method, length of payload; method; payload

A `post` wants no answer (raft's mail); a `call` is answered by number, in any
order. Version and cluster id travel once, in the stream's metadata, and a stream
of another version or cluster is refused. Malformed records end the stream: it is
logged, and nobody else is harmed.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import grpc.aio

from raft.doors import Handler, Unreachable

log = logging.getLogger(__name__)

PROTOCOL_VERSION = "1"
METHOD = "/shardkv.Channel/Open"
RECORD = struct.Struct("<BQHI")
POST, CALL, ANSWER = 1, 2, 3
MAX_PARCEL_BYTES = 4 << 20  # more waits for the next parcel (one larger record still goes)
MAX_MESSAGE_BYTES = 64 << 20
MAX_QUEUED_BYTES = 64 << 20  # to one address; beyond, calls fail as Unreachable and posts are dropped
MAX_CALLS_AT_ONCE = 512  # of one stream at a server; beyond, it is not read from

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.so_reuseport", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


class MalformedParcel(Exception):
    """Bytes that are no sequence of records."""


def unpack_parcel(parcel: bytes) -> Iterator[tuple[int, int, str, bytes]]:
    """(kind, number, method, payload) of each record. Raises MalformedParcel."""
    offset, end = 0, len(parcel)
    while offset < end:
        if offset + RECORD.size > end:
            raise MalformedParcel("a record's header is cut short")
        kind, number, method_length, length = RECORD.unpack_from(parcel, offset)
        offset += RECORD.size
        stop = offset + method_length + length
        if kind not in (POST, CALL, ANSWER) or stop > end:
            raise MalformedParcel(f"a record of kind {kind} and {length} bytes")
        try:
            method = parcel[offset : offset + method_length].decode("ascii")
        except UnicodeDecodeError:
            raise MalformedParcel("a method's name is not ASCII") from None
        yield kind, number, method, parcel[offset + method_length : stop]
        offset = stop


class Outbox:
    """Records that wait for the next parcel. Bounded by its users."""

    def __init__(self) -> None:
        self._records: list[bytes] = []
        self._wake = asyncio.Event()
        self.size = 0

    def put(self, kind: int, number: int, method: str, payload: bytes) -> None:
        name = method.encode("ascii")
        self._records.append(RECORD.pack(kind, number, len(name), len(payload)) + name + payload)
        self.size += RECORD.size + len(name) + len(payload)
        self._wake.set()

    async def take(self) -> bytes:
        """All that waits, as one parcel; waits for the first record."""
        while not self._records:
            self._wake.clear()
            await self._wake.wait()
        count, size = 0, 0
        for record in self._records:
            if count and size + len(record) > MAX_PARCEL_BYTES:
                break
            count, size = count + 1, size + len(record)
        parcel = b"".join(self._records[:count])
        del self._records[:count]
        self.size -= size
        return parcel


class Connection:
    """A stream to one address that is opened when needed and again after it broke."""

    def __init__(self, address: str, cluster: Callable[[], str], on_break: Callable[[], None]) -> None:
        self._address, self._cluster, self._on_break = address, cluster, on_break
        self._outbox = Outbox()
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._next = 0
        self._channel: grpc.aio.Channel | None = None
        self._task: asyncio.Task[None] | None = None
        self.refusal = ""

    def post(self, method: str, payload: bytes) -> None:
        """Send without an answer; dropped when too much is queued already."""
        if self._outbox.size < MAX_QUEUED_BYTES:
            self._outbox.put(POST, 0, method, payload)
            self._ensure_open()

    async def call(self, method: str, payload: bytes, timeout: float) -> bytes:
        """The answer. Raises Unreachable within `timeout` seconds."""
        if self._outbox.size >= MAX_QUEUED_BYTES:
            raise Unreachable(f"{self._address}: too much is queued")
        self._next += 1
        number = self._next
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        self._outbox.put(CALL, number, method, payload)
        self._ensure_open()
        handle = asyncio.get_running_loop().call_later(timeout, self._time_out, number, timeout)
        try:
            return await future
        finally:
            handle.cancel()
            self._calls.pop(number, None)

    def _time_out(self, number: int, timeout: float) -> None:
        future = self._calls.pop(number, None)
        if future is not None and not future.done():
            why = self.refusal or f"no answer within {timeout:.3g} s"
            future.set_exception(Unreachable(f"{self._address}: {why}"))

    def _ensure_open(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        """Carry one stream until it breaks; then fail the calls that were on it."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS)
        metadata = (("shardkv-version", PROTOCOL_VERSION), ("shardkv-cluster", self._cluster()))
        stream = self._channel.stream_stream(METHOD)(metadata=metadata)
        writer: asyncio.Task[None] | None = None
        try:
            writer = asyncio.get_running_loop().create_task(self._write_forever(stream))
            while True:
                parcel = await stream.read()
                if parcel is grpc.aio.EOF:
                    break
                for kind, number, _, payload in unpack_parcel(parcel):
                    future = self._calls.pop(number, None)
                    if kind == ANSWER and future is not None and not future.done():
                        future.set_result(payload)
            why = f"{(await stream.code()).name}: {await stream.details()}"
        except grpc.aio.AioRpcError as error:
            why = f"{error.code().name}: {error.details()}"
        except MalformedParcel as error:
            why = f"the peer sent {error}"
        finally:
            if writer is not None:
                writer.cancel()
            stream.cancel()
        self._broke(why)

    async def _write_forever(self, stream: Any) -> None:
        try:
            while True:
                await stream.write(await self._outbox.take())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reader sees the same break and says why

    def _broke(self, why: str) -> None:
        self.refusal = why if why.startswith("FAILED_PRECONDITION") else ""
        log.debug("stream to %s ended: %s", self._address, why)
        calls, self._calls = self._calls, {}
        self._outbox = Outbox()
        for future in calls.values():
            if not future.done():
                future.set_exception(Unreachable(f"{self._address}: {why}"))
        self._on_break()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._broke("closed by us")
        if self._channel is not None:
            await self._channel.close()


class GrpcDialer:
    """Real calls behind the `Dialer` door: one `Connection` for each address."""

    def __init__(self, cluster: str = "") -> None:
        self.cluster = cluster  # may be learned after the first call; empty is accepted by every server
        self._connections: dict[str, Connection] = {}

    async def call(self, address: str, method: str, payload: bytes, timeout: float) -> bytes:
        connection = self._connections.get(address)
        if connection is None:
            connection = Connection(address, lambda: self.cluster, lambda: None)
            self._connections[address] = connection
        return await connection.call(method, payload, timeout)

    async def close(self) -> None:
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.close()


Post = Callable[[str, bytes], None]


class ChannelService(grpc.GenericRpcHandler):
    """The server's side: gives each call to `handler`, each post to `on_post`."""

    def __init__(self, cluster: str, handler: Handler, on_post: Post) -> None:
        self._cluster, self._handler, self._on_post = cluster, handler, on_post

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method == METHOD:
            return grpc.stream_stream_rpc_method_handler(self._serve)
        return None

    async def _serve(self, requests: AsyncIterator[bytes], context: Any) -> None:
        refusal = self._refusal(dict(context.invocation_metadata()))
        if refusal:
            log.warning("refused a stream from %s: %s", context.peer(), refusal)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        outbox = Outbox()
        calls: set[asyncio.Task[None]] = set()
        room = asyncio.Semaphore(MAX_CALLS_AT_ONCE)
        writer = asyncio.get_running_loop().create_task(self._write_forever(context, outbox))
        try:
            async for parcel in requests:
                for kind, number, method, payload in unpack_parcel(parcel):
                    if kind == POST:
                        self._on_post(method, payload)
                        continue
                    await room.acquire()
                    task = asyncio.get_running_loop().create_task(self._answer(number, method, payload, outbox))
                    calls.add(task)
                    task.add_done_callback(calls.discard)
                    task.add_done_callback(lambda _: room.release())
        except MalformedParcel as error:
            log.warning("closed a stream from %s: it sent %s", context.peer(), error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            writer.cancel()
            for task in calls:
                task.cancel()

    def _refusal(self, metadata: dict[str, str]) -> str:
        version, cluster = metadata.get("shardkv-version"), metadata.get("shardkv-cluster")
        if version != PROTOCOL_VERSION:
            return f"protocol version {version}, this server speaks {PROTOCOL_VERSION}"
        if cluster and cluster != self._cluster:
            return f"this server belongs to cluster {self._cluster!r}, not {cluster!r}"
        return ""

    async def _answer(self, number: int, method: str, payload: bytes, outbox: Outbox) -> None:
        try:
            outbox.put(ANSWER, number, "", await self._handler(method, payload))
        except asyncio.CancelledError:
            raise
        except Exception:  # a handler answers bad input itself: this is our bug; the caller times out
            log.exception("%s failed", method)

    async def _write_forever(self, context: Any, outbox: Outbox) -> None:
        try:
            while True:
                await context.write(await outbox.take())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.RpcError):
            pass  # the stream is gone, and its reader ends too
