"""Restores: one at a time, whole or not at all, whatever is cut off, killed or moved meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from shardkv import shardkv_pb2 as pb
from shardkv.backup import install
from shardkv.backup.errors import BackupError
from shardkv.backup.restore import Piece, Restore
from shardkv.backup.run import HAS_DATA, Run, abort, held
from shardkv.client import BeingRestored
from shardkv.shardctrler.shard_map import Change, Merge, Move, Shard, Split
from shardkv.state import commands, layout
from shardkv.state.machine import ShardMachine
from shardkv.state.restoring import WINDOW
from shardkv.state.row import Fence
from shardkv.storage.memory import MemoryEngine
from shardkv.wire import frames
from shardkv.wire.calls import Code, Dialer, parse
from tests.sim.disk import SimDisk
from tests.sim.world import World, in_world
from tests.test_units import CREATED, ONE, TWO, entry, learn, member, write

Pairs = list[tuple[bytes, bytes]]

KEYS = [bytes([255 * n // 300]) + b"/%03d" % n for n in range(300)]  # in all shards
NEW: Pairs = [(key, b"new " + key) for key in KEYS]
OLD: Pairs = [(key, b"old") for key in KEYS[::2]]
NAME, OTHER = "20261125T000000Z-000000", "20261124T000000Z-000000"

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "CHUNK_PAIRS", 10)


class Group:
    """As `restore.Revived`, with pairs of its own."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def pairs(self, piece: Piece) -> Iterator[tuple[bytes, bytes]]:
        low, high = layout.data_range(piece.start, piece.end)
        for key, value in self._pairs:
            if low <= layout.data_key(key) < high:
                yield layout.data_key(key), value


async def restore(
    world: World, name: str = NAME, pairs: Pairs = NEW, rate: float = 0.0, dialer: Dialer | None = None
) -> tuple[int, int]:
    work = Restore(None, Path(), rate)  # type: ignore[arg-type]
    work._groups = {None: Group(pairs)}  # type: ignore[dict-item]
    pieces = [Piece(b"", b"", None)]  # type: ignore[arg-type]
    return await work.write(world.controller, dialer or world._dialer, pieces, name)


async def everything(world: World) -> dict[bytes, bytes]:
    return dict([pair async for pair in world.clerk().scan()])


async def neighbours(world: World) -> list[Shard]:
    """The shards in key order; the third and the fourth are one group's."""
    shards = list((await world.config()).shards())
    assert shards[2].gid == shards[3].gid
    return shards


async def cut_off(world: World, after: float, pairs: Pairs = OLD) -> None:
    """A run of another backup that ends at some moment as if it were killed, if it has not ended before."""
    task = asyncio.create_task(restore(world, OTHER, pairs, rate=2000.0))
    await asyncio.wait([task], timeout=after)
    task.cancel()
    await asyncio.wait([task])


# ---- one at a time


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("other", [NAME, OTHER])
def test_of_two_restores_at_once_one_wins_and_the_other_is_refused(seed: int, other: str) -> None:
    @in_world(groups=(1, 2), controllers=1, seed=seed)
    async def story(world: World) -> None:
        done = await asyncio.gather(
            restore(world), restore(world, other, OLD, rate=500.0), return_exceptions=True
        )
        won = [n for n, result in enumerate(done) if not isinstance(result, BaseException)]
        assert len(won) == 1 and isinstance(done[1 - won[0]], BackupError), done
        assert await everything(world) == dict([NEW, OLD][won[0]]), "one of them, whole"

    story()


@pytest.mark.parametrize("seed", range(12))
def test_a_restore_that_was_cut_off_is_replaced_and_nothing_of_it_is_left(seed: int) -> None:
    @in_world(groups=(1, 2), controllers=1, seed=seed)
    async def story(world: World) -> None:
        await cut_off(world, after=0.1 + 0.04 * seed)
        assert await fences(world), "it was cut off while it wrote"
        assert await restore(world) == (300, sum(len(key) + len(value) for key, value in NEW))
        assert await everything(world) == dict(NEW)

    story()


async def fences(world: World) -> list[Fence]:
    found = []
    for gid in (await world.config()).groups:
        machine = (await world.leader(gid)).rsm.machine
        assert isinstance(machine, ShardMachine)
        found += [row.fence for row in machine.ownership.rows.values() if row.fence is not None]
    return found


