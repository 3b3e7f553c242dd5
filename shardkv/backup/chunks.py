"""Pairs in key order, cut into chunks where the keys say so. Pure.

A chunk ends after a pair whose key's hash is small, measured at the pair's size: so a change
of one pair changes one chunk, the same data makes the same chunks on every replica, and
chunks have about the same size whatever the values' sizes are (content-defined chunking,
as in LBFS, Muthitacharoen et al., SOSP 2001).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from shardkv.wire import frames
from shardkv.wire.frames import MalformedFrame

TARGET_BYTES = 1 << 20
MAX_BYTES = 8 << 20
SPACE = 1 << 32


class Chunker:
    """Takes pairs in order, gives chunks out."""

    def __init__(self, target_bytes: int = TARGET_BYTES, max_bytes: int = MAX_BYTES) -> None:
        self._target, self._max = target_bytes, max_bytes
        self._pairs: list[tuple[bytes, bytes]] = []
        self._size = 0

    def add(self, pairs: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:  # hot: runs per pair
        for pair in pairs:
            self._pairs.append(pair)
            size = len(pair[0]) + len(pair[1])
            self._size += size
            if zlib.crc32(pair[0]) * self._target < size * SPACE or self._size >= self._max:
                yield self._cut()

    def rest(self) -> Iterator[bytes]:
        if self._pairs:
            yield self._cut()

    def _cut(self) -> bytes:
        chunk = frames.pack_page(True, b"", self._pairs)
        self._pairs, self._size = [], 0
        return chunk


def pairs_of(chunk: bytes) -> list[tuple[bytes, bytes]]:
    """Raises MalformedFrame."""
    return frames.unpack_page(chunk)[2]


__all__ = ["Chunker", "MalformedFrame", "pairs_of"]
