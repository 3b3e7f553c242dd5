"""Engines, frames, sessions and ownership by themselves; both engines go through the same stories."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv import shardkv_pb2 as pb
from shardkv.raft.disk import RealDirectory
from shardkv.raft.errors import DamagedState, StorageError
from shardkv.raft.machine import STAMP
from shardkv.raft.protocol.quorum import Membership, Vote, majority, quorum_index, tally
from shardkv.raft.protocol.types import Entry, Kind, SnapshotMeta
from shardkv.raft.sessions import SessionClock, SessionRecord
from shardkv.server.giver import Closing, Pace
from shardkv.shardctrler.codec import change_to_pb
from shardkv.shardctrler.shard_map import Change, Group, Merge, Move, Split
from shardkv.state import commands, layout
from shardkv.state.cursor import JOURNAL, Cursor
from shardkv.state.effects import Drop
from shardkv.state.machine import JOINS, ShardMachine
from shardkv.state.ownership import TRANSITIONS, Ownership
from shardkv.state.row import Event, Row, State
from shardkv.state.rows import cursor_to_pb, decode_row, encode_row
from shardkv.storage.engine import Batch, Engine
from shardkv.storage.memory import MemoryEngine
from shardkv.storage.rocks import RocksEngine
from shardkv.wire import frames
from shardkv.wire.frames import MalformedFrame, Status
from tests.sim import loop
from tests.sim.disk import SimDisk

quick = pytest.mark.quick


# ---- engines


@pytest.fixture(params=["memory", "rocks"])
def open_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Engine]]:
    """Opens an engine in a directory of that name; closes them all at the end."""
    opened: dict[str, tuple[Engine, RealDirectory | None]] = {}

    def close(name: str) -> None:
        engine, directory = opened.pop(name)
        engine.close()
        if directory is not None:
            directory.close()

    def open_one(name: str) -> Engine:
        if name in opened:
            close(name)
        if request.param == "rocks":
            opened[name] = (RocksEngine(tmp_path / name), None)
        else:
            directory = RealDirectory(tmp_path / name)
            opened[name] = (MemoryEngine(directory), directory)
        return opened[name][0]

    yield open_one
    for name in list(opened):
        close(name)


def test_an_engine_keeps_order_and_deletes_ranges(open_engine: Callable[[str], Engine]) -> None:
    engine = open_engine("a")
    keys = [bytes([n]) + b"k" for n in range(0x30, 0x60)]
    engine.write([], {key: key * 2 for key in reversed(keys)}, SnapshotMeta(1, 1))
    assert [key for key, _ in engine.scan(b"0", b"a")] == keys
    assert [key for key, _ in engine.scan(keys[3], keys[6])] == keys[3:6]
    assert engine.multi_get([keys[0], b"none"]) == [keys[0] * 2, None]
    engine.write([(keys[3], keys[6])], {keys[4]: b"new", keys[0]: None}, SnapshotMeta(2, 1))
    assert [key for key, _ in engine.scan(b"0", keys[7])] == [keys[1], keys[2], keys[4], keys[6]]
    assert engine.get(keys[4]) == b"new", "what is put in a batch survives the batch's range deletion"
    assert engine.applied == SnapshotMeta(2, 1)


def test_what_is_flushed_survives_with_its_applied_index(open_engine: Callable[[str], Engine]) -> None:
    engine = open_engine("a")
    engine.write([], {b"k": b"1"}, SnapshotMeta(7, 2))
    assert asyncio.run(engine.flush()) == 7
    again = open_engine("a")
    assert again.applied == SnapshotMeta(7, 2) and again.get(b"k") == b"1"


def test_a_snapshot_makes_another_engine_the_same(open_engine: Callable[[str], Engine]) -> None:
    source, target = open_engine("a"), open_engine("b")
    pairs = {b"%05d" % n: Random(n).randbytes(100) for n in range(3000)}
    source.write([], dict(pairs), SnapshotMeta(9, 3))
    target.write([], {b"old": b"old"}, SnapshotMeta(2, 1))

    async def stream() -> None:
        snapshot = await source.open_snapshot()
        source.write([], {b"00000": b"later"}, SnapshotMeta(10, 3))
        sink = target.open_sink(snapshot.meta)
        for offset in range(0, snapshot.size, 10_000):
            await sink.write(await snapshot.read(offset, 10_000))
        await sink.finish()
        assert target.get(b"old") == b"old", "nothing changes before it is installed"
        target.install(snapshot.meta, sink)
        snapshot.close()

    asyncio.run(stream())
    assert dict(target.scan(b"0", b"a")) == pairs
    assert target.applied == SnapshotMeta(9, 3)
    again = open_engine("b")
    assert again.applied == SnapshotMeta(9, 3) and again.get(b"old") is None


def test_a_view_shows_one_moment_however_it_is_read(open_engine: Callable[[str], Engine]) -> None:
    engine = open_engine("a")
    pairs = {b"d%05d" % n: b"1" for n in range(2000)}
    engine.write([], dict(pairs), SnapshotMeta(9, 3))
    view = engine.view()
    before = list(zip(view.scan(b""), range(1000), strict=False))
    engine.write([(b"d00500", b"d01500")], {b"d00001": b"2", b"d01999x": b"2"}, SnapshotMeta(10, 3))
    asyncio.run(engine.flush())
    assert [pair for pair, _ in before] == sorted(pairs.items())[:1000]
    assert list(view.scan(b"")) == sorted(pairs.items()), "read again from the start"
    assert list(view.scan(b"d00500")) == sorted(pairs.items())[500:]
    assert view.applied == SnapshotMeta(9, 3)
    view.close()
    assert engine.get(b"d00001") == b"2"


def test_a_cut_snapshot_is_refused(open_engine: Callable[[str], Engine]) -> None:
    source, target = open_engine("a"), open_engine("b")
    source.write([], {b"k": b"v" * 1000}, SnapshotMeta(9, 3))

    async def stream() -> None:
        snapshot = await source.open_snapshot()
        sink = target.open_sink(snapshot.meta)
        await sink.write(await snapshot.read(0, snapshot.size - 1))
        with pytest.raises(ValueError):
            await sink.finish()
        sink.abort()
        snapshot.close()

    asyncio.run(stream())
    assert target.get(b"k") is None


def test_the_space_of_a_deleted_range_goes_back_to_the_disk(tmp_path: Path) -> None:
    engine = RocksEngine(tmp_path)
    engine.write([], {b"d%05d" % n: Random(n).randbytes(1000) for n in range(5000)}, SnapshotMeta(1, 1))
    asyncio.run(engine.flush())
    assert _tables(tmp_path) > 4_000_000
    engine.write([(b"d", b"e")], {}, SnapshotMeta(2, 1))
    engine.reclaim(b"d", b"e")
    engine.close()  # waits for the background work
    assert _tables(tmp_path) < 100_000


def _tables(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*.sst"))


def _state_of_one_pair(path: Path) -> tuple[RealDirectory, bytes]:
    """A memory engine's directory, and the bytes of its state file."""
    directory = RealDirectory(path)
    engine = MemoryEngine(directory)
    engine.write([], {b"k": b"v"}, SnapshotMeta(56, 1))
    asyncio.run(engine.flush())
    return directory, (path / "state").read_bytes()


