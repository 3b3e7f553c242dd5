"""Restoring a moment: nothing is missing without a word, no wrong clock hides a write, old holders lose."""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from shardkv import shardkv_pb2 as pb
from shardkv.backup.archive import ArchivedGroup, Archiver, Segment, Watermark, watermark, watermark_name
from shardkv.backup.chunks import Chunker
from shardkv.backup.create import Backup
from shardkv.backup.errors import BackupError, Damaged
from shardkv.backup.manifest import GroupPart, Manifest, RangePart, name_of
from shardkv.backup.restore import Restore
from shardkv.backup.source import Compacted, read_log
from shardkv.backup.store import LEVEL, chunk_name
from shardkv.raft.machine import STAMP
from shardkv.raft.protocol.types import Entry, Kind
from shardkv.shardctrler.codec import change_to_pb
from shardkv.shardctrler.shard_map import Change, Group, Merge, Move
from shardkv.state import commands
from shardkv.state.digests import Digester, parts_of
from shardkv.state.machine import ShardMachine
from shardkv.state.row import State
from shardkv.storage.memory import MemoryEngine
from shardkv.wire import frames
from tests.sim.disk import SimDisk
from tests.sim.world import World, in_world
from tests.test_backup_digests import InMemory

START = 1_700_000_000_000
HOUR = 3_600_000
CLUSTER = "c"
ONE, TWO = Group(1, ("a:1",), 1), Group(2, ("b:1",), 1)
# Group 1 has the keys below m, group 2 the others.
CREATED = Change(1, moves=(Move(1, b"", b"m", None, ONE), Move(2, b"m", b"", None, TWO)), joined=(ONE, TWO))
MOVED = Change(2, moves=(Move(2, b"m", b"", TWO, ONE),))
LEFT = Change(3, left=(2,))
MERGED = Change(4, merge=Merge(1, 2, holder=1))


class Log:
    """One group's log, written by hand, and the machine that it makes."""

    def __init__(self, gid: int, *, learns: bool = True) -> None:
        self.name = ArchivedGroup(gid, f"{gid:016x}")
        self.machine = ShardMachine(gid, MemoryEngine(SimDisk(Random(1)).open()))
        self.entries: list[pb.LoggedEntry] = []
        self.now_ms = START
        self.write(commands.begin(gid))
        self.write(commands.claimed(gid, 1))
        if learns:
            self.learn(CREATED)

    def write(self, command: bytes, wrong_ms: int = 0, term: int = 1) -> None:
        self.now_ms += 1000
        data = STAMP.pack(self.now_ms, self.now_ms + wrong_ms) + command
        index = len(self.entries) + 1
        self.entries.append(pb.LoggedEntry(index=index, term=term, kind=Kind.COMMAND, data=data))
        self.machine.apply([Entry(index, term, Kind.COMMAND, data)])

    def learn(self, change: Change) -> None:
        self.write(commands.learn([change_to_pb(change).SerializeToString()]))

    def put(self, key: str, shard: int = 0, wrong_ms: int = 0, term: int = 1) -> int:
        """When it was written."""
        section = frames.pack_section(
            shard or self.name.gid, frames.NO_SESSION, 0, bytes([frames.PUT]), [0], [key.encode()], [b"x"]
        )
        self.write(commands.frame(frames.pack_frame(frames.WRITE, 0, 0, [section], 0), 1 << 20), wrong_ms, term)
        return self.now_ms

    def install_all(self, shard: int, epoch: int, items: Sequence[tuple[str, str]]) -> None:
        """The last piece of a hand-over, with all of it."""
        message = pb.Install(shard=shard, epoch=epoch, final=True, clock_ms=self.now_ms)
        for key, value in items:
            message.items.add(key=b"d" + key.encode(), value=value.encode())
        self.write(commands.install(message))

    async def backup(self, store: InMemory, now_ms: int) -> GroupPart:
        view = self.machine.engine.view()
        pairs = list(view.scan(b""))
        chunker, parts = Chunker(), parts_of(self.machine.ownership.rows.values())
        digester = Digester(parts)
        digester.add(pairs)
        part = GroupPart(view.applied.index, view.applied.term, self.name.incarnation, clock_ms=now_ms)
        for chunk in [*chunker.add(pairs), *chunker.rest()]:
            digest, stored = store.packed(chunk)
            part.chunks.append(digest)
            await store.put(chunk_name(digest), stored)
        part.last, part.pairs = part.index, len(pairs)
        part.bytes = sum(len(key) + len(value) for key, value in pairs)
        part.ranges = [RangePart.of(*found) for found in zip(parts, digester.parts(), strict=True)]
        part.rest_pairs, part.rest_digest = digester.rest().pairs, digester.rest().value.hex()
        return part

    async def archive(self, store: InMemory, *, until: int = 0, size: int = 5, time_ms: int = 0) -> list[str]:
        """In objects of `size` entries; the names."""
        until = until or len(self.entries)
        names = []
        for start in range(0, until, size):
            entries = self.entries[start : min(until, start + size)]
            content = pb.LogChunk(entries=entries).SerializeToString()
            digest = hashlib.sha256(content).hexdigest()
            name = Segment(CLUSTER, self.name, entries[0].index, entries[-1].index, digest).name
            await store.put(name, zlib.compress(content, LEVEL))
            names.append(name)
        mark = Watermark(until, self.entries[until - 1].term, time_ms or self.now_ms, time_ms or self.now_ms)
        await store.put(watermark_name(CLUSTER, self.name), mark.encode(self.name))
        return names


async def made(store: InMemory, *logs: Log) -> Manifest:
    now_ms = max(log.now_ms for log in logs)
    manifest = Manifest("20261125T000000Z-000000", CLUSTER, 1, now_ms, 2)
    for log in logs:
        log.now_ms = now_ms
        manifest.groups[log.name.gid] = await log.backup(store, now_ms)
    await store.put(name_of(manifest.id), manifest.encode())
    return manifest


async def restored(store: InMemory, directory: Path, at_ms: int) -> set[str]:
    """The keys at a moment, without the engine's prefix. Raises BackupError."""
    work = Restore(store, directory)
    try:
        manifest = await work.choose("", at_ms)
        pieces = await work.revive(manifest, at_ms)
        return {key[1:].decode() for piece in pieces for key, _ in work._groups[piece.group].pairs(piece)}
    finally:
        work.close()


class Story:
    """A backup of two groups, and what they wrote since."""

    def __init__(self, tmp_path: Path) -> None:
        self.store, self._path, self._count = InMemory(), tmp_path, 0
        self.one, self.two = Log(1), Log(2)
        self.one.put("before")
        asyncio.run(made(self.store, self.one, self.two))

    def archive(self, log: Log, **options: int) -> list[str]:
        return asyncio.run(log.archive(self.store, **options))

    def at(self, at_ms: int) -> set[str]:
        self._count += 1
        return asyncio.run(restored(self.store, self._path / f"{self._count}", at_ms))


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


# ---- nothing is missing without a word (13)


def test_every_moment_shows_what_was_written_by_then(story: Story) -> None:
    times = [story.one.put(f"k{n:02}") for n in range(49)]
    story.archive(story.one)
    story.archive(story.two, time_ms=story.one.now_ms)
    for n in (0, 1, 20, 48):
        assert story.at(times[n]) == {"before", *(f"k{m:02}" for m in range(n + 1))}
        assert len(story.at(times[n] - 1)) == n + 1


@pytest.mark.parametrize("lost", [[-1], [-2], [3], [3, 4], [1], [-1, -2, -3]])
def test_an_object_that_is_missing_anywhere_is_noticed_and_its_entries_named(
    story: Story, lost: list[int]
) -> None:
    times = [story.one.put(f"k{n:02}") for n in range(49)]
    names = story.archive(story.one)
    story.archive(story.two, time_ms=story.one.now_ms)
    segments = sorted((Segment.parse(names[n]) for n in lost), key=lambda segment: segment.first)  # type: ignore[union-attr]
    for segment in segments:
        assert segment is not None
        del story.store.objects[segment.name]
    first, last = max(segments[0].first, 6), segments[-1].last  # type: ignore[union-attr]
    with pytest.raises(BackupError, match=rf"group 1 \(incarnation 0+1\) .*entries {first} to {last}"):
        story.at(times[-1])


