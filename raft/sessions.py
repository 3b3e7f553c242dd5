"""Exactly-once records: what has been done for whom, so that a retry is answered, not repeated.

After RIFL (Lee et al., SOSP 2015). A session is a random 128-bit id; its owner
numbers the writes and may have many outstanding. Of each session we keep the
replies to the writes at or above the owner's low-water mark `acked_below`: every
write below it has been answered and will not be asked again.

Records expire by replicated time. A write says when it was first issued
(`issued_ms`, by the same clock). If its session has no record, then either it was
never done, or its record expired `ttl_ms` after it was done, hence later than
`ttl_ms` after it was issued: such a late write is refused, not done again. For
this the clock must never fall behind an `issued_ms` that it has seen; the state
machines see to that.

Pure: the caller stores `encode()` in its replicated state.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass, field

HEADER = struct.Struct("<QQII")  # acked_below, used_ms, plain replies, other replies
OTHER = struct.Struct("<QI")  # seq, length

DEFAULT_TTL_MS = 3600 * 1000


@dataclass(slots=True)
class SessionRecord:
    """One session's completed writes at or above `acked_below`, with their replies."""

    acked_below: int = 0
    used_ms: int = 0
    replies: dict[int, bytes] = field(default_factory=dict)

    def acknowledge(self, below: int) -> None:
        """The owner has the replies to everything below: forget them. Never goes back."""
        if below > self.acked_below:
            self.acked_below = below
            self.replies = {seq: reply for seq, reply in self.replies.items() if seq >= below}

    def merge(self, other: SessionRecord) -> None:
        """Two shards that each served the session become one."""
        self.acked_below = max(self.acked_below, other.acked_below)
        self.used_ms = max(self.used_ms, other.used_ms)
        both = self.replies | other.replies
        self.replies = {seq: reply for seq, reply in both.items() if seq >= self.acked_below}

    def encode(self) -> bytes:
        """Bytes to store. Most replies are empty (a put's): those are a column of numbers."""
        plain = array("Q", [seq for seq, reply in self.replies.items() if not reply])
        other = [(seq, reply) for seq, reply in self.replies.items() if reply]
        parts = [HEADER.pack(self.acked_below, self.used_ms, len(plain), len(other)), plain.tobytes()]
        for seq, reply in other:
            parts += (OTHER.pack(seq, len(reply)), reply)
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> SessionRecord:
        acked_below, used_ms, plain_count, other_count = HEADER.unpack_from(data)
        offset = HEADER.size + 8 * plain_count
        plain = array("Q", data[HEADER.size : offset])
        replies: dict[int, bytes] = dict.fromkeys(plain, b"")
        for _ in range(other_count):
            seq, length = OTHER.unpack_from(data, offset)
            offset += OTHER.size
            replies[seq] = data[offset : offset + length]
            offset += length
        return cls(acked_below, used_ms, replies)


def may_begin(issued_ms: int, now_ms: int, ttl_ms: int) -> bool:
    """Whether a write without a record was surely never done (see the module's docstring)."""
    return now_ms < issued_ms + ttl_ms
