"""One port for both languages: our own streams, and gRPC for everybody else.

The first bytes of a connection tell: HTTP/2 begins with "PRI", our hello with "SKV".
A gRPC connection is piped to the process's own gRPC server, which listens on a
private socket; ours are served here. So one address is all that anybody needs.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakSet

from shardkv.wire.acceptor import Acceptor
from shardkv.wire.audit import Audit
from shardkv.wire.auth import Authorizer, Standing
from shardkv.wire.calls import Handler
from shardkv.wire.descriptors import PIPE, Descriptors
from shardkv.wire.framing import MAGIC
from shardkv.wire.handshake import Greeter
from shardkv.wire.inbound import Inbound
from shardkv.wire.node_name import common_name
from shardkv.wire.server_stream import Post, ServerStream

log = logging.getLogger(__name__)

HTTP2 = b"PRI"


STRANGE_PIPE_BYTES = 64 << 10  # of a gRPC connection, until a call of it is let in


@contextmanager
def private_socket() -> Iterator[tuple[str, str]]:
    """Where the gRPC server listens: (its name for gRPC, its address for connect).

    In a directory of our own, so that nobody on this machine gets past the listener's bounds. Only a
    SIGKILL leaves the directory behind.
    """
    with tempfile.TemporaryDirectory(prefix="shardkv-") as directory:
        yield f"unix:{directory}/grpc", f"{directory}/grpc"


class _Pipe(asyncio.Protocol):
    """Half of a pipe: what arrives here leaves at `other`, no faster than that takes it."""

    def __init__(self, inbound: Inbound) -> None:
        self._inbound = inbound
        self.transport: asyncio.Transport | None = None
        self.other: _Pipe | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._inbound.touched = True
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.transport is not None:
            self._inbound.hold(self.transport.get_write_buffer_size())
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        self._inbound.hold(0)
        if self.other is not None:
            self.other.read_on()

    def read_on(self) -> None:
        if self.transport is not None:
            self.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class _Outer(_Pipe):
    """The half towards the client. A stranger gets so many bytes through, until a call of his is let in."""

    def __init__(self, inbound: Inbound, pipes: Pipes) -> None:
        super().__init__(inbound)
        self._pipes = pipes
        self._strange_bytes = 0
        self._held_back = False

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._inbound.standing is Standing.STRANGER:
            self._strange_bytes += len(data)
            if self._strange_bytes > STRANGE_PIPE_BYTES and self.transport is not None:
                self._held_back = True
                self.transport.pause_reading()

    def known(self) -> None:
        self._strange_bytes = 0
        if self._held_back:
            self._held_back = False
            self.read_on()

    def read_on(self) -> None:
        if not self._held_back:
            super().read_on()

    def connection_lost(self, error: Exception | None) -> None:
        self._inbound.ended()
        self._pipes.forget(self._inbound)
        super().connection_lost(error)


class Pipes:
    """The gRPC connections, each by the name that its end of the private socket has.

    That name is the `peer()` that the gRPC server's code sees, so whoever judges a call there finds out
    where it comes from, and tells the listener whether its caller is known.
    """

    def __init__(self) -> None:
        self._prefix = f"shardkv-{secrets.token_hex(8)}-"
        self._count = 0
        self._of: dict[str, tuple[Inbound, _Outer]] = {}
        self._name_of: dict[Inbound, str] = {}

    def name(self, inbound: Inbound, outer: _Outer) -> str:
        self._count += 1
        name = f"{self._prefix}{self._count}"
        self._of[name] = inbound, outer
        self._name_of[inbound] = name
        return name

    def forget(self, inbound: Inbound) -> None:
        self._of.pop(self._name_of.pop(inbound, ""), None)

    def address(self, peer: str) -> str:
        """Where the connection comes from that the gRPC server knows as `peer`."""
        found = self._of.get(peer.removeprefix("unix-abstract:"))
        return found[0].address if found is not None else "?"

    def certified(self, peer: str) -> str:
        """The user that the connection's certificate names; empty if there is none."""
        found = self._of.get(peer.removeprefix("unix-abstract:"))
        transport = found[0].transport if found is not None else None
        return common_name(transport.get_extra_info("peercert")) if transport is not None else ""

    def settle(self, peer: str, standing: Standing, owner: str) -> str:
        """This is what the caller of a call on that connection turned out to be.

        Returns whose share of the server's places its calls use; empty where they get none, for its user has as many
        connections as it may.
        """
        found = self._of.get(peer.removeprefix("unix-abstract:"))
        if found is None:
            return owner or "?"
        found[0].settle(standing, owner)
        if found[0].over_quota:
            return ""
        if standing is not Standing.STRANGER:
            found[1].known()
        return found[0].owner


