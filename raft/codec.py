"""Envelopes to bytes and back: the bytes of raft's mail, and nothing else.

    mail       magic "SKM", version u8, CRC32C u32 of all that follows; address; envelopes
    address    length of the cluster's name u16, of the sender's address u16, group u32,
               incarnation u64 of the sender's disk, u64 of the receiver's as the sender's log
               knows it, number of envelopes u32; the cluster's name; the sender's address
    envelope   kind u8, sender u64, receiver u64, term u64; then the message, by its kind
    entry      index u64, term u64, kind u8, CRC32C u32, length u32; data

Fixed fields rather than protobuf: a lone put is six pieces of mail, and parsing them cost a tenth of
its CPU. `LAYOUTS` has the fields of each kind, in the order of the message's attributes.

`decode_mail` takes bytes from the network: whatever they are, it returns mail
or raises `MalformedMail`, and never anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from struct import error as StructError
from typing import Any

import google_crc32c

from shardkv.raft.protocol import messages as m
from shardkv.raft.protocol.bounds import flaw
from shardkv.raft.protocol.types import NOBODY, Entry, Kind, NodeId

PROTOCOL_VERSION = 3

MAGIC = b"SKM"
HEAD = Struct("<3sBI")
ADDRESS = Struct("<HHIQQI")
ENVELOPE = Struct("<BQQQ")
ENTRY = Struct("<QQBII")

# Kinds, and what follows the envelope of each. The numbers never change their meaning.
APPEND_ENTRIES, INSTALL_SNAPSHOT = 3, 5
LAYOUTS: dict[type[Any], tuple[int, Struct]] = {
    m.RequestVote: (1, Struct("<?QQ?")),
    m.RequestVoteReply: (2, Struct("<??")),
    m.AppendEntries: (APPEND_ENTRIES, Struct("<QQQQI")),  # the last: how many entries follow
    m.AppendReply: (4, Struct("<?QQQQQ??")),
    m.InstallSnapshot: (INSTALL_SNAPSHOT, Struct("<QQQQIQI")),  # the last: how many bytes follow
    m.InstallSnapshotReply: (6, Struct("<QQQ?Q")),
    m.ReadIndex: (7, Struct("<Q")),
    m.ReadIndexReply: (8, Struct("<QQ")),
    m.TimeoutNow: (9, Struct("<")),
}
APPEND, SNAPSHOT = LAYOUTS[m.AppendEntries][1], LAYOUTS[m.InstallSnapshot][1]
# kind → (layout, the message from its fields), for the kinds that are their fields alone
PLAIN: dict[int, tuple[Struct, Callable[..., m.Message]]] = {
    kind: (layout, message)
    for message, (kind, layout) in LAYOUTS.items()
    if kind not in (APPEND_ENTRIES, INSTALL_SNAPSHOT)
}
FIELDS = {kind: message.__slots__ for message, (kind, _) in LAYOUTS.items() if kind in PLAIN}
KINDS = {kind.value: kind for kind in Kind}


class MalformedMail(Exception):
    """Bytes that are no mail for this replica: damaged, of another version, cluster or group.

    `sender` is the replica that the mail says it is from; 0 where it does not say.
    """

    def __init__(self, why: str, sender: NodeId = NOBODY) -> None:
        super().__init__(why)
        self.sender = sender


def encode_mail(
    cluster: str,
    group: int,
    address: str,
    envelopes: Sequence[m.Envelope],
    incarnation: int = 0,
    to_incarnation: int = 0,
) -> bytes:
    """`address`: where the sender listens, for a receiver that does not know it yet.

    `incarnation` is that of the sender's disk, `to_incarnation` that of the receiver's as the
    sender's log knows it.
    """
    name, listens = cluster.encode(), address.encode()
    parts = [
        ADDRESS.pack(len(name), len(listens), group, incarnation, to_incarnation, len(envelopes)),
        name,
        listens,
    ]
    for envelope in envelopes:
        _put(parts, envelope)
    body = b"".join(parts)
    return HEAD.pack(MAGIC, PROTOCOL_VERSION, google_crc32c.value(body)) + body


def decode_mail(cluster: str, group: int, data: bytes) -> tuple[str, list[m.Envelope]]:
    """The sender's address and the envelopes in `data`. Raises MalformedMail."""
    to, address, envelopes = read_mail(data)
    if to != (cluster, group):
        raise MalformedMail(f"mail for cluster {to[0]!r} group {to[1]}, this is {cluster!r} group {group}")
    for envelope in envelopes:
        why = flaw(envelope)
        if why is not None:
            raise MalformedMail(f"replica {envelope.sender} at {address[:64]}: {why}", envelope.sender)
    return address, envelopes


