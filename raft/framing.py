"""The bytes of a stream between processes: a hello, then records in both directions. Cut here, used by `stream.py`.

    hello    magic "SKV", version u8, length u16, cluster id (empty: not known yet)
    welcome  magic "SKV", 0 or 1, length u16, text: why not, when it is 1
    record   kind u8, number u64, length of method u16, length of payload u32; method; payload

After the hello a stream is a sequence of records in both directions. A `post` wants
no answer (raft's mail); a `call` is answered by its number, in any order. An end that hears
nothing sends an `ask`, which the other answers with a `here` (`keepalive.py`). What queued
while the peer was slow to read leaves in one write.

A stream of another version or cluster is refused with a reason. Malformed bytes end the
stream, and nobody else is harmed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

MAGIC = b"SKV"
PROTOCOL_VERSION = 2
HELLO = struct.Struct("<3sBH")
RECORD = struct.Struct("<BQHI")
POST, CALL, ANSWER, ASK, HERE = 1, 2, 3, 4, 5
MAX_METHOD_BYTES = 64
MAX_PAYLOAD_BYTES = 64 << 20


class MalformedStream(Exception):
    """Bytes that are no hello, or no sequence of records."""


def pack_hello(version: int, cluster: str) -> bytes:
    name = cluster.encode()
    return HELLO.pack(MAGIC, version, len(name)) + name


class Parser:
    """Cuts what arrives into a hello and records; keeps what is not whole yet."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def hello(self) -> tuple[int, str] | None:
        """(version or status, text) once it is whole. Raises MalformedStream."""
        buffer = self._buffer
        if buffer[:3] != MAGIC[: len(buffer[:3])]:
            raise MalformedStream(f"{bytes(buffer[:16])!r} where a hello belongs")
        if len(buffer) < HELLO.size:
            return None
        _, version, length = HELLO.unpack_from(buffer)
        if len(buffer) < HELLO.size + length:
            return None
        text = bytes(buffer[HELLO.size : HELLO.size + length]).decode(errors="replace")
        del buffer[: HELLO.size + length]
        return version, text

    def records(self) -> Iterator[tuple[int, int, str, bytes]]:
        """(kind, number, method, payload) of each whole record. Raises MalformedStream."""
        buffer, offset = self._buffer, 0
        try:
            while len(buffer) - offset >= RECORD.size:
                kind, number, method_length, length = RECORD.unpack_from(buffer, offset)
                if not POST <= kind <= HERE or method_length > MAX_METHOD_BYTES or length > MAX_PAYLOAD_BYTES:
                    raise MalformedStream(f"a record of kind {kind} with {method_length} + {length} bytes")
                start = offset + RECORD.size
                end = start + method_length + length
                if end > len(buffer):
                    break
                method = bytes(buffer[start : start + method_length]).decode("ascii", errors="replace")
                payload = bytes(buffer[start + method_length : end])
                offset = end
                yield kind, number, method, payload
        finally:
            del buffer[:offset]
