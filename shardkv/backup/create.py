"""Making a backup: all groups at one moment, under one configuration.

First a view is opened at every group, then comes the moment: each group's log from its view
to there is taken as well, and only then are the views copied, at leisure. So what one sees
after a restore is a cut at that moment by the groups' clocks, not a walk that began before it
and ended after it. The moment is what most wall clocks of the groups show. A clock that is off by
more than `TOLERANCE_MS` neither chooses the moment nor puts an entry on its other side.

Whoever begins anew finds the chunks that are there already, by their names: a backup that was
cut off goes on where it was, and the next one writes only what has changed since.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random

from shardkv import shardkv_pb2 as pb
from shardkv.backup import fence
from shardkv.backup.chunks import Chunker, pairs_of
from shardkv.backup.confirm import Confirmed, SourceDiffers, confirm
from shardkv.backup.errors import BackupError
from shardkv.backup.manifest import GroupPart, Manifest, RangePart, name_of
from shardkv.backup.moments import TOLERANCE_MS
from shardkv.backup.sealed import check_place
from shardkv.backup.source import Compacted, GroupView, SourceLost, Throttle, open_view, read_log, wall_clocks
from shardkv.backup.store import Store, chunk_name
from shardkv.observe import compare
from shardkv.observe.overview import look
from shardkv.raft.machine import unstamp
from shardkv.raft.protocol.types import Entry, Kind
from shardkv.shardctrler.client import ControllerClient
from shardkv.shardctrler.shard_map import Config
from shardkv.state import commands
from shardkv.state.digests import Digest, Digester, Part
from shardkv.wire.calls import Dialer

ATTEMPTS = 5
SETTLE_SECONDS = 60.0
UPLOADS_AT_ONCE = 4
QUERY_SECONDS = 10.0
LOG_BYTES = 4 << 20  # of entries in one chunk


class _Moved(BackupError):
    """The configuration changed under way."""


class _Clock:
    """What most clocks of the groups show while a backup is made, counted by this process's own clock."""

    def __init__(self) -> None:
        """To be called before the first view is opened."""
        self._began = self._read_at = asyncio.get_running_loop().time()
        self._read_ms = 0

    def read(self, wall_ms: int) -> None:
        self._read_at, self._read_ms = asyncio.get_running_loop().time(), wall_ms

    def now_ms(self) -> int:
        return self._read_ms + int((asyncio.get_running_loop().time() - self._read_at) * 1000)

    def may_show(self, wall_ms: int) -> bool:
        """Whether a right clock may have shown that since the first view was opened."""
        first_ms = self._read_ms - int((self._read_at - self._began) * 1000)
        return first_ms - TOLERANCE_MS <= wall_ms <= self.now_ms() + TOLERANCE_MS

    def cut(self, entries: Sequence[pb.LoggedEntry], time_ms: int) -> tuple[int, bool]:
        """(how many of the entries after a view belong before the moment, whether one was written after it).

        They all came while the backup was made. A stamp that says otherwise is of a wrong clock, and
        its entry belongs with the one before it.
        """
        count, past = 0, False
        for position, entry in enumerate(entries, 1):
            wall_ms = unstamp(_entry(entry))[0].wall_ms
            if wall_ms and self.may_show(wall_ms):
                past = wall_ms > time_ms
            if not past:
                count = position
        return count, past


@dataclass
class BackupProgress:
    """What has been done so far, in bytes of pairs."""

    read: int = 0
    stored: int = 0  # of these, what was not there yet, as it is compressed
    known: int = 0  # chunks that were there already
    written: int = 0