def test_every_bit_of_a_state_file_is_inside_its_checksum(tmp_path: Path) -> None:
    """A flipped bit in the index (56 to 65592) once made a follower acknowledge what it did not have."""
    directory, data = _state_of_one_pair(tmp_path)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "state").write_bytes(flipped)
        with pytest.raises(DamagedState, match="state: damaged"):
            MemoryEngine(directory)
    for size in range(len(data)):
        (tmp_path / "state").write_bytes(data[:size])
        with pytest.raises(DamagedState):
            MemoryEngine(directory)
    (tmp_path / "state").write_bytes(data)
    assert MemoryEngine(directory).applied == SnapshotMeta(56, 1)
    directory.close()


def test_a_state_file_of_the_old_format_is_refused_by_name(tmp_path: Path) -> None:
    directory = RealDirectory(tmp_path)
    old = struct.pack("<8sIQQQI", b"SKVSTATE", 1, 56, 1, 1, google_crc32c.value(b"x")) + b"x"
    (tmp_path / "state").write_bytes(old)
    with pytest.raises(StorageError, match="format version 1, this program reads 2") as refused:
        MemoryEngine(directory)
    assert not isinstance(refused.value, DamagedState), "it is whole: nothing may replace it"
    directory.close()


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.binary(min_size=1, max_size=2), st.binary(max_size=3)),
            st.tuples(st.just("delete"), st.binary(min_size=1, max_size=2), st.just(b"")),
            st.tuples(st.just("range"), st.binary(max_size=2), st.binary(max_size=2)),
            st.tuples(st.just("commit"), st.just(b""), st.just(b"")),
        ),
        max_size=30,
    )
)
@settings(max_examples=200, deadline=None)
def test_a_batch_reads_what_it_will_write(steps: list[tuple[str, bytes, bytes]]) -> None:
    engine, model = MemoryEngine(SimDisk(Random(1)).open()), dict[bytes, bytes]()
    batch = Batch(engine)
    for kind, key, value in steps:
        match kind:
            case "put":
                batch.put(key, value)
                model[key] = value
            case "delete":
                batch.delete(key)
                model.pop(key, None)
            case "range":
                batch.delete_range(key, value)
                model = {k: v for k, v in model.items() if not key <= k < value}
            case _:
                batch.commit(SnapshotMeta(1, 1))
        assert batch.scan(b"", b"\xff\xff\xff") == sorted(model.items())
        assert list(batch.walk(b"", b"\xff\xff\xff")) == sorted(model.items())
        assert all(batch.get(k) == v for k, v in model.items())
        asked = [*model, b"a", b"", b"zz"]
        assert batch.get_many(asked) == [model.get(k) for k in asked]
    batch.commit(SnapshotMeta(1, 1))
    assert dict(engine.scan(b"", b"\xff\xff\xff")) == model


