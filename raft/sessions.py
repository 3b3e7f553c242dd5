"""Exactly-once records: what has been done for whom, so that a retry is answered, not repeated.

After RIFL (Lee et al., SOSP 2015). A session is a random 128-bit id; its owner
numbers the writes and may have many outstanding. Of each session we keep the
replies to the writes at or above the owner's low-water mark `acked_below`: every
write below it has been answered and will not be asked again.

Records expire by replicated time, `ttl_ms` after their last use. A write says when its
owner issued it (`issued_ms`: fixed when the write is first sent, by the newest time that the
owner had heard then). A write that no record tells of was either never done, or its record
expired. In the latter case the time is past `issued_ms + ttl_ms`, since a record counts as used no
earlier than the issue of what it records. So a write that old is refused, and never done again (also
where its session has begun a new record since); any younger one is new (`may_begin`).

Nobody's clock can break that rule. An owner that heard a time ahead of ours only
keeps its record for longer; our time does not move for it. An owner whose time is far behind is
refused, hears our time in the refusal, and issues the write again. When our own time leaps (a
shard arrives from a group whose time is ahead, or a group was down), no record expires for another
`ttl_ms` (`SessionClock`), so no session is lost to the leap.

Pure: the caller stores `encode()` in its replicated state.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass, field

HEADER = struct.Struct("<QQII")  # acked_below, used_ms, plain replies, other replies
OTHER = struct.Struct("<QI")  # seq, length

DEFAULT_TTL_MS = 3600 * 1000
CLOCK = struct.Struct(">QQ")
MOST_AHEAD_MS = 400 * 24 * 3600 * 1000  # a time further ahead is no time (microseconds, say), and counts as now
USED_MS = struct.Struct("<8xQ")  # of an encoded record


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


def used_ms_of(encoded: bytes) -> int:
    """When an encoded record was last used, without decoding the rest."""
    return int(USED_MS.unpack_from(encoded)[0])


@dataclass(slots=True)
class SessionClock:
    """A group's replicated time, and which records have expired by it. Part of the replicated state."""

    ttl_ms: int
    now_ms: int = 0
    keep_until_ms: int = 0  # nothing expires before: the time has leapt

    def advance(self, to_ms: int) -> None:
        """The time is at least `to_ms`. It never goes back."""
        if to_ms <= self.now_ms:
            return
        if self.now_ms and to_ms - self.now_ms > self.ttl_ms // 2:
            # Records that were used a moment ago by any clock of this world would expire now.
            self.keep_until_ms = to_ms + self.ttl_ms
        self.now_ms = to_ms

    def used_ms(self, heard_ms: int) -> int:
        """When a record counts as used, of a frame whose owner has heard of no later time than `heard_ms`."""
        return max(self.now_ms, heard_ms) if heard_ms <= self.now_ms + MOST_AHEAD_MS else self.now_ms

    def may_begin(self, issued_ms: int) -> bool:
        """Whether a write without a record was surely never done (see the module's docstring)."""
        return self.now_ms < issued_ms + self.ttl_ms

    def has_expired(self, used_ms: int) -> bool:
        return used_ms + self.ttl_ms < self.now_ms and self.keep_until_ms <= self.now_ms

    def encode(self) -> bytes:
        return CLOCK.pack(self.now_ms, self.keep_until_ms)

    def restore(self, encoded: bytes) -> None:
        """Become what `encode` gave; of nothing, a clock that has not begun."""
        self.now_ms, self.keep_until_ms = CLOCK.unpack(encoded) if encoded else (0, 0)
