"""Counters and ranges: incr, put_if_absent, delete_range, count, and scans backwards or of keys alone (issue 14)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv.client import (
    AsyncShardClerk,
    BadRequest,
    BatchError,
    CounterOverflow,
    DeadlineExceeded,
    NotANumber,
    OutcomeUnknown,
    PartlyDeleted,
)
from shardkv.raft.machine import STAMP
from shardkv.raft.protocol.types import Entry, Kind, SnapshotMeta
from shardkv.server import reading
from shardkv.state import commands, writes
from shardkv.state.machine import ShardMachine
from shardkv.state.owned_sessions import own_frame
from shardkv.storage.engine import Batch, Engine
from shardkv.storage.memory import MemoryEngine
from shardkv.storage.rocks import RocksEngine
from shardkv.wire import frames, ranges
from shardkv.wire.calls import Code
from shardkv.wire.frames import DELETE_RANGE, INCR, PUT, Limits, MalformedFrame, Status
from shardkv.wire.ranges import LEAST, MOST, parse_number
from tests.one_group import DONE, LATE, MUTE, NOW_MS, Fate, OneGroup
from tests.sim.disk import SimDisk
from tests.sim.world import World, in_world

quick = pytest.mark.quick


def against_one_group(
    story: Callable[[OneGroup, AsyncShardClerk], Awaitable[None]],
) -> Callable[[], None]:
    """On four shards, whose borders are at b" ", b"8", b"P" and b"h"."""

    def test() -> None:
        async def main() -> None:
            group = OneGroup(4)
            async with AsyncShardClerk(["c:1"], dialer=group, rng=Random(1)) as clerk:
                await story(group, clerk)

        asyncio.run(asyncio.wait_for(main(), 30))

    test.__name__ = story.__name__
    test.__doc__ = story.__doc__
    return quick(test)


KEYS = sorted(bytes([letter]) + b"%02d" % n for letter in b"!5BUmz" for n in range(7))


async def fill(clerk: AsyncShardClerk, keys: list[bytes] = KEYS) -> None:
    await asyncio.gather(*(clerk.put(key, b"v" + key) for key in keys))


# ---- counters


@against_one_group
async def test_a_counter_counts_and_says_its_value(group: OneGroup, clerk: AsyncShardClerk) -> None:
    assert [await clerk.incr("n"), await clerk.incr("n", 41), await clerk.incr("n", -50)] == [1, 42, -8]
    assert group.value(b"n") == b"-8"
    assert await asyncio.gather(*(clerk.incr("m") for _ in range(100))) == list(range(1, 101))


@against_one_group
async def test_what_cannot_be_counted_up_is_told_and_stays(group: OneGroup, clerk: AsyncShardClerk) -> None:
    for text in (b"", b"x", b"007", b"-0", b"+1", b" 1", b"1.0", b"\xd9\xa1", b"9" * 19, b"-" + b"9" * 19):
        await clerk.put("n", text)
        with pytest.raises(NotANumber):
            await clerk.incr("n")
        assert group.value(b"n") == text
    for limit, by in ((MOST, 1), (LEAST, -1), (1, MOST), (-2, LEAST)):
        await clerk.put("n", str(limit))
        with pytest.raises(CounterOverflow):
            await clerk.incr("n", by)
        assert group.value(b"n") == b"%d" % limit
    with pytest.raises(CounterOverflow):
        await clerk.incr("n", MOST + 1)
    for wrong in (True, 1.5, "1", None):
        with pytest.raises(TypeError):
            await clerk.incr("n", wrong)  # type: ignore[arg-type]
    assert await clerk.incr("other", MOST) == MOST and await clerk.incr("least", LEAST) == LEAST


@quick
@given(st.one_of(st.binary(max_size=24), st.from_regex(rb"-?[0-9]{1,21}", fullmatch=True)))
def test_a_number_is_what_an_incr_writes(text: bytes) -> None:
    number = parse_number(text)
    try:
        is_one = b"%d" % int(text) == text and LEAST <= int(text) <= MOST
    except ValueError:
        is_one = False
    assert (number is not None) == is_one and (number is None or b"%d" % number == text)


@against_one_group
async def test_a_retried_incr_counts_once_and_hears_its_own_answer(
    group: OneGroup, clerk: AsyncShardClerk
) -> None:
    await clerk.incr("n", 10)
    script: list[Fate] = [MUTE, MUTE]
    group.fate = lambda frame: script.pop(0) if script else DONE
    assert await clerk.incr("n") == 11
    assert await clerk.incr("n") == 12 and group.value(b"n") == b"12"


@against_one_group
async def test_an_incr_that_was_given_up_is_not_done_later(group: OneGroup, clerk: AsyncShardClerk) -> None:
    await clerk.incr("n")
    group.fate = lambda frame: LATE
    with pytest.raises(OutcomeUnknown):
        await clerk.incr("n", timeout=0.2)
    late = group.late[0]
    group.fate = lambda frame: DONE
    assert await clerk.incr("n", 5) == 6
    group.arrive(late)
    assert group.value(b"n") == b"6"


@against_one_group
async def test_put_if_absent_and_batches_tell_what_each_write_did(
    group: OneGroup, clerk: AsyncShardClerk
) -> None:
    assert await clerk.put_if_absent("k", "1") and not await clerk.put_if_absent("k", "2")
    assert group.value(b"k") == b"1"
    async with clerk.batch() as batch:
        batch.incr("n", 3)
        batch.incr("n")
        batch.put_if_absent("k", "3")
        batch.put_if_absent("l", "")
        batch.cas("k", "1", "4")
        batch.delete("none")
    assert batch.results == [3, 4, False, True, True, False]
    spoiled = clerk.batch()
    spoiled.incr("k", 2)
    spoiled.put("k", "x")
    spoiled.incr("k")
    with pytest.raises(BatchError) as told:
        await spoiled.__aexit__(None)
    assert told.value.outcomes[:2] == (6, None) and isinstance(told.value.outcomes[2], NotANumber)


# ---- conveniences of the clerk


@against_one_group
async def test_calls_are_convenient_and_mistakes_are_told_at_once(
    group: OneGroup, clerk: AsyncShardClerk
) -> None:
    await clerk.put("k", "1")
    assert await clerk.get("none", b"0") == b"0" and await clerk.get("k", b"0") == b"1"
    assert await clerk.multi_get(["k", "none"]) == {"k": b"1", "none": None}
    assert await clerk.multi_get([b"k"]) == {b"k": b"1"}
    assert repr(clerk) == "AsyncShardClerk(['c:1'], timeout=10)"
    with pytest.raises(ValueError, match="leader, any, stale"):
        await clerk.get("k", consistency="strong")  # type: ignore[call-overload]
    for wrong in ("c:1", [], ["c"]):
        with pytest.raises(ValueError, match="host:port"):
            AsyncShardClerk(wrong, dialer=group)
    group.fate = lambda frame: Code.BUSY
    with pytest.raises(TimeoutError):
        await clerk.get("k", timeout=0.1)
    group.fate = lambda frame: DONE
    batch = clerk.batch()
    batch.put("k", "2")
    batch.delete("none")
    assert await batch.execute() == [None, False] and group.value(b"k") == b"2"
    batch = clerk.batch()
    batch.put("k", "3")
    with pytest.warns(ResourceWarning, match="a batch of 1 writes was never executed"):
        del batch


# ---- ranges


@against_one_group
async def test_scans_go_both_ways_with_and_without_values(group: OneGroup, clerk: AsyncShardClerk) -> None:
    await fill(clerk)
    for start, end in (
        (b"", b""),
        (b"5", b""),
        (b"", b"U03"),
        (b"503", b"P"),
        (b"P", b"h"),
        (b"x", b"a"),
        (b"P", b"P"),
    ):
        inside = [key for key in KEYS if key >= start and (not end or key < end)]
        pairs = [(key, b"v" + key) for key in inside]
        assert [pair async for pair in clerk.scan(start, end)] == pairs
        assert [pair async for pair in clerk.scan(start, end, reverse=True)] == pairs[::-1]
        assert [key async for key in clerk.scan(start, end, keys_only=True)] == inside
        assert [key async for key in clerk.scan(start, end, keys_only=True, reverse=True)] == inside[::-1]
        assert [key async for key in clerk.scan(start, end, 9, reverse=True, keys_only=True)] == inside[::-1][
            :9
        ]
        assert await clerk.count(start, end) == len(inside)
    assert [key async for key in clerk.scan(prefix="B", keys_only=True)] == [k for k in KEYS if k[:1] == b"B"]
    assert await clerk.count(prefix=b"m0") == 7
    with pytest.raises(ValueError, match="prefix"):
        await clerk.count("a", prefix="b")


@against_one_group
async def test_pages_are_small_and_none_is_lost_between_them(group: OneGroup, clerk: AsyncShardClerk) -> None:
    keys = [b"%c%05d" % (letter, n) for letter in b"!5Bm" for n in range(1300)]
    await fill(clerk, keys)
    group.frames.clear()
    assert [key async for key in clerk.scan(reverse=True, keys_only=True)] == keys[::-1]
    assert len(group.frames) >= 8
    assert await clerk.count() == len(keys)
    group.frames.clear()
    assert await clerk.delete_range("!00007", "m00500") == 3 * 1300 - 7 + 500
    assert len(group.frames) >= 6, "no page takes more than a thousand keys"
    assert [key async for key in clerk.scan(keys_only=True)] == keys[:7] + keys[-800:]
    assert await clerk.delete_prefix("m") == 800
    assert await clerk.delete_range(None, None) == 7 and await clerk.count() == 0
    assert await clerk.delete_range("a", "a") == 0 and await clerk.delete_range("b", "a") == 0
    with pytest.raises(ValueError, match="every key"):
        await clerk.delete_prefix("")


@against_one_group
async def test_a_delete_that_ends_early_says_how_far_it_came(group: OneGroup, clerk: AsyncShardClerk) -> None:
    keys = [b"5%05d" % n for n in range(2500)]
    await fill(clerk, keys)
    script: list[Fate] = [DONE, Code.NO_ROOM]
    group.fate = lambda frame: script.pop(0) if script else DONE
    with pytest.raises(PartlyDeleted, match="1000 keys are deleted") as told:
        await clerk.delete_range("5", "6")
    assert (told.value.deleted, told.value.rest) == (1000, keys[1000])
    assert [key async for key in clerk.scan(keys_only=True)] == keys[1000:]
    group.fate = lambda frame: Code.BUSY
    with pytest.raises(DeadlineExceeded) as late:
        await clerk.delete_range("5", "6", timeout=0.1)
    assert not isinstance(late.value, OutcomeUnknown), "nothing was deleted: an ordinary error"


@against_one_group
async def test_a_retried_delete_of_a_range_counts_what_it_deleted_and_no_later_key(
    group: OneGroup, clerk: AsyncShardClerk
) -> None:
    await fill(clerk)
    script: list[Fate] = [MUTE]

    def fate(frame: bytes) -> Fate:
        if not script:
            return DONE
        script.pop()
        return MUTE

    group.fate = fate
    deleting = asyncio.ensure_future(clerk.delete_range("B", "C"))
    while script:
        await asyncio.sleep(0)
    while any(group.value(key) for key in KEYS if key[:1] == b"B"):
        await asyncio.sleep(0)
    group.machine.engine.write([], {b"dB03": b"newer"}, group.machine.applied)
    assert await deleting == 7 and group.value(b"B03") == b"newer"


def command(*operations: tuple[int, bytes, bytes], version: int | None = None, first: int = 1) -> bytes:
    kinds = bytes(kind for kind, _, _ in operations)
    section = frames.pack_section(
        1, b"s" * 16, 0, kinds, range(first, first + len(operations)),
        [key for _, key, _ in operations], [value for _, _, value in operations],
    )  # fmt: skip
    version = frames.version_for(kinds) if version is None else version
    return frames.pack_frame(frames.WRITE, 0, NOW_MS, [section], version=version)


def statuses(reply: bytes) -> list[int]:
    (section,) = frames.unpack_reply(reply)[1]
    return list(section.statuses)


@quick
def test_a_frame_has_the_lowest_version_that_will_do() -> None:
    """So old servers take what they know; and what a version does not know is refused by replicas of both alike."""
    assert frames.read_header(command((PUT, b"k", b""))).version == 2
    assert frames.read_header(command((PUT, b"k", b""), (INCR, b"k", ranges.pack_by(1)))).version == 3
    group = OneGroup()
    old = command((INCR, b"k", ranges.pack_by(1)), (PUT, b"l", b"1"), version=2)
    assert statuses(group.arrive(old)) == [Status.BAD_OPERATION, Status.OK]
    assert group.value(b"k") is None
    for version in (0, 1, 4):
        with pytest.raises(MalformedFrame, match="this server reads 2 to 3"):
            frames.read_header(command((PUT, b"k", b""), version=version))
    for version in (2, 3):
        owned = own_frame(command((PUT, b"k", b""), version=version), "ada")
        assert next(frames.unpack_sections(owned)).session != b"s" * 16, "sessions are the user's own"
    # A frame in which the server refuses something keeps its version.
    limited = group.limits = Limits(key_bytes=4)
    mixed = command((PUT, b"k" * 5, b""), (INCR, b"n", ranges.pack_by(1)), first=10)
    assert not frames.check_frame(mixed, frames.WRITE, limited).plain
    assert statuses(OneGroup().arrive(mixed)) == [Status.OK, Status.OK]
    assert statuses(group.arrive(mixed)) == [Status.KEY_SIZE, Status.OK] and group.value(b"n") == b"1"


@against_one_group
async def test_malformed_arguments_are_refused_one_by_one(group: OneGroup, clerk: AsyncShardClerk) -> None:
    group = OneGroup()
    assert statuses(group.arrive(command((PUT, b"k", b"5")))) == [Status.OK]
    bad = command(
        (INCR, b"k", b""), (INCR, b"k", bytes(9)), (DELETE_RANGE, b"k", b"x"), (99, b"l", b""), first=7
    )
    assert statuses(group.arrive(bad)) == [Status.BAD_OPERATION] * 4
    assert group.value(b"k") == b"5"
    for kind, value in (
        (frames.RANGE, b""),
        (frames.RANGE, ranges.pack_look(b"", 0, 8)),
        (frames.RANGE_BACK, b"x"),
    ):
        with pytest.raises(BadRequest):
            await clerk._submit(kind, b"k", value, 1, None)


@quick
def test_one_frame_of_deletes_does_a_bounded_part_of_them() -> None:
    group = OneGroup()
    everything: dict[bytes, bytes | None] = {b"d%06d" % n: b"v" for n in range(30_000)}
    group.machine.engine.write([], everything, group.machine.applied)
    frame = command(*[(DELETE_RANGE, b"\0", ranges.pack_look(b"", 0))] * 40)
    told = statuses(group.arrive(frame))
    done = told.count(Status.OK)
    assert told == [Status.OK] * done + [Status.NOT_ANSWERED] * (40 - done)
    assert 10 <= done <= 20, "sixteen megabytes, by a kilobyte for each key"
    left = [key for key, _ in group.machine.engine.scan(b"d", b"e")]
    assert left == sorted(everything)[done * writes.PAGE_KEYS :]
    large: dict[bytes, bytes | None] = {b"d%06d" % n: bytes(1 << 20) for n in range(10)}
    group.machine.engine.write([(b"d", b"e")], large, group.machine.applied)
    group.arrive(command((DELETE_RANGE, b"\0", ranges.pack_look(b"", 0)), first=100))
    assert len(list(group.machine.engine.keys(b"d", b"e"))) == 6, "four megabytes are looked at"


def entry(index: int, frame: bytes) -> Entry:
    return Entry(index, 1, Kind.COMMAND, STAMP.pack(NOW_MS + index, NOW_MS) + commands.frame(frame, 1 << 20))


step = st.one_of(
    st.tuples(st.just(PUT), st.integers(0, 30), st.just(0)),
    st.tuples(st.just(frames.DELETE), st.integers(0, 30), st.just(0)),
    st.tuples(st.just(INCR), st.integers(0, 30), st.integers(-5, 5)),
    st.tuples(st.just(DELETE_RANGE), st.integers(0, 30), st.integers(0, 31)),
)


def as_operation(kind: int, at: int, argument: int) -> tuple[int, bytes, bytes]:
    packed = {INCR: ranges.pack_by(argument), DELETE_RANGE: ranges.pack_look(b"k%02d" % argument, 3), PUT: b"7"}
    return kind, b"k%02d" % at, packed.get(kind, b"")


@quick
@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(step, min_size=1, max_size=6), max_size=12), st.randoms(use_true_random=False))
def test_entries_have_the_same_effect_and_answers_however_they_are_batched(
    history: list[list[tuple[int, int, int]]], rng: Random
) -> None:
    one, many = OneGroup().machine, OneGroup().machine
    entries, seq = [], 1
    for number, operations in enumerate(history):
        frame = command(*(as_operation(*operation) for operation in operations), first=seq)
        entries.append(entry(one.applied.index + 1 + number, frame))
        seq += len(operations)
    replies = [reply for each in entries for reply in one.apply([each])]
    together: list[bytes] = []
    at = 0
    while at < len(entries):
        size = rng.randint(1, 5)
        together += many.apply(entries[at : at + size])
        at += size
    assert together == replies
    assert list(one.engine.scan(b"", b"\xff")) == list(many.engine.scan(b"", b"\xff"))


# ---- engines


@pytest.fixture(params=["memory", "rocks"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    if request.param == "memory":
        return MemoryEngine(SimDisk(Random(1)).open())
    return RocksEngine(tmp_path / "db")


def test_engines_go_backwards_and_tell_keys_alone(engine: Engine) -> None:
    keys = [b"d%02d" % n for n in range(20)]
    engine.write([], {key: key * 2 for key in [*keys, b"c", b"e", b"dd"]}, SnapshotMeta(1, 1))
    engine.write([(b"d05", b"d08")], {b"d10": None, b"d06": b"new"}, SnapshotMeta(2, 1))
    for start, end in ((b"d", b"e"), (b"d03", b"d12"), (b"d06", b"d06"), (b"a", b"b"), (b"d19", b"d2")):
        pairs = list(engine.scan(start, end))
        assert list(engine.scan_back(start, end)) == pairs[::-1]
        assert list(engine.keys(start, end)) == [key for key, _ in pairs]
    assert b"d06" in list(engine.keys(b"d", b"e")) and b"d10" not in list(engine.keys(b"d", b"e"))
    batch = Batch(engine)
    batch.delete_range(b"d11", b"d13")
    batch.put(b"d05", b"put")
    batch.put(b"d12", b"put")
    batch.delete(b"d14")
    assert list(batch.walk(b"d", b"e")) == batch.scan(b"d", b"e")
    assert batch.first(b"d", b"e", 7) == batch.scan(b"d", b"e")[:7]
    engine.close()


def test_both_engines_do_the_same(engine: Engine) -> None:
    """A group's machine on it: counters, deletes and pages."""
    source = OneGroup()
    first = dict(source.machine.engine.scan(b"", b"\xff"))
    engine.write([], {key: value for key, value in first.items() if key != b"a"}, source.machine.applied)
    machine = ShardMachine(1, engine)
    operations = [(PUT, b"k%02d" % n, b"v") for n in range(40)] + [
        (INCR, b"n", ranges.pack_by(5)),
        (DELETE_RANGE, b"k10", ranges.pack_look(b"k30", 15)),
        (INCR, b"n", ranges.pack_by(-7)),
    ]
    frame = command(*operations)
    (reply,) = machine.apply([entry(machine.applied.index + 1, frame)])
    assert reply == source._log(commands.frame(frame, 1 << 20))
    row = machine.ownership.rows[1]
    told = [reading.back_page(machine, row, b"k05", b"k35", 4, keys_only=True)[0]]
    told += [reading.count_page(machine, row, b"", b"", 0)[0]]
    assert frames.unpack_page(told[0])[2] == [(b"k%02d" % n, b"") for n in (34, 33, 32, 31)]
    assert ranges.unpack_tally(told[1]) == (True, b"", 26)
    machine.close()