class Suspending:
    """A dialer of a process that stands still from its n-th call on, until it is let go."""

    def __init__(self, dialer: Dialer, calls: int) -> None:
        self._dialer, self._calls = dialer, calls
        self.go = asyncio.Event()

    async def call(self, address: str, method: str, payload: bytes, timeout: float) -> bytes:
        self._calls -= 1
        if self._calls < 0:
            await self.go.wait()
        return await self._dialer.call(address, method, payload, timeout)


@pytest.mark.parametrize("calls", [0, 1, 3, 5, 8, 13, 21, 30, 34, 37, 40, 43, 46])
def test_a_run_that_was_suspended_and_replaced_changes_nothing_any_more(calls: int) -> None:
    @in_world(groups=(1, 2), controllers=1, seed=calls)
    async def story(world: World) -> None:
        suspending = Suspending(world._dialer, calls)
        late = asyncio.create_task(restore(world, OTHER, OLD, dialer=suspending))  # type: ignore[arg-type]
        await asyncio.sleep(5)
        (result,) = await asyncio.gather(restore(world), return_exceptions=True)
        # If it stood still after all was written, it is the one that won.
        other_won = isinstance(result, BackupError) and str(result) == HAS_DATA
        assert other_won or result == (300, sum(len(key) + len(value) for key, value in NEW))
        expected = dict(OLD if other_won else NEW)
        clerk = world.clerk()
        await clerk.delete(KEYS[0])
        await clerk.put(KEYS[2], b"newer")
        suspending.go.set()
        await asyncio.wait([late])
        if not other_won:
            assert isinstance(late.exception(), BackupError), late
        found = await everything(world)
        expected.pop(KEYS[0], None)
        assert found == {**expected, KEYS[2]: b"newer"}

    story()


@pytest.mark.parametrize("calls", [*range(20, 32)])
def test_a_run_that_is_killed_at_any_call_is_replaced_or_ended(calls: int) -> None:
    """All of its last steps, one by one: it seals and opens shard by shard."""

    @in_world(groups=(1, 2), controllers=1, seed=calls)
    async def story(world: World) -> None:
        suspending = Suspending(world._dialer, calls)
        killed = asyncio.create_task(restore(world, OTHER, OLD, dialer=suspending))  # type: ignore[arg-type]
        await asyncio.sleep(5)
        killed.cancel()
        await asyncio.wait([killed])
        (result,) = await asyncio.gather(restore(world), return_exceptions=True)
        won = isinstance(result, BackupError)
        assert not won or str(result) == HAS_DATA, result
        assert await everything(world) == dict(OLD if won else NEW), "whole, and open to clients"

    story()


@in_world(groups=(1, 2), controllers=1)
async def test_a_run_has_a_higher_generation_than_all_before_it(world: World) -> None:
    left = pb.RestoreStep(kind=BEGIN, shard=4, run="left", name=OTHER, generation=7)
    leader = await world.leader((await world.config()).by_id[4].gid)
    await world._dialer.call(leader.address, "kv.restore", left.SerializeToString(), 5.0)
    started = Run(world.controller, world._dialer, NAME)
    await started.begin()
    found = await fences(world)
    assert {fence.run for fence in found} == {started.id} and len(found) == 4
    assert {fence.generation for fence in found if fence.beat} == {8}, "the first shard's, which decides"


@in_world(groups=(1,), controllers=1)
async def test_a_restore_that_was_cut_off_when_all_was_written_is_ended_by_the_next(world: World) -> None:
    ended = Run(world.controller, world._dialer, OTHER)
    await ended.begin()
    await ended.seal()
    with pytest.raises(BackupError, match="into an empty one"):
        await restore(world)
    assert await world.clerk().cas(b"k", None, b"v"), "it is open to clients"


@in_world(groups=(1,), controllers=1)
async def test_a_cluster_that_has_data_is_refused_and_left_open(world: World) -> None:
    clerk = world.clerk()
    await clerk.put(b"z", b"1")
    with pytest.raises(BackupError, match="into an empty one"):
        await restore(world)
    await clerk.put(b"a", b"2")
    assert await everything(world) == {b"z": b"1", b"a": b"2"}


