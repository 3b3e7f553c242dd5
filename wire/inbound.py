"""One accepted connection, from its accept to its end, and what is known of who is behind it."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from typing import Any, Protocol

from shardkv.wire.auth import Standing

OVER_QUOTA = "its user has as many connections as it may"


class Listener(Protocol):
    """Who accepted it, and is told of it: see `Acceptor`."""

    def settle(self, inbound: Inbound, standing: Standing, owner: str) -> None: ...

    def weigh(self, inbound: Inbound, descriptors: int) -> None: ...

    def hold(self, inbound: Inbound, held: int) -> None: ...

    def ended(self, inbound: Inbound) -> None: ...

    @property
    def crowded(self) -> bool: ...


class NoListener:
    """Of a connection that nobody counts."""

    crowded = False

    def settle(self, inbound: Inbound, standing: Standing, owner: str) -> None:
        inbound.standing = standing

    def weigh(self, inbound: Inbound, descriptors: int) -> None:
        pass

    def hold(self, inbound: Inbound, held: int) -> None:
        inbound.held_bytes = held

    def ended(self, inbound: Inbound) -> None:
        pass


class Inbound:
    """What a listener keeps of a connection. `owner` is whose share of the places it uses."""

    def __init__(self, address: str, source: str, now: float, listener: Listener | None = None) -> None:
        self.address, self.source, self.owner = address, source, source
        self.listener: Listener = listener or NoListener()
        self.strange_since = now  # when the time to say who one is began
        self.standing = Standing.STRANGER
        self.over_quota = False  # its user is known, and has as many connections as it may
        self.descriptors = 1
        self.touched = False  # whether it was used since the listener last looked
        self.idle_since = now
        self.held_bytes = 0
        self.recheck: Callable[[], object] | None = None  # its standing may have changed
        self.accepted: socket.socket | None = None  # until it has a transport
        self.beginning: asyncio.Task[None] | None = None
        self.transport: Any = None
        self.certified_until: float | None = None  # the end of its certificate, by the wall clock
        self.turned_away = ""  # why we ended it, if we did

    def settle(self, standing: Standing, owner: str = "") -> None:
        """Who is behind it is known now, or is not any more; `owner` is the user, where there is one."""
        self.listener.settle(self, standing, owner)

    def weigh(self, descriptors: int) -> None:
        """It takes so many descriptors from now on."""
        self.listener.weigh(self, descriptors)

    def hold(self, held: int) -> None:
        """So many bytes are in memory for it."""
        if held != self.held_bytes:
            self.listener.hold(self, held)

    def ended(self) -> None:
        """The connection is closed. A second time does nothing."""
        self.listener.ended(self)

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        elif self.beginning is not None:
            self.beginning.cancel()


def source_of(host: str) -> str:
    """Whose share a connection from `host` uses: of IPv6 a network of 64 bits, which is what one machine may have."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
