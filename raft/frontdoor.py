"""One port for both languages: our own streams, and gRPC for everybody else.

The first bytes of a connection tell: HTTP/2 begins with "PRI", our hello with "SKV".
A gRPC connection is piped to the process's own gRPC server, which listens on a
private socket; ours are served here. So one address is all that anybody needs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from raft.doors import Handler
from raft.framing import MAGIC
from raft.gate import Gate
from raft.serving import Post, ServerStream

log = logging.getLogger(__name__)

HTTP2 = b"PRI"
FIRST_BYTES_SECONDS = 10.0
MAX_CONNECTIONS = 10_000


@contextmanager
def private_socket(guarded: bool) -> Iterator[tuple[str, str]]:
    """Where the gRPC server listens: (its name for gRPC, its address for connect).

    In Linux's abstract namespace, so that no file is left behind; but anybody on the machine may
    connect there. `guarded`, where certificates decide who comes in: in a directory of our own,
    which only a SIGKILL leaves behind.
    """
    if not guarded:
        name = f"shardkv-{os.getpid()}-{secrets.token_hex(8)}"
        yield f"unix-abstract:{name}", "\0" + name
        return
    with tempfile.TemporaryDirectory(prefix="shardkv-") as directory:
        yield f"unix:{directory}/grpc", f"{directory}/grpc"


class _Pipe(asyncio.Protocol):
    """Half of a pipe: what arrives here leaves at `other`, no faster than that takes it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _Pipe | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class _Guest(asyncio.Protocol):
    """A new connection, until its first bytes tell what it speaks."""

    def __init__(self, door: FrontDoor) -> None:
        self._door = door
        self._first = b""
        self._transport: Any = None
        self._timer = asyncio.get_running_loop().call_later(FIRST_BYTES_SECONDS, self._silent)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        if len(self._door.guests) >= self._door.most_connections:
            self._door.turn_away(transport)
            return
        self._door.guests.add(transport)

    def data_received(self, data: bytes) -> None:
        self._first += data
        if len(self._first) < len(MAGIC):
            return
        self._timer.cancel()
        if self._first.startswith(HTTP2):
            self._hand_over(_Pipe())
        else:
            self._hand_over(self._door.new_stream())

    def _hand_over(self, protocol: Any) -> None:
        transport = self._transport
        door = self._door
        lost = protocol.connection_lost

        def connection_lost(error: Exception | None) -> None:
            door.guests.discard(transport)
            lost(error)

        protocol.connection_lost = connection_lost
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if isinstance(protocol, _Pipe):
            transport.pause_reading()
            task = asyncio.get_running_loop().create_task(door.pipe(protocol, self._first))
            door.piping.add(task)
            task.add_done_callback(door.piping.discard)
        else:
            protocol.data_received(self._first)

    def _silent(self) -> None:
        self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._door.guests.discard(self._transport)


class FrontDoor:
    """Listens on one address for streams and for gRPC."""

    def __init__(
        self, cluster: str, handler: Handler, on_post: Post, grpc_socket: str, gate: Gate | None = None
    ) -> None:
        self._grpc_socket = grpc_socket
        self.new_stream: Callable[[], ServerStream] = lambda: ServerStream(cluster, handler, on_post, gate)
        self.guests: set[Any] = set()  # transports, to be ended with us
        self.piping: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.most_connections = MAX_CONNECTIONS
        self._turned_away = 0

    def turn_away(self, transport: Any) -> None:
        """One connection too many: closed at once, so that those who are here are served."""
        transport.abort()
        self._turned_away += 1
        if self._turned_away & (self._turned_away - 1) == 0:  # said at 1, 2, 4, 8, …
            log.warning("turned away %d connections: %d are open", self._turned_away, self.most_connections)

    async def open(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        """Raises OSError when the address cannot be listened on."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Guest(self), host, port, backlog=1024, ssl=tls)

    async def pipe(self, guest: _Pipe, first: bytes) -> None:
        loop = asyncio.get_running_loop()
        inner = _Pipe()
        guest.other, inner.other = inner, guest
        private = socket.socket(socket.AF_UNIX)
        private.setblocking(False)
        try:
            await loop.sock_connect(private, self._grpc_socket)
            await loop.create_unix_connection(lambda: inner, sock=private)
        except OSError as error:
            log.warning("the gRPC server does not answer: %s", error)
            private.close()
            if guest.transport is not None:
                guest.transport.abort()
            return
        assert inner.transport is not None
        inner.transport.write(first)
        if guest.transport is not None:
            guest.transport.resume_reading()
        else:
            inner.transport.close()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for transport in list(self.guests):
            transport.abort()
        if self._server is not None:
            await self._server.wait_closed()