@in_world(groups=(1, 2), controllers=1)
async def test_an_operator_aborts_a_restore_that_was_cut_off(world: World) -> None:
    assert await abort(world.controller, world._dialer) == 0
    await cut_off(world, 0.3)
    at_work = asyncio.create_task(restore(world, rate=100.0))
    await asyncio.sleep(10)
    with pytest.raises(BackupError, match="is under way"):
        await abort(world.controller, world._dialer)
    at_work.cancel()
    await asyncio.wait([at_work])
    assert await abort(world.controller, world._dialer) == 4
    assert await everything(world) == {}
    await world.clerk().put(b"k", b"v")


# ---- clients, and the map


@in_world(groups=(1, 2), controllers=1)
async def test_clients_are_refused_until_the_restore_has_ended(world: World) -> None:
    clerk = world.clerk()
    async with held(world.controller, world._dialer, NAME):
        for call in (
            lambda: clerk.put(b"k", b"v"),
            lambda: clerk.get(b"k"),
            lambda: clerk.append(b"k", b"v"),
            lambda: clerk.cas(b"k", None, b"v"),
            lambda: clerk.delete(b"k"),
            lambda: clerk.multi_get([b"a", b"z"]),
            lambda: everything(world),
        ):
            with pytest.raises(BeingRestored):
                await call()
    assert await clerk.get(b"k") is None
    assert await clerk.cas(b"k", None, b"v"), "none of the refused writes is done later"


@pytest.mark.parametrize("seed", range(4))
def test_moves_splits_and_merges_wait_for_the_restore(seed: int) -> None:
    @in_world(groups=(1, 2), controllers=1, seed=seed)
    async def story(world: World) -> None:
        shards = await neighbours(world)
        task = asyncio.create_task(restore(world, rate=1000.0))
        await asyncio.sleep(0.5)
        await world.move(shards[0].id, 3 - shards[0].gid)
        await world.split(shards[1].id, shards[1].start + b"k")
        await world.merge(shards[2].id)
        assert not task.done(), "all of that came while it wrote"
        await task
        await world.settle()
        assert await everything(world) == dict(NEW)

    story()


@in_world(groups=(1, 2), controllers=1)
async def test_a_restore_that_was_cut_off_is_replaced_though_the_map_has_changed_since(world: World) -> None:
    shards = await neighbours(world)
    await cut_off(world, 0.2)
    assert await fences(world)
    await world.move(shards[0].id, 3 - shards[0].gid)
    await world.split(shards[1].id, shards[1].start + b"k")
    await world.merge(shards[2].id)
    await restore(world)
    await world.settle()
    assert await everything(world) == dict(NEW)


@pytest.mark.parametrize("seed", range(6))
def test_leaders_die_while_a_restore_writes(seed: int) -> None:
    @in_world(groups=(1, 2), controllers=1, seed=seed)
    async def story(world: World) -> None:
        task = asyncio.create_task(restore(world, rate=400.0))
        rng = Random(seed)
        for _ in range(4):
            await asyncio.sleep(rng.uniform(0.2, 1.5))
            leader = await world.leader(rng.choice([1, 2]))
            await world.crash(leader)
            await world.restart(leader)
        assert await task == (300, sum(len(key) + len(value) for key, value in NEW))
        assert await everything(world) == dict(NEW)
        assert world.compare_replicas() is not None

    story()


# ---- one group


def step(kind: pb.RestoreStep.Kind, run: str = "a", **fields: object) -> bytes:
    message = pb.RestoreStep(kind=kind, shard=1, run=run, **fields)  # type: ignore[arg-type]
    return commands.restore(message.SerializeToString())


def chunk(number: int, pairs: Pairs, run: str = "a", page: bytes | None = None) -> bytes:
    if page is None:
        page = frames.pack_page(True, b"", [(layout.data_key(key), value) for key, value in pairs])
    message = pb.RestoreChunk(shard=1, run=run, number=number, page=page)
    return commands.restore_chunk(message.SerializeToString())


BEGIN, BEAT, SEAL, END = pb.RestoreStep.BEGIN, pb.RestoreStep.BEAT, pb.RestoreStep.SEAL, pb.RestoreStep.END


