"""A listener that cannot be filled up: it accepts, and bounds what those may cost who have not said who they are.

    accepted   a place among the strangers; the deadline begins
    spoken     (TLS) the first byte is there: the handshake waits for its turn (`tls_handshakes.py`)
    begun      the connection has a protocol, which tells us when it knows who is behind it
    known      a place among the clients, or among the peers; the deadline is over

Each of the three has so many places (`descriptors.py`), shared fairly (`shares.py`). One connection
too many costs the owner of most connections its oldest. A process of the cluster loses its place to
nobody. Where the system has no descriptor left for a connection, accepting pauses: the disk's files
have theirs.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from shardkv.wire.audit import Audit, NoAudit
from shardkv.wire.auth import Standing
from shardkv.wire.descriptors import Descriptors
from shardkv.wire.held import HeldBytes
from shardkv.wire.inbound import OVER_QUOTA, Inbound, source_of
from shardkv.wire.shares import Share
from shardkv.wire.tls_handshakes import Handshakes

log = logging.getLogger(__name__)

HELLO_SECONDS = 10.0  # for TLS, hello and login together
IDLE_SECONDS = 600.0
BACKLOG = 4096
ACCEPTS_A_TURN = 16
PAUSE_SECONDS = 0.2
LOOK_SECONDS = 0.5
LOOKS = 256  # at known connections, each time
TLS_RECORD = b"\x16"  # the first byte of a handshake

Factory = Callable[[Inbound], asyncio.BaseProtocol]


class Acceptor:
    """Listens at one address. `factory` makes the protocol of a connection, which calls `Inbound.ended` at its end."""

    def __init__(
        self,
        name: str,
        factory: Factory,
        strangers: int,
        known: int,
        peers: int = 0,
        audit: Audit | None = None,
        idle_seconds: float = IDLE_SECONDS,
        hello_seconds: float = HELLO_SECONDS,
    ) -> None:
        self.name = name
        self._factory, self._audit = factory, audit or NoAudit()
        self._idle_seconds, self._hello_seconds = idle_seconds, hello_seconds
        self._loop = asyncio.get_running_loop()
        self._strangers: Share[Inbound] = Share(strangers)
        self._known: Share[Inbound] = Share(known, lambda inbound: inbound.touched)
        self._peers: Share[Inbound] = Share(peers)
        self._by_age: dict[Inbound, None] = {}  # the strangers, the longest first
        self._looked_at: dict[Inbound, None] = {}  # the others, in the order of the looks
        self._listening: list[socket.socket] = []
        self._context: Callable[[], ssl.SSLContext] | None = None
        self._handshakes: Handshakes[Inbound] = Handshakes(self._shake_hands, self._drop_handshake)
        self._held = HeldBytes(lambda inbound: self.turn_away(inbound, "too many bytes are held"))
        self._looking: asyncio.TimerHandle | None = None
        self._resuming: asyncio.TimerHandle | None = None
        self._closed = False
        self.turned_away: Counter[str] = Counter()  # by why
        self.accepted = self.accept_failures = 0
        self.connections_of: Callable[[str], int] = lambda user: 0
        """How many connections a user may have at once; 0: as many as there is room for."""

    @classmethod
    def of(cls, name: str, factory: Factory, descriptors: Descriptors, audit: Audit | None = None) -> Acceptor:
        return cls(name, factory, descriptors.strangers, descriptors.known, descriptors.peers, audit)

    async def open(self, host: str, port: int, context: Callable[[], ssl.SSLContext] | None = None) -> None:
        """`context` gives the TLS context of the next connection. Raises OSError where the address cannot be listened on."""
        self._context = context
        found = await self._loop.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        try:
            for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
                self._listening.append(_listen(family, address))
        except OSError:
            self._stop_listening()
            raise
        self._listen_again()
        self._looking = self._loop.call_later(LOOK_SECONDS, self._look)

    @property
    def port(self) -> int:
        return int(self._listening[0].getsockname()[1])

    @property
    def paused(self) -> bool:
        return self._resuming is not None

    def status(self) -> dict[str, Any]:
        return {
            "strangers": len(self._strangers),
            "known": len(self._known),
            "peers": len(self._peers),
            "places": [self._strangers.most, self._known.most, self._peers.most],
            "handshakes_waiting": self._handshakes.waiting,
            "handshakes_under_way": self._handshakes.under_way,
            "handshakes_begun": self._handshakes.begun,
            "held_bytes": self._held.total,
            "accepted": self.accepted,
            "turned_away": dict(self.turned_away),
            "accept_failures": self.accept_failures,
            "accepting_pauses": self.paused,
        }

    # ---- accepting

    def _listen_again(self) -> None:
        self._resuming = None
        for listening in self._listening:
            self._loop.add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                accepted, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(error)
                return
            accepted.setblocking(False)
            self.accepted += 1
            self._take(accepted, address)

    def _pause(self, error: OSError) -> None:
        """No descriptor, or no memory, for one more: no fault of the disk. Have the oldest stranger make room."""
        self.accept_failures += 1
        if self.accept_failures & (self.accept_failures - 1) == 0:  # at 1, 2, 4, 8, …
            log.error(
                "cannot accept connections at %s: %s (%d times): raise the limit of open files",
                self.name,
                error,
                self.accept_failures,
            )
        for listening in self._listening:
            self._loop.remove_reader(listening)
        oldest = next(iter(self._by_age), None)
        if oldest is not None:
            self.turn_away(oldest, "no descriptor is left")
        self._resuming = self._loop.call_later(PAUSE_SECONDS, self._listen_again)

    def _take(self, accepted: socket.socket, address: Any) -> None:
        host, port = str(address[0]), address[1]
        inbound = Inbound(f"{host}:{port}", source_of(host), self._loop.time(), self)
        inbound.accepted = accepted
        self._strangers.add(inbound, inbound.owner)
        self._by_age[inbound] = None
        self._make_room(self._strangers)
        if inbound.turned_away:
            return
        if self._context is None:
            self._begin(inbound, None)
        else:
            # An SSL object takes some 50 KB, so those who say nothing do not get one.
            self._loop.add_reader(accepted, self._spoke, inbound)

    def _spoke(self, inbound: Inbound) -> None:
        assert inbound.accepted is not None
        self._loop.remove_reader(inbound.accepted)
        try:
            first = inbound.accepted.recv(1, socket.MSG_PEEK)
        except OSError:
            first = b""
        if not first:
            self._close_accepted(inbound)
            self.ended(inbound)
        elif first != TLS_RECORD:
            self._refuse(inbound, "it does not speak TLS")
        else:
            self._handshakes.add(inbound, inbound.source)

    def _shake_hands(self, inbound: Inbound) -> None:
        assert self._context is not None
        self._begin(inbound, self._context())

    def _begin(self, inbound: Inbound, context: ssl.SSLContext | None) -> None:
        inbound.beginning = self._loop.create_task(self._connect(inbound, context))

    async def _connect(self, inbound: Inbound, context: ssl.SSLContext | None) -> None:
        """Give it a protocol, after a handshake if there is to be one."""
        accepted, inbound.accepted = inbound.accepted, None
        assert accepted is not None
        left = max(0.1, inbound.strange_since + self._hello_seconds - self._loop.time())
        times = {} if context is None else {"ssl_handshake_timeout": left, "ssl_shutdown_timeout": 1.0}
        try:
            transport, _ = await self._loop.connect_accepted_socket(
                lambda: self._factory(inbound), accepted, ssl=context, **times
            )
            until = (transport.get_extra_info("peercert") or {}).get("notAfter")
            inbound.certified_until = ssl.cert_time_to_seconds(until) if until else None
            if inbound.turned_away:
                transport.abort()
        except (OSError, ssl.SSLError, asyncio.CancelledError) as error:
            accepted.close()
            if not inbound.turned_away and not self._closed and not isinstance(error, asyncio.CancelledError):
                self._note_failure(inbound, error)
            self.ended(inbound)
        except BaseException:
            accepted.close()
            self.ended(inbound)
            raise
        finally:
            self._handshakes.remove(inbound, inbound.source)
            inbound.beginning = None

    def _note_failure(self, inbound: Inbound, error: OSError | ssl.SSLError) -> None:
        """A handshake failed. One that the other end gave up is no news."""
        if isinstance(error, ConnectionResetError | BrokenPipeError):
            return
        why = str(getattr(error, "verify_message", "") or getattr(error, "reason", "") or error)
        self.turned_away["TLS"] += 1
        self._audit.note(
            "tls", address=inbound.address, door=self.name, what="handshake", allowed=False, why=why
        )

    def _refuse(self, inbound: Inbound, why: str) -> None:
        self.turned_away["TLS"] += 1
        self._audit.note(
            "tls", address=inbound.address, door=self.name, what="handshake", allowed=False, why=why
        )
        inbound.turned_away = why
        self._close_accepted(inbound)
        self.ended(inbound)

    # ---- who they are

    def settle(self, inbound: Inbound, standing: Standing, owner: str = "") -> None:
        """The protocol knows now who is behind it, or does not any more; `owner` is the user, where there is one."""
        if inbound.turned_away or (inbound not in self._by_age and inbound not in self._looked_at):
            return
        if standing is Standing.NODE and len(self._peers) >= self._peers.most and inbound not in self._peers:
            standing = Standing.KNOWN  # more of them than have a place of their own
        user, owner = owner, owner or inbound.source
        if (standing, owner) == (inbound.standing, inbound.owner):
            return
        inbound.over_quota = standing is Standing.KNOWN and self._is_over_quota(user)
        if inbound.over_quota:  # it stays a stranger, and its time runs out
            standing, owner = Standing.STRANGER, inbound.source
            if (standing, owner) == (inbound.standing, inbound.owner):
                return
        was = inbound.standing
        inbound.standing, inbound.owner = standing, owner
        self._leave(inbound)
        self._share(standing).add(inbound, owner, inbound.descriptors)
        if standing is Standing.STRANGER:
            self._by_age[inbound] = None
            if was is not Standing.STRANGER:
                inbound.strange_since = self._loop.time()
        else:
            self._looked_at[inbound] = None
        self._make_room(self._share(standing))

    def _is_over_quota(self, user: str) -> bool:
        most = self.connections_of(user) if user else 0
        return 0 < most <= self._known.held_by(user)

    def weigh(self, inbound: Inbound, descriptors: int) -> None:
        """It takes so many descriptors from now on."""
        inbound.descriptors = descriptors
        share = self._share(inbound.standing)
        if inbound in share:
            share.add(inbound, inbound.owner, descriptors)
            self._make_room(share)

    def hold(self, inbound: Inbound, held: int) -> None:
        if not inbound.turned_away:
            self._held.hold(inbound, held)

    @property
    def crowded(self) -> bool:
        return self._held.crowded

    def _share(self, standing: Standing) -> Share[Inbound]:
        match standing:
            case Standing.STRANGER:
                return self._strangers
            case Standing.KNOWN:
                return self._known
            case Standing.NODE:
                return self._peers

    def _leave(self, inbound: Inbound) -> None:
        for share in (self._strangers, self._known, self._peers):
            share.remove(inbound)
        self._by_age.pop(inbound, None)
        self._looked_at.pop(inbound, None)

    # ---- the end

    def _make_room(self, share: Share[Inbound]) -> None:
        while share is not self._peers and (one := share.surplus()) is not None:
            self.turn_away(one, "no place is left")

    def _drop_handshake(self, inbound: Inbound) -> None:
        self.turn_away(inbound, "other handshakes wait")

    def turn_away(self, inbound: Inbound, why: str) -> None:
        """End a connection. `why` is one of a few texts."""
        if inbound.turned_away:
            return
        self.turned_away[why] += 1
        self._audit.note(
            "connection",
            who=inbound.owner if inbound.owner != inbound.source else "",
            address=inbound.address,
            door=self.name,
            what=inbound.standing.name.lower(),
            allowed=False,
            why=why,
        )
        inbound.turned_away = why
        self._held.release(inbound)
        self._leave(inbound)  # its descriptor is free by the end of this turn
        self._close_accepted(inbound)
        self._handshakes.remove(inbound, inbound.source)
        inbound.abort()

    def end_all(self, why: str) -> None:
        """End every connection, so that each has to show its certificate again."""
        for inbound in [*self._by_age, *self._looked_at]:
            self.turn_away(inbound, why)

    def _close_accepted(self, inbound: Inbound) -> None:
        if inbound.accepted is not None:
            self._loop.remove_reader(inbound.accepted)
            inbound.accepted.close()
            inbound.accepted = None

    def ended(self, inbound: Inbound) -> None:
        self._leave(inbound)
        self._held.release(inbound)

    def _look(self) -> None:
        """End who had time enough to say who he is, and who has not been used for long."""
        now = self._loop.time()
        while (oldest := next(iter(self._by_age), None)) is not None:
            if now - oldest.strange_since < self._hello_seconds:
                break
            if oldest.recheck is not None:
                oldest.recheck()  # the users may have become known meanwhile
            if oldest in self._by_age:
                why = OVER_QUOTA if oldest.over_quota else "it did not say in time who it is"
                self.turn_away(oldest, why)
        for _ in range(min(LOOKS, len(self._looked_at))):
            inbound = next(iter(self._looked_at))
            del self._looked_at[inbound]
            self._looked_at[inbound] = None
            if inbound.certified_until is not None and time.time() >= inbound.certified_until:
                self.turn_away(inbound, "its certificate has expired")
                continue
            if inbound.touched:
                inbound.touched, inbound.idle_since = False, now
            elif now - inbound.idle_since >= self._idle_seconds and inbound not in self._peers:
                self.turn_away(inbound, "it was idle for long")
                continue
            if inbound.recheck is not None:
                inbound.recheck()
        self._looking = self._loop.call_later(LOOK_SECONDS, self._look)

    def _stop_listening(self) -> None:
        for listening in self._listening:
            self._loop.remove_reader(listening)
            listening.close()
        self._listening = []

    async def close(self) -> None:
        self._closed = True
        for timer in (self._looking, self._resuming):
            if timer is not None:
                timer.cancel()
        self._stop_listening()
        self._handshakes.close()
        beginning = []
        for inbound in [*self._by_age, *self._looked_at]:
            self._close_accepted(inbound)
            if inbound.beginning is not None:
                beginning.append(inbound.beginning)
            inbound.abort()
        await asyncio.gather(*beginning, return_exceptions=True)


def _listen(family: int, address: Any) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening
