"""Archiving the committed log of every group as it grows, for restores to a point in time.

One process archives the whole cluster, and continues where the archive ends. Where a group's
log was compacted meanwhile, the archive has a gap: the process reports the gap, and only a newer
backup closes it. Entries are filed under the group's number and its incarnation: a number
that is used again begins a log of its own, which must not be spliced to the old one.

The watermark of a group names the last entry that was archived, and the moment up to which
nothing came after that entry. So an object that is missing at the end is noticed too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardkv import shardkv_pb2 as pb
from shardkv.backup.errors import BackupError, Damaged, Missing
from shardkv.backup.fields import whole
from shardkv.backup.sealed import check_place
from shardkv.backup.source import FAR, Compacted, SourceLost, read_log, wall_clocks
from shardkv.backup.store import Store, log_entries
from shardkv.shardctrler.client import ControllerClient, ControllerUnavailable
from shardkv.wire.bounded_json import parse_json
from shardkv.wire.calls import Dialer

log = logging.getLogger(__name__)

QUERY_SECONDS = 10.0
MAX_WATERMARK_BYTES = 4096
WATERMARK_FORMAT = 2  # 1: a time alone; 2: the last entry, its term, the incarnation, the group's time


@dataclass(frozen=True, slots=True, order=True)
class ArchivedGroup:
    """One group whose log is archived."""

    gid: int
    incarnation: str  # 16 hexadecimal digits

    def __str__(self) -> str:
        return f"{self.gid}-{self.incarnation}"

    @classmethod
    def parse(cls, text: str) -> ArchivedGroup:
        """Raises ValueError."""
        gid, incarnation = text.split("-")
        int(incarnation, 16)
        return cls(int(gid), incarnation)


@dataclass(frozen=True, slots=True)
class Segment:
    """Entries first to last of a group, in one object."""

    cluster: str
    group: ArchivedGroup
    first: int
    last: int
    digest: str

    @property
    def name(self) -> str:
        return f"archive/{self.cluster}/{self.group}/{self.first:016x}-{self.last:016x}-{self.digest}"

    @classmethod
    def parse(cls, name: str) -> Segment | None:
        """None for what is no segment's name."""
        try:
            _, cluster, group, rest = name.split("/")
            first, last, digest = rest.split("-")
            return cls(cluster, ArchivedGroup.parse(group), int(first, 16), int(last, 16), digest)
        except ValueError:
            return None

    async def entries(self, store: Store) -> Sequence[pb.LoggedEntry]:
        """Raises Damaged."""
        content = store.unpacked(self.name, self.digest, await store.get(self.name))
        entries = log_entries(f"{store.url}: {self.name}", content)
        if [entry.index for entry in entries] != list(range(self.first, self.last + 1)):
            raise Damaged(f"{store.url}: {self.name} is damaged: other entries than its name says")
        return entries


async def segments(store: Store, cluster: str) -> dict[ArchivedGroup, list[Segment]]:
    """What there is of each group, in the order of the log. Raises BackupError."""
    found: dict[ArchivedGroup, list[Segment]] = {}
    async for item in store.list(f"archive/{cluster}/"):
        if item.name.split("/")[2].isdecimal():
            raise BackupError(
                f"{store.url}: {item.name} is of another version of shardkv: give the archive a new place"
            )
        segment = Segment.parse(item.name)
        if segment is not None:
            found.setdefault(segment.group, []).append(segment)
        elif item.name.endswith("/watermark"):
            # Also where no segment is left: the watermark says that there were some.
            found.setdefault(ArchivedGroup.parse(item.name.split("/")[2]), [])
    for of_group in found.values():
        of_group.sort(key=lambda segment: (segment.first, -segment.last))
    return found


