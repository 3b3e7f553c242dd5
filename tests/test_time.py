"""Replicated time: whatever clocks say, no write is done twice, none is refused for it, and replicas agree."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv import shardkv_pb2 as kv
from shardkv.client.errors import SessionExpired
from shardkv.observe.overview import problems
from shardkv.raft.machine import STAMP
from shardkv.raft.protocol.clock import SLEW, ReplicatedClock
from shardkv.raft.protocol.types import Entry, Kind, SnapshotMeta
from shardkv.raft.sessions import MOST_AHEAD_MS, SessionClock, SessionRecord
from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.codec import change_to_pb
from shardkv.shardctrler.shard_map import Change, Group, Merge, Move, Split
from shardkv.state import commands, layout
from shardkv.state.machine import JOINS, ShardMachine
from shardkv.state.records import SWEEP_RECORDS, Records
from shardkv.state.row import State
from shardkv.state.rows import cursor_to_pb
from shardkv.storage.engine import Batch
from shardkv.storage.memory import MemoryEngine
from shardkv.storage.rocks import RocksEngine
from shardkv.wire import frames
from shardkv.wire.frames import APPEND, NO_SESSION, PUT, Status
from tests.sim.disk import SimDisk
from tests.sim.world import World, in_world

quick = pytest.mark.quick
TTL_MS = 4000
START_MS = 1_700_000_000_000
YEAR_MS = 365 * 24 * 3600 * 1000
ONE, TWO = Group(1, ("a:1",), 1), Group(2, ("b:1",), 1)
CREATED = Change(1, moves=(Move(1, b"", b"", None, ONE),))


def memory_engine() -> MemoryEngine:
    return MemoryEngine(SimDisk(Random(1)).open())


def member(engine: MemoryEngine) -> ShardMachine:
    """The machine of a group that has joined, and learnt nothing yet."""
    engine.write([], {layout.JOINS: JOINS.pack(1, 1, 0)}, engine.applied)
    return ShardMachine(1, engine, TTL_MS)


def learn(change: Change) -> bytes:
    return commands.learn([change_to_pb(change).SerializeToString()])


def frame(
    session: bytes,
    seq: int,
    issued_ms: int,
    heard_ms: int = 0,
    kind: int = APPEND,
    key: bytes = b"k",
    value: bytes = b"x",
    shard: int = 1,
) -> bytes:
    section = frames.pack_section(shard, session, 0, bytes([kind]), [seq], [key], [value])
    return commands.frame(frames.pack_frame(frames.WRITE, 0, issued_ms, [section], heard_ms), 1 << 20)


def entry(index: int, clock_ms: int, command: bytes) -> Entry:
    return Entry(index, 1, Kind.COMMAND, STAMP.pack(clock_ms, 0) + command)


def status_of(reply: bytes) -> int:
    return frames.unpack_reply(reply)[1][0].statuses[0]


# ---- replicas agree, however entries share batches (T-3)

SESSIONS = [bytes([n]) * 16 for n in range(1, 5)] + [NO_SESSION]


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, bytes]]:
    """(time, command) of a log: writes and retries of several sessions, and what changes the owner, as time passes."""
    now, history = START_MS, [(START_MS, learn(CREATED))]
    seqs = dict.fromkeys(SESSIONS, 0)
    steps = [learn(Change(2, split=Split(1, b"m", 2, holder=1)))]
    if draw(st.booleans()):
        steps.append(learn(Change(3, moves=(Move(1, b"", b"m", ONE, TWO),))))
    for _ in range(draw(st.integers(1, 40))):
        now += draw(st.sampled_from([0, 1, 60, 150, TTL_MS // 3, TTL_MS, 3 * TTL_MS]))
        if steps and draw(st.integers(0, 9)) == 0:
            history.append((now, steps.pop(0)))
            continue
        session = draw(st.sampled_from(SESSIONS))
        seqs[session] += draw(st.sampled_from([0, 1, 1]))
        kind = draw(st.sampled_from([PUT, APPEND, frames.DELETE]))
        issued = now - draw(st.sampled_from([0, 0, 10, TTL_MS, 2 * TTL_MS]))
        heard = draw(st.sampled_from([0, now, now + TTL_MS]))
        key = draw(st.sampled_from([b"a", b"k", b"z"]))
        history.append(
            (now, frame(session, max(1, seqs[session]), issued, heard, kind, key, b"%d;" % len(history)))
        )
    return history


@quick
@settings(max_examples=300, deadline=None)
@given(histories(), st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_t_3_any_partition_of_a_log_into_batches_gives_the_same_bytes_and_replies(
    history: list[tuple[int, bytes]], sizes: list[int]
) -> None:
    entries = [entry(index, clock_ms, command) for index, (clock_ms, command) in enumerate(history, 1)]
    told = []
    for pattern in ([1], [len(entries)], sizes):
        engine = memory_engine()
        machine = member(engine)
        replies, position, turn = [], 0, 0
        while position < len(entries):
            size = pattern[turn % len(pattern)]
            replies += machine.apply(entries[position : position + size])
            position, turn = position + size, turn + 1
        told.append((engine.dump(), replies))
    assert told[0] == told[1] == told[2]


@quick
def test_a_record_that_expires_in_the_middle_of_a_batch_is_gone_for_the_rest_of_it() -> None:
    """The story of the review: replicas answered "1;" or "1;2;" for ever, by how they had batched."""
    late = START_MS + 10 * TTL_MS
    commands_ = [
        (START_MS, learn(CREATED)),
        (START_MS, frame(b"s" * 16, 1, START_MS, value=b"1;")),
        (START_MS + TTL_MS // 2, frame(b"o" * 16, 1, START_MS + TTL_MS // 2)),
        (START_MS + TTL_MS, frame(b"o" * 16, 2, START_MS + TTL_MS)),
        (START_MS + 3 * TTL_MS // 2, frame(b"o" * 16, 3, START_MS + 3 * TTL_MS // 2)),
        (late, frame(b"o" * 16, 4, late)),
        (late, frame(b"s" * 16, 2, late, value=b"2;")),
    ]
    entries = [entry(index, *stamped) for index, stamped in enumerate(commands_, 1)]
    machine = member(memory_engine())
    replies = machine.apply(entries)
    assert status_of(replies[-1]) == Status.OK
    record = machine.engine.get(layout.record_key(1, b"s" * 16))
    assert record is not None and list(SessionRecord.decode(record).replies) == [2], "a new record, not the old"


# ---- never twice, and never refused for a clock (T-1, T-2)


class Story:
    """One group's machine, a session that retries, and a clock that somebody turns."""

    def __init__(self) -> None:
        self.machine = member(memory_engine())
        self.index = 0
        self.now_ms = START_MS
        self.apply(learn(CREATED))

    def apply(self, command: bytes) -> bytes:
        self.index += 1
        return self.machine.apply([entry(self.index, self.now_ms, command)])[0]

    def pass_time(self, passed_ms: int) -> None:
        """As much as that, with others at work all the while, so that expired records go."""
        step = TTL_MS // 4
        for _ in range(0, passed_ms, step):
            self.now_ms += min(step, passed_ms)
            self.apply(frame(b"o" * 16, 1, self.now_ms, kind=PUT, key=b"other"))

    def has_record(self, session: bytes) -> bool:
        return self.machine.engine.get(layout.record_key(1, session)) is not None

    @property
    def value(self) -> bytes | None:
        return self.machine.engine.get(layout.data_key(b"k"))


