"""A group's exactly-once records: `raft.sessions` kept in the engine, one record a shard and session.

Decoded records are cached. Whatever is read here is read through the batch, on top of the
engine: which entries share a batch differs between replicas, and what they do must not.
Changed records are written once a batch, however many operations changed them.

Expired records go a few at a time (`sweep`), from a cursor that is replicated state: a million
records cost no entry more than a fraction of a millisecond.

So do the records that a split gives to both halves, and those that a merge joins (`inherit`): the shard takes them over step by
step, each an entry of the log. Until then it looks at the other shard's record as well, and neither
of the two moves, splits or merges.
"""

from __future__ import annotations

from shardkv.raft.sessions import SessionClock, SessionRecord, used_ms_of
from shardkv.state import layout
from shardkv.state.layout import record_key, record_range
from shardkv.state.row import Row
from shardkv.storage.engine import Batch

CACHED_RECORDS = 50_000
SWEEP_RECORDS = 200  # looked at by one step
INHERIT_RECORDS = 200  # taken over by one step


class Records:
    def __init__(self, batch: Batch) -> None:
        """`batch` is the machine's, for as long as the machine lives."""
        self._batch = batch
        self._cache: dict[tuple[int, bytes], SessionRecord] = {}
        self._changed: set[tuple[int, bytes]] = set()

    def find(self, row: Row, session: bytes) -> SessionRecord | None:
        """The caller changes it, and says so (`touch`)."""
        record = self._cache.get((row.shard, session))
        if record is None:
            stored = self._batch.get(record_key(row.shard, session))
            if row.inherits:
                stored = self._with_inherited(row, session, stored)
            if stored is None:
                return None
            record = self._cache[row.shard, session] = SessionRecord.decode(stored)
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

    # ---- after a split or merge

    def _with_inherited(self, row: Row, session: bytes, own: bytes | None) -> bytes | None:
        """The encoded record, with what is still to be taken over. The same however far that has come."""
        if own is not None and not row.folds:
            return own  # it was taken over, or has nothing to do with the other shard
        theirs = self._batch.get(record_key(row.inherits, session))
        return own if theirs is None else _both(own, theirs)

    def inherit(self, row: Row) -> bool:
        """One step: take over the next records of the shard that this one was split from, or has merged with.

        Changes `row`, which the caller stores. True when it was the last step. To be called on a batch
        of its own, after everything else was committed.
        """
        batch, (low, high) = self._batch, record_range(row.inherits)
        found = batch.first(low + row.inherited, high, INHERIT_RECORDS)
        keys = [record_key(row.shard, layout.record_of(key)[1]) for key, _ in found]
        for (key, theirs), own_key, own in zip(found, keys, batch.get_many(keys), strict=True):
            if row.folds:
                batch.put(own_key, _both(own, theirs))
                batch.delete(key)
            elif own is None:
                batch.put(own_key, theirs)
        if len(found) < INHERIT_RECORDS:
            return True
        row.inherited = layout.record_of(found[-1][0])[1] + b"\0"
        return False


def _both(own: bytes | None, theirs: bytes) -> bytes:
    """Two shards that each served a session are one. Taking theirs in twice makes no difference."""
    if own is None:
        return theirs
    record = SessionRecord.decode(own)
    record.merge(SessionRecord.decode(theirs))
    return record.encode()
