"""After a split or merge a shard takes the exactly-once records over step by step; nobody can tell from the outside."""

from __future__ import annotations

from random import Random

import pytest

from shardkv.raft.protocol.types import Entry
from shardkv.shardctrler.shard_map import Change, Merge, Move, Split
from shardkv.state import commands, layout, records
from shardkv.state.machine import ShardMachine
from shardkv.state.row import State
from shardkv.storage.memory import MemoryEngine
from shardkv.wire import frames
from shardkv.wire.frames import SectionStatus, Status
from tests.sim.disk import SimDisk
from tests.sim.world import World, in_world
from tests.test_units import CREATED, ONE, TWO, entry, learn, member

pytestmark = pytest.mark.quick
STEP = 3


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "INHERIT_RECORDS", STEP)


def machine_of_one() -> ShardMachine:
    return member(MemoryEngine(SimDisk(Random(1)).open()))


def session(n: int) -> bytes:
    return b"%016d" % n


def append(shard: int, n: int, seq: int, key: bytes, acked_below: int = 0) -> bytes:
    section = frames.pack_section(shard, session(n), acked_below, bytes([frames.APPEND]), [seq], [key], [b"x"])
    return commands.frame(frames.pack_frame(frames.WRITE, 0, 1000, [section]), 1 << 20)


SPLIT = learn(Change(2, split=Split(1, b"m", 2, holder=1)))
MERGE = learn(Change(3, merge=Merge(1, 2, holder=1)))
LOST = learn(Change(4, moves=(Move(1, b"", b"", ONE, TWO),)))


def step_of(machine: ShardMachine) -> bytes | None:
    """What the leader proposes next for a shard that takes records over."""
    for row in machine.ownership.rows.values():
        if row.inherits:
            return commands.inherit(row.shard, row.inherited)
    return None


def story(rng: Random) -> list[bytes]:
    """Appends, retries of any age at the half that has the key now, a split, a merge and a move; steps between them."""
    machine, history = machine_of_one(), [learn(CREATED)]
    machine.apply([entry(1, history[0])])
    done: list[tuple[int, int, bytes]] = []
    seqs = dict.fromkeys(range(12), 0)
    waiting = [SPLIT, MERGE, LOST]

    def log(command: bytes) -> None:
        history.append(command)
        machine.apply([entry(len(history), command)])
        machine.check()

    for _ in range(rng.randint(80, 160)):
        choice = rng.random()
        step = step_of(machine)
        if choice < 0.15 and step is not None:
            log(step)
            if rng.random() < 0.2:
                log(step)  # a repetition
        elif choice < 0.2 and waiting:
            log(waiting.pop(0))
        else:
            if choice < 0.5 and done:
                n, seq, key = rng.choice(done)
            else:
                n = rng.randrange(12)
                seqs[n] += 1
                seq, key = seqs[n], rng.choice([b"a", b"l", b"m", b"z"])
                done.append((n, seq, key))
            row = machine.ownership.find(key)
            if row is not None:
                log(append(row.shard, n, seq, key))
    for command in waiting:
        log(command)
    while (last := step_of(machine)) is not None:
        log(last)
    return history


@pytest.mark.parametrize("seed", range(60))
def test_each_write_is_done_once_on_all_replicas_however_far_the_records_have_come(seed: int) -> None:
    rng = Random(seed)
    history = story(rng)
    entries = [entry(n, command) for n, command in enumerate(history, 1)]
    states = []
    for most in (1, 2, 7, 1000):
        machine = machine_of_one()
        replies, position = [], 0
        while position < len(entries):
            count = rng.randint(1, most)
            replies += machine.apply(entries[position : position + count])
            position += count
            if rng.random() < 0.2:
                machine._load()  # as after a restart: nothing is cached
        assert isinstance(machine.engine, MemoryEngine)
        states.append((machine.engine.dump(), replies))
    assert all(state == states[0] for state in states)
    row = machine.ownership.rows[1]
    assert row.state is State.LENDING, "the move came last, when all records were there"
    asked = [item for command in history if command[0] == commands.FRAME for item in [section_of(command)]]
    for key in {key for _, _, key in asked}:
        once = len({(who, seq) for who, seq, found in asked if found == key})
        assert machine.engine.get(layout.data_key(key)) == b"x" * once
    assert not list(machine.engine.scan(*layout.record_range(2))), "the records of what has ended are gone"


def section_of(command: bytes) -> tuple[bytes, int, bytes]:
    (section,) = frames.unpack_sections(command[commands.FRAME_HEADER.size :])
    return section.session, section.seqs[0], section.keys[0]


def test_no_entry_writes_more_records_than_a_step() -> None:
    machine = machine_of_one()
    history = [learn(CREATED), *(append(1, n, 1, b"z") for n in range(100)), SPLIT, MERGE]
    most = 0
    write = machine.engine.write

    def counted(deleted, changes, applied):  # type: ignore[no-untyped-def]
        nonlocal most
        most = max(most, len([key for key in changes if key[:1] == b"s"]))
        assert not any(low <= b"s" <= high for low, high in deleted)
        write(deleted, changes, applied)

    machine.engine.write = counted  # type: ignore[method-assign]
    index = 0
    for command in history:
        index += 1
        machine.apply([entry(index, command)])
    steps = 0
    while (step := step_of(machine)) is not None:
        index, steps = index + 1, steps + 1
        machine.apply([entry(index, step)])
    assert 60 < steps < 80 and most == 2 * STEP, (
        "a merge writes each record of a step, and deletes it where it was"
    )
    assert len(list(machine.engine.scan(*layout.record_range(1)))) == 100


def test_a_retry_is_answered_before_and_after_its_record_has_come() -> None:
    machine = machine_of_one()
    history: list[Entry] = []

    def log(command: bytes) -> bytes:
        history.append(entry(len(history) + 1, command))
        return machine.apply(history[-1:])[0]

    log(learn(CREATED))
    for n in range(20):
        log(append(1, n, 1, b"z"))
    log(SPLIT)
    assert machine.ownership.rows[2].inherits == 1
    for n in (0, 19):
        _, (reply,) = frames.unpack_reply(log(append(2, n, 1, b"z")))
        assert reply.status is SectionStatus.OK and reply.statuses == bytes([Status.OK])
    while (step := step_of(machine)) is not None:
        log(step)
    for n in range(20):
        log(append(2, n, 1, b"z"))
    assert machine.engine.get(b"dz") == b"x" * 20


@in_world(groups=(1, 2), controllers=1)
async def test_a_leader_takes_the_records_over_and_the_next_one_goes_on(world: World) -> None:
    clerks = [world.clerk() for _ in range(30)]
    for clerk in clerks:
        await clerk.append(b"\x01k", b"x")
    first = (await world.config()).lookup(b"\x01")
    await world.split(first.id, b"\x01")
    leader = await world.leader(first.gid)
    await world.crash(leader)
    await world.merge(first.id)
    await world.restart(leader)
    await world.move(first.id, 3 - first.gid)
    await world.settle()
    for clerk in clerks:
        await clerk.append(b"\x01k", b"x")
    assert await clerks[0].get(b"\x01k") == b"x" * 60
    await world.converge(30.0)
    world.check_leftovers()
