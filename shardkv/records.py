"""A group's exactly-once records: `raft.sessions` kept in the engine, one record a shard and session.

Decoded records are cached; the engine has the truth. Changed ones are written once
a batch, however many operations changed them.
"""

from __future__ import annotations

from raft.sessions import SessionRecord
from shardkv.engine import Batch, Engine
from shardkv.layout import record_key, record_range

CACHED_RECORDS = 50_000


class Records:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cache: dict[tuple[int, bytes], SessionRecord] = {}
        self._changed: set[tuple[int, bytes]] = set()

    def find(self, shard: int, session: bytes) -> SessionRecord | None:
        record = self._cache.get((shard, session))
        if record is None:
            stored = self._engine.get(record_key(shard, session))
            if stored is None:
                return None
            record = self._cache[shard, session] = SessionRecord.decode(stored)
        return record

    def create(self, shard: int, session: bytes) -> SessionRecord:
        record = self._cache[shard, session] = SessionRecord()
        return record

    def touch(self, shard: int, session: bytes) -> None:
        """The record was changed and is to be written with the batch."""
        self._changed.add((shard, session))

    def store(self, batch: Batch) -> None:
        """Put what changed into the batch."""
        for shard, session in sorted(self._changed):
            batch.put(record_key(shard, session), self._cache[shard, session].encode())
        self._changed.clear()

    def trim(self) -> None:
        """Keep the cache bounded. Call only when nothing is changed and unwritten."""
        assert not self._changed
        if len(self._cache) > CACHED_RECORDS:
            self._cache.clear()

    def forget(self) -> None:
        """The engine changed underneath: by an install, a release, an expiry."""
        assert not self._changed
        self._cache.clear()

    # ---- whole shards; each on a batch of its own, after everything else was committed

    def copy(self, batch: Batch, source: int, target: int) -> None:
        """A split: both halves answer retries of what the whole has done."""
        for key, value in batch.scan(*record_range(source)):
            batch.put(record_key(target, key[9:]), value)

    def merge(self, batch: Batch, source: int, target: int) -> None:
        """A merge: the whole answers retries of what either half has done."""
        for key, value in batch.scan(*record_range(source)):
            record = SessionRecord.decode(value)
            target_key = record_key(target, key[9:])
            present = batch.get(target_key)
            if present is not None:
                record.merge(SessionRecord.decode(present))
            batch.put(target_key, record.encode())
        batch.delete_range(*record_range(source))

    def expired(self, used_before_ms: int) -> list[bytes]:
        """Engine keys of the records that were not used since."""
        return [
            key
            for key, value in self._engine.scan(b"s", b"t")
            if SessionRecord.decode(value).used_ms < used_before_ms
        ]
