"""The addresses that one process listens at: its own, that of the metrics, that of the page.

Each has its share of the process's file descriptors, and all write to one audit log.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from random import Random

from shardkv.observe.metrics import Metrics
from shardkv.observe.overview import Overview, look
from shardkv.observe.scrapes import Scrapes
from shardkv.process.identity import CannotStart
from shardkv.process.options import ProcessOptions
from shardkv.raft.figures import voters
from shardkv.raft.replica import Replica
from shardkv.server.access import Access
from shardkv.shardctrler.client import ControllerClient
from shardkv.wire.address import host_of, split_address
from shardkv.wire.audit import Audit
from shardkv.wire.descriptors import Descriptors
from shardkv.wire.dialer import TcpDialer
from shardkv.wire.listener import Listener

log = logging.getLogger(__name__)

WARN_SECONDS = 0.5  # between two looks at whether users are known yet
LOOK_SECONDS = 2.0  # for the configuration that the page shows

Stop = Callable[[], Awaitable[None]]
Context = Callable[[], ssl.SSLContext] | None  # of the next connection; None without TLS


class Listeners:
    """Open ones, to be closed together: the page first, for it asks the others."""

    def __init__(self, options: ProcessOptions, descriptors: Descriptors, audit: Audit) -> None:
        self._options, self._descriptors, self._audit = options, descriptors, audit
        self._stops: list[Stop] = []

    async def open_main(self, listener: Listener, context: Context) -> None:
        """Raises CannotStart."""
        options = self._options
        address = options.listen or options.address
        host, port = split_address(address)
        if options.tls is None and not _is_loopback(host):
            log.warning("listening on %s WITHOUT TLS: whoever can read packets reads the data", address)
        try:
            await listener.open(host, port, context)
        except OSError as error:
            raise CannotStart(f"{address} cannot be listened on: {error.strerror or error}") from None
        self._stops.append(listener.close)
        log.info("listening on %s%s", address, " with TLS" if options.tls is not None else "")

    async def open_metrics(self, metrics: Metrics) -> None:
        """Raises CannotStart."""
        address = self._options.metrics
        if not address:
            return
        host, port = split_address(address)
        try:
            stop = await Scrapes(metrics.registry).open(host, port, self._descriptors.pages, self._audit)
        except OSError as error:
            raise CannotStart(f"{address} cannot be listened on: {error.strerror or error}") from None
        self._stops.append(stop)

    async def open_page(
        self, replica: Replica, authorizer: Access, dialer: TcpDialer, rng: Random, context: Context
    ) -> None:
        """Raises CannotStart."""
        options = self._options
        if not options.web:
            return
        try:
            # Here, for it is large, and most processes do without.
            from shardkv.web.server import Page, open_page
        except ImportError:
            raise CannotStart("--web needs the package aiohttp: pip install 'shardkv[web]'") from None
        host, port = split_address(options.web)
        if options.tls is None and not _is_loopback(host):
            log.warning("the page at %s is WITHOUT TLS: tokens that are typed into it can be read", options.web)
        client = ControllerClient(options.peers or (options.address,), dialer, rng)

        async def look_around() -> Overview:
            return await look(client, dialer, list(voters(replica)), LOOK_SECONDS)

        def why_closed(address: str) -> str:
            if options.tls is None or options.web_open or not authorizer.is_open:
                return ""
            return why_elsewhere(address)

        names = {
            socket.gethostname(),
            *options.web_names,
            *(split_address(at)[0] for at in (options.web, options.address)),
        }
        page = Page(options.cluster, look_around, authorizer.login_refusal, names, why_closed)
        try:
            stop = await open_page(page, host, port, context, self._descriptors.pages, self._audit)
        except OSError as error:
            raise CannotStart(f"{options.web} cannot be listened on: {error.strerror or error}") from None
        self._stops.append(stop)
        log.info("the page is at %s://%s/", "http" if options.tls is None else "https", options.web)

    async def warn_if_open(self, replica: Replica, authorizer: Access) -> None:
        """One line where access control is off and others may come: once it is known."""
        options = self._options
        address = options.listen or options.address
        while not authorizer.knows_users or not replica.leader_address:
            await asyncio.sleep(WARN_SECONDS)
        if not authorizer.is_open or (options.tls is None and _is_loopback(split_address(address)[0])):
            return
        whoever = "has a certificate of the CA" if options.tls is not None else f"reaches {address}"
        log.warning(
            "access control is off: whoever %s may read and change everything (`shardkv admin access enable`)",
            whoever,
        )

    async def close(self) -> None:
        stops, self._stops = self._stops, []
        for stop in reversed(stops):
            await stop()


def why_elsewhere(address: str) -> str:
    """Why a browser at `address` is not answered where nobody is asked who he is; empty if it is on this machine."""
    if _is_loopback(host_of(address)):
        return ""
    return "access control is off, so only browsers on the controller's machine are answered (see --web-open)"


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.strip("[]"))
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host == "localhost"