def read_mail(data: bytes) -> tuple[tuple[str, int], str, list[m.Envelope]]:
    """(cluster, group) that the mail is for, the sender's address, and what it says, believed or not.

    Raises MalformedMail.
    """
    if len(data) < HEAD.size or not data.startswith(MAGIC):
        raise MalformedMail(f"{len(data)} bytes are no mail")
    _, version, crc = HEAD.unpack_from(data)
    if version != PROTOCOL_VERSION:
        raise MalformedMail(f"protocol version {version}, this replica speaks {PROTOCOL_VERSION}")
    body = data[HEAD.size :]
    # A flipped bit in a commit index or a match index commits what no quorum has stored. TCP's own
    # checksum has 16 bits and does not see what a memory or a network card does before it or after it.
    if google_crc32c.value(body) != crc:
        raise MalformedMail(f"{len(data)} bytes of mail do not match their checksum")
    try:
        return _take(body)
    except (StructError, ValueError, KeyError) as error:
        # ValueError: text that is not UTF-8. KeyError: a kind that this version does not know.
        raise MalformedMail(f"{len(data)} bytes are no mail: {error!r}") from None


def _put(parts: list[bytes], envelope: m.Envelope) -> None:
    message = envelope.message
    kind, layout = LAYOUTS[type(message)]
    parts.append(ENVELOPE.pack(kind, envelope.sender, envelope.to, envelope.term))
    match message:
        case m.AppendEntries():
            parts.append(
                APPEND.pack(
                    message.prev_log_index,
                    message.prev_log_term,
                    message.leader_commit,
                    message.read_seq,
                    len(message.entries),
                )
            )
            for entry in message.entries:
                parts += (
                    ENTRY.pack(entry.index, entry.term, entry.kind, entry.crc, len(entry.data)),
                    entry.data,
                )
        case m.InstallSnapshot():
            parts += (
                SNAPSHOT.pack(
                    message.last_index,
                    message.last_term,
                    message.total,
                    message.offset,
                    message.crc,
                    message.stream,
                    len(message.data),
                ),
                message.data,
            )
        case _:
            parts.append(layout.pack(*[getattr(message, field) for field in FIELDS[kind]]))


def _take(body: bytes) -> tuple[tuple[str, int], str, list[m.Envelope]]:
    """Raises MalformedMail, struct.error, ValueError, KeyError."""
    name_length, address_length, group, incarnation, to_incarnation, count = ADDRESS.unpack_from(body)
    at = ADDRESS.size + name_length
    cluster = _cut(body, ADDRESS.size, at).decode()
    address = _cut(body, at, at + address_length).decode()
    at += address_length
    envelopes = []
    for _ in range(count):  # ends by struct.error where there are fewer
        kind, sender, to, term = ENVELOPE.unpack_from(body, at)
        at += ENVELOPE.size
        message: m.Message
        if kind == APPEND_ENTRIES:
            message, at = _append_entries(body, at)
        elif kind == INSTALL_SNAPSHOT:
            message, at = _install_snapshot(body, at)
        else:
            layout, of_fields = PLAIN[kind]
            message = of_fields(*layout.unpack_from(body, at))
            at += layout.size
        envelopes.append(m.Envelope(sender, to, term, message, incarnation, to_incarnation))
    if at != len(body):
        raise MalformedMail(f"{len(body) - at} bytes after the last of {count} envelopes")
    return (cluster, group), address, envelopes


def _append_entries(body: bytes, at: int) -> tuple[m.AppendEntries, int]:
    prev_index, prev_term, leader_commit, read_seq, count = APPEND.unpack_from(body, at)
    at += APPEND.size
    entries = []
    for _ in range(count):  # ends by struct.error where there are fewer
        index, term, kind, crc, length = ENTRY.unpack_from(body, at)
        start = at + ENTRY.size
        at = start + length
        entries.append(Entry(index, term, KINDS[kind], _cut(body, start, at), crc))
    return m.AppendEntries(prev_index, prev_term, tuple(entries), leader_commit, read_seq), at


def _install_snapshot(body: bytes, at: int) -> tuple[m.InstallSnapshot, int]:
    last_index, last_term, total, offset, crc, stream, length = SNAPSHOT.unpack_from(body, at)
    start = at + SNAPSHOT.size
    at = start + length
    return m.InstallSnapshot(last_index, last_term, total, offset, _cut(body, start, at), crc, stream), at


def _cut(body: bytes, start: int, end: int) -> bytes:
    if end > len(body):
        raise MalformedMail(f"{end - len(body)} bytes are missing at the end")
    return body[start:end]
