"""Serves the page and what it shows, on a port of its own (`--web`). Read-only.

However many browsers look, the cluster is asked at most twice a second. With access control
on, a browser asks its user for a name and a token (HTTP Basic; any role will do); with TLS
the page is served over it, and no certificate is asked of browsers. So in a cluster with TLS and without
access control, browsers on other machines are refused unless an operator says otherwise (`--web-open`).

Other sites' pages run in the same browsers (`asking.py`): what they ask for is refused.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import ssl
from collections.abc import Awaitable, Callable, Collection
from importlib.resources import files
from typing import Any

from aiohttp import web

from shardkv.observe.overview import Overview, problems
from shardkv.shardctrler.client import ControllerUnavailable
from shardkv.web.asking import why_foreign
from shardkv.wire.acceptor import Acceptor
from shardkv.wire.audit import Audit
from shardkv.wire.auth import Login, Standing
from shardkv.wire.inbound import Inbound

FRESH_SECONDS = 0.5
MAX_CONNECTIONS = 64
IDLE_SECONDS = 60.0
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Look = Callable[[], Awaitable[Overview]]
MayLook = Callable[[Login | None, str], str]  # (login, address): why not; empty if so


class Page:
    def __init__(
        self,
        cluster: str,
        look: Look,
        may_look: MayLook,
        names: Collection[str] = (),
        why_closed: Callable[[str], str] = lambda address: "",
    ) -> None:
        """`names`: hosts under which browsers may ask, besides addresses and localhost. `why_closed`: to an address."""
        self._cluster, self._look, self._may_look = cluster, look, may_look
        self._names, self._why_closed = frozenset(names), why_closed
        self._shown: bytes = b""
        self._shown_at = -FRESH_SECONDS
        self._asking = asyncio.Lock()
        self.inbounds: dict[Any, Inbound] = {}  # by aiohttp's protocol
        self._html = files("shardkv.web").joinpath("page.html").read_bytes()

    def application(self) -> Any:
        application = web.Application(client_max_size=1024, middlewares=[self._guard])
        application.router.add_get("/", self._page)
        application.router.add_get("/api/cluster", self._data)
        return application

    @property
    def _guard(self) -> Any:
        async def guard(request: Any, handler: Any) -> Any:
            inbound = self.inbounds.get(request.protocol)
            if inbound is not None:
                inbound.touched = True
                inbound.settle(Standing.KNOWN)  # whoever asks in time may ask again
            address = inbound.address if inbound is not None else "?"
            login = _login(request.headers.get("Authorization", ""))
            if why := why_foreign(request.method, request.headers, self._names):
                answer = web.Response(status=why.status, text=f"{why.text}\n")
            elif closed := self._why_closed(address):
                answer = web.Response(status=403, text=f"{closed}\n")
            elif self._may_look(login, address):
                answer = web.Response(status=401, text="a name and its token, please\n")
                answer.headers["WWW-Authenticate"] = 'Basic realm="shardkv"'
            else:
                answer = await handler(request)
            answer.headers.update(HEADERS)
            return answer

        return web.middleware(guard)

    async def _page(self, request: Any) -> Any:
        return web.Response(body=self._html, content_type="text/html", charset="utf-8")

    async def _data(self, request: Any) -> Any:
        loop = asyncio.get_running_loop()
        async with self._asking:  # who comes meanwhile gets the same answer
            if loop.time() - self._shown_at >= FRESH_SECONDS:
                try:
                    facts = shown(self._cluster, await self._look(), loop.time())
                except ControllerUnavailable as error:
                    return web.json_response({"error": str(error)}, status=503)
                self._shown, self._shown_at = json.dumps(facts).encode(), loop.time()
        return web.Response(body=self._shown, content_type="application/json")


def _login(header: str) -> Login | None:
    kind, _, encoded = header.partition(" ")
    if kind.lower() != "basic":
        return None
    try:
        name, _, token = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return Login(name, token)


def shown(cluster: str, overview: Overview, now: float) -> dict[str, Any]:
    """What the page is told. Counters go up: the page makes rates of them."""
    serving, total = overview.settled()
    rows = {gid: (overview.leader(gid) or {}).get("shards", {}) for gid in overview.groups}
    return {
        "cluster": cluster,
        "config_num": overview.config.num,
        "seconds": now,
        "serving": serving,
        "problems": problems(overview),
        "shards": [
            {
                "id": shard.id,
                "start": _text(shard.start),
                "end": _text(shard.end),
                "gid": shard.gid,
                **_of_owner(rows.get(shard.gid, {}).get(str(shard.id))),
            }
            for shard in overview.config.shards()
        ],
        "moves": [
            {
                "shard": int(shard),
                "gid": gid,
                "state": row["state"],
                "copying": row.get("copying", ""),
                "why": row.get("why", ""),
            }
            for gid, of_group in sorted(rows.items())
            for shard, row in of_group.items()
            if row["state"] != "SERVING"
        ],
        "groups": [
            {"gid": gid, "replicas": _replicas(replicas)}
            for gid, replicas in [(0, overview.controllers), *sorted(overview.groups.items())]
        ],
        "total": total,
    }


def _text(key: bytes) -> str:
    return key.decode(errors="backslashreplace")


def _of_owner(row: dict[str, Any] | None) -> dict[str, Any]:
    if row is None:
        return {"state": "UNKNOWN"}
    return {key: row[key] for key in ("state", "bytes", "writes", "reads") if key in row}


def _replicas(replicas: dict[str, dict[str, Any] | None]) -> list[dict[str, Any]]:
    newest = max((said["commit_index"] for said in replicas.values() if said), default=0)
    return [
        {"address": address, "role": "no answer"}
        if said is None
        else {
            "address": address,
            "role": said["role"],
            "term": said["term"],
            "behind": newest - said["applied_index"],
            "room": said.get("room", "PLENTY"),
            "read_only": said.get("read_only", False),
            "free_bytes": said.get("free_bytes", 0),
        }
        for address, said in replicas.items()
    ]


async def open_page(
    page: Page,
    host: str,
    port: int,
    context: Callable[[], ssl.SSLContext] | None,
    places: int = MAX_CONNECTIONS,
    audit: Audit | None = None,
) -> Callable[[], Awaitable[None]]:
    """Listen; returns how to stop. Raises OSError where the address cannot be listened on."""
    runner = web.AppRunner(page.application(), access_log=None, handle_signals=False, keepalive_timeout=15)
    await runner.setup()

    def factory(inbound: Inbound) -> asyncio.BaseProtocol:
        return _Browser(runner.server(), inbound, page.inbounds)

    half = max(1, places // 2)
    acceptor = Acceptor("page", factory, strangers=half, known=half, audit=audit, idle_seconds=IDLE_SECONDS)
    try:
        await acceptor.open(host, port, context)
    except BaseException:
        await runner.cleanup()
        raise

    async def stop() -> None:
        await acceptor.close()
        await runner.cleanup()

    return stop


class _Browser(asyncio.Protocol):
    """One browser's connection: aiohttp's protocol, whose end the listener is told of."""

    def __init__(self, serving: Any, inbound: Inbound, inbounds: dict[Any, Inbound]) -> None:
        self._serving, self._inbound, self._inbounds = serving, inbound, inbounds

    def data_received(self, data: bytes) -> None:
        self._serving.data_received(data)

    def eof_received(self) -> None:
        self._serving.eof_received()

    def pause_writing(self) -> None:
        self._serving.pause_writing()

    def resume_writing(self) -> None:
        self._serving.resume_writing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._inbound.transport = transport
        self._inbounds[self._serving] = self._inbound
        self._serving.connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._inbounds.pop(self._serving, None)
        self._inbound.ended()
        self._serving.connection_lost(error)
