"""Operations do not share a fate, and each error says what is true (issue 11, points 6, 8, 9 and 10; F-1, F-3)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from shardkv.client import (
    AsyncShardClerk,
    BadRequest,
    BatchError,
    Busy,
    ClerkClosed,
    DeadlineExceeded,
    KeyTooLarge,
    OutcomeUnknown,
    OutOfSpace,
    PermissionDenied,
    SessionExpired,
    ShardKVError,
    ValueTooLarge,
    core,
)
from shardkv.client.core import WRITE_LANE
from shardkv.client.operations import Numbering, Operation
from shardkv.raft.protocol.space import Room, has_room
from shardkv.wire import frames
from shardkv.wire.calls import Code
from shardkv.wire.frames import ABANDON, Limits
from tests.one_group import DONE, LATE, LOST, MUTE, Fate, OneGroup, operations
from tests.sim.world import World, in_world

LENIENT = Limits(key_bytes=1 << 16, value_bytes=16 << 20)  # a clerk that refuses nothing by itself


def against_one_group(
    story: Callable[[OneGroup, AsyncShardClerk], Awaitable[None]],
) -> Callable[[], None]:
    def test() -> None:
        async def main() -> None:
            group = OneGroup()
            async with AsyncShardClerk(["c:1"], dialer=group, limits=LENIENT, rng=Random(1)) as clerk:
                await clerk.put("first", "of all")  # the map is loaded
                await story(group, clerk)

        asyncio.run(asyncio.wait_for(main(), 30))

    test.__name__ = story.__name__
    test.__doc__ = story.__doc__
    return pytest.mark.quick(test)


def fates(*script: Fate) -> Callable[[bytes], Fate]:
    """These, one frame after the other; then all are done."""
    left = list(script)
    return lambda frame: left.pop(0) if left else DONE


# ---- refusals are of one operation


@against_one_group
async def test_f_1_one_bad_operation_among_400(group: OneGroup, clerk: AsyncShardClerk) -> None:
    bad: dict[bytes, tuple[Callable[[], Awaitable[object]], type[Exception]]] = {
        b"a long key": (lambda: clerk.put(b"k" * 5000, "v"), KeyTooLarge),
        b"a large value": (lambda: clerk.put("large", b"v" * ((1 << 20) + 1)), ValueTooLarge),
        b"a large cas": (lambda: clerk.cas("large", None, b"v" * ((1 << 20) + 1)), ValueTooLarge),
        b"a large append": (lambda: clerk.append("large", b"v" * ((1 << 20) + 1)), ValueTooLarge),
    }
    for why, (call, error) in bad.items():
        good = [clerk.put(b"%s-%d" % (why, n), why) for n in range(199)]
        more = [clerk.append(b"%s-%d" % (why, n), why) for n in range(200, 400)]
        results = await asyncio.gather(*good, call(), *more, return_exceptions=True)
        assert isinstance(results[199], error), why
        assert [result for result in results if result is not None] == [results[199]]
        assert all(group.value(b"%s-%d" % (why, n)) == why for n in range(400) if n != 199)
    assert group.value(b"k" * 5000) is None and group.value(b"large") is None


@against_one_group
async def test_a_get_never_hears_of_the_key_of_somebody_elses_scan(
    group: OneGroup, clerk: AsyncShardClerk
) -> None:
    async def scan() -> object:
        return [pair async for pair in clerk.scan(b"k" * 5000)]

    group.fate = lambda frame: DONE
    value, refused, _ = await asyncio.gather(
        clerk.get("first"), scan(), clerk.get("no"), return_exceptions=True
    )
    assert value == b"of all"
    assert isinstance(refused, KeyTooLarge)


@in_world(groups=(1,))
async def test_deletes_succeed_beside_puts_on_a_full_group(world: World) -> None:
    clerk = world.clerk()
    for n in range(100):
        await clerk.put(b"%03d" % n, b"before")
    members = world.of(1)
    for process in members[:2]:
        world.set_room(process, Room.LOW)
    leader = members[2]
    async with asyncio.timeout(30):
        while not (leader.rsm.is_leader and not has_room(leader.rsm.core)):
            await asyncio.sleep(0.01)
    puts = [clerk.put(b"%03d" % n, b"after") for n in range(50)]
    deletes = [clerk.delete(b"%03d" % n) for n in range(50, 100)]
    mixed = [call for pair in zip(puts, deletes, strict=True) for call in pair]
    results = await asyncio.gather(*mixed, return_exceptions=True)
    assert all(isinstance(result, OutOfSpace) and "nearly full" in str(result) for result in results[::2])
    assert all("(shard 1, group 1)" in str(result) for result in results[::2]), "an error says where"
    assert results[1::2] == [True] * 50
    assert {value async for _, value in clerk.scan()} == {b"before"}


@in_world(groups=(1,))
async def test_every_replica_refuses_alike_before_the_log(world: World) -> None:
    """What is refused never gets into the log, so replicas with other limits cannot disagree."""
    clerk = world.clerk()
    clerk._limits = LENIENT
    await clerk.put("k", "v")
    with pytest.raises(KeyTooLarge):
        await clerk.put(b"k" * 5000, "v")
    await world.converge(10)
    for process in world.of(1):
        log = process.rsm.core.log
        entries = [entry.data for entry in log.slice(log.base_index + 1, log.last_index + 1, 1 << 30)]
        assert entries and not any(b"k" * 5000 in data for data in entries)


# ---- the order of one clerk


@pytest.mark.quick
@pytest.mark.parametrize("seed", range(40))
def test_writes_of_one_clerk_to_a_key_end_in_order(seed: int) -> None:
    """Through every fate of frames, late duplicates, refusals, and frames of all sizes."""

    async def main() -> None:
        rng = Random(seed)
        group = OneGroup(shards=rng.choice([1, 3]))
        kinds: list[str | Code] = [
            DONE,
            DONE,
            LOST,
            MUTE,
            LATE,
            Code.BUSY,
            Code.RETRY,
            Code.NOT_LEADER,
            Code.STOPPED,
        ]
        async with AsyncShardClerk(["c:1"], dialer=group, rng=rng, timeout=60) as clerk:
            await clerk.put("first", "of all")
            group.fate = lambda frame: rng.choice(kinds)
            calls: list[Awaitable[object]] = []
            told: dict[str, str] = {}
            for n in range(300):
                key = rng.choice("ABab")
                if rng.random() < 0.2:
                    calls.append(asyncio.ensure_future(clerk.put(key, f"{n};")))
                    told[key] = f"{n};"
                else:
                    calls.append(asyncio.ensure_future(clerk.append(key, f"{n};")))
                    told[key] = told.get(key, "") + f"{n};"
                if rng.random() < 0.3:
                    await asyncio.sleep(rng.choice([0, 0, 0.001]))
                if group.late and rng.random() < 0.5:
                    group.arrive(group.late.pop(rng.randrange(len(group.late))))
            await asyncio.gather(*calls)
            for frame in group.late:
                group.arrive(frame)
            for key, value in told.items():
                assert group.value(key.encode()) == value.encode()
            core = clerk._core
            assert not core._outstanding and not core._last_writes
            for numbering in core._numberings.values():
                assert not numbering._outstanding and not numbering._done

    asyncio.run(asyncio.wait_for(main(), 60))


@against_one_group
async def test_writes_of_one_key_share_frames(group: OneGroup, clerk: AsyncShardClerk) -> None:
    """Order does not cost a round trip for each write."""
    group.frames.clear()
    await asyncio.gather(*(clerk.append("hot", b"%d;" % n) for n in range(1000)))
    assert len(group.frames) <= 8
    assert group.value(b"hot") == b"".join(b"%d;" % n for n in range(1000))


@against_one_group
async def test_a_retry_keeps_its_number_whatever_went_wrong(group: OneGroup, clerk: AsyncShardClerk) -> None:
    retried: list[str | Code] = [LOST, MUTE, LATE, *(code for code in Code if RETRIED[code])]
    for n, fate in enumerate(retried):
        group.frames.clear()
        group.fate = fates(fate)
        await clerk.append(f"key-{n}", "once")
        first, second = group.frames
        assert operations(first) == operations(second), fate
        for frame in group.late:
            group.arrive(frame)
        assert group.value(b"key-%d" % n) == b"once", fate


RETRIED = {
    Code.OK: False,
    Code.NOT_LEADER: True,
    Code.BUSY: True,
    Code.RETRY: True,
    Code.BAD_REQUEST: False,
    Code.STOPPED: True,
    Code.NO_ROOM: False,
    Code.DENIED: False,
}


# ---- calls that are cancelled, or whose time is up


@in_world(groups=(1,))
async def test_f_3_a_cancelled_write_does_not_overtake_a_later_one(world: World) -> None:
    clerk = world.clerk()
    for n in range(6):
        key = b"key-%d" % n
        await clerk.put(key, "before")
        for process in world.of(1):
            await world.crash(process)
        for cancelled in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2 + 0.3 * world.rng.random()):
                    await clerk.put(key, f"cancelled-{cancelled}")
        later = asyncio.ensure_future(clerk.put(key, "later"))
        await asyncio.sleep(world.rng.random())
        await world.start_all()
        await later
        assert await clerk.get(key) == b"later"
        await asyncio.sleep(8)
        assert await clerk.get(key) == b"later"


@against_one_group
async def test_what_was_not_sent_is_dropped_at_the_cancel(group: OneGroup, clerk: AsyncShardClerk) -> None:
    group.gate.clear()
    out = [asyncio.ensure_future(clerk.put(f"out-{n}", "v")) for n in range(2)]
    await asyncio.sleep(0)
    while len(group.frames) < 2:
        await asyncio.sleep(0)
    queued = asyncio.ensure_future(clerk.put("out-0", "queued"))
    behind = asyncio.ensure_future(clerk.put("out-0", "behind"))
    await asyncio.sleep(0.01)
    queued.cancel()
    group.gate.set()
    await asyncio.gather(*out, behind)
    assert group.value(b"out-0") == b"behind"
    sent = [value for frame in group.frames for _, _, _, value in operations(frame)]
    assert b"queued" not in sent and sent.count(b"behind") == 1
    assert not any(kind == ABANDON for frame in group.frames for kind, *_ in operations(frame))


@pytest.mark.quick
@pytest.mark.parametrize("refusal", [None, Code.NO_ROOM, Code.DENIED])
def test_an_attempt_that_arrives_after_its_write_was_given_up_is_not_done(
    refusal: Code | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an older write holds the low-water mark back, which would refuse it as well."""
    monkeypatch.setattr(Numbering, "over", lambda self, seqs: None)

    async def main() -> None:
        group = OneGroup()
        async with AsyncShardClerk(["c:1"], dialer=group, rng=Random(1)) as clerk:
            await clerk.put("first", "of all")
            if refusal is None:
                group.fate = lambda frame: LATE
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await clerk.put("k", "given up")
            else:
                group.fate = fates(LATE, refusal)
                with pytest.raises(OutcomeUnknown):
                    await clerk.put("k", "given up")
            late = [frame for frame in group.late if b"given up" in frame]
            group.fate = lambda frame: DONE
            await clerk.put("k", "later")
            assert late
            for frame in late:
                group.arrive(frame)
            assert group.value(b"k") == b"later"
            assert any(kind == ABANDON for frame in group.frames for kind, *_ in operations(frame))

    asyncio.run(asyncio.wait_for(main(), 30))