@quick
def test_t_2_a_retry_from_before_the_record_expired_is_refused() -> None:
    story = Story()
    write = frame(b"s" * 16, 1, story.now_ms)
    assert status_of(story.apply(write)) == status_of(story.apply(write)) == Status.OK
    story.pass_time(3 * TTL_MS)
    assert not story.has_record(b"s" * 16)
    assert status_of(story.apply(write)) == Status.SESSION_EXPIRED
    assert story.value == b"x"


@quick
def test_t_1_a_session_that_is_used_does_not_expire() -> None:
    """A record's time-to-live counts from its last use: else the retry of a new write of an old session would be done again."""
    story = Story()
    story.apply(frame(b"s" * 16, 1, story.now_ms, value=b"1"))
    story.pass_time(TTL_MS * 3 // 4)
    write = frame(b"s" * 16, 2, story.now_ms, value=b"2")
    story.apply(write)
    story.pass_time(TTL_MS * 3 // 4)
    assert story.has_record(b"s" * 16)
    assert status_of(story.apply(write)) == Status.OK
    assert story.value == b"12"


@quick
@pytest.mark.parametrize("ahead_ms", [1, TTL_MS // 2, TTL_MS, 900_000, YEAR_MS])
def test_t_1_a_write_issued_by_a_clock_that_is_ahead_is_done_once(ahead_ms: int) -> None:
    """Its record lives until the time that it was issued at has come, and a time-to-live more."""
    story = Story()
    issued = story.now_ms + ahead_ms
    write = frame(b"s" * 16, 1, issued, issued)
    assert status_of(story.apply(write)) == Status.OK, "never refused"
    assert story.machine.clock_ms == story.now_ms, "a foreign clock does not move ours"
    while story.now_ms < START_MS + 4 * TTL_MS or (ahead_ms < YEAR_MS and story.now_ms < issued + 3 * TTL_MS):
        assert status_of(story.apply(write)) in (Status.OK, Status.SESSION_EXPIRED)
        story.pass_time(TTL_MS // 2 if ahead_ms < 900_000 else 300 * TTL_MS)
    assert story.value == b"x"


@quick
def test_t_1_a_time_that_is_none_counts_as_now() -> None:
    """An admin's or a foreign client's microseconds: its session lives as long as any other, and no clock moves."""
    story = Story()
    assert status_of(story.apply(frame(b"s" * 16, 1, START_MS * 1000, START_MS * 1000))) == Status.OK
    assert story.machine.clock_ms == START_MS
    story.pass_time(3 * TTL_MS)
    assert not story.has_record(b"s" * 16)
    assert status_of(story.apply(frame(b"n" * 16, 1, story.now_ms))) == Status.OK, "new clerks get in"


@quick
def test_t_1_no_session_is_lost_when_the_time_leaps() -> None:
    """A shard came from a group whose time is a day ahead: what was outstanding is still known."""
    story = Story()
    write = frame(b"s" * 16, 1, story.now_ms)
    story.apply(write)
    story.now_ms += 24 * 3600 * 1000
    story.apply(frame(b"o" * 16, 1, story.now_ms, kind=PUT, key=b"other"))
    story.now_ms += TTL_MS // 2
    assert status_of(story.apply(write)) == Status.OK, "answered from the record"
    story.pass_time(3 * TTL_MS)
    assert not story.has_record(b"s" * 16), "later it goes as ever"
    assert story.value == b"x"


@quick
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_never_twice_whatever_clocks_and_delays_do(data: st.DataObject) -> None:
    """Attempts of a few writes arrive in any order and any number; time passes and leaps in between."""
    story = Story()
    sent: list[bytes] = []
    for seq in range(1, data.draw(st.integers(1, 4)) + 1):
        issued = story.now_ms + data.draw(st.sampled_from([-2 * TTL_MS, -10, 0, 5, TTL_MS, 5 * TTL_MS]))
        heard = max(issued, story.now_ms) + data.draw(st.sampled_from([0, TTL_MS]))
        session = data.draw(st.sampled_from([b"s" * 16, b"t" * 16]))
        sent.append(frame(session, seq, issued, heard, value=b"<%d>" % seq))
        for _ in range(data.draw(st.integers(1, 8))):
            if data.draw(st.booleans()):
                story.apply(data.draw(st.sampled_from(sent)))
            elif data.draw(st.booleans()):
                story.pass_time(data.draw(st.sampled_from([100, TTL_MS // 2, TTL_MS, 2 * TTL_MS])))
            else:
                story.now_ms += data.draw(st.sampled_from([1, TTL_MS, 10 * TTL_MS]))
    value = story.value or b""
    for seq in range(1, len(sent) + 1):
        assert value.count(b"<%d>" % seq) <= 1


@quick
def test_a_write_without_an_identity_leaves_no_record() -> None:
    story = Story()
    for _ in range(3):
        assert status_of(story.apply(frame(NO_SESSION, 0, story.now_ms))) == Status.OK
    assert story.value == b"xxx", "nothing remembers it: each is a write of its own"
    assert list(story.machine.engine.scan(*layout.ALL_RECORDS)) == []


# ---- a leader's clock


class Clocks:
    def __init__(self) -> None:
        self.wall, self.passed = START_MS, 0.0
        self.clock = ReplicatedClock(lambda: self.wall, lambda: self.passed)

    def pass_time(self, seconds: float) -> None:
        self.passed += seconds
        self.wall += int(seconds * 1000)


@quick
@pytest.mark.parametrize("wrong_ms", [900_000, 24 * 3600 * 1000, YEAR_MS, -900_000, -YEAR_MS])
def test_a_wrong_wall_clock_moves_the_time_hardly_at_all(wrong_ms: int) -> None:
    clocks = Clocks()
    began = clocks.clock.stamp_ms(0)
    clocks.wall += wrong_ms
    last = began
    for _ in range(600):
        clocks.pass_time(1.0)
        now = clocks.clock.stamp_ms(last)
        assert now >= last, "never goes back"
        last = now
    assert abs(last - began - 600_000) <= 600_000 * SLEW + 600


@quick
@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1000), st.integers(-YEAR_MS, YEAR_MS), st.integers(0, START_MS + 2 * YEAR_MS)),
        min_size=1,
    )
)
def test_the_time_never_goes_back_and_leaps_only_where_two_witnesses_agree(
    steps: list[tuple[float, int, int]],
) -> None:
    clocks = Clocks()
    last = clocks.clock.stamp_ms(0)
    for seconds, wrong_ms, heard_ms in steps:
        clocks.passed += seconds
        clocks.wall = START_MS + wrong_ms
        now = clocks.clock.stamp_ms(last, heard_ms)
        assert now >= last
        assert now <= max(last + seconds * 1000 * (1 + SLEW) + 1, min(clocks.wall, heard_ms))
        last = now


@quick
def test_a_group_that_was_down_catches_up_when_a_client_tells_the_time_of_another() -> None:
    clocks = Clocks()
    stopped_at = START_MS - 24 * 3600 * 1000
    assert clocks.clock.stamp_ms(stopped_at) == stopped_at, "the wall clock alone is one witness"
    assert clocks.clock.stamp_ms(stopped_at, START_MS - 5) == START_MS - 5


@quick
def test_a_new_leader_goes_on_from_what_is_applied() -> None:
    clocks = Clocks()
    clocks.clock.stamp_ms(0)
    assert clocks.clock.stamp_ms(START_MS + YEAR_MS) == START_MS + YEAR_MS


@quick
def test_before_the_first_stamp_a_replica_tells_no_time() -> None:
    """Its wall clock may be a year ahead; whoever believed it would never hear the right time again."""
    clocks = Clocks()
    assert clocks.clock.now_ms(0) == 0
    assert clocks.clock.now_ms(START_MS - YEAR_MS) == START_MS - YEAR_MS


@quick
def test_a_session_clock_survives_its_encoding() -> None:
    clock = SessionClock(TTL_MS)
    clock.advance(START_MS)
    clock.advance(START_MS + YEAR_MS)
    again = SessionClock(TTL_MS)
    again.restore(clock.encode())
    assert again == clock and again.keep_until_ms
    again.restore(b"")
    assert again == SessionClock(TTL_MS)
    assert clock.used_ms(clock.now_ms + MOST_AHEAD_MS + 1) == clock.now_ms


# ---- expiry is bounded work (F-4)


@pytest.fixture(params=["memory", "rocks"])
def batch(request: pytest.FixtureRequest, tmp_path) -> Iterator[Batch]:  # type: ignore[no-untyped-def]
    engine = memory_engine() if request.param == "memory" else RocksEngine(tmp_path / "rocks")
    yield Batch(engine)
    engine.close()


def test_f_4_expired_records_go_a_few_at_a_time_and_all_of_them(batch: Batch) -> None:
    """100,000 records, all but a few expired: no step is long, and none is left out."""
    count, now = 100_000, START_MS + 10 * TTL_MS
    young = SessionRecord(1, now).encode()
    old = SessionRecord(1, START_MS).encode()
    for n in range(count):
        batch.put(layout.record_key(n % 7, n.to_bytes(16, "big")), young if n % 1000 == 0 else old)
    batch.commit(SnapshotMeta(1, 1))
    records, clock = Records(batch), SessionClock(TTL_MS, now)
    longest, steps = 0.0, 0
    while True:
        began = time.process_time()
        records.sweep(clock)
        longest = max(longest, time.process_time() - began)
        steps += 1
        batch.commit(SnapshotMeta(1, 1))
        if batch.get(layout.SWEPT) == layout.ALL_RECORDS[0]:
            break
    left = list(batch._engine.scan(*layout.ALL_RECORDS))
    assert len(left) == count // 1000
    assert steps <= count // SWEEP_RECORDS + 1
    assert longest < 0.05, "no entry holds up the loop"


@quick
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_first_of_a_batch_are_the_first_of_its_scan(data: st.DataObject) -> None:
    keys = st.binary(min_size=1, max_size=2)
    engine = memory_engine()
    engine.write([], data.draw(st.dictionaries(keys, st.just(b"e"), max_size=20)), SnapshotMeta(1, 1))
    batch = Batch(engine)
    if data.draw(st.booleans()):
        batch.delete_range(*sorted([data.draw(keys), data.draw(keys)]))
    for key in data.draw(st.lists(keys, max_size=10)):
        batch.delete(key) if data.draw(st.booleans()) else batch.put(key, b"b")
    start, end = sorted([data.draw(keys), data.draw(keys)])
    most = data.draw(st.integers(1, 30))
    assert batch.first(start, end, most) == batch.scan(start, end)[:most]


# ---- whole clusters with wrong clocks (T-1)


@pytest.mark.parametrize("wrong_ms", [900_000, -660_000, YEAR_MS, -YEAR_MS])
def test_t_1_one_wrong_wall_clock_refuses_no_write_and_is_named(wrong_ms: int) -> None:
    """At a controller, at a group's leader, at a follower; for a moment, and for good; then the shards move."""

    @in_world(controllers=3, session_ttl_ms=4000)
    async def story(world: World) -> None:
        for process in world.processes.values():
            process.skew_ms = 0
        old = world.clerk()
        await old.append("k", "1")
        count = 1
        leader, controller = await world.leader(1), await world.leader(0)
        follower = next(process for process in world.of(1) if process is not leader)
        for process in (leader, follower, controller):
            process.skew_ms += wrong_ms
            for clerk in (old, world.clerk()):
                count += 1
                await clerk.append("k", f"{count}")
            named = [line for line in problems(await world.overview()) if "wall clock" in line]
            assert len(named) == 1 and process.address in named[0]
            if process is not leader:
                process.skew_ms -= wrong_ms
                continue
            await world.restart(process)  # another leads, and this one's stamps stay in the log
            process.skew_ms -= wrong_ms
        leader.skew_ms += wrong_ms  # for good
        for gid in (2, 1):
            for shard in (await world.config()).by_id:
                if (await world.config()).by_id[shard].gid != gid:
                    await world.move(shard, gid)
            await world.settle()
            for clerk in (old, world.clerk()):
                count += 1
                await clerk.append("k", f"{count}")
        assert await old.get("k") == b"".join(b"%d" % n for n in range(1, count + 1))

    story()


@pytest.mark.parametrize("wrong_ms", [YEAR_MS, -YEAR_MS])
def test_t_1_a_group_whose_first_clock_was_wrong_serves_and_hands_over(wrong_ms: int) -> None:
    """Its time is a year off for ever. That is nobody's concern but its own."""

    @in_world(groups=(1,), session_ttl_ms=4000)
    async def story(world: World) -> None:
        clerk = world.clerk()
        await clerk.append("k", "1")
        addresses = {n: f"g2-{n}:1" for n in (1, 2, 3)}
        for n in addresses:
            process = world._add(2, n, addresses)
            process.skew_ms = wrong_ms
            await world.start(process)
        await world.controller.admin(
            pb.AdminRequest(join=pb.Join(groups=[pb.Group(gid=2, addresses=list(addresses.values()))])), 60.0
        )
        await world.settle()
        for turn, gid in enumerate((2, 1, 2), 2):
            shard = (await world.config()).lookup(b"k")
            if shard.gid != gid:
                await world.move(shard.id, gid)
            await clerk.append("k", f"{turn}")  # while it is on its way, or has just come
            await world.settle()
        assert await clerk.get("k") == b"1234"
        assert await world.clerk().get("k") == b"1234"
        await world.clerk().append("k", "5")

    story()


# ---- what a record says, and whose it is


def sections_of(story: Story, seq: int, acked_below: int) -> bytes:
    section = frames.pack_section(1, b"s" * 16, acked_below, bytes([APPEND]), [seq], [b"k"], [b"%d" % seq])
    return commands.frame(frames.pack_frame(frames.WRITE, 0, story.now_ms, [section]), 1 << 20)


@quick
def test_a_late_duplicate_of_an_acknowledged_write_is_not_done_again() -> None:
    story = Story()
    story.apply(sections_of(story, 1, 1))
    story.apply(sections_of(story, 2, 2))
    assert status_of(story.apply(sections_of(story, 1, 1))) == Status.SESSION_EXPIRED
    assert story.value == b"12"


@quick
def test_cas_tells_an_absent_key_from_an_empty_value() -> None:
    story = Story()

    def cas(seq: int, expected: bytes | None, new: bytes) -> int:
        packed = frames.pack_cas(expected, new)
        return status_of(story.apply(frame(b"s" * 16, seq, story.now_ms, kind=frames.CAS_OP, value=packed)))

    assert cas(1, b"", b"x") == Status.CAS_FAILED, "the key is absent, not empty"
    assert cas(2, None, b"") == Status.OK
    assert cas(3, None, b"x") == Status.CAS_FAILED, "the value is empty, not absent"
    assert cas(4, b"", b"x") == Status.OK


@quick
def test_a_merge_keeps_what_both_shards_remember_of_one_session() -> None:
    story = Story()
    story.apply(learn(Change(2, split=Split(1, b"m", 2, holder=1))))
    left = frame(b"s" * 16, 1, story.now_ms, key=b"a", value=b"l")
    right = frame(b"s" * 16, 2, story.now_ms, key=b"z", value=b"r", shard=2)
    story.apply(left)
    story.apply(right)
    story.apply(learn(Change(3, merge=Merge(1, 2, holder=1))))
    retry_of_right = frame(b"s" * 16, 2, story.now_ms, key=b"z", value=b"r")
    assert status_of(story.apply(left)) == status_of(story.apply(retry_of_right)) == Status.OK
    engine = story.machine.engine
    assert engine.get(layout.data_key(b"a")) == b"l" and engine.get(layout.data_key(b"z")) == b"r"


@quick
def test_t_2_a_retry_at_the_next_owner_is_too_old_by_the_giver_s_time() -> None:
    """The giver's time is ahead, and the record expired there. The taker must not take the retry for a new write."""
    story = Story()
    write = frame(b"s" * 16, 1, story.now_ms)
    story.apply(learn(Change(2, moves=(Move(1, b"", b"", ONE, TWO),))))
    story.apply(commands.close(1, 2))
    story.apply(commands.release(1, 2))
    story.apply(learn(Change(3, moves=(Move(1, b"", b"", TWO, ONE),))))
    row = story.machine.ownership.rows[1]
    assert row.state is State.PULLING
    chunk = kv.Install(shard=1, epoch=3, final=True, clock_ms=story.now_ms + 3 * TTL_MS)
    getattr(chunk, "from").CopyFrom(cursor_to_pb(row.cursor))
    chunk.next.CopyFrom(cursor_to_pb(row.cursor))
    assert story.apply(commands.install(chunk)) == b"1"
    assert status_of(story.apply(write)) == Status.SESSION_EXPIRED
    assert story.value is None


@in_world(groups=(1,), controllers=1, session_ttl_ms=4000)
async def test_t_2_a_clerk_that_was_cut_off_until_its_session_expired_does_nothing_twice(world: World) -> None:
    """Its write was done and the answer lost. When the clerk is back, the write's time of issue is still the first one."""
    clerk, other = world.clerk(), world.clerk()
    await clerk.append("k", "1")
    world.network.cut |= {(process, "clerk-0:1") for process in world.processes}
    sent = asyncio.ensure_future(clerk.append("k", "2"))
    while await other.get("k") != b"12":
        await asyncio.sleep(0.001)
    world.network.partition(["clerk-0:1"], list(world.processes))
    assert not sent.done()
    for _ in range(40):
        await asyncio.sleep(0.5)
        await other.put("other", "y")
    world.network.heal()
    with pytest.raises(SessionExpired):
        await sent
    assert await other.get("k") == b"12"
    await clerk.append("k", "3")
    assert await other.get("k") == b"123"