class _PendingConnection(asyncio.Protocol):
    """A new connection, until its first bytes tell what it speaks."""

    def __init__(self, listener: Listener, inbound: Inbound) -> None:
        self._listener, self._inbound = listener, inbound
        self._first = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self._inbound.transport = transport
        if self._inbound.turned_away:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._first += data
        if len(self._first) < len(MAGIC):
            return
        if self._first.startswith(HTTP2):
            outer = _Outer(self._inbound, self._listener.pipes)
            self._inbound.weigh(PIPE)
            if self._inbound.turned_away:
                return
            self._hand_over(outer)
            self._transport.pause_reading()
            task = asyncio.get_running_loop().create_task(
                self._listener.pipe(outer, self._inbound, self._first)
            )
            self._listener.piping.add(task)
            task.add_done_callback(self._listener.piping.discard)
        else:
            stream = self._listener.new_stream(self._inbound)
            self._hand_over(stream)
            stream.data_received(self._first)

    def _hand_over(self, protocol: Any) -> None:
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._inbound.ended()


class Listener:
    """Listens on one address for streams and for gRPC."""

    def __init__(
        self,
        greeter: Greeter,
        handler: Handler,
        on_post: Post,
        grpc_socket: str,
        authorizer: Authorizer | None = None,
        descriptors: Descriptors | None = None,
        audit: Audit | None = None,
        pipes: Pipes | None = None,
    ) -> None:
        self._grpc_socket = grpc_socket
        self._streams: WeakSet[ServerStream] = WeakSet()

        def new_stream(inbound: Inbound) -> ServerStream:
            stream = ServerStream(greeter, handler, on_post, authorizer, inbound, audit)
            self._streams.add(stream)
            return stream

        self.new_stream: Callable[[Inbound], ServerStream] = new_stream
        self.pipes = pipes or Pipes()
        self.piping: set[asyncio.Task[None]] = set()
        descriptors = descriptors or Descriptors.divide(20_000)
        self.acceptor = Acceptor.of(
            "main", lambda inbound: _PendingConnection(self, inbound), descriptors, audit
        )

    async def open(self, host: str, port: int, context: Callable[[], ssl.SSLContext] | None = None) -> None:
        """`context` gives the TLS context of the next connection. Raises OSError when the address cannot be listened on."""
        await self.acceptor.open(host, port, context)

    def recheck(self) -> None:
        """Users or secrets have changed: end the streams of those who would not be let in any more."""
        for stream in list(self._streams):
            stream.recheck()

    async def pipe(self, outer: _Outer, inbound: Inbound, first: bytes) -> None:
        loop = asyncio.get_running_loop()
        inner = _Pipe(inbound)
        outer.other, inner.other = inner, outer
        private = socket.socket(socket.AF_UNIX)
        try:
            private.setblocking(False)
            private.bind("\0" + self.pipes.name(inbound, outer))
            await loop.sock_connect(private, self._grpc_socket)
            await loop.create_unix_connection(lambda: inner, sock=private)
        except OSError as error:
            log.warning("the gRPC server does not answer: %s", error)
            private.close()
            if outer.transport is not None:
                outer.transport.abort()
            return
        assert inner.transport is not None
        inner.transport.write(first)
        if outer.transport is not None:
            outer.read_on()
        else:
            inner.transport.close()

    async def close(self) -> None:
        await self.acceptor.close()