def test_a_moment_before_a_gap_can_be_restored(story: Story) -> None:
    times = [story.one.put(f"k{n:02}") for n in range(49)]
    names = story.archive(story.one)
    story.archive(story.two, time_ms=story.one.now_ms)
    del story.store.objects[names[5]]  # entries 26 to 30, k21 to k25
    first = 26 - 5  # the key that entry 26 writes
    assert len(story.at(times[first - 2])) == first
    with pytest.raises(BackupError, match="entries 26 to 30"):
        story.at(times[first - 1])  # nothing tells whether an entry of the gap was written by then


@pytest.mark.parametrize("what", ["gone", "an older one", "of another term", "format 1", "damaged"])
def test_a_watermark_that_does_not_prove_the_end_is_not_trusted(story: Story, what: str) -> None:
    times = [story.one.put(f"k{n:02}") for n in range(20)]
    story.archive(story.one)
    story.archive(story.two, time_ms=story.one.now_ms)
    name, last = watermark_name(CLUSTER, story.one.name), len(story.one.entries)
    match what:
        case "gone":
            del story.store.objects[name]
        case "an older one":
            mark = Watermark(last - 10, 1, times[5], times[5])
            story.store.objects[name] = mark.encode(story.one.name)
        case "of another term":
            mark = Watermark(last, 2, times[-1], times[-1])
            story.store.objects[name] = mark.encode(story.one.name)
        case "format 1":
            story.store.objects[name] = b'{"time_ms": %d, "last": %d}' % (times[-1], last)
        case "damaged":
            story.store.objects[name] = story.store.objects[name].replace(b'"last": ', b'"last": 1')
    with pytest.raises(BackupError, match=r"watermark|reaches to"):
        story.at(times[-1])


def test_a_moment_that_the_archive_does_not_reach_is_refused(story: Story) -> None:
    times = [story.one.put(f"k{n:02}") for n in range(20)]
    story.archive(story.one)
    story.archive(story.two, time_ms=times[5])
    assert story.at(times[5])
    with pytest.raises(BackupError, match=r"group 2 .* reaches to"):
        story.at(times[6])


@pytest.mark.parametrize("wrong_ms", [2 * HOUR, -2 * HOUR])
@pytest.mark.parametrize("at", [0, 3, 8])
def test_one_write_stamped_two_hours_off_hides_no_other_one(story: Story, wrong_ms: int, at: int) -> None:
    times = [story.one.put(f"k{n}", wrong_ms=wrong_ms if n == at else 0) for n in range(9)]
    story.archive(story.one)
    story.archive(story.two, time_ms=story.one.now_ms)
    for n in range(9):
        assert story.at(times[n]) == {"before", *(f"k{m}" for m in range(n + 1))}


@pytest.mark.parametrize("wrong_ms", [900_000, -900_000])
@pytest.mark.parametrize("term", [2, 3, 4])
def test_a_leader_whose_clock_is_off_for_its_whole_term_hides_nothing(
    story: Story, wrong_ms: int, term: int
) -> None:
    """Also the first after the backup, and the last one."""
    times = [
        story.one.put(f"{t}{n}", wrong_ms=wrong_ms if t == term else 0, term=t)
        for t in (2, 3, 4)
        for n in range(4)
    ]
    story.archive(story.one)
    story.archive(story.two, time_ms=story.one.now_ms)
    for n in range(12):
        assert len(story.at(times[n])) == n + 2


# ---- groups that have left (14)


def moved(story: Story, *, merged: bool) -> None:
    """Group 2 gives its shard to group 1, leaves, and is gone before its log was archived to the end."""
    story.two.put("x")
    story.two.put("y")
    story.archive(story.two)  # as it serves
    story.one.now_ms = story.two.now_ms
    story.one.learn(MOVED)
    story.one.install_all(2, 2, [("x", "1"), ("y", "1")])
    story.one.learn(LEFT)
    if merged:
        story.one.learn(MERGED)