@against_one_group
async def test_a_write_of_unknown_outcome_is_resolved_before_a_later_one(
    group: OneGroup, clerk: AsyncShardClerk
) -> None:
    group.fate = lambda frame: LATE if b"unknown" in frame else LOST
    with pytest.raises(OutcomeUnknown):
        await clerk.put("k", "unknown", timeout=0.1)
    with pytest.raises(DeadlineExceeded) as refused:
        await clerk.put("k", "waits", timeout=0.1)
    assert not isinstance(refused.value, OutcomeUnknown), "it waited for the other, and was never sent"
    group.fate = lambda frame: DONE
    await clerk.put("k", "later")
    for frame in group.late:
        group.arrive(frame)
    assert group.value(b"k") == b"later"
    sent = [value for frame in group.frames for _, _, _, value in operations(frame)]
    assert b"waits" not in sent


@against_one_group
async def test_what_was_given_up_does_not_stay_for_ever(group: OneGroup, clerk: AsyncShardClerk) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "ABANDON_SECONDS", 0.2)
        group.fate = lambda frame: LOST
        with pytest.raises(OutcomeUnknown):
            await clerk.put("k", "v", timeout=0.1)
        assert len(clerk._core._outstanding) == 1
        while clerk._core._outstanding:
            await asyncio.sleep(0.01)
    assert not clerk._core._last_writes