def test_replicas_agree_on_a_restore_however_entries_are_batched() -> None:
    rng = Random(5)
    history = [learn(CREATED), write(1, frames.DELETE, b"a", b""), step(BEGIN, generation=1, name=OTHER)]
    history += [chunk(n, [(b"old%d" % n, b"1")]) for n in (0, 2, 1, 2)]
    history += [write(2, frames.PUT, b"a", b"refused")]
    history += [step(BEGIN, "b", generation=2, over_run="a", over_beat=0), chunk(3, [(b"old3", b"1")])]
    order = [n for n in range(30) for _ in range(2)]
    history += [chunk(n, [(b"new%02d" % n, b"1"), (b"new%02d+" % n, b"2")], "b") for n in shuffled(order, rng)]
    history += [learn(Change(2, split=Split(1, b"new15", 2, holder=1)))]
    history += [learn(Change(3, moves=(Move(2, b"new15", b"", ONE, TWO),)))]
    history += [
        step(SEAL, "b", chunks=30),
        step(END, "b"),
        write(3, frames.PUT, b"a", b"taken"),
        step(END, "b"),
    ]
    entries = [entry(n, command) for n, command in enumerate(history, 1)]
    states = []
    for most in (1, 2, 7, 1000):
        machine = member(MemoryEngine(SimDisk(Random(1)).open()))
        replies, position = [], 0
        while position < len(entries):
            count = rng.randint(1, most)
            replies += machine.apply(entries[position : position + count])
            position += count
            machine.check()
        assert isinstance(machine.engine, MemoryEngine)
        states.append((machine.engine.dump(), replies))
        data = dict(machine.engine.scan(b"d", b"e"))
        assert data == {
            b"da": b"taken",
            **{b"dnew%02d" % n: b"1" for n in range(30)},
            **{b"dnew%02d+" % n: b"2" for n in range(30)},
        }
        assert machine.ownership.rows[2].peer == TWO, "the split and the move came when the restore had ended"
    assert all(state == states[0] for state in states)


def shuffled(numbers: list[int], rng: Random) -> list[int]:
    """Each near its place, as retries and calls that run side by side do."""
    return sorted(numbers, key=lambda n: n + rng.uniform(0, 8))


def outcome(machine: ShardMachine, index: list[int], command: bytes) -> int:
    index[0] += 1
    reply = machine.apply([entry(index[0], command)])[0]
    return pb.RestoreReply.FromString(reply).outcome


def test_what_a_group_refuses_changes_nothing() -> None:
    reply = pb.RestoreReply
    machine, index = member(MemoryEngine(SimDisk(Random(1)).open())), [0]
    assert outcome(machine, index, step(BEGIN, generation=1)) == reply.NOT_SERVED
    machine.apply([entry(2, learn(CREATED))])
    index[0] = 2
    assert outcome(machine, index, chunk(0, NEW)) == reply.OTHER_RUN
    assert outcome(machine, index, step(BEAT)) == reply.OTHER_RUN
    assert outcome(machine, index, step(BEGIN, generation=2)) == reply.DONE
    refused = {
        step(BEGIN, "b", generation=2, over_run="a", over_beat=0): reply.OTHER_RUN,  # no higher generation
        step(BEGIN, "b", generation=3, over_run="a", over_beat=1): reply.OTHER_RUN,  # another beat
        step(BEGIN, "b", generation=3, over_run="c"): reply.OTHER_RUN,
        chunk(0, NEW, "b"): reply.OTHER_RUN,
        chunk(WINDOW, NEW): reply.TOO_FAR,
        chunk(0, [(b"b", b""), (b"a", b"")]): reply.MALFORMED,
        chunk(0, [(b"a", b""), (b"a", b"")]): reply.MALFORMED,
        chunk(0, [(b"", b"")]): reply.MALFORMED,
        chunk(0, []): reply.MALFORMED,
        chunk(0, [], page=b"not a page"): reply.MALFORMED,
        step(SEAL, chunks=1): reply.INCOMPLETE,
        step(END): reply.INCOMPLETE,
    }
    before = {**dict(machine.engine.scan(b"d", b"e")), b"row": repr(machine.ownership.rows[1]).encode()}
    for command, expected in refused.items():
        assert outcome(machine, index, command) == expected, command
    after = {**dict(machine.engine.scan(b"d", b"e")), b"row": repr(machine.ownership.rows[1]).encode()}
    assert after == before
    assert outcome(machine, index, step(BEAT)) == reply.DONE
    assert outcome(machine, index, step(BEGIN, "b", generation=3, over_run="a", over_beat=0)) == reply.OTHER_RUN
    assert outcome(machine, index, chunk(0, NEW)) == reply.DONE
    assert outcome(machine, index, step(SEAL, chunks=1)) == reply.DONE
    assert outcome(machine, index, chunk(1, NEW)) == reply.MALFORMED, "all of them are in"
    assert outcome(machine, index, step(END)) == reply.DONE
    machine.apply([entry(index[0] + 1, write(1, frames.DELETE, NEW[0][0], b""))])
    index[0] += 1
    assert outcome(machine, index, step(END)) == reply.DONE, "it had ended"
    assert outcome(machine, index, step(BEGIN, generation=2)) == reply.OTHER_RUN, "a step that comes late"
    assert outcome(machine, index, step(BEGIN, "b", generation=3)) == reply.HAS_DATA