# ---- the machine


def write(seq: int, kind: int, key: bytes, value: bytes, issued_ms: int = 1000) -> bytes:
    section = frames.pack_section(1, b"s" * 16, 0, bytes([kind]), [seq], [key], [value])
    version = frames.version_for(bytes([kind]))
    return commands.frame(frames.pack_frame(frames.WRITE, 0, issued_ms, [section], version=version), 1 << 20)


def entry(index: int, command: bytes) -> Entry:
    return Entry(index, 1, Kind.COMMAND, STAMP.pack(1000 + index, 0) + command)


def learn(*changes: Change) -> bytes:
    return commands.learn([change_to_pb(change).SerializeToString() for change in changes])


def member(engine: Engine) -> ShardMachine:
    """The machine of a group 1 that has claimed its join of configuration 1, and learnt nothing yet."""
    engine.write([], {layout.JOINS: JOINS.pack(1, 1, 0)}, engine.applied)
    return ShardMachine(1, engine)


ONE, TWO = Group(1, ("a:1",), 1), Group(2, ("b:1",), 1)
CREATED = Change(1, moves=(Move(1, b"", b"", None, ONE),))
LOST = Change(2, moves=(Move(1, b"", b"", ONE, TWO),))


@quick
def test_replicas_agree_however_entries_are_batched() -> None:
    """Found by simulation (seed 47): the journal of a lent shard followed the batches."""
    rng = Random(47)
    history = [learn(CREATED), write(1, frames.PUT, b"a", b"1"), learn(LOST)]
    for seq in range(2, 60):
        kind = rng.choice([frames.PUT, frames.APPEND, frames.DELETE])
        history.append(write(seq, kind, rng.choice([b"a", b"b", b"c"]), b"%d;" % seq))
    entries = [entry(n, command) for n, command in enumerate(history, 1)]
    states = []
    for most in (1, 2, 7, 1000):
        machine = member(MemoryEngine(SimDisk(Random(1)).open()))
        replies, position = [], 0
        while position < len(entries):
            count = rng.randint(1, most)
            replies += machine.apply(entries[position : position + count])
            position += count
        assert isinstance(machine.engine, MemoryEngine)
        states.append((machine.engine.dump(), replies))
        assert machine.ownership.rows[1].journal > 0
    assert all(state == states[0] for state in states)


