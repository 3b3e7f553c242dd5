"""Raft's mail over the streams of `rpc.py`: what one turn has for a peer is one piece of mail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from raft.address import split_address
from raft.codec import MalformedMail, decode_mail, encode_mail
from raft.gate import Login
from raft.messages import Envelope
from raft.rpc import Connection
from raft.tls import Tls
from raft.tls_files import TlsFiles, contexts
from raft.types import NOBODY, NodeId

log = logging.getLogger(__name__)

MAIL = "raft"
MAX_PEERS = 64


class TcpTransport:
    """The transport door of one replica. Envelopes of one turn leave as one piece of mail a peer."""

    def __init__(
        self,
        cluster: str,
        group: int,
        address: str,
        peers: Mapping[NodeId, str],
        tls: Tls | TlsFiles | None = None,
        login: Login | None = None,
        incarnation: int = 0,
    ) -> None:
        """Raises BadCertificate."""
        self._tls = contexts(tls)
        self._login = login.encode() if login is not None else b""
        self._cluster, self._group, self._address = cluster, group, address
        self._incarnation = incarnation  # of our disk
        self._incarnations: Mapping[NodeId, int] = {}  # of the others', as the log knows them
        self.on_unreachable: Callable[[NodeId], None] = lambda node: None
        self.on_refused: Callable[[NodeId, str], None] = lambda sender, why: log.warning("refused: %s", why)
        self._connections: dict[NodeId, Connection] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._connect(peers)

    def _connect(self, peers: Mapping[NodeId, str]) -> None:
        for node, address in peers.items():
            present = self._connections.get(node)
            if present is not None and present.address == address:
                continue
            if present is not None:
                self._forget(node)
            if address != self._address:
                self._connections[node] = Connection(
                    address,
                    lambda: self._cluster,
                    lambda node=node: self.on_unreachable(node),  # type: ignore[misc]
                    self._tls,
                    self._login,
                )

    def _forget(self, node: NodeId) -> None:
        task = asyncio.get_running_loop().create_task(self._connections.pop(node).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def set_peers(self, addresses: Mapping[NodeId, str], incarnations: Mapping[NodeId, int]) -> None:
        self._incarnations = dict(incarnations)
        for node in [node for node in self._connections if node not in addresses]:
            self._forget(node)
        self._connect(addresses)

    def send(self, envelopes: Sequence[Envelope]) -> None:
        by_peer: dict[NodeId, list[Envelope]] = {}
        for envelope in envelopes:
            by_peer.setdefault(envelope.to, []).append(envelope)
        for node, mail in by_peer.items():
            if node in self._connections:  # else it was removed, or never heard from: as if lost
                to_incarnation = self._incarnations.get(node, 0)
                packed = encode_mail(
                    self._cluster, self._group, self._address, mail, self._incarnation, to_incarnation
                )
                self._connections[node].post(MAIL, packed)

    def unpack(self, payload: bytes) -> list[Envelope]:
        """Mail that came for this replica; what is not for it is refused, and `on_refused` hears why."""
        try:
            address, envelopes = decode_mail(self._cluster, self._group, payload)
            if address:
                split_address(address)
        except MalformedMail as error:
            self.on_refused(error.sender, str(error))
            return []
        except ValueError as error:
            self.on_refused(envelopes[0].sender if envelopes else NOBODY, f"mail from {error}")
            return []
        for envelope in envelopes:
            # It joined the group after our last news of it; how else could we answer?
            if envelope.sender not in self._connections and len(self._connections) < MAX_PEERS and address:
                self._connect({envelope.sender: address})
        return envelopes

    async def close(self) -> None:
        await asyncio.gather(*(connection.close() for connection in self._connections.values()), *self._closing)
