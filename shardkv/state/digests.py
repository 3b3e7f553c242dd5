"""Digests of what an engine holds, by which replicas and backups are compared. Pure.

A digest is blake2b over the pairs in key order, each with its lengths before it, so that no
two lists of pairs look alike. The data of each shard has a digest of its own, which names
the shard where two replicas differ. Everything else (exactly-once records, rows of
ownership, journals, the replicated clock, the membership) is in one more, the *rest*. The
applied index is not in it: views leave that key out, and whoever compares looks at the index first.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from shardkv.state import layout
from shardkv.state.row import Row, State

LENGTHS = struct.Struct("<II")
DIGEST_BYTES = 16
ABOVE_ALL = b"\xff"  # no engine key is as large


@dataclass(frozen=True, slots=True)
class Part:
    """The keys of one shard, as clients know them; an empty end is open."""

    shard: int
    start: bytes
    end: bytes


@dataclass(frozen=True, slots=True)
class Digest:
    pairs: int
    value: bytes


def parts_of(rows: Iterable[Row]) -> list[Part]:
    """What is digested by itself: the range of every shard of which a group may hold something."""
    parts: list[Part] = []
    for row in sorted(rows, key=lambda row: (row.start, row.shard)):
        if row.state is State.ABSENT:
            continue
        start = row.start
        if parts:
            if not parts[-1].end:
                break
            start = max(start, parts[-1].end)
        if row.contains(start):
            parts.append(Part(row.shard, start, row.end))
    return parts


class Digester:
    """Takes engine pairs in key order, as many at a time as there are; has a digest for each part, and the rest."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """`parts` do not overlap, and are in order."""
        ranges = [layout.data_range(part.start, part.end) for part in parts]
        self._lows = [low for low, _ in ranges]
        self._highs = [high for _, high in ranges]
        self._hashes = [blake2b(digest_size=DIGEST_BYTES) for _ in range(len(parts) + 1)]
        self._pairs = [0] * (len(parts) + 1)
        self._at = len(parts)  # the part that the last pair was in; the last one is the rest
        self._low, self._high = b"", b""

    @property
    def pairs(self) -> int:
        """How many there were so far."""
        return sum(self._pairs)

    def add(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:  # hot: runs per pair
        pack = LENGTHS.pack
        waiting: list[bytes] = []
        for key, value in pairs:
            if not self._low <= key < self._high:
                self._hash(waiting)
                waiting = []
                self._turn_to(key)
            waiting += (pack(len(key), len(value)), key, value)
        self._hash(waiting)

    def _hash(self, waiting: list[bytes]) -> None:
        self._hashes[self._at].update(b"".join(waiting))
        self._pairs[self._at] += len(waiting) // 3

    def _turn_to(self, key: bytes) -> None:
        after = bisect_right(self._lows, key)
        if after and key < self._highs[after - 1]:
            self._at, self._low, self._high = after - 1, self._lows[after - 1], self._highs[after - 1]
        else:
            self._at, self._low = len(self._lows), key
            self._high = self._lows[after] if after < len(self._lows) else ABOVE_ALL

    def parts(self) -> list[Digest]:
        """In the order of the parts."""
        return self._digests()[:-1]

    def rest(self) -> Digest:
        return self._digests()[-1]

    def _digests(self) -> list[Digest]:
        found = zip(self._pairs, self._hashes, strict=True)
        return [Digest(count, hashed.digest()) for count, hashed in found]
