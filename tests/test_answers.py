"""Answers have a bound, in bytes and in time, and each attempt gets on (issue 11, point 7; F-2)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from shardkv.client import AsyncShardClerk
from shardkv.raft.errors import Stopped
from shardkv.raft.protocol.types import SnapshotMeta
from shardkv.server import reading
from shardkv.server.reading import ANSWER_BYTES, SCAN_PAGE_BYTES, Reader
from shardkv.state.row import State
from shardkv.storage.engine import Batch, Engine
from shardkv.storage.memory import MemoryEngine
from shardkv.storage.rocks import RocksEngine
from shardkv.wire import frames
from shardkv.wire.frames import APPEND, GET, PUT, SCAN_OP, Limits, MalformedFrame, SectionReply, Status
from tests.one_group import OneGroup
from tests.sim.disk import SimDisk

pytestmark = pytest.mark.quick

MEGABYTE = 1 << 20


def fill(group: OneGroup, values: int, size: int) -> list[bytes]:
    keys = [b"key-%04d" % n for n in range(values)]
    value = bytes(size)
    group.machine.engine.write([], {b"d" + key: value for key in keys}, group.machine.applied)
    return keys


def reads(group: OneGroup, kind: int, keys: list[bytes], value: bytes = b"") -> bytes:
    shard = group.config.lookup(keys[0]).id
    kinds = bytes([kind]) * len(keys)
    section = frames.pack_section(shard, frames.NO_SESSION, 0, kinds, [], keys, [value] * len(keys))
    return frames.pack_frame(frames.READ, 0, 0, [section])


async def answers(group: OneGroup, frame: bytes) -> tuple[int, SectionReply]:
    reply = await group.reader.read(frame)
    (section,) = frames.unpack_reply(reply)[1]
    return len(reply), section


@pytest.mark.parametrize("kind", [GET, SCAN_OP])
def test_an_answer_stops_at_its_bound_and_says_what_is_left(kind: int) -> None:
    async def main() -> None:
        group = OneGroup()
        keys = fill(group, 64, MEGABYTE)
        for count in (1, 3, 5, 64):
            packed = frames.pack_scan(b"", 1) if kind == SCAN_OP else b""
            size, section = await answers(group, reads(group, kind, keys[:count], packed))
            told = [Status(status) for status in section.statuses]
            done = told.count(Status.OK)
            assert told == [Status.OK] * done + [Status.NOT_ANSWERED] * (count - done)
            assert 1 <= done <= 4 and (done >= 3 or done == count)
            assert size <= ANSWER_BYTES + SCAN_PAGE_BYTES + 4096

    asyncio.run(main())


def test_the_first_operation_is_answered_whatever_its_size() -> None:
    async def main() -> None:
        group = OneGroup()
        keys = fill(group, 3, 9 * MEGABYTE)
        _, section = await answers(group, reads(group, GET, keys))
        assert list(section.statuses) == [Status.OK, Status.NOT_ANSWERED, Status.NOT_ANSWERED]
        assert len(section.values[0]) == 9 * MEGABYTE

    asyncio.run(main())


def test_no_look_up_takes_much_more_than_the_answer_may_have() -> None:
    """Small values first, so that the look-ups grow, and then large ones."""

    async def main() -> None:
        group = OneGroup()
        keys = fill(group, 400, 10)
        large: dict[bytes, bytes | None] = {b"d" + key: bytes(MEGABYTE) for key in keys[200:]}
        engine = group.machine.engine
        engine.write([], large, group.machine.applied)
        asked: list[int] = []
        original = engine.multi_get

        def multi_get(wanted: list[bytes]) -> list[bytes | None]:
            found = original(wanted)
            asked.append(sum(len(value or b"") for value in found))
            return found

        engine.multi_get = multi_get  # type: ignore[method-assign, assignment]
        _, section = await answers(group, reads(group, GET, keys))
        assert section.statuses.count(Status.OK) >= 200
        assert sum(asked) < 40 * MEGABYTE and max(asked) <= 32 * MEGABYTE

    asyncio.run(main())


def test_long_frames_let_others_run_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        group = OneGroup()
        keys = fill(group, 1000, 900)
        slices = 0
        most_between = 0
        original = reading._read_slice

        def counted(*arguments: object) -> None:
            nonlocal slices
            slices += 1
            original(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(reading, "_read_slice", counted)
        frame = reads(group, GET, keys * 4)
        tasks = [asyncio.ensure_future(group.reader.read(frame)) for _ in range(10)]
        await asyncio.sleep(0)
        begun = slices
        while not all(task.done() for task in tasks):
            before = slices
            await asyncio.sleep(0)
            most_between = max(most_between, slices - before)
        assert begun == 10, "each has its first slice at once"
        assert slices >= 30 and most_between <= 2, "afterwards callers wait for one of them, not for all"

    asyncio.run(main())


def test_a_shard_that_leaves_between_two_slices_is_not_read_any_more() -> None:
    async def main() -> None:
        group = OneGroup()
        keys = fill(group, 4000, 100)
        reader = asyncio.ensure_future(group.reader.read(reads(group, GET, keys)))
        await asyncio.sleep(0)
        row = group.machine.ownership.rows[group.config.lookup(keys[0]).id]
        row.state = State.FROZEN
        group.machine.engine.write([(b"d", b"e")], {}, group.machine.applied)
        (section,) = frames.unpack_reply(await reader)[1]
        read = section.statuses.count(Status.OK)
        assert 0 < read < 4000
        assert list(section.statuses[read:]) == [Status.WRONG_SHARD] * (4000 - read)
        assert all(section.values[:read]) and not any(section.values[read:])

    asyncio.run(main())


def test_a_replica_that_stops_in_between_reads_nothing_more_and_keeps_no_turn() -> None:
    async def main() -> None:
        group = OneGroup()
        keys = fill(group, 4000, 100)

        looks = 0

        @contextmanager
        def looking() -> Iterator[None]:
            nonlocal looks
            looks += 1
            if looks % 2 == 0:
                raise Stopped("this replica has stopped")
            yield

        reader = Reader(group.machine, looking)
        for _ in range(2):
            with pytest.raises(Stopped):
                await asyncio.wait_for(reader.read(reads(group, GET, keys)), 5)

    asyncio.run(main())


def test_a_frame_has_a_bound_of_operations() -> None:
    for kind, write in ((frames.READ, False), (frames.WRITE, True)):
        for count, passes in ((frames.MAX_OPERATIONS, True), (frames.MAX_OPERATIONS + 1, False)):
            keys = [b"k"] * count
            section = frames.pack_section(
                1,
                b"s" * 16,
                0,
                bytes([PUT if write else GET]) * count,
                range(count) if write else [],
                keys,
                keys,
            )
            frame = frames.pack_frame(kind, 0, 0, [section])
            if passes:
                frames.check_frame(frame, kind, Limits())
            else:
                with pytest.raises(MalformedFrame, match="operations"):
                    frames.check_frame(frame, kind, Limits())


def test_a_clerk_gets_all_of_what_does_not_fit_into_one_answer() -> None:
    async def main() -> None:
        group = OneGroup()
        keys = fill(group, 64, MEGABYTE)
        async with AsyncShardClerk(["c:1"], dialer=group, rng=Random(1)) as clerk:
            found = await clerk.multi_get(keys)
            assert list(found) == keys and all(found.values())
            assert len(group.frames) <= 16 + 2 * 64, "later frames ask for what an answer holds"
            group.frames.clear()
            assert len(await asyncio.gather(*(clerk.get(keys[0]) for _ in range(200)))) == 200
            assert len(group.frames) <= 100
            group.frames.clear()
            scans = [[pair async for pair in clerk.scan(start, keys[40])] for start in keys[:8]]
            assert [len(scan) for scan in scans] == [40 - n for n in range(8)]

            async def scan(n: int) -> int:
                return len([pair async for pair in clerk.scan(keys[n], keys[n + 3])])

            assert await asyncio.gather(*(scan(n % 60) for n in range(100))) == [3] * 100
            # What comes after large answers is sized by its own.
            small = fill(group, 1, 10)
            for _ in range(30):
                await clerk.get(small[0])
            group.frames.clear()
            await asyncio.gather(*(clerk.get(small[0]) for _ in range(512)))
            assert len(group.frames) <= 4

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_frame_of_appends_to_large_values_writes_only_so_much_at_once() -> None:
    """A few bytes each, and a copy of the whole value: what one entry writes has a bound, and order stays."""

    async def main() -> None:
        group = OneGroup()
        keys = fill(group, 40, MEGABYTE - 64)
        async with AsyncShardClerk(["c:1"], dialer=group, rng=Random(1)) as clerk:
            await clerk.put("first", "of all")
            written: list[int] = []
            original = group.machine.engine.write

            def write(deleted, changes, applied):  # type: ignore[no-untyped-def]
                written.append(sum(len(value or b"") for value in changes.values()))
                original(deleted, changes, applied)

            group.machine.engine.write = write  # type: ignore[method-assign]
            calls = [clerk.append(key, text) for key in keys for text in ("one;", "two;")]
            await asyncio.gather(*calls)
            assert all(group.value(key)[-8:] == b"one;two;" for key in keys)  # type: ignore[index]
            assert max(written) < 20 * MEGABYTE

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_command_that_is_all_appends_is_told_what_was_not_done() -> None:
    group = OneGroup()
    keys = fill(group, 30, MEGABYTE - 64)
    shard = group.config.lookup(keys[0]).id
    section = frames.pack_section(shard, b"s" * 16, 0, bytes([APPEND]) * 30, range(1, 31), keys, [b"x"] * 30)
    frame = frames.pack_frame(frames.WRITE, 0, 1 << 41, [section])
    (reply,) = frames.unpack_reply(group.arrive(frame))[1]
    done = reply.statuses.count(Status.OK)
    assert list(reply.statuses) == [Status.OK] * done + [Status.NOT_ANSWERED] * (30 - done)
    assert 16 <= done < 20
    (reply,) = frames.unpack_reply(group.arrive(frame))[1]  # again: the first answer as it was, and some more
    assert reply.statuses.count(Status.OK) > done
    assert group.value(keys[0]) == bytes(MEGABYTE - 64) + b"x"


# ---- a range ends before its end


@pytest.mark.parametrize("kind", ["memory", "rocks"])
def test_a_range_delete_leaves_its_end(kind: str, tmp_path: Path) -> None:
    engine: Engine = (
        MemoryEngine(SimDisk(Random(1)).open()) if kind == "memory" else RocksEngine(tmp_path / "db")
    )
    keys = [b"d" + bytes([n]) for n in range(97, 110)]
    engine.write([], dict.fromkeys(keys, b"v"), SnapshotMeta(1, 1))
    start, end = keys[3], keys[7]
    batch = Batch(engine)
    for key in (keys[5], end):
        batch.put(key, b"newer")
    batch.delete_range(start, end)
    left = [key for key in keys if not start <= key < end]
    assert batch.get(start) is None and batch.get(end) == b"newer"
    assert [key for key, _ in batch.scan(b"d", b"e")] == left
    assert [key for key, _ in batch.first(b"d", b"e", 99)] == left
    batch.commit(SnapshotMeta(2, 1))
    assert [key for key, _ in engine.scan(b"d", b"e")] == left
    assert engine.multi_get([start, keys[5], end]) == [None, None, b"newer"]
    batch.delete_range(keys[0], keys[2])  # and where nothing puts the end again
    batch.commit(SnapshotMeta(3, 1))
    assert [key for key, _ in engine.scan(b"d", b"e")] == left[2:]
    engine.close()