@dataclass(frozen=True, slots=True)
class Watermark:
    """How far a group's archive goes."""

    last: int  # the last entry in the archive
    term: int  # of that entry
    time_ms: int  # what was acknowledged by then is in the archive
    clock_ms: int  # the group's time at that moment; 0: unknown

    def encode(self, group: ArchivedGroup) -> bytes:
        fields = {"last": self.last, "term": self.term, "time_ms": self.time_ms, "clock_ms": self.clock_ms}
        body = {"format": WATERMARK_FORMAT, "incarnation": group.incarnation, **fields}
        return json.dumps(body | {"crc32": _checksum(body)}).encode()

    @classmethod
    def decode(cls, name: str, group: ArchivedGroup, data: bytes) -> Watermark:
        """Raises Damaged, with `name`."""
        try:
            body = parse_json(data, MAX_WATERMARK_BYTES)
            if (version := body.get("format", 1)) != WATERMARK_FORMAT:
                raise Damaged(
                    f"{name} has format {version}, and this version of shardkv reads format {WATERMARK_FORMAT} "
                    "alone: give the archive a new place"
                )
            if body.pop("crc32") != _checksum(body):
                raise ValueError("it does not match its checksum")
            if body["incarnation"] != group.incarnation:
                raise ValueError("it is of another group")
            return cls(*(whole(body[name]) for name in ("last", "term", "time_ms", "clock_ms")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{name} is damaged: {error}") from None


def _checksum(body: dict[str, object]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def watermark_name(cluster: str, group: ArchivedGroup) -> str:
    return f"archive/{cluster}/{group}/watermark"


async def watermark(store: Store, cluster: str, group: ArchivedGroup) -> Watermark | None:
    """Up to where the archive of a group goes; None where there is no watermark. Raises BackupError."""
    name = watermark_name(cluster, group)
    try:
        data = await store.get(name)
    except Missing:
        return None
    return Watermark.decode(f"{store.url}: {name}", group, data)


@dataclass(frozen=True, slots=True)
class Archived:
    """How one group stands after a round."""

    gid: int
    last: int
    entries: int
    gap_after: int = 0  # the last entry before a gap that there was to leave; 0: none


class Archiver:
    def __init__(
        self,
        controller: ControllerClient,
        dialer: Dialer,
        store: Store,
        wall_ms: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> None:
        self._controller, self._dialer, self._store = controller, dialer, store
        self._wall_ms = wall_ms
        self._cluster = ""
        self._last: dict[ArchivedGroup, int] = {}  # the last entry in the archive
        self._terms: dict[ArchivedGroup, int] = {}  # the term of that entry
        self._addresses: dict[int, tuple[str, ...]] = {}  # also of groups that have left, until they are empty

    async def begin(self) -> None:
        """Find out how far the archive goes. Raises BackupError, ControllerUnavailable.

        The archive has to be of one key, or plain (WrongKey). Two clusters of one name must not share an archive: it would be neither's.
        """
        await check_place(self._store, writing=True)
        await self._controller.changes(0, 0.0, QUERY_SECONDS, limit=1)  # for the cluster's id
        self._cluster = self._controller.cluster
        ours = await self._controller.incarnations(QUERY_SECONDS)
        for group, of_group in (await segments(self._store, self._cluster)).items():
            if (group.gid, int(group.incarnation, 16)) not in ours:
                raise BackupError(
                    f"{self._store.url}: the archive of group {group.gid} is of another cluster "
                    f"that is called {self._cluster!r} as well: give each a place of its own"
                )
            self._last[group] = max((segment.last for segment in of_group), default=0)
            mark = await watermark(self._store, self._cluster, group)
            if of_group:
                newest = max(of_group, key=lambda segment: segment.last)
                self._terms[group] = (await newest.entries(self._store))[-1].term
            if mark is not None and mark.last > self._last[group]:
                log.warning(
                    "group %d: entries %d to %d were archived, and are missing now: archiving them again",
                    group.gid,
                    self._last[group] + 1,
                    mark.last,
                )

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
        reply = await read_log(self._dialer, addresses, FAR, 0.0, barrier=True)  # for who answers
        if not reply.incarnation or not reply.claimed:
            raise SourceLost("the map has not let it in: it holds nothing")
        group = ArchivedGroup(gid, f"{reply.incarnation:016x}")
        last, count, gap_after = self._last.get(group, 0), 0, 0
        # What was acknowledged by now will be in this round: the next call has a barrier.
        time_ms, clock_ms = await self._now(addresses), reply.clock_ms
        while True:
            try:
                reply = await read_log(self._dialer, addresses, last, 0.0, barrier=True)
            except Compacted as error:
                gap_after, last = max(1, last), error.base_index
                log.error(
                    "group %d: its log begins after entry %d now, the archive ends at %d: make a new backup",
                    gid,
                    last,
                    self._last.get(group, 0),
                )
                continue
            if f"{reply.incarnation:016x}" != group.incarnation:
                raise SourceLost("another group answers under its number now")
            if reply.entries:
                await self._put(group, reply.entries)
                count += len(reply.entries)
                last = self._last[group] = reply.entries[-1].index
                self._terms[group] = reply.entries[-1].term
            if last >= reply.applied_index:
                break
        if self._last.get(group, 0) == last and group in self._terms:
            mark = Watermark(last, self._terms[group], time_ms, clock_ms)
            await self._store.put(watermark_name(self._cluster, group), mark.encode(group))
        return Archived(gid, last, count, gap_after)

    async def _now(self, addresses: tuple[str, ...]) -> int:
        """What the clocks of a group and of this machine show: their median, so that a wrong one does not count."""
        clocks = sorted([self._wall_ms(), *await wall_clocks(self._dialer, addresses)])
        return clocks[(len(clocks) - 1) // 2]

    async def _put(self, group: ArchivedGroup, entries: Sequence[pb.LoggedEntry]) -> None:
        content = pb.LogChunk(entries=entries).SerializeToString()
        digest, stored = await asyncio.to_thread(self._store.packed, content)
        await self._store.put(
            Segment(self._cluster, group, entries[0].index, entries[-1].index, digest).name, stored
        )
