"""The journal of a lent shard: no larger than the shard, the same however entries are batched, and complete."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv import shardkv_pb2 as pb
from shardkv.server import giver as lending
from shardkv.server.giver import Pace
from shardkv.state import layout
from shardkv.state.cursor import JOURNAL, Cursor
from shardkv.state.machine import ShardMachine
from shardkv.state.row import State
from shardkv.state.rows import cursor_from_pb, cursor_to_pb
from shardkv.storage.memory import MemoryEngine
from shardkv.wire import frames
from shardkv.wire.ranges import pack_look
from tests.sim.disk import SimDisk
from tests.test_units import CREATED, LOST, entry, learn, member, write

quick = pytest.mark.quick
PACE = Pace(chunk_bytes=60, journal_keys=3)


class Giver:
    """A group's machine that has lent its one shard."""

    def __init__(self) -> None:
        self.machine = member(MemoryEngine(SimDisk(Random(1)).open()))
        self.index = 0
        for change in (CREATED, LOST):
            self.apply([learn(change)])
        assert self.machine.ownership.rows[1].state is State.LENDING

    def apply(self, commands: list[bytes]) -> None:
        entries = [entry(self.index + n, command) for n, command in enumerate(commands, 1)]
        self.machine.apply(entries)
        self.index += len(entries)

    def journal(self) -> list[tuple[int, bytes]]:
        found = self.machine.engine.scan(*layout.journal_range(1))
        return [(layout.journal_position(place), item) for place, item in found]

    def pull(self, cursor: Cursor) -> pb.PullReply:
        request = pb.PullRequest(shard=1, epoch=2, gid=1, joined=1, can_finish=True)
        getattr(request, "from").CopyFrom(cursor_to_pb(cursor))
        return lending.pull(self.machine, request, PACE)


@quick
def test_a_hot_key_is_in_the_journal_once() -> None:
    """A million writes of one key made a million items, for the taker to read and the giver to delete."""
    giver = Giver()
    for n in range(200):
        giver.apply([write(5 * n + k + 1, frames.PUT, b"hot", b"%d" % n) for k in range(5)])
        giver.apply([write(5 * n + 1, frames.PUT, b"key-%d" % (n % 7), b"")])
    items = [item for _, item in giver.journal()]
    assert sorted(items) == sorted(set(items)) and len(items) <= 1 + 7 + 1, "the keys, and the session's record"
    row = giver.machine.ownership.rows[1]
    assert row.journal > 2000, "positions go on: they say how far a copy has come"
    places = dict(giver.machine.engine.scan(*layout.place_range(1)))
    assert {int.from_bytes(place, "big") for place in places.values()} == {
        place for place, _ in giver.journal()
    }


@quick
def test_a_journal_goes_with_its_loan() -> None:
    giver = Giver()
    giver.apply([write(1, frames.PUT, b"a", b"1")])
    giver.machine.ownership.closed(1, 2, 0)
    released = giver.machine.ownership.released(1, 2)
    for effect in released:
        giver.machine._carry_out(effect, may_inherit=True)
    giver.machine._commit(giver.machine.applied)
    assert not list(giver.machine.engine.scan(b"d", b"e")) + giver.journal()
    assert not list(giver.machine.engine.scan(*layout.place_range(1)))


steps = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from([b"a", b"b", b"c", b"d", b"e"]),
            st.sampled_from([frames.PUT, frames.DELETE, frames.DELETE_RANGE]),
        ),
        st.just("pull"),
        st.just("restart"),
    ),
    max_size=60,
)


@quick
@settings(max_examples=300, deadline=None)
@given(steps, st.integers(1, 9))
def test_a_copy_by_the_journal_ends_with_what_the_giver_has(history: list[object], at_once: int) -> None:
    """Pulls and writes in any order: when nothing is left, both have the same items."""
    giver, taken, cursor = Giver(), dict[bytes, bytes](), Cursor()
    waiting: list[bytes] = []
    seq = 0

    def pull() -> None:
        nonlocal cursor
        reply = giver.pull(cursor)
        following = cursor_from_pb(reply.next)
        assert following >= cursor, "a copy does not go back"
        for item in reply.items:
            taken.pop(item.key, None) if item.absent else taken.update({item.key: item.value})
        cursor = following

    for step in history:
        if isinstance(step, tuple):
            seq += 1
            value = pack_look(b"d", 2) if step[1] == frames.DELETE_RANGE else b"%d" % seq
            waiting.append(write(seq, step[1], step[0], value))
            if len(waiting) >= at_once:
                giver.apply(waiting)
                waiting = []
        elif step == "pull":
            pull()
        else:
            giver.machine = ShardMachine(1, giver.machine.engine)
    if waiting:
        giver.apply(waiting)
    end = Cursor(JOURNAL, b"", giver.machine.ownership.rows[1].journal)
    for _ in range(200):
        if cursor == end:
            break
        pull()
    assert cursor == end
    engine = giver.machine.engine
    held = dict(engine.scan(*layout.data_range(b"", b""))) | dict(engine.scan(*layout.record_range(1)))
    assert taken == held


@quick
def test_a_replica_that_is_behind_does_not_send_a_copy_back() -> None:
    giver = Giver()
    giver.apply([write(1, frames.PUT, b"a", b"1")])
    ahead = Cursor(JOURNAL, b"", 1000)
    reply = giver.pull(ahead)
    assert cursor_from_pb(reply.next) == ahead and not reply.items and not reply.final
