"""A group's exactly-once records: `raft.sessions` kept in the engine, one record a shard and session.

Decoded records are cached. Whatever is read here is read through the batch, on top of the
engine: which entries share a batch differs between replicas, and what they do must not.
Changed records are written once a batch, however many operations changed them.

Expired records go a few at a time (`sweep`), from a cursor that is replicated state: a million
records cost no entry more than a fraction of a millisecond.
"""

from __future__ import annotations

from raft.sessions import SessionClock, SessionRecord, used_ms_of
from shardkv import layout
from shardkv.engine import Batch
from shardkv.layout import record_key, record_range

CACHED_RECORDS = 50_000
SWEEP_RECORDS = 200  # looked at by one step


class Records:
    def __init__(self, batch: Batch) -> None:
        """`batch` is the machine's, for as long as the machine lives."""
        self._batch = batch
        self._cache: dict[tuple[int, bytes], SessionRecord] = {}
        self._changed: set[tuple[int, bytes]] = set()

    def find(self, shard: int, session: bytes) -> SessionRecord | None:
        record = self._cache.get((shard, session))
        if record is None:
            stored = self._batch.get(record_key(shard, session))
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

    def store(self) -> None:
        """Put what changed into the batch."""
        for shard, session in sorted(self._changed):
            self._batch.put(record_key(shard, session), self._cache[shard, session].encode())
        self._changed.clear()

    def trim(self) -> None:
        """Keep the cache bounded. Call only when nothing is changed and unwritten."""
        assert not self._changed
        if len(self._cache) > CACHED_RECORDS:
            self._cache.clear()

    def forget(self) -> None:
        """Records were changed in the batch or the engine: by an install, a release, a split."""
        assert not self._changed
        self._cache.clear()

    def sweep(self, clock: SessionClock) -> None:
        """One step: look at the next records in key order, and delete those that have expired."""
        self.store()  # what this batch changed is used, and must not be judged by what it was before
        batch, (low, high) = self._batch, layout.ALL_RECORDS
        start = batch.get(layout.SWEPT) or low
        looked = batch.first(start, high, SWEEP_RECORDS)
        for key, value in looked:
            if clock.has_expired(used_ms_of(value)):
                batch.delete(key)
                self._cache.pop(layout.record_of(key), None)
        # Behind the last one, or from the beginning again.
        batch.put(layout.SWEPT, looked[-1][0] + b"\0" if len(looked) == SWEEP_RECORDS else low)

    # ---- whole shards; each on a batch of its own, after everything else was committed

    def copy(self, source: int, target: int) -> None:
        """A split: both halves answer retries of what the whole has done."""
        for key, value in self._batch.scan(*record_range(source)):
            self._batch.put(record_key(target, key[9:]), value)

    def merge(self, source: int, target: int) -> None:
        """A merge: the whole answers retries of what either half has done."""
        batch = self._batch
        for key, value in batch.scan(*record_range(source)):
            record = SessionRecord.decode(value)
            target_key = record_key(target, key[9:])
            present = batch.get(target_key)
            if present is not None:
                record.merge(SessionRecord.decode(present))
            batch.put(target_key, record.encode())
        batch.delete_range(*record_range(source))
