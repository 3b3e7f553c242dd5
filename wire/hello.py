"""The bytes of the handshake: what each end of a new stream says of itself. Pure; malformed bytes raise MalformedStream."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from shardkv.wire.auth import Kind
from shardkv.wire.framing import PROTOCOL_VERSION, MalformedStream, pack_hello
from shardkv.wire.node_name import Member

NONCE_BYTES = 32
MAX_TEXT_BYTES = 300  # of each name and address
_HELLO = struct.Struct("<B32sQQ")
_WELCOME = struct.Struct("<32sQQ")
_LENGTH = struct.Struct("<H")


@dataclass(frozen=True, slots=True)
class Hello:
    """The end that dials."""

    nonce: bytes
    kind: Kind = Kind.NOBODY
    cluster: str = ""  # empty: not known yet
    group: int = 0  # of a node: which one it is
    replica: int = 0
    name: str = ""  # of a user
    key: bytes = b""  # names the secret that it will prove
    dialled: str = ""  # host:port, as it was told
    seen: bytes = b""  # what it found there: the hash of the certificate or, without TLS, the socket's address

    def encode(self) -> bytes:
        head = _HELLO.pack(self.kind, self.nonce, self.group, self.replica)
        return head + pack_fields(
            self.cluster.encode(), self.name.encode(), self.key, self.dialled.encode(), self.seen
        )

    @classmethod
    def decode(cls, data: bytes) -> Hello:
        if len(data) < _HELLO.size:
            raise MalformedStream(f"a hello of {len(data)} bytes")
        number, nonce, group, replica = _HELLO.unpack_from(data)
        try:
            kind = Kind(number)
        except ValueError:
            raise MalformedStream(f"a hello of kind {number}") from None
        cluster, name, key, dialled, seen = _fields(data[_HELLO.size :], 5)
        return cls(nonce, kind, _text(cluster), group, replica, _text(name), key, _text(dialled), seen)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The end that was dialled."""

    nonce: bytes
    member: Member
    proof: bytes = b""

    def encode(self) -> bytes:
        head = _WELCOME.pack(self.nonce, self.member.group, self.member.replica)
        return head + pack_fields(self.member.cluster.encode(), self.proof)

    @classmethod
    def decode(cls, data: bytes) -> Welcome:
        if len(data) < _WELCOME.size:
            raise MalformedStream(f"a welcome of {len(data)} bytes")
        nonce, group, replica = _WELCOME.unpack_from(data)
        cluster, proof = _fields(data[_WELCOME.size :], 2)
        return cls(nonce, Member(_text(cluster), group, replica), proof)


def stranger(cluster: str = "", version: int = PROTOCOL_VERSION) -> bytes:
    """The whole hello of somebody who does not say who it is."""
    return pack_hello(version, Hello(bytes(NONCE_BYTES), cluster=cluster).encode())


def transcript(hello: Hello, welcome: Welcome) -> bytes:
    """All that both ends have said before the first proof. Each proof is one of exactly this."""
    return pack_fields(b"shardkv stream 3", hello.encode(), replace(welcome, proof=b"").encode())


def pack_fields(*fields: bytes) -> bytes:
    return b"".join(_LENGTH.pack(len(field)) + field for field in fields)


def _fields(data: bytes, count: int) -> list[bytes]:
    fields, offset = [], 0
    for _ in range(count):
        end = offset + _LENGTH.size
        if end > len(data):
            raise MalformedStream("a handshake that is cut short")
        (length,) = _LENGTH.unpack_from(data, offset)
        if length > MAX_TEXT_BYTES or end + length > len(data):
            raise MalformedStream(f"a field of {length} bytes in a handshake")
        fields.append(data[end : end + length])
        offset = end + length
    if offset != len(data):
        raise MalformedStream(f"{len(data) - offset} bytes after a handshake")
    return fields


def _text(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise MalformedStream("a name in a handshake that is not UTF-8") from None
    if not text.isprintable():  # it may stand in a line of the log
        raise MalformedStream("a name in a handshake with a character that cannot be printed")
    return text