def test_a_merge_waits_for_both_shards() -> None:
    machine, index = member(MemoryEngine(SimDisk(Random(1)).open())), [2]
    halves = Change(2, split=Split(1, b"m", 2, holder=1))
    machine.apply([entry(1, learn(CREATED)), entry(2, learn(halves))])
    right = pb.RestoreStep(kind=BEGIN, shard=2, run="a", generation=1)
    assert outcome(machine, index, commands.restore(right.SerializeToString())) == pb.RestoreReply.DONE
    machine.apply([entry(4, learn(Change(3, merge=Merge(1, 2, holder=1))))])
    machine.check()
    assert machine.ownership.rows[2].fence is not None and machine.ownership.rows[1].end == b"m"
    index[0] = 4
    for kind in (SEAL, END):
        right = pb.RestoreStep(kind=kind, shard=2, run="a")
        assert outcome(machine, index, commands.restore(right.SerializeToString())) == pb.RestoreReply.DONE
    assert machine.ownership.rows[1].end == b""


def test_keys_of_other_shards_are_not_taken() -> None:
    machine, index = member(MemoryEngine(SimDisk(Random(1)).open())), [2]
    halves = Change(2, split=Split(1, b"m", 2, holder=1))
    machine.apply([entry(1, learn(CREATED)), entry(2, learn(halves))])
    assert outcome(machine, index, step(BEGIN, generation=1)) == pb.RestoreReply.DONE
    assert outcome(machine, index, chunk(0, [(b"a", b""), (b"m", b"")])) == pb.RestoreReply.MALFORMED
    assert outcome(machine, index, chunk(0, [(b"a", b""), (b"l", b"")])) == pb.RestoreReply.DONE


@in_world(groups=(1,), controllers=1)
async def test_a_chunk_that_is_not_what_its_digest_says_is_not_logged(world: World) -> None:
    leader = await world.leader(1)
    page = frames.pack_page(True, b"", NEW)
    for digest in (b"", hashlib.sha256(page + b"x").digest()):
        message = pb.RestoreChunk(shard=1, run="a", number=0, page=page, digest=digest)
        answer = await world._dialer.call(leader.address, "kv.restore_chunk", message.SerializeToString(), 5.0)
        assert parse(answer)[0] is Code.BAD_REQUEST


def test_chunks_are_bounded_by_pairs_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "CHUNK_BYTES", 1000)
    pairs = [(b"%04d" % n, bytes(n % 400)) for n in range(1000)] + [(b"large", bytes(5000))]
    chunks = list(install.chunks_of(pairs))
    assert [pair for found, _ in chunks for pair in found] == pairs
    assert all(len(found) <= 10 for found, _ in chunks)
    assert all(size - len(found[-1][0] + found[-1][1]) < 1000 for found, size in chunks)


def test_a_chunk_holds_data_alone() -> None:
    machine, index = member(MemoryEngine(SimDisk(Random(1)).open())), [1]
    machine.apply([entry(1, learn(CREATED))])
    assert outcome(machine, index, step(BEGIN, generation=1)) == pb.RestoreReply.DONE
    for key in (layout.CLOCK, layout.record_key(1, b"s" * 16), b"a", b"d", b"e", b""):
        page = frames.pack_page(True, b"", [(key, b"x")])
        assert outcome(machine, index, chunk(0, [], page=page)) == pb.RestoreReply.MALFORMED, key
