"""Putting a backup into a cluster, of whatever shape: as it was at its moment, or at a later one.

First each group of then is brought back to life on this machine, on disk: its state from the
chunks, then its log, through the same state machine that ran in the cluster, up to the
moment (`history.py`). Then each range of keys is taken from the group that held it last, and only
if nothing is missing of that group's log. A group all of whose ranges have a newer holder is left
out, also where its own log is not whole: it has left, or nobody archived it any more. Only
when all of that is proven is anything written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shardkv import shardkv_pb2 as pb
from shardkv.backup import archive, catalog
from shardkv.backup.archive import ArchivedGroup, Segment
from shardkv.backup.errors import BackupError, Damaged
from shardkv.backup.history import History
from shardkv.backup.install import Installer
from shardkv.backup.manifest import GroupPart, Manifest, moment
from shardkv.backup.run import held
from shardkv.backup.source import Throttle
from shardkv.backup.store import Store, log_entries
from shardkv.backup.whole import Wholeness
from shardkv.raft.protocol.types import Entry, Index, Kind, SnapshotMeta
from shardkv.shardctrler.client import ControllerClient
from shardkv.shardctrler.key_range import overlap
from shardkv.state import layout
from shardkv.state.machine import ShardMachine
from shardkv.state.row import Row, State
from shardkv.storage.rocks import RocksEngine
from shardkv.storage.tables import RocksOptions
from shardkv.wire.calls import Dialer

LOAD_PAIRS = 5000
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
        self._engine = RocksEngine(directory, RocksOptions(scratch=True))
        self.machine = ShardMachine(self.gid, self._engine)
        self.why_not = ""  # why it may not be as it was at the moment

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

    def replay(self, entries: Iterable[pb.LoggedEntry], until: Index) -> None:
        """Apply what follows, up to an index. Raises Damaged for a gap."""
        batch: list[Entry] = []
        last = self.machine.applied.index
        for item in entries:
            if not last < item.index <= until:
                continue
            if item.index != last + 1:
                raise Damaged(f"the log of group {self.gid} has no entry {last + 1}")
            batch.append(Entry(item.index, item.term, Kind(item.kind), item.data))
            last = item.index
        if batch:
            self.machine.apply(batch)

    def rows(self) -> list[Row]:
        """The shards that it held whole. Raises BackupError where a restore was writing them."""
        restoring = [row for row in self.machine.ownership.rows.values() if row.fence is not None]
        if restoring:
            raise BackupError(
                f"at that moment a restore was writing shard {restoring[0].shard} of group {self.gid}: "
                "choose a later moment, or another backup"
            )
        return [row for row in self.machine.ownership.rows.values() if row.state in HOLDS]

    def pairs(self, piece: Piece) -> Iterator[tuple[bytes, bytes]]:
        """By the engine's keys."""
        return self._engine.scan(*layout.data_range(piece.start, piece.end))

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
        archived = {} if at_ms is None else await archive.segments(self._store, manifest.cluster)
        parts = {ArchivedGroup(gid, part.incarnation): part for gid, part in manifest.groups.items()}
        for name in sorted({*parts, *archived}):
            part = parts.get(name)
            group = self._groups[name] = Revived(name, self._directory / f"group-{name}")
            if part is not None:
                await group.load(self._store, manifest.id, part, self._loaded)
                await self._replay_tail(group, part)
            if at_ms is not None:
                await self._replay_archive(group, part, archived.get(name, []), manifest, at_ms)
        return self._pieces(manifest.time_ms if at_ms is None else at_ms)

    async def _replay_tail(self, group: Revived, part: GroupPart) -> None:
        """The backup's own log: all of it comes before the backup's moment."""
        async for _, content in catalog.fetched(self._store, part.log):
            group.replay(log_entries(f"the log of group {group.gid}", content), part.last)
        if group.machine.applied.index != part.last:
            raise Damaged(
                f"the log of group {group.gid} ends at {group.machine.applied.index}, not at {part.last}"
            )

    async def _replay_archive(
        self, group: Revived, part: GroupPart | None, segments: list[Segment], manifest: Manifest, at_ms: int
    ) -> None:
        try:
            mark = await archive.watermark(self._store, manifest.cluster, group.name)
            history = History(group.name, group.machine.applied.index, segments, mark)
            if part is not None:
                history.anchor(part.clock_ms, manifest.time_ms)
            await history.read(self._store)
        except Damaged as error:
            group.why_not = str(error)  # whether that matters, the other groups tell
            return
        cut = history.cut(at_ms)
        group.why_not = cut.why_not
        for segment in history.segments:
            if segment.first > cut.last:
                break
            entries = await segment.entries(self._store)
            await asyncio.to_thread(group.replay, entries, cut.last)

    def _pieces(self, until: int) -> list[Piece]:
        """Every key once: at the group that held it by the newest hand-over."""
        held = [(row, group) for group in self._groups.values() for row in group.rows()]
        borders = sorted({b"", *(row.start for row, _ in held), *(row.end for row, _ in held)})
        pieces = []
        for start, end in zip(borders, [*borders[1:], b""], strict=True):
            holders = [(row.epoch, HOLDS[row.state], row, group) for row, group in held if row.contains(start)]
            if not holders:
                raise BackupError(
                    f"at {moment(until)} the keys from {start!r} to {end!r} were on their way between groups: "
                    "choose a moment a little later or earlier"
                )
            *_, row, group = max(holders, key=lambda holder: holder[:2])
            why_not = self._why_not_taker(row) if row.state is State.FROZEN else group.why_not
            if why_not:
                raise BackupError(why_not)
            pieces.append(Piece(start, end, group.name))
        return pieces

    def _why_not_taker(self, row: Row) -> str:
        """Why a shard that was closed may have been written to at its taker; empty: the taker had not begun."""
        assert row.peer is not None
        named = f"group {row.peer.gid}, which was given shard {row.shard} in configuration {row.epoch}"
        for group in self._groups.values():
            if group.machine.ownership.is_us(row.peer.gid, row.peer.joined):
                if group.machine.ownership.serves_epoch(row.shard, row.epoch):
                    return f"{named}, served it, and holds it no more: what it did is not in the archive"
                return group.why_not
        return f"the archive has nothing of {named}"

    async def write(
        self, controller: ControllerClient, dialer: Dialer, pieces: list[Piece], name: str
    ) -> tuple[int, int]:
        """Into a cluster that is empty, or in the place of a restore that was cut off: (keys, bytes).

        Raises BackupError, AccessDenied, ControllerUnavailable.
        """
        async with held(controller, dialer, name) as run:
            installer = Installer(run, self._throttle, self._written)
            await installer.install(lambda start, end: self._pairs(pieces, start, end))
        return installer.keys, installer.size

    def _pairs(self, pieces: list[Piece], start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """All pairs in [start, end), by the engine's keys, in order."""
        for piece in pieces:
            if overlap(piece.start, piece.end, start, end):
                both_end = min(filter(None, (piece.end, end)), default=b"")
                part = Piece(max(piece.start, start), both_end, piece.group)
                yield from self._groups[piece.group].pairs(part)

    def close(self) -> None:
        for group in self._groups.values():
            group.close()
