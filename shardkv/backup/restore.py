"""Putting a backup into a cluster, of whatever shape: as it was at its moment, or at a later one.

First each group of then is brought back to life on this machine, on disk: its state from the
chunks, then its log, through the same state machine that ran in the cluster, up to the
moment. Only when all of that is whole is anything written. Then the keys of whoever held
them go into the new cluster as ordinary writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from client import AsyncShardClerk
from raft.rsm import unstamp
from raft.types import Entry, Kind, SnapshotMeta
from shardkv import layout
from shardkv import shardkv_pb2 as pb
from shardkv.backup import archive, catalog
from shardkv.backup.archive import ArchivedGroup, Segment
from shardkv.backup.errors import BackupError, Damaged
from shardkv.backup.manifest import GroupPart, Manifest, moment
from shardkv.backup.source import Throttle
from shardkv.backup.store import Store
from shardkv.backup.whole import Wholeness
from shardkv.machine import ShardMachine
from shardkv.ownership import Row, State
from shardkv.rocks import RocksEngine

MARK = b"\0shardkv/restore"  # a key that is there while a restore is under way; its value names it
LOAD_PAIRS = 5000
WRITES_AT_ONCE = 2000
HOLDS = {State.SERVING: 2, State.LENDING: 1, State.FROZEN: 0}  # the whole of a shard; the more the better


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of keys, and the group that held it."""

    start: bytes
    end: bytes
    group: ArchivedGroup


class Revived:
    """One group as it was: its state machine on a database in `directory`."""

    def __init__(self, name: ArchivedGroup, directory: Path) -> None:
        self.name, self.gid = name, name.gid
        self._engine = RocksEngine(directory)
        self.machine = ShardMachine(self.gid, self._engine)
        self.reaches_ms = 0  # up to when it is known to be whole
        self._newest = 0  # stamp

    async def load(self, store: Store, backup: str, part: GroupPart, done: Callable[[int], None]) -> None:
        """Its state at the view, all of it. Raises BackupError."""
        applied = SnapshotMeta(part.index, part.term)
        whole, names = Wholeness(backup, self.gid, part), iter(part.chunks)
        async for _, content in catalog.fetched(store, part.chunks):
            pairs = whole.add(next(names), content)
            for start in range(0, len(pairs), LOAD_PAIRS):
                self._engine.write([], dict(pairs[start : start + LOAD_PAIRS]), applied)
            done(len(content))
        whole.finish()
        if not part.chunks:
            self._engine.write([], {}, applied)
        self.machine = ShardMachine(self.gid, self._engine)
        if f"{self.machine.incarnation:016x}" != self.name.incarnation:
            raise Damaged(f"{store.url}: the chunks of group {self.gid} are of another group of that number")

    def replay(self, entries: Iterator[pb.LoggedEntry], until_ms: int) -> bool:
        """Apply what follows; whether the moment is passed. Raises BackupError for a gap."""
        batch: list[Entry] = []
        passed = False
        last = self.machine.applied.index
        for item in entries:
            if item.index <= last:
                continue
            if item.index != last + 1:
                raise BackupError(
                    f"the archive of group {self.gid} has a gap: entries {last + 1} to {item.index - 1} are missing. "
                    "Restore an earlier moment, or begin with a backup that was made after the gap"
                )
            entry = Entry(item.index, item.term, Kind(item.kind), item.data)
            self._newest = max(self._newest, unstamp(entry)[0].wall_ms)
            if self._newest > until_ms:
                passed = True
                break
            batch.append(entry)
            last = item.index
        if batch:
            self.machine.apply(batch)
        return passed

    def rows(self) -> list[Row]:
        return [row for row in self.machine.ownership.rows.values() if row.state in HOLDS]

    def pairs(self, piece: Piece) -> Iterator[tuple[bytes, bytes]]:
        for key, value in self._engine.scan(*layout.data_range(piece.start, piece.end)):
            yield key[1:], value

    def close(self) -> None:
        self._engine.close()


