"""The engine in memory: for tests, and for the simulator."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from sortedcontainers import SortedDict

from shardkv.raft.protocol.types import SnapshotMeta
from shardkv.raft.state_file import InMemoryMachine
from shardkv.storage.engine import Range, ViewGone

PAIR = struct.Struct("<II")


class MemoryEngine(InMemoryMachine):
    """All in memory, for the simulator and for `--ephemeral`; flushed as one state file."""

    on_fault: Callable[[BaseException], None] | None = None  # never called: nothing works in the background

    def __init__(self, directory: Any) -> None:
        super().__init__(directory)
        self._pairs = SortedDict()
        self.recover()

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._pairs.get(key)
        return value

    def multi_get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self._pairs.get(key) for key in keys]

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        pairs = self._pairs
        for key in pairs.irange(start, end, inclusive=(True, False)):
            yield key, pairs[key]

    def scan_back(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        pairs = self._pairs
        for key in pairs.irange(start, end, inclusive=(True, False), reverse=True):
            yield key, pairs[key]

    def keys(self, start: bytes, end: bytes) -> Iterator[bytes]:
        yield from self._pairs.irange(start, end, inclusive=(True, False))

    def write(
        self, deleted: Sequence[Range], changes: dict[bytes, bytes | None], applied: SnapshotMeta
    ) -> None:
        for start, end in deleted:
            for key in list(self._pairs.irange(start, end, inclusive=(True, False))):
                del self._pairs[key]
        for key, value in changes.items():
            if value is None:
                self._pairs.pop(key, None)
            else:
                self._pairs[key] = value
        self._applied = applied

    def reclaim(self, start: bytes, end: bytes) -> None:
        """Memory is given back already."""

    def scrub_progress(self) -> dict[str, Any]:
        return {}

    def estimate(self, start: bytes, end: bytes) -> int:
        pairs = self._pairs
        count = pairs.bisect_left(end) - pairs.bisect_left(start)
        some = list(islice(self.scan(start, end), 100))
        return count * sum(len(key) + len(value) for key, value in some) // max(1, len(some))

    def view(self) -> MemoryView:
        return MemoryView(self.applied, self._pairs.copy())

    def dump(self) -> bytes:
        parts: list[bytes] = []
        for key, value in self._pairs.items():
            parts += (PAIR.pack(len(key), len(value)), key, value)
        return b"".join(parts)

    def load(self, data: bytes) -> None:
        pairs, offset = {}, 0
        while offset < len(data):
            key_length, value_length = PAIR.unpack_from(data, offset)
            middle = offset + PAIR.size + key_length
            pairs[data[offset + PAIR.size : middle]] = data[middle : middle + value_length]
            offset = middle + value_length
        if offset != len(data):
            raise ValueError("the last pair is cut short")
        self._pairs = SortedDict(pairs)


class MemoryView:
    """A copy: what is in memory is small."""

    def __init__(self, applied: SnapshotMeta, pairs: Any) -> None:
        self.applied = applied
        self._pairs: Any = pairs

    def scan(self, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        if self._pairs is None:
            raise ViewGone("the view was closed")
        for key in self._pairs.irange(start):
            yield key, self._pairs[key]

    def close(self) -> None:
        self._pairs = None