@quick
def test_a_refused_key_is_not_in_the_journal() -> None:
    """Found by simulation (seed 135): the next owner deleted what a stale clerk had asked for here."""
    machine = member(MemoryEngine(SimDisk(Random(1)).open()))
    halves = Change(2, split=Split(1, b"m", 2, holder=1))
    lost = Change(3, moves=(Move(1, b"", b"m", ONE, TWO),))
    machine.apply([entry(1, learn(CREATED)), entry(2, learn(halves)), entry(3, learn(lost))])
    machine.apply(
        [entry(4, write(1, frames.PUT, b"z", b"refused")), entry(5, write(2, frames.PUT, b"a", b"done"))]
    )
    named = {value for _, value in machine.engine.scan(*layout.journal_range(1))}
    assert named == {layout.data_key(b"a"), layout.record_key(1, b"s" * 16)}


@quick
def test_a_machine_reloaded_from_its_engine_goes_on_the_same() -> None:
    engine = MemoryEngine(SimDisk(Random(1)).open())
    machine = member(engine)
    machine.apply([entry(1, learn(CREATED)), entry(2, write(1, frames.APPEND, b"k", b"x"))])
    again = ShardMachine(1, engine)
    assert again.ownership.rows == machine.ownership.rows and again.clock_ms == machine.clock_ms
    again.apply([entry(3, write(1, frames.APPEND, b"k", b"x"))])
    assert engine.get(layout.data_key(b"k")) == b"x", "the record was in the engine"


# ---- ownership


def reachable(start: State) -> set[State]:
    found, todo = {start}, [start]
    while todo:
        state = todo.pop()
        for (old, _), new in TRANSITIONS.items():
            if old is state and new not in found:
                found.add(new)
                todo.append(new)
    return found


@quick
def test_every_state_leads_to_every_other() -> None:
    for start in State:
        assert reachable(start) == set(State), start


@quick
def test_a_shard_that_goes_and_comes_back_makes_two_hand_overs() -> None:
    ownership = Ownership(1, joins=(1, 1))
    ownership.learn(CREATED)
    ownership.learn(LOST)
    ownership.learn(Change(3, moves=(Move(1, b"", b"", TWO, ONE),)))
    row = ownership.rows[1]
    assert row.state is State.LENDING and len(row.queue) == 1, "the way back waits for the way there"
    assert ownership.closed(1, 2, 0) and not ownership.closed(1, 2, 0), "a repetition has no effect"
    assert ownership.released(1, 2) == [Drop(1, b"", b"")]
    assert row.state is State.PULLING and row.epoch == 3
    assert ownership.released(1, 2) == []


@quick
def test_a_range_is_not_fetched_while_its_old_copy_is_frozen() -> None:
    """Lent whole, split on the way, one half comes back."""
    ownership = Ownership(1, joins=(1, 1))
    ownership.learn(CREATED)
    ownership.learn(LOST)
    ownership.closed(1, 2, 0)
    ownership.learn(Change(3, split=Split(1, b"m", 2, holder=2)))
    ownership.learn(Change(4, moves=(Move(2, b"m", b"", TWO, ONE),)))
    assert ownership.rows[2].state is State.ABSENT, "its release would delete what arrives"
    ownership.released(1, 2)
    assert ownership.rows[2].state is State.PULLING
    ownership.check()