# ---- each error against what it promises


@against_one_group
async def test_closed_with_the_write_sent(group: OneGroup, clerk: AsyncShardClerk) -> None:
    group.fate = lambda frame: LATE
    sent = asyncio.ensure_future(clerk.put("k", "sent"))
    while not group.late:
        await asyncio.sleep(0)
    waits = asyncio.ensure_future(clerk.put("k", "waits"))
    read = asyncio.ensure_future(clerk.get("k"))
    await asyncio.sleep(0)
    await clerk.close()
    with pytest.raises(OutcomeUnknown) as unknown:
        await sent
    assert isinstance(unknown.value.__cause__, ClerkClosed)
    for call in (waits, read):
        with pytest.raises(ClerkClosed):
            await call
    with pytest.raises(ClerkClosed):
        await clerk.put("k", "never")
    group.arrive(group.late[0])
    assert group.value(b"k") == b"sent", "so it was right to be in doubt"


@pytest.mark.parametrize(
    ("code", "error"),
    [(Code.BAD_REQUEST, BadRequest), (Code.NO_ROOM, OutOfSpace), (Code.DENIED, PermissionDenied)],
)
@pytest.mark.parametrize("before", [None, MUTE, LATE])
@pytest.mark.quick
def test_a_frame_that_is_refused(code: Code, error: type[ShardKVError], before: Fate | None) -> None:
    async def main() -> None:
        group = OneGroup()
        async with AsyncShardClerk(["c:1"], dialer=group) as clerk:
            await clerk.put("first", "of all")
            group.fate = fates(*([before] if before else []), code)
            with pytest.raises(ShardKVError) as raised:
                await clerk.put("k", "v")
            if before is None:
                assert type(raised.value) is error
                assert group.value(b"k") is None
                return
            assert isinstance(raised.value, OutcomeUnknown)
            assert type(raised.value.__cause__) is error
            await clerk.put("k", "later")
            for frame in group.late:
                group.arrive(frame)
            assert group.value(b"k") == b"later"

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("before", [None, MUTE, LATE])
@pytest.mark.quick
def test_an_operation_that_is_refused_for_want_of_room(before: Fate | None) -> None:
    async def main() -> None:
        group = OneGroup()
        async with AsyncShardClerk(["c:1"], dialer=group) as clerk:
            await clerk.put("first", "of all")
            group.fate = fates(*([before] if before else []))
            call = asyncio.ensure_future(clerk.put("k", "v"))
            await asyncio.sleep(0)
            while (before == MUTE and group.value(b"k") is None) or (before == LATE and not group.late):
                await asyncio.sleep(0)
            group.has_room = False
            with pytest.raises(ShardKVError) as raised:
                await call
            assert isinstance(raised.value, OutOfSpace if before is None else OutcomeUnknown)
            assert await clerk.delete("k") is (before == MUTE)
            for frame in group.late:
                group.arrive(frame)
            assert group.value(b"k") is None

    asyncio.run(asyncio.wait_for(main(), 30))