@pytest.mark.parametrize("merged", [False, True])
def test_a_moment_after_a_group_has_left_is_restored_from_who_has_its_ranges(
    story: Story, merged: bool
) -> None:
    moved(story, merged=merged)
    last = story.one.put("z", shard=1 if merged else 2)
    story.archive(story.one)
    assert story.at(last) == {"before", "x", "y", "z"}
    del story.store.objects[watermark_name(CLUSTER, story.two.name)]
    assert story.at(last) == {"before", "x", "y", "z"}, (
        "what is wrong with a log that nobody needs is no reason"
    )


def test_a_newer_holder_that_is_giving_the_shard_away_wins_over_an_older_one_that_seemed_to_serve(
    story: Story,
) -> None:
    moved(story, merged=False)
    last = story.one.put("z", shard=2)
    three = Group(3, ("c:1",), 4)
    story.one.learn(Change(4, moves=(Move(2, b"m", b"", ONE, three),), joined=(three,)))
    assert story.one.machine.ownership.rows[2].state is State.LENDING
    story.archive(story.one)
    assert story.at(story.one.now_ms) == story.at(last) == {"before", "x", "y", "z"}


def test_the_epoch_of_a_merged_shard_is_that_of_its_newer_part() -> None:
    log = Log(1)
    log.learn(MOVED)
    log.install_all(2, 2, [])
    log.learn(LEFT)
    log.learn(MERGED)
    row = log.machine.ownership.rows[1]
    assert (row.end, row.epoch) == (b"", 2)


def closed(story: Story) -> None:
    """Group 2 has closed its shard, and group 1 may have taken it."""
    story.two.put("x")
    story.two.learn(MOVED)
    story.two.write(commands.close(2, 2))
    assert story.two.machine.ownership.rows[2].state is State.FROZEN
    story.archive(story.two)


def test_what_a_giver_had_when_it_closed_is_taken_only_if_the_taker_did_not_serve(story: Story) -> None:
    closed(story)
    story.one.now_ms = story.two.now_ms
    story.one.learn(MOVED)
    before = story.one.now_ms
    story.archive(story.one)
    with pytest.raises(BackupError, match="group 1"):
        story.at(before + 1)  # what the taker did by then is not archived
    assert story.at(story.two.now_ms) == {"before", "x"}
    story.one.install_all(2, 2, [("x", "1")])
    last = story.one.put("new", shard=2)
    names = story.archive(story.one)
    assert story.at(last) == {"before", "x", "new"}
    del story.store.objects[names[-1]]
    with pytest.raises(BackupError, match=r"group 1 .* lacks entries"):
        story.at(last)


def test_a_giver_s_copy_is_refused_where_what_the_taker_did_is_missing(story: Story) -> None:
    """The giver's own archive is whole, and so is that of every other group."""
    three = Log(3)
    given = Change(2, moves=(Move(2, b"m", b"", TWO, Group(3, ("c:1",), 1)),))
    story.two.put("x")
    story.two.learn(given)
    story.two.write(commands.close(2, 2))
    three.now_ms = story.two.now_ms
    three.learn(given)
    three.put("", shard=9)  # refused: it fills the first object
    three.install_all(2, 2, [("x", "1")])
    last = three.put("new", shard=2)
    names = story.archive(three)
    story.archive(story.one, time_ms=last)
    story.archive(story.two, time_ms=last)
    assert story.at(last) == {"before", "x", "new"}
    del story.store.objects[names[-1]]
    with pytest.raises(BackupError, match=r"group 3 .* lacks entries 6 to 7"):
        story.at(last)


def test_a_taker_of_which_nothing_is_archived_makes_the_giver_s_copy_worthless(story: Story) -> None:
    closed(story)
    del story.store.objects[name_of("20261125T000000Z-000000")]
    asyncio.run(made(story.store, story.two))  # the backup does not have it either
    with pytest.raises(BackupError, match=r"group 1|on their way"):
        story.at(story.two.now_ms)


