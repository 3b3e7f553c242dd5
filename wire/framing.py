"""The bytes of a stream between processes: a hello, then records in both directions. Cut here, used by `stream.py`.

    hello    magic "SKV", version u8, length u16; who dials whom (`hello.py`)
    welcome  magic "SKV", 0, length u16; who was dialled, and its proof
             magic "SKV", 1 or 2, length u16, text: why not; 2: because of who dials
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
PROTOCOL_VERSION = 3  # 3: both ends prove who they are
WELCOME, REFUSED, DENIED = 0, 1, 2
HELLO = struct.Struct("<3sBH")
RECORD = struct.Struct("<BQHI")
POST, CALL, ANSWER, ASK, HERE = 1, 2, 3, 4, 5
MAX_METHOD_BYTES = 64
MAX_PAYLOAD_BYTES = 64 << 20
MAX_HELLO_BYTES = 1024
SMALL_PAYLOAD_BYTES = 8 << 10  # of a record, until the other end has said who it is


class MalformedStream(Exception):
    """Bytes that are no hello, or no sequence of records."""


def pack_hello(version_or_status: int, body: bytes) -> bytes:
    return HELLO.pack(MAGIC, version_or_status, len(body)) + body


class Parser:
    """Cuts what arrives into a hello and records; keeps what is not whole yet.

    While the other end has not said who it is, the payload of a record above `SMALL_PAYLOAD_BYTES` is
    not kept: the record is given out without it as soon as its head is there, and the payload is skipped.
    """

    def __init__(self, small: bool = False) -> None:
        self._buffer = bytearray()
        self.small = small
        self._to_skip = 0

    def feed(self, data: bytes) -> None:
        if self._to_skip:
            skipped = min(self._to_skip, len(data))
            self._to_skip -= skipped
            data = data[skipped:]
        self._buffer += data

    def __len__(self) -> int:
        """Bytes that are kept."""
        return len(self._buffer)

    def hello(self) -> tuple[int, bytes] | None:
        """(version or status, body) once it is whole. Raises MalformedStream."""
        buffer = self._buffer
        if buffer[:3] != MAGIC[: len(buffer[:3])]:
            raise MalformedStream(f"{bytes(buffer[:16])!r} where a hello belongs")
        if len(buffer) < HELLO.size:
            return None
        _, version, length = HELLO.unpack_from(buffer)
        if length > MAX_HELLO_BYTES:
            raise MalformedStream(f"a hello of {length} bytes")
        if len(buffer) < HELLO.size + length:
            return None
        body = bytes(buffer[HELLO.size : HELLO.size + length])
        del buffer[: HELLO.size + length]
        return version, body

    def records(self) -> Iterator[tuple[int, int, str, bytes | None]]:
        """(kind, number, method, payload) of each whole record; without a payload that is skipped. Raises MalformedStream."""
        buffer, offset = self._buffer, 0
        try:
            while len(buffer) - offset >= RECORD.size:
                kind, number, method_length, length = RECORD.unpack_from(buffer, offset)
                if not POST <= kind <= HERE or method_length > MAX_METHOD_BYTES or length > MAX_PAYLOAD_BYTES:
                    raise MalformedStream(f"a record of kind {kind} with {method_length} + {length} bytes")
                start = offset + RECORD.size
                body = start + method_length
                end = body + length
                if self.small and length > SMALL_PAYLOAD_BYTES:
                    if body > len(buffer):
                        break
                    self._to_skip = max(0, end - len(buffer))
                    offset = min(end, len(buffer))
                    method = bytes(buffer[start:body]).decode("ascii", errors="replace")
                    yield kind, number, method, None
                    continue
                if end > len(buffer):
                    break
                method = bytes(buffer[start:body]).decode("ascii", errors="replace")
                payload = bytes(buffer[body:end])
                offset = end
                yield kind, number, method, payload
        finally:
            del buffer[:offset]