@against_one_group
async def test_a_result_that_is_too_large_is_final(group: OneGroup, clerk: AsyncShardClerk) -> None:
    await clerk.put("k", b"v" * (1 << 20))
    group.fate = fates(LATE, MUTE)
    with pytest.raises(ValueTooLarge):
        await clerk.append("k", "v")
    await clerk.put("k", "")
    for frame in group.late:
        group.arrive(frame)
    assert group.value(b"k") == b"", "it was refused for good, and not only for then"


@against_one_group
async def test_a_session_that_expired_in_doubt_is_an_unknown_outcome(
    group: OneGroup, clerk: AsyncShardClerk
) -> None:
    group.fate = fates(MUTE)
    call = asyncio.ensure_future(clerk.append("k", "once;"))
    while group.value(b"k") is None:
        await asyncio.sleep(0)
    group.machine.clock.advance(group.machine.clock_ms + 10 * group.machine.clock.ttl_ms)
    group.machine._records.forget()
    for key, _ in list(group.machine.engine.scan(b"s", b"t")):
        group.machine._batch.delete(key)
    with pytest.raises(SessionExpired) as raised:
        await call
    assert isinstance(raised.value, OutcomeUnknown)
    assert group.value(b"k") == b"once;"


@against_one_group
async def test_a_status_that_this_clerk_does_not_know_is_an_unknown_outcome(
    group: OneGroup, clerk: AsyncShardClerk
) -> None:
    answered = group.arrive

    def arrive(frame: bytes) -> bytes:
        reply = answered(frame)
        group.arrive = answered  # type: ignore[method-assign]
        return (
            reply[: -5 if len(reply) else 0] + b"\x64" + bytes(4)
        )  # 100: below those that say when to come back

    group.arrive = arrive  # type: ignore[method-assign]
    with pytest.raises(OutcomeUnknown):
        await clerk.put("k", "v")


