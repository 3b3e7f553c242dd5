"""A look at everything that a RocksDB database held at one moment; see `engine.View`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from shardkv.raft.protocol.types import SnapshotMeta
from shardkv.storage.engine import ViewGone
from shardkv.storage.tables import APPLIED_KEY, read_to_end


class RocksView:
    """One iterator of RocksDB: wherever it is put, it shows the database as it was when it was made.

    It keeps what it needs from being compacted away until it is closed. (A `Snapshot` of
    rocksdict 0.3.29 will not do: its gets show the old state, but its iterators the newest.)
    """

    def __init__(self, applied: SnapshotMeta, iterator: Any, failed: Callable[[Exception], Exception]) -> None:
        self.applied, self._iterator, self._failed = applied, iterator, failed

    def scan(self, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        iterator = self._iterator
        if iterator is None:
            raise ViewGone("the replica has taken another's snapshot in")
        # Above the key of the applied index, which is the engine's own.
        iterator.seek(max(start, APPLIED_KEY + b"\0"))
        try:
            yield from read_to_end(iterator)
        except Exception as error:
            raise self._failed(error) from None

    def close(self) -> None:
        self._iterator = None