class Restore:
    """One run of `shardkv restore`. `directory` is for what is brought back to life, and is emptied by the caller."""

    def __init__(
        self,
        store: Store,
        directory: Path,
        rate: float = 0.0,
        loaded: Callable[[int], None] = lambda size: None,
        written: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._store, self._directory = store, directory
        self._throttle = Throttle(rate)
        self._loaded, self._written = loaded, written
        self._groups: dict[ArchivedGroup, Revived] = {}

    async def choose(self, id: str, at_ms: int | None) -> Manifest:
        """The backup to begin with: the named one, the newest, or the newest before a moment. Raises BackupError."""
        if at_ms is None or id:
            manifest = await catalog.find(self._store, id)
        else:
            before = [m for m in await catalog.backups(self._store) if m.time_ms <= at_ms]
            if not before:
                raise BackupError(f"{self._store.url}: no backup is as old as {moment(at_ms)}")
            manifest = before[-1]
        if at_ms is not None and at_ms < manifest.time_ms:
            raise BackupError(
                f"backup {manifest.id} shows {moment(manifest.time_ms)}, which is later than that"
            )
        return manifest

    async def revive(self, manifest: Manifest, at_ms: int | None) -> list[Piece]:
        """All groups as they were, and who held what. Raises BackupError."""
        until = manifest.time_ms if at_ms is None else at_ms
        archived = {} if at_ms is None else await archive.segments(self._store, manifest.cluster)
        parts = {ArchivedGroup(gid, part.incarnation): part for gid, part in manifest.groups.items()}
        for name in sorted({*parts, *archived}):
            part = parts.get(name)
            group = self._groups[name] = Revived(name, self._directory / f"group-{name}")
            if part is not None:
                await group.load(self._store, manifest.id, part, self._loaded)
                await self._replay_tail(group, part, until)
            if at_ms is None:
                group.reaches_ms = until
            else:
                await self._replay_archive(group, archived.get(name, []), manifest.cluster, at_ms)
        return self._pieces(until)

    async def _replay_tail(self, group: Revived, part: GroupPart, until: int) -> None:
        async for _, content in catalog.fetched(self._store, part.log):
            group.replay(iter(pb.LogChunk.FromString(content).entries), until)

    async def _replay_archive(self, group: Revived, segments: list[Segment], cluster: str, until: int) -> None:
        group.reaches_ms = await archive.watermark(self._store, cluster, group.name)
        for segment in segments:
            if segment.last <= group.machine.applied.index:
                continue
            entries = await segment.entries(self._store)
            if await asyncio.to_thread(group.replay, iter(entries), until):
                group.reaches_ms = until
                return

    def _pieces(self, until: int) -> list[Piece]:
        """Every key once: at the group that served it, or at the one that still had all of it."""
        held = [(row, group) for group in self._groups.values() for row in group.rows()]
        borders = sorted({b"", *(row.start for row, _ in held), *(row.end for row, _ in held)})
        pieces = []
        for start, end in zip(borders, [*borders[1:], b""], strict=True):
            holders = [
                (HOLDS[row.state], row.epoch, group)
                for row, group in held
                if row.start <= start and (not row.end or start < row.end)
            ]
            if not holders:
                raise BackupError(
                    f"at {moment(until)} the keys from {start!r} to {end!r} were on their way between groups: "
                    "choose a moment a little later or earlier"
                )
            *_, group = max(holders, key=lambda holder: holder[:2])
            if group.reaches_ms < until:
                raise BackupError(
                    f"the archive of group {group.gid} reaches to {moment(group.reaches_ms)} only: "
                    "choose an earlier moment, or let `shardkv backup archive` catch up"
                )
            pieces.append(Piece(start, end, group.name))
        return pieces

    async def write(self, clerk: AsyncShardClerk, pieces: list[Piece], name: str) -> tuple[int, int]:
        """Into a cluster that is empty, or that a restore of the same `name` was cut off in: (keys, bytes).

        Raises BackupError, ShardKVError.
        """
        mark = await clerk.get(MARK)
        if mark is None and [pair async for pair in clerk.scan(limit=1)]:
            raise BackupError("the cluster has data: restore into an empty one")
        if mark is not None and mark != name.encode():
            raise BackupError(
                f"the cluster has a part of another restore ({mark.decode()}): begin with an empty one"
            )
        await clerk.put(MARK, name.encode())
        keys, size, count = 0, 0, 0
        waiting: set[asyncio.Future[None]] = set()
        try:
            for piece in pieces:
                for key, value in self._groups[piece.group].pairs(piece):
                    waiting.add(asyncio.ensure_future(clerk.put(key, value)))
                    keys, size, count = keys + 1, size + len(key) + len(value), count + len(key) + len(value)
                    if len(waiting) >= WRITES_AT_ONCE:
                        waiting = await self._some_done(waiting, count)
                        count = 0
            while waiting:
                waiting = await self._some_done(waiting, count)
                count = 0
        finally:
            for put in waiting:
                put.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        await clerk.delete(MARK)
        return keys, size

    async def _some_done(self, waiting: set[asyncio.Future[None]], count: int) -> set[asyncio.Future[None]]:
        await self._throttle.take(count)
        done, left = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for put in done:
            put.result()
        self._written(count)
        return left

    def close(self) -> None:
        for group in self._groups.values():
            group.close()