@quick
def test_gains_of_one_range_wait_for_one_another_in_order() -> None:
    """Seed 1172: a later gain went first, and giver and taker waited for each other for ever.

    Shard 1 is lent whole and frozen; meanwhile the other group splits it, gives the right
    half, takes it back, merges, and gives the whole.
    """
    ownership = Ownership(1, joins=(1, 1))
    ownership.learn(CREATED)
    ownership.learn(LOST)
    ownership.closed(1, 2, 0)
    ownership.learn(Change(3, split=Split(1, b"m", 2, holder=2)))
    ownership.learn(Change(4, moves=(Move(2, b"m", b"", TWO, ONE),)))
    ownership.learn(Change(5, moves=(Move(2, b"m", b"", ONE, TWO),)))
    ownership.learn(Change(6, merge=Merge(1, 2, holder=2)))
    ownership.learn(Change(7, moves=(Move(1, b"", b"", TWO, ONE),)))
    ownership.rows = dict(reversed(ownership.rows.items()))  # a restart may reorder them: no matter
    ownership.released(1, 2)
    assert ownership.rows[2].state is State.PULLING, "what was given first comes first"
    assert ownership.rows[1].state is State.ABSENT
    ownership.installed(2, 4)
    assert ownership.rows[2].state is State.LENDING
    ownership.closed(2, 5, 0)
    ownership.released(2, 5)
    assert ownership.rows[1].state is State.PULLING
    ownership.check()


@quick
def test_a_split_and_a_merge_wait_for_both_rows() -> None:
    ownership = Ownership(2, joins=(1, 1))
    ownership.learn(Change(1, moves=(Move(1, b"", b"", ONE, TWO),)))
    ownership.learn(Change(2, split=Split(1, b"m", 2, holder=2)))
    ownership.learn(Change(3, merge=Merge(1, 2, holder=2)))
    ownership.learn(Change(4, moves=(Move(1, b"", b"", TWO, ONE),)))
    row = ownership.rows[1]
    assert row.state is State.PULLING and [pending.event for pending in row.queue] == [
        Event.SPLIT,
        Event.MERGE,
        Event.LOST,
    ]
    ownership.installed(1, 1)
    assert row.end == b"m" and row.state is State.SERVING, "the merge waits until the new shard has its records"
    ownership.inherited(2)
    assert row.end == b"" and row.state is State.SERVING, "and the move until the merged one has all records"
    ownership.inherited(1)
    assert row.state is State.LENDING and row.end == b"" and ownership.rows[2].state is State.ABSENT
    assert ownership.serves_epoch(1, 1) and not ownership.serves_epoch(1, 4)
    for one in ownership.rows.values():
        assert decode_row(encode_row(one)) == one
        one.attempt, one.given_up = 3, (2, 7)
        assert decode_row(encode_row(one)) == one


@quick
def test_a_move_ends_although_clients_write_faster_than_it_copies() -> None:
    """Seed 21: what was left to copy never got small enough to stop for."""
    pace = Pace()
    closing, row = Closing(pace), Row(1, State.LENDING, epoch=5)
    requests = 0
    for position in range(0, 10**9, 10):
        row.journal = 1000 * pace.close_at + 20 * position
        request = pb.PullRequest(shard=1, epoch=5, gid=2, joined=1, can_finish=True)
        getattr(request, "from").CopyFrom(cursor_to_pb(Cursor(JOURNAL, b"", position)))
        requests += 1
        if closing.is_due(row, request):
            break
    assert requests == pace.patience + 1


# ---- frames


@quick
@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_no_bytes_upset_the_frame_checker(data: bytes) -> None:
    for bytes_ in (data, b"SKF\x01\x01" + data):
        with pytest.raises(MalformedFrame):
            frames.check_frame(bytes_, frames.WRITE, frames.Limits())


OPERATIONS = st.lists(
    st.tuples(st.integers(1, 4), st.binary(min_size=1, max_size=9), st.binary(max_size=20)),
    min_size=1,
    max_size=20,
)