class Backup:
    """One run of `shardkv backup create`."""

    def __init__(
        self,
        controller: ControllerClient,
        dialer: Dialer,
        store: Store,
        rng: Random,
        rate: float = 0.0,
        on_progress: Callable[[BackupProgress], None] = lambda progress: None,
        on_note: Callable[[str], None] = lambda note: None,
    ) -> None:
        """`rate`: bytes a second to read from the cluster, 0 for as fast as it goes.

        `on_note` hears, in a line for people, why it takes longer than the reading does.
        """
        self._controller, self._dialer, self._store, self._rng = controller, dialer, store, rng
        self._throttle = Throttle(rate)
        self._uploads = asyncio.Semaphore(UPLOADS_AT_ONCE)
        self._there: set[str] = set()
        self._on_progress, self._on_note = on_progress, on_note
        self._damaged: dict[str, str] = {}  # replicas that a majority of their group differs from, and how
        self.confirmed: dict[int, Confirmed] = {}  # by group
        self.progress = BackupProgress()

    async def create(self) -> Manifest:
        """Raises BackupError, ControllerUnavailable, AccessDenied."""
        await check_place(self._store, writing=True)
        id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        async with fence.pending(self._store, id):
            return await self._create(id)

    async def _create(self, id: str) -> Manifest:
        self._there = {found.name async for found in self._store.list("chunks/")}
        for attempt in range(1, ATTEMPTS + 1):
            try:
                manifest = await self._attempt(id)
                break
            except (SourceLost, Compacted, SourceDiffers, _Moved) as error:
                if isinstance(error, SourceDiffers):
                    self._damaged[error.address] = str(error)
                if attempt == ATTEMPTS:
                    raise BackupError(f"given up after {ATTEMPTS} attempts: {error}") from None
                self._on_note(f"begun anew, attempt {attempt + 1} of {ATTEMPTS}: {error}")
                self.progress = BackupProgress()
        for confirmed in self.confirmed.values():
            self._damaged.update(confirmed.differing)
        there = {found.name async for found in self._store.list("chunks/")}
        if gone := sorted(digest for digest in manifest.digests() if chunk_name(digest) not in there):
            raise BackupError(
                f"{self._store.url}: {chunk_name(gone[0])} was removed meanwhile: make the backup again"
            )
        await self._store.put(name_of(id), manifest.encode())
        if not await fence.is_pending(self._store, id):
            await self._store.delete(name_of(id))
            raise BackupError(
                f"{self._store.url}: a deletion took this run for one that was killed: make the backup again"
            )
        return manifest

    @property
    def warnings(self) -> list[str]:
        """What an operator should know of a backup that was made."""
        alone = [f"group {gid}: {said.alone}" for gid, said in sorted(self.confirmed.items()) if said.alone]
        return [*self._damaged.values(), *alone]

    async def _attempt(self, id: str) -> Manifest:
        config = await self._settled()
        views: dict[int, GroupView] = {}
        clock = _Clock()
        try:
            for gid, group in sorted(config.groups.items()):
                views[gid] = await open_view(self._dialer, group.addresses, self._rng, self._damaged)
            if any(view.config_num != config.num for view in views.values()):
                raise _Moved("the configuration changes")
            time_ms = await self._now(config, clock)
            manifest = Manifest(id, self._controller.cluster, config.num, time_ms, len(config.by_id))
            for gid, view in views.items():
                part = GroupPart(view.index, view.term, f"{view.incarnation:016x}")
                await self._log_until(part, config.groups[gid].addresses, time_ms, clock)
                manifest.groups[gid] = part
            async with asyncio.TaskGroup() as copies:
                for gid, view in views.items():
                    copies.create_task(self._copy_and_confirm(gid, view, manifest.groups[gid]))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None  # the others were cancelled for it
        finally:
            for view in views.values():
                await view.close()
                await compare.close(self._dialer, view.begun.members, view.begun.id)
        return manifest

    async def _settled(self) -> Config:
        """The latest configuration, once every shard serves under it."""
        deadline = time.monotonic() + SETTLE_SECONDS
        told = False
        while True:
            overview = await look(self._controller, self._dialer, [], QUERY_SECONDS)
            if not overview.config.groups:
                raise BackupError("no group has joined: there is nothing to back up")
            serving, total = overview.settled()
            if serving == total:
                await self._controller.changes(overview.config.num, 0.0, QUERY_SECONDS)  # for the cluster's id
                return overview.config
            if time.monotonic() > deadline:
                raise BackupError(
                    f"{total - serving} of {total} shards do not serve: wait until they do "
                    "(`shardkv admin status`)"
                )
            if not told:
                self._on_note(f"waiting until all shards serve: {total - serving} of {total} do not")
                told = True
            await asyncio.sleep(0.1)

    async def _now(self, config: Config, clock: _Clock) -> int:
        """The latest time that a right clock of the groups shows. Raises SourceLost."""
        asked = [wall_clocks(self._dialer, group.addresses) for group in config.groups.values()]
        clocks = sorted(now_ms for of_group in await asyncio.gather(*asked) for now_ms in of_group)
        if not clocks:
            raise SourceLost("no replica says what time it is")
        right_ms = clocks[len(clocks) // 2]
        clock.read(right_ms)
        return max(now_ms for now_ms in clocks if now_ms <= right_ms + TOLERANCE_MS)

    async def _log_until(
        self, part: GroupPart, addresses: tuple[str, ...], time_ms: int, clock: _Clock
    ) -> None:
        """The entries after a view that belong before the moment. Raises SourceLost, Compacted, _Moved."""
        found: list[pb.LoggedEntry] = []
        while True:
            after = found[-1].index if found else part.index
            reply = await read_log(self._dialer, addresses, after, 0.0, barrier=True)
            if f"{reply.incarnation:016x}" != part.incarnation:
                raise SourceLost("another group answers under its number than the one whose view was opened")
            found.extend(reply.entries)
            count, past = clock.cut(found, time_ms)
            now_ms = reply.now_ms if clock.may_show(reply.now_ms) else clock.now_ms()
            at_end = (found[-1].index if found else part.index) == reply.applied_index
            if past or (at_end and now_ms > time_ms):
                break  # what comes after these is stamped later
            if at_end:
                await asyncio.sleep(0.01)  # its clock is behind another's
        part.last, part.clock_ms = part.index, max(0, reply.clock_ms - (now_ms - time_ms))
        for kept in _pieces(found[:count]):
            if any(_command(entry)[:1] == bytes([commands.LEARN]) for entry in kept):
                raise _Moved("the configuration changed under way")
            part.log.append(await self._store_chunk(pb.LogChunk(entries=kept).SerializeToString()))
            part.last = kept[-1].index

    async def _copy_and_confirm(self, gid: int, view: GroupView, part: GroupPart) -> None:
        """Copy a view while the members compute the digests of that moment, and compare. Raises BackupError."""
        members = view.begun.members
        asked = [asyncio.create_task(compare.ask(self._dialer, address, view.begun)) for address in members]
        try:
            digester = Digester(view.begun.parts)
            await self._copy(view, part, digester)
            if not all(task.done() for task in asked):
                self._on_note(f"group {gid} is read: waiting until its replicas confirm what was read")
            said = dict(zip(members, await asyncio.gather(*asked), strict=True))
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        digests, rest = digester.parts(), digester.rest()
        part.ranges = [RangePart.of(*found) for found in zip(view.begun.parts, digests, strict=True)]
        part.rest_pairs, part.rest_digest = rest.pairs, rest.value.hex()
        written: dict[Part | None, Digest] = dict(zip(view.begun.parts, digests, strict=True))
        written[None] = rest
        self.confirmed[gid] = confirm(gid, view.address, written, compare.GroupCheck(gid, view.begun, said))
        part.replicas = self.confirmed[gid].replicas

    async def _copy(self, view: GroupView, part: GroupPart, digester: Digester) -> None:
        """Into chunks. What was written, not what was read, is what is digested."""
        chunker = Chunker()
        # In order, a few at a time: memory for a few chunks.
        waiting: list[asyncio.Task[str]] = []

        async def store(content: bytes) -> None:
            digester.add(pairs_of(content))
            if len(waiting) >= UPLOADS_AT_ONCE:
                part.chunks.append(await waiting.pop(0))
            waiting.append(asyncio.create_task(self._store_chunk(content)))

        try:
            async for pairs in view.pages():
                size = sum(len(key) + len(value) for key, value in pairs)
                part.pairs += len(pairs)
                part.bytes += size
                await self._throttle.take(size)
                for content in chunker.add(pairs):
                    await store(content)
                self.progress.read += size
                self._on_progress(self.progress)
            for content in chunker.rest():
                await store(content)
            while waiting:
                part.chunks.append(await waiting.pop(0))
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _store_chunk(self, content: bytes) -> str:
        async with self._uploads:
            digest, stored = await asyncio.to_thread(self._store.packed, content)
            name = chunk_name(digest)
            if name in self._there:
                self.progress.known += 1
            else:
                await self._store.put(name, stored)
                self._there.add(name)
                self.progress.written += 1
                self.progress.stored += len(stored)
        return digest


def _entry(logged: pb.LoggedEntry) -> Entry:
    return Entry(logged.index, logged.term, Kind(logged.kind), logged.data)


def _command(logged: pb.LoggedEntry) -> bytes:
    return unstamp(_entry(logged))[1]


def _pieces(entries: Sequence[pb.LoggedEntry]) -> Iterator[list[pb.LoggedEntry]]:
    """Entries in order, cut where a chunk is full."""
    piece: list[pb.LoggedEntry] = []
    size = 0
    for entry in entries:
        piece.append(entry)
        size += len(entry.data)
        if size >= LOG_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
