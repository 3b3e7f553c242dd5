"""Raft's mail over the streams of `rpc.py`: what one turn has for a peer is one piece of mail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from raft.codec import MalformedMail, decode_mail, encode_mail
from raft.messages import Envelope
from raft.rpc import Connection
from raft.types import NodeId

log = logging.getLogger(__name__)

MAIL = "raft"


class TcpTransport:
    """The transport door of one replica. Envelopes of one turn leave as one piece of mail a peer."""

    def __init__(self, cluster: str, group: int, peers: Mapping[NodeId, str]) -> None:
        self._cluster, self._group = cluster, group
        self.on_unreachable: Callable[[NodeId], None] = lambda node: None
        self._connections = {
            node: Connection(address, lambda: cluster, lambda node=node: self.on_unreachable(node))  # type: ignore[misc]
            for node, address in peers.items()
        }

    def send(self, envelopes: Sequence[Envelope]) -> None:
        by_peer: dict[NodeId, list[Envelope]] = {}
        for envelope in envelopes:
            by_peer.setdefault(envelope.to, []).append(envelope)
        for node, mail in by_peer.items():
            self._connections[node].post(MAIL, encode_mail(self._cluster, self._group, mail))

    def unpack(self, payload: bytes) -> list[Envelope]:
        """Mail that came for this replica; what is not for it is refused, logged and dropped."""
        try:
            return decode_mail(self._cluster, self._group, payload)
        except MalformedMail as error:
            log.warning("refused raft mail: %s", error)
            return []

    async def close(self) -> None:
        await asyncio.gather(*(connection.close() for connection in self._connections.values()))