# ---- while shards move, split and merge


@in_world()
async def test_counters_and_deletes_survive_moves_and_splits(world: World) -> None:
    """Counting, and deleting page by page, while every shard changes hands: nothing is counted or deleted twice."""
    clerk = world.clerk()
    keys = [b"%c%04d" % (letter, n) for letter in b"!5Bm" for n in range(1100)]
    await fill(clerk, keys)
    answers: list[int] = []

    async def count_up() -> None:
        for _ in range(60):
            answers.append(await clerk.incr("zcounter"))
            await asyncio.sleep(0.02)

    counting = [asyncio.create_task(count_up()) for _ in range(3)]
    deleting = asyncio.create_task(clerk.delete_range("!", "m"))
    for shard in sorted((await world.config()).by_id):
        await world.move(shard, 3 - (await world.config()).by_id[shard].gid)
        await asyncio.sleep(0.05)
    await world.split((await world.config()).lookup(b"zcounter").id, b"zcounter")
    assert await deleting == 3300
    await asyncio.gather(*counting)
    assert sorted(answers) == list(range(1, 181)) and await clerk.get("zcounter") == b"180"
    await world.settle()
    assert [key async for key in clerk.scan(keys_only=True, reverse=True)] == [b"zcounter", *keys[:3299:-1]]
    assert await clerk.count(None, "z") == 1100
    world.compare_replicas()


@quick
@given(
    st.lists(st.lists(st.sampled_from([frames.PUT, frames.INCR, DELETE_RANGE]), min_size=1), min_size=1),
    st.data(),
)
def test_a_kind_is_found_by_the_headers_alone(kinds: list[list[int]], data: st.DataObject) -> None:
    """Also where keys and values have the same bytes."""
    sections = [
        frames.pack_section(
            1,
            bytes(16),
            0,
            bytes(each),
            list(range(len(each))),
            [b"\x09"] * len(each),
            [b"\x08\x09"] * len(each),
        )
        for each in kinds
    ]
    frame = frames.pack_frame(frames.WRITE, 0, 0, sections, version=frames.VERSION)
    kind = data.draw(st.sampled_from([frames.PUT, frames.INCR, DELETE_RANGE]))
    assert frames.has_kind(frame, kind) == any(kind in each for each in kinds)
