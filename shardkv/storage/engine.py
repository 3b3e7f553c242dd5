"""The storage engine: ordered keys, atomic batches, snapshots. The interface, and the one in memory.

What an engine writes is one atomic step together with the applied index. Nothing
is durable until `flush`, and then everything up to some index is: the raft log
replays the rest after a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from shardkv.raft.protocol.types import Index, SnapshotMeta
from shardkv.raft.snapshot import SnapshotSink, SnapshotSource

Range = tuple[bytes, bytes]


class View(Protocol):
    """Everything that an engine held at one moment, whatever is written since. `close` it."""

    applied: SnapshotMeta

    def scan(self, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Pairs from `start` on. Raises ViewGone."""

    def close(self) -> None: ...


class ViewGone(Exception):
    """The view was closed, or its engine became another replica's snapshot."""


class Engine(Protocol):
    """Keys are bytes in byte order.

    Reads and writes raise `raft.errors.DamagedState` when a file of the engine fails its
    checksum, and OSError when the disk fails. Afterwards the engine must not be used.
    """

    on_fault: Callable[[BaseException], None] | None
    """Hears of every such fault, also of those that background work (compaction, scrub) meets.

    The owner sets it. The engine calls it on any thread, possibly more than once, and at once
    when it is set after the fault. A replica hands the fault to its event loop, and stops there:

        engine.on_fault = lambda fault: loop.call_soon_threadsafe(replica.node.fail, fault)
    """

    @property
    def applied(self) -> SnapshotMeta: ...

    def get(self, key: bytes) -> bytes | None: ...

    def multi_get(self, keys: Sequence[bytes]) -> list[bytes | None]: ...

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Pairs with start <= key < end. Not to be used across a write."""

    def scan_back(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The same pairs, the last one first."""

    def keys(self, start: bytes, end: bytes) -> Iterator[bytes]:
        """The keys of `scan`, without a look at the values."""

    def write(
        self, deleted: Sequence[Range], changes: dict[bytes, bytes | None], applied: SnapshotMeta
    ) -> None:
        """Delete the ranges, then put (or, for None, delete) the keys, and note what was applied."""

    def reclaim(self, start: bytes, end: bytes) -> None:
        """Give the space of a deleted range back to the disk, in the background."""

    async def flush(self) -> Index: ...

    def scrub_progress(self) -> dict[str, Any]:
        """How far the check of everything at rest has come (`scrub.Scrub.progress`); empty where there is none."""

    def estimate(self, start: bytes, end: bytes) -> int:
        """About how many bytes lie in [start, end)."""

    def view(self) -> View: ...

    async def open_snapshot(self) -> SnapshotSource: ...

    def open_sink(self, meta: SnapshotMeta) -> SnapshotSink: ...

    def install(self, meta: SnapshotMeta, sink: SnapshotSink) -> None: ...

    def close(self) -> None: ...


class Batch:
    """Changes on top of an engine that are not written yet. Reads see them."""

    __slots__ = ("_deleted", "_engine", "changes")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._deleted: list[Range] = []
        self.changes: dict[bytes, bytes | None] = {}

    def get(self, key: bytes) -> bytes | None:
        if key in self.changes:
            return self.changes[key]
        if any(start <= key < end for start, end in self._deleted):
            return None
        return self._engine.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """`get` of each, with one look at the engine for all that this batch does not know."""
        unknown = [key for key in keys if key not in self.changes]
        stored = dict(zip(unknown, self._engine.multi_get(unknown), strict=True)) if unknown else {}
        for key in unknown:
            if any(start <= key < end for start, end in self._deleted):
                stored[key] = None
        return [self.changes[key] if key in self.changes else stored[key] for key in keys]

    def forget_new(self, key: bytes) -> None:
        """Delete a key that was put only once, ever: nothing is left of it if that was in this batch."""
        if self.changes.pop(key, None) is None:
            self.changes[key] = None

    def scan(self, start: bytes, end: bytes) -> list[tuple[bytes, bytes]]:
        """What the engine will hold in [start, end) once this is written."""
        pairs = {
            key: value
            for key, value in self._engine.scan(start, end)
            if not any(low <= key < high for low, high in self._deleted)
        }
        for key, value in self.changes.items():
            if start <= key < end:
                if value is None:
                    pairs.pop(key, None)
                else:
                    pairs[key] = value
        return sorted(pairs.items())

    def first(self, start: bytes, end: bytes, most: int) -> list[tuple[bytes, bytes]]:
        """The first `most` pairs of `scan`, at the cost of as many, and of a look at what has changed."""
        return list(islice(self.walk(start, end), most))

    def walk(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The pairs of `scan`, looked up as they are taken. The batch must not change meanwhile."""
        changes = self.changes
        changed = iter(sorted(key for key in changes if start <= key < end))
        following = next(changed, None)
        for key, value in self._engine.scan(start, end):
            while following is not None and following < key:
                if (new := changes[following]) is not None:
                    yield following, new
                following = next(changed, None)
            if key not in changes and not any(low <= key < high for low, high in self._deleted):
                yield key, value
        while following is not None:
            if (new := changes[following]) is not None:
                yield following, new
            following = next(changed, None)

    def put(self, key: bytes, value: bytes) -> None:
        self.changes[key] = value

    def delete(self, key: bytes) -> None:
        self.changes[key] = None

    def delete_range(self, start: bytes, end: bytes) -> None:
        """Everything in [start, end), what this batch has put there as well."""
        for key in [key for key in self.changes if start <= key < end]:
            del self.changes[key]
        self._deleted.append((start, end))

    def commit(self, applied: SnapshotMeta) -> None:
        """Write it all, atomically. The batch is empty afterwards."""
        self._engine.write(self._deleted, self.changes, applied)
        self._deleted, self.changes = [], {}
