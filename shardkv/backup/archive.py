"""Archiving the committed log of every group as it grows, for restores to a point in time.

One process does it for the whole cluster. It goes on where the archive ends; where a group's
log has been compacted meanwhile there is a gap, which is said, and which only a newer backup
makes good. The watermark tells up to which moment the archive of a group is whole, also
while nothing is written.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from raft.doors import Dialer
from shardctrler.query import ControllerClient, ControllerUnavailable
from shardkv import shardkv_pb2 as pb
from shardkv.backup.errors import BackupError, Damaged
from shardkv.backup.source import Compacted, SourceLost, read_log
from shardkv.backup.store import LEVEL, Store, unpacked

log = logging.getLogger(__name__)

QUERY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Segment:
    """Entries first to last of a group, in one object."""

    cluster: str
    gid: int
    first: int
    last: int
    digest: str

    @property
    def name(self) -> str:
        return f"archive/{self.cluster}/{self.gid}/{self.first:016x}-{self.last:016x}-{self.digest}"

    @classmethod
    def parse(cls, name: str) -> Segment | None:
        """None for what is no segment's name."""
        try:
            _, cluster, gid, rest = name.split("/")
            first, last, digest = rest.split("-")
            return cls(cluster, int(gid), int(first, 16), int(last, 16), digest)
        except ValueError:
            return None

    async def entries(self, store: Store) -> Sequence[pb.LoggedEntry]:
        """Raises Damaged."""
        content = unpacked(store.url, self.name, self.digest, await store.get(self.name))
        entries = pb.LogChunk.FromString(content).entries
        if [entry.index for entry in entries] != list(range(self.first, self.last + 1)):
            raise Damaged(f"{store.url}: {self.name} is damaged: other entries than its name says")
        return entries


async def segments(store: Store, cluster: str) -> dict[int, list[Segment]]:
    """What there is of each group, in the order of the log."""
    found: dict[int, list[Segment]] = {}
    async for item in store.list(f"archive/{cluster}/"):
        segment = Segment.parse(item.name)
        if segment is not None:
            found.setdefault(segment.gid, []).append(segment)
    for of_group in found.values():
        of_group.sort(key=lambda segment: (segment.first, -segment.last))
    return found


async def watermark(store: Store, cluster: str, gid: int) -> int:
    """Until when (ms) the archive of a group is whole; 0 if it does not say."""
    name = f"archive/{cluster}/{gid}/watermark"
    try:
        data = await store.get(name)
    except Damaged:
        return 0
    try:
        return int(json.loads(data)["time_ms"])
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{store.url}: {name} is damaged: {error}") from None


@dataclass(frozen=True, slots=True)
class Archived:
    """How one group stands after a round."""

    gid: int
    last: int
    entries: int
    gap_after: int = 0  # the last entry before a gap that there was to leave; 0: none


class Archiver:
    def __init__(self, controller: ControllerClient, dialer: Dialer, store: Store) -> None:
        self._controller, self._dialer, self._store = controller, dialer, store
        self._cluster = ""
        self._unproven: dict[int, Segment] = {}  # archived before: is it of this cluster's log?
        self._last: dict[int, int] = {}  # group to its last entry in the archive
        self._addresses: dict[int, tuple[str, ...]] = {}  # also of groups that have left, until they are empty

    async def begin(self) -> None:
        """Find out how far the archive goes. Raises BackupError, ControllerUnavailable."""
        await self._controller.changes(0, 0.0, QUERY_SECONDS, limit=1)  # for the cluster's id
        self._cluster = self._controller.cluster
        for gid, of_group in (await segments(self._store, self._cluster)).items():
            newest = max(of_group, key=lambda segment: segment.last)
            self._last[gid] = newest.last
            self._unproven[gid] = newest

    async def round(self) -> list[Archived]:
        """Bring the archive of every group up to now. What fails is said, and done in the next round.

        Raises BackupError if the store fails.
        """
        joined = set(self._addresses)
        try:
            config = await self._controller.query(None, QUERY_SECONDS)
            joined = set(config.groups)
            self._addresses |= {gid: group.addresses for gid, group in config.groups.items()}
        except ControllerUnavailable as error:
            log.warning("%s; going on with the groups that are known", error)
        done = []
        for gid, addresses in sorted(self._addresses.items()):
            try:
                done.append(await self._archive(gid, addresses))
            except SourceLost as error:
                if gid in joined:
                    log.warning("group %d is not archived now: %s", gid, error)
                else:
                    # It has left, and its shards are elsewhere: nothing more will come.
                    log.info("group %d has left and is gone: %s", gid, error)
                    del self._addresses[gid]
        return done

    async def _archive(self, gid: int, addresses: tuple[str, ...]) -> Archived:
        if gid in self._unproven:
            await self._prove(self._unproven[gid], addresses)
            del self._unproven[gid]
        last, count, gap_after, time_ms = self._last.get(gid, 0), 0, 0, 0
        while True:
            try:
                reply = await read_log(self._dialer, addresses, last, 0.0, barrier=True)
            except Compacted as error:
                gap_after, last = max(1, last), error.base_index
                log.error(
                    "group %d: its log begins after entry %d now, the archive ends at %d: make a new backup",
                    gid,
                    last,
                    self._last.get(gid, 0),
                )
                continue
            time_ms = time_ms or reply.now_ms  # all that was acknowledged by then will be in this round
            if reply.entries:
                await self._put(gid, reply.entries)
                count += len(reply.entries)
                last = self._last[gid] = reply.entries[-1].index
            if last >= reply.applied_index:
                break
        mark = json.dumps({"time_ms": time_ms, "last": last}).encode()
        await self._store.put(f"archive/{self._cluster}/{gid}/watermark", mark)
        return Archived(gid, last, count, gap_after)

    async def _prove(self, segment: Segment, addresses: tuple[str, ...]) -> None:
        """Two clusters of one name must not share an archive: it would be neither's. Raises BackupError."""
        try:
            reply = await read_log(self._dialer, addresses, segment.last - 1, 0.0, barrier=True)
        except Compacted:
            return  # there will be a gap anyhow
        archived = (await segment.entries(self._store))[-1]
        if not reply.entries or reply.entries[0] != archived:
            raise BackupError(
                f"{self._store.url}: the archive of group {segment.gid} is of another cluster "
                f"that is called {segment.cluster!r} as well: give each a place of its own"
            )

    async def _put(self, gid: int, entries: Sequence[pb.LoggedEntry]) -> None:
        content = pb.LogChunk(entries=entries).SerializeToString()
        digest = hashlib.sha256(content).hexdigest()
        stored = await asyncio.to_thread(zlib.compress, content, LEVEL)
        await self._store.put(
            Segment(self._cluster, gid, entries[0].index, entries[-1].index, digest).name, stored
        )
