"""Raft's mail over the streams of `dialer.py`: what one turn has for a peer is one piece of mail.

We dial only the members that our log names (for a new replica: those that it was started with). Whoever
else sends us mail, a leader that joined the group after our last news of it or the group that a new
replica joins, is answered on the stream that the mail came on: no address in a piece of mail is ever dialled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from shardkv.raft.codec import MalformedMail, decode_mail, encode_mail
from shardkv.raft.protocol.messages import Envelope
from shardkv.raft.protocol.types import NOBODY, NodeId
from shardkv.wire.auth import Caller, Node
from shardkv.wire.dialer import Connection
from shardkv.wire.server_stream import ServerStream
from shardkv.wire.tls import Tls
from shardkv.wire.tls_files import TlsFiles, contexts

log = logging.getLogger(__name__)

MAIL = "raft"
MAX_PEERS = 64  # that we answer without dialling them


class TcpTransport:
    """`interfaces.Transport` for one replica. Envelopes of one turn leave as one piece of mail a peer."""

    def __init__(
        self,
        cluster: str,
        group: int,
        address: str,
        peers: Mapping[NodeId, str],
        tls: Tls | TlsFiles | None = None,
        who: Node | None = None,
        incarnation: int = 0,
    ) -> None:
        """Raises BadCertificate."""
        self._tls = contexts(tls)
        self._who = who
        self._cluster, self._group, self._address = cluster, group, address
        self._incarnation = incarnation  # of our disk
        self._incarnations: Mapping[NodeId, int] = {}  # of the others', as the log knows them
        self.on_unreachable: Callable[[NodeId], None] = lambda node: None
        # Called with what those whom we dialled post back to us.
        self.on_answers: Callable[[Sequence[Envelope]], None] = lambda envelopes: None
        self.on_refused: Callable[[NodeId, str], None] = lambda sender, why: log.warning("refused: %s", why)
        self._connections: dict[NodeId, Connection] = {}
        self._answering: dict[NodeId, ServerStream] = {}  # streams of those that our log does not name
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
                    self._who,
                    (self._group, node) if self._who is not None else None,
                    lambda payload, node=node: self._answered(node, payload),  # type: ignore[misc]
                )

    def _forget(self, node: NodeId) -> None:
        task = asyncio.get_running_loop().create_task(self._connections.pop(node).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def set_peers(self, addresses: Mapping[NodeId, str], incarnations: Mapping[NodeId, int]) -> None:
        self._incarnations = dict(incarnations)
        for node in [node for node in self._connections if node not in addresses]:
            self._forget(node)
        for node in addresses:
            self._answering.pop(node, None)
        self._connect(addresses)

    def send(self, envelopes: Sequence[Envelope]) -> None:
        by_peer: dict[NodeId, list[Envelope]] = {}
        for envelope in envelopes:
            by_peer.setdefault(envelope.to, []).append(envelope)
        for node, mail in by_peer.items():
            connection, stream = self._connections.get(node), self._answering.get(node)
            if connection is None and stream is None:
                continue  # it was removed, or never heard from: as if lost
            to_incarnation = self._incarnations.get(node, 0)
            packed = encode_mail(
                self._cluster, self._group, self._address, mail, self._incarnation, to_incarnation
            )
            if connection is not None:
                connection.post(MAIL, packed)
            elif stream is not None:
                stream.post(MAIL, packed)

    def unpack(self, payload: bytes, stream: ServerStream | None = None) -> list[Envelope]:
        """Mail that came for this replica; what is not for it is refused, and `on_refused` hears why.

        `stream`: on which it came, if the other end dialled.
        """
        envelopes = self._decode(payload)
        if not envelopes or stream is None:
            return envelopes
        sender = envelopes[0].sender
        if not self._is_from(sender, envelopes, stream.caller):
            self.on_refused(NOBODY, f"mail as if from replica {sender}, by {stream.caller.member}")
            return []
        if sender not in self._connections:
            self._answer_on(sender, stream)
        return envelopes

    def _answered(self, node: NodeId, payload: bytes) -> None:
        """Mail came on a stream that we dialled: the other end does not have us in its log yet."""
        envelopes = self._decode(payload)
        if any(envelope.sender != node for envelope in envelopes):
            self.on_refused(node, "mail as if from another replica")
        elif envelopes:
            self.on_answers(envelopes)

    def _is_from(self, sender: NodeId, envelopes: Sequence[Envelope], caller: Caller) -> bool:
        """Whether a caller that has proven which replica it is sends mail of its own."""
        proven = caller.member
        if proven is None:
            return True  # nobody can prove anything in this cluster: the authorizer has let it through
        if proven.group != self._group or proven.replica != sender:
            return False
        return all(envelope.sender == sender for envelope in envelopes)

    def _answer_on(self, node: NodeId, stream: ServerStream) -> None:
        self._answering = {peer: each for peer, each in self._answering.items() if each.is_open}
        if len(self._answering) < MAX_PEERS or node in self._answering:
            self._answering[node] = stream

    def _decode(self, payload: bytes) -> list[Envelope]:
        try:
            _, envelopes = decode_mail(self._cluster, self._group, payload)
        except MalformedMail as error:
            self.on_refused(error.sender, str(error))
            return []
        return envelopes

    async def close(self) -> None:
        await asyncio.gather(*(connection.close() for connection in self._connections.values()), *self._closing)