@against_one_group
async def test_busy_is_of_what_was_not_sent(group: OneGroup, clerk: AsyncShardClerk) -> None:
    clerk._core._max_outstanding = 10
    batch = clerk.batch()
    for n in range(25):
        batch.put(f"key-{n:02}", "v")
    with pytest.raises(BatchError) as raised:
        await batch.__aexit__(None)
    outcomes = raised.value.outcomes
    assert list(outcomes) == batch.results
    assert [type(outcome) for outcome in outcomes] == [type(None)] * 10 + [Busy] * 15
    for n, outcome in enumerate(outcomes):
        assert (group.value(b"key-%02d" % n) == b"v") == (outcome is None)
    assert "10 were done, 15 were not, 0 may have been" in str(raised.value)


@against_one_group
async def test_a_batch_tells_what_became_of_each_write(group: OneGroup, clerk: AsyncShardClerk) -> None:
    await clerk.put("there", "v")
    async with clerk.batch() as batch:
        batch.put("k", "1")
        batch.append("k", "2")
        batch.delete("there")
        batch.delete("absent")
    assert batch.results == [None, None, True, False]
    assert group.value(b"k") == b"12"
    clerk.timeout = 0.2
    group.fate = lambda frame: MUTE
    batch = clerk.batch()
    batch.put("j", "unknown")
    batch.put("k", "unknown")
    with pytest.raises(BatchError) as raised:
        await batch.__aexit__(None)
    assert all(isinstance(outcome, OutcomeUnknown) for outcome in raised.value.outcomes)
    assert "2 may have been" in str(raised.value)
    batch = clerk.batch()
    batch.put("k", "not sent")
    await batch.__aexit__(RuntimeError)
    assert batch.results == []
    assert group.value(b"k") == b"unknown"


# ---- mutants of the issue


@against_one_group
async def test_a_scan_over_many_pages_gives_each_pair_once(group: OneGroup, clerk: AsyncShardClerk) -> None:
    keys = [b"%05d" % n for n in range(2500)]
    await asyncio.gather(*(clerk.put(key, b"v" * 700) for key in keys))
    found = [key async for key, _ in clerk.scan("0", "9")]
    assert found == keys
    for limit in (1, 999, 1000, 1001, 2000):
        assert [key async for key, _ in clerk.scan("0", "9", limit)] == keys[:limit]
    some = [key async for key, _ in clerk.scan("00010", "00020")]
    assert some == keys[10:20]


def test_statuses_keep_their_numbers() -> None:
    assert frames.Status.LOCKED == 7 and frames.Status.ABANDONED == 8 and frames.FIRST_UNRECORDED == 16


@against_one_group
async def test_a_write_whose_time_is_up_as_its_frame_is_packed_is_not_called_undone(
    group: OneGroup, clerk: AsyncShardClerk
) -> None:
    """Soak seed 247: the lane had taken the write, the frame left a turn later, and in between its time was up.

    The clerk said "not done", and the write was done.
    """
    loop, core = asyncio.get_running_loop(), clerk._core
    waiter: asyncio.Future[tuple[int, bytes]] = loop.create_future()
    # An older write that goes on keeps the session's low-water mark below the late one.
    older = asyncio.ensure_future(clerk.put("older", "one"))
    await asyncio.sleep(0)
    # The lane takes both in the next turn; the sweep comes right behind, and the frame's task after that.
    core.submit(Operation(frames.PUT, b"k", b"v", loop.time() - 1, waiter), WRITE_LANE)
    loop.call_soon(core._sweep)
    with pytest.raises(DeadlineExceeded) as error:
        await waiter
    await older
    await clerk.put("after", "it")
    assert [key for _, _, key, _ in operations(group.frames[1])] == [b"older", b"k"], "they share a frame"
    assert isinstance(error.value, OutcomeUnknown) or group.value(b"k") is None