@quick
@given(st.lists(OPERATIONS, min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_frames_and_replies_come_back_as_they_went(sections: list[list[tuple[int, bytes, bytes]]]) -> None:
    packed = []
    for number, operations in enumerate(sections):
        kinds, keys, values = (list(column) for column in zip(*operations, strict=True))
        packed.append(
            frames.pack_section(number, b"%016d" % number, number, bytes(kinds), range(len(keys)), keys, values)
        )
    frame = frames.pack_frame(frames.WRITE, 7, 99, packed)
    header = frames.check_frame(frame, frames.WRITE, frames.Limits())
    assert (header.config_num, header.issued_ms, header.sections) == (7, 99, len(sections))
    for number, (section, operations) in enumerate(zip(frames.unpack_sections(frame), sections, strict=True)):
        assert (section.shard, section.session) == (number, b"%016d" % number)
        assert list(zip(section.kinds, section.keys, section.values, strict=True)) == operations
    for end in range(len(frame)):
        with pytest.raises(MalformedFrame):
            frames.check_frame(frame[:end], frames.WRITE, frames.Limits())
    values = [value for operations in sections for _, _, value in operations]
    reply = frames.pack_reply(5, [frames.pack_results(bytes(len(values)), values)])
    clock, (results,) = frames.unpack_reply(reply)
    assert clock == 5 and results.values == values and set(results.statuses) == {Status.OK}


@quick
@given(st.one_of(st.none(), st.binary(max_size=9)), st.binary(max_size=9), st.integers(0, 1000))
@settings(deadline=None)
def test_operations_with_two_arguments(expected: bytes | None, new: bytes, limit: int) -> None:
    assert frames.unpack_cas(frames.pack_cas(expected, new)) == (expected, new)
    assert frames.unpack_scan(frames.pack_scan(new, limit)) == (new, limit)


# ---- sessions and quorums


@quick
@given(
    st.dictionaries(st.integers(1, 1 << 40), st.binary(max_size=5)),
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 40),
)
@settings(deadline=None)
def test_records_come_back_as_they_went(replies: dict[int, bytes], below: int, used: int) -> None:
    record = SessionRecord(0, used, dict(replies))
    record.acknowledge(below)
    again = SessionRecord.decode(record.encode())
    assert again == record
    assert again.replies == {seq: reply for seq, reply in replies.items() if seq >= below}
    record.acknowledge(0)
    assert record.acked_below == below, "never back"


@quick
def test_an_old_write_may_not_begin() -> None:
    clock = SessionClock(ttl_ms=100, now_ms=199)
    assert clock.may_begin(issued_ms=100)
    clock.advance(200)
    assert not clock.may_begin(issued_ms=100)


@quick
@given(st.sets(st.integers(1, 9), min_size=1), st.sets(st.integers(1, 9)), st.data())
@settings(deadline=None)
def test_a_quorum_is_a_majority_of_each_half(voters: set[int], outgoing: set[int], data: st.DataObject) -> None:
    membership = Membership(frozenset(voters), frozenset(outgoing))
    match = {node: data.draw(st.integers(0, 5)) for node in voters | outgoing}
    index = quorum_index(membership, match)
    for half in membership.halves():
        assert sum(1 for node in half if match[node] >= index) >= majority(len(half))
    assert any(
        sum(1 for node in half if match[node] > index) < majority(len(half)) for half in membership.halves()
    )
    votes = {node: data.draw(st.booleans()) for node in voters | outgoing}
    won = all(sum(votes[node] for node in half) >= majority(len(half)) for half in membership.halves())
    assert (tally(membership, votes) is Vote.WON) == won
    assert tally(membership, {}) is Vote.PENDING


def test_a_state_is_durable_no_further_than_it_is_applied() -> None:
    """Found by seed 60219: a received snapshot lies in the state file before it is installed, or never is."""

    async def story() -> None:
        giver, taker = (MemoryEngine(SimDisk(Random(1)).open()) for _ in range(2))
        for engine, index in ((giver, 9), (taker, 5)):
            engine.write([], {b"dk": b"%d" % index}, SnapshotMeta(index, 1))
        source = await giver.open_snapshot()
        sink = taker.open_sink(source.meta)
        await sink.write(await source.read(0, source.size))
        await sink.finish()
        assert await taker.flush() == 5, "the log must not be cut above what is applied"
        taker.install(source.meta, sink)
        assert await taker.flush() == 9 and taker.get(b"dk") == b"9"

    loop.run(story())