# ---- the archiver and `create`, in simulation


@pytest.fixture(autouse=True)
def without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    async def inline(work, *arguments):  # type: ignore[no-untyped-def]
        return work(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", inline)


def archiver(world: World, store: InMemory, wrong_ms: int = 0) -> Archiver:
    from tests.sim.loop import world_time
    from tests.sim.world import START_MS

    return Archiver(
        world.controller, world._dialer, store, lambda: START_MS + wrong_ms + int(world_time() * 1000)
    )


@pytest.mark.parametrize("wrong", [0, 1, 2, 3])
def test_no_one_wrong_clock_tells_how_far_the_archive_reaches(wrong: int) -> None:
    """Of a replica, or of the machine that archives (3)."""

    @in_world(groups=(1,), controllers=1)
    async def story(world: World) -> None:
        from tests.sim.loop import world_time
        from tests.sim.world import START_MS

        for process in world.processes.values():
            process.skew_ms = 0
        if wrong < 3:
            world.of(1)[wrong].skew_ms = 2 * HOUR
        clerk = world.clerk()
        await clerk.put("k", "1")
        store = InMemory()
        work = archiver(world, store, 2 * HOUR if wrong == 3 else 0)
        await work.begin()
        await work.round()
        (name,) = work._last
        mark = await watermark(store, world.controller.cluster, name)
        assert mark is not None and mark.last == work._last[name] and mark.term > 0
        true = START_MS + int(world_time() * 1000)
        assert true - 5000 <= mark.time_ms <= true
        again = archiver(world, store)
        await again.begin()
        await again.round()
        assert await watermark(store, world.controller.cluster, name) is not None

    story()


@pytest.mark.parametrize("wrong_ms", [2 * HOUR, -2 * HOUR])
@pytest.mark.parametrize("replica", [0, 1, 2])
def test_a_backup_is_made_at_the_moment_that_most_clocks_show(wrong_ms: int, replica: int) -> None:
    @in_world(groups=(1, 2), controllers=1)
    async def story(world: World) -> None:
        from tests.sim.loop import world_time
        from tests.sim.world import START_MS

        for process in world.processes.values():
            process.skew_ms = 0
        world.of(1)[replica].skew_ms = wrong_ms
        clerk = world.clerk()
        await asyncio.gather(*(clerk.put(b"k%d" % n, b"1") for n in range(50)))
        store = InMemory()
        before = START_MS + int(world_time() * 1000)
        writing = asyncio.create_task(clerk.put(b"late", b"1"))
        manifest = await Backup(world.controller, world._dialer, store, Random(1)).create()
        await writing
        assert before <= manifest.time_ms <= START_MS + int(world_time() * 1000)
        assert world_time() < 60, "nobody waited until a wrong clock was right"
        assert sum(found.pairs for part in manifest.groups.values() for found in part.ranges) >= 50

    story()


def test_compacted_names_the_base_of_the_replica_that_reaches_back_furthest() -> None:
    class Dialer:
        async def call(self, address: str, method: str, payload: bytes, timeout: float) -> bytes:
            return b"\0" + pb.LogReply(base_index={"a": 70, "b": 40, "c": 90}[address]).SerializeToString()

    for addresses in (("a", "b", "c"), ("b", "a"), ("c", "b")):
        with pytest.raises(Compacted) as refused:
            asyncio.run(read_log(Dialer(), addresses, 10, 0.0))  # type: ignore[arg-type]
        assert refused.value.base_index == 40


def test_a_watermark_of_another_group_or_format_is_refused() -> None:
    one, two = ArchivedGroup(1, "0" * 15 + "1"), ArchivedGroup(1, "0" * 15 + "2")
    data = Watermark(5, 1, START, START).encode(one)
    assert Watermark.decode("x", one, data) == Watermark(5, 1, START, START)
    for group, damaged in ((two, data), (one, data[:-3]), (one, b"{}"), (one, b"[]")):
        with pytest.raises(Damaged, match="x "):
            Watermark.decode("x", group, damaged)
