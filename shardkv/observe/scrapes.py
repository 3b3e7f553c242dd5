"""The HTTP server for Prometheus: one request a connection, on the event loop, within a listener's bounds.

However many ask at once, the metrics are gathered for one of them at a time, and all who wait share the
next answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import cast

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from shardkv.wire.acceptor import Acceptor
from shardkv.wire.audit import Audit
from shardkv.wire.auth import Standing
from shardkv.wire.inbound import Inbound

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 8 << 10
ANSWER_SECONDS = 30.0  # to take the answer


class Scrapes:
    """Renders a registry, for one connection at a time."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._next: asyncio.Task[bytes] | None = None  # has not begun to gather
        self._gathering = asyncio.Lock()

    async def answer(self) -> bytes:
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._render())
        return await asyncio.shield(self._next)

    async def _render(self) -> bytes:
        async with self._gathering:
            self._next = None  # who comes from now on wants to see what is so now
            try:
                body = await asyncio.to_thread(generate_latest, self._registry)
            except TimeoutError as error:  # the loop stood still: a monitor should see that
                log.warning("metrics: %s", error)
                return _response("503 Service Unavailable", b"", "text/plain")
        return _response("200 OK", body, CONTENT_TYPE_LATEST)

    async def open(
        self, host: str, port: int, places: int, audit: Audit | None = None
    ) -> Callable[[], Awaitable[None]]:
        """Listen; returns how to stop. Raises OSError when the address cannot be listened on."""
        acceptor = Acceptor(
            "metrics",
            lambda inbound: _Scrape(self, inbound),
            strangers=max(1, places // 2),
            known=max(1, places // 2),
            audit=audit,
            idle_seconds=ANSWER_SECONDS,
        )
        await acceptor.open(host, port)
        return acceptor.close


def _response(status: str, body: bytes, content_type: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return (head + "Connection: close\r\n\r\n").encode() + body


class _Scrape(asyncio.Protocol):
    """One connection: reads a request's head, answers, and closes."""

    def __init__(self, scrapes: Scrapes, inbound: Inbound) -> None:
        self._scrapes, self._inbound = scrapes, inbound
        self._head = b""
        self._answering: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self._inbound.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._answering is not None or self._transport is None:
            return  # one request a connection
        self._head += data
        if b"\r\n\r\n" in self._head:
            self._inbound.settle(Standing.KNOWN)
            self._transport.pause_reading()
            self._answering = asyncio.get_running_loop().create_task(self._answer())
        elif len(self._head) > MAX_HEAD_BYTES:
            self._transport.abort()

    async def _answer(self) -> None:
        method = self._head.partition(b" ")[0]
        if method == b"GET":
            answer = await self._scrapes.answer()
        else:
            answer = _response("405 Method Not Allowed", b"", "text/plain")
        if self._transport is not None:
            self._transport.write(answer)
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._inbound.ended()
        if self._answering is not None:
            self._answering.cancel()
