"""Replicas compared with each other at one entry of their log: in small, in simulation, and as processes."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench.live import LiveCluster, attempt
from shardkv import shardkv_pb2 as pb
from shardkv.observe.compare import Begun, GroupCheck, Said, ask, check_controllers, odd_ones
from shardkv.raft.errors import Busy
from shardkv.raft.protocol.types import Entry
from shardkv.raft.sessions import SessionRecord
from shardkv.server import checking
from shardkv.server.checking import Checks
from shardkv.server.views import Views
from shardkv.shardctrler.shard_map import Config
from shardkv.state import commands, layout
from shardkv.state.digests import LENGTHS, Digest, Digester, Part
from shardkv.storage.engine import Engine, ViewGone
from shardkv.storage.memory import MemoryEngine
from shardkv.storage.rocks import RocksEngine
from shardkv.wire import frames
from shardkv.wire.calls import Code, refuse
from tests.sim.disk import SimDisk
from tests.sim.loop import run
from tests.sim.network import Weather
from tests.sim.workload import Workload
from tests.sim.world import World, in_world
from tests.test_units import CREATED, LOST, entry, learn, member, write

# ---- digests


def plain(pairs: list[tuple[bytes, bytes]]) -> Digest:
    text = b"".join(LENGTHS.pack(len(key), len(value)) + key + value for key, value in pairs)
    return Digest(len(pairs), blake2b(text, digest_size=16).digest())


PARTS = [Part(3, b"", b"g"), Part(1, b"k", b"p"), Part(2, b"p", b"")]
PAIRS = [(b"d" + key, key * 2) for key in (b"a", b"f", b"g", b"h", b"k", b"o", b"p", b"z")]
STATE = [(b"mclock", b"1"), (b"s1", b"x")]


@pytest.mark.quick
@pytest.mark.parametrize("step", [1, 2, 3, 100])
def test_each_part_and_the_rest_have_their_digests_whatever_the_steps(step: int) -> None:
    pairs, digester = PAIRS + STATE, Digester(PARTS)
    for start in range(0, len(pairs), step):
        digester.add(pairs[start : start + step])
    assert digester.parts() == [plain(PAIRS[:2]), plain(PAIRS[4:6]), plain(PAIRS[6:])]
    assert digester.rest() == plain(PAIRS[2:4] + STATE)


@pytest.mark.quick
@pytest.mark.parametrize(
    "other",
    [
        [(b"da", b"b"), (b"db", b"")],  # a byte on the other side of a border
        [(b"dab", b""), (b"db", b"")],
        [(b"da", b"a"), (b"db", b"")],  # another value
        [(b"da", b"")],  # fewer
    ],
)
def test_other_pairs_have_another_digest(other: list[tuple[bytes, bytes]]) -> None:
    one, two = Digester([Part(1, b"", b"")]), Digester([Part(1, b"", b"")])
    one.add([(b"da", b""), (b"db", b"")])
    two.add(other)
    assert one.parts() != two.parts()


@pytest.mark.quick
def test_who_is_odd_is_said_only_where_there_is_a_majority() -> None:
    a, b, c = (Digest(1, name) for name in (b"a", b"b", b"c"))
    assert odd_ones({"x": a, "y": a, "z": b}) == ["z"]
    assert odd_ones({"x": a, "y": a}) == []
    assert odd_ones({"x": a, "y": b}) == []
    assert odd_ones({"x": a, "y": b, "z": c}) == []


@pytest.mark.quick
def test_a_member_that_did_not_answer_does_not_agree() -> None:
    begun = Begun(b"1", 7, 1, (PARTS[0],), ("x", "y", "z"))
    whole = Said({PARTS[0]: Digest(1, b"a"), None: Digest(2, b"b")})
    assert GroupCheck(1, begun, dict.fromkeys("xyz", whole)).agrees
    assert not GroupCheck(1, begun, {"x": whole, "y": whole}).agrees, "one was never asked"
    silent = GroupCheck(1, begun, {"x": whole, "y": whole, "z": Said(why_not="no answer")})
    assert not silent.agrees and silent.not_compared == {"z": "no answer"}


# ---- at one replica


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "memory": lambda directory: MemoryEngine(SimDisk(Random(1)).open()),
    "rocks": lambda directory: RocksEngine(directory / "rocks"),
}

ID = b"i" * 16


def history() -> list[Entry]:
    """A group that gets all keys, is written to, loses a shard, and is checked in the middle of all that."""
    steps = [learn(CREATED)]
    steps += [write(n, frames.PUT, b"k%d" % n, b"%d" % n) for n in range(1, 20)]
    steps += [learn(LOST)]
    steps += [write(n, frames.APPEND, b"k%d" % (n % 7), b"+") for n in range(20, 40)]
    steps += [commands.check(ID)]
    steps += [write(n, frames.PUT, b"k%d" % (n % 7), b"later") for n in range(40, 60)]
    return [entry(n, step) for n, step in enumerate(steps, 1)]


CHECKED_AT = 42


async def complete(checks: Checks, id: bytes = ID) -> pb.CheckReply:
    while (reply := checks.answer(pb.CheckRequest(id=id))).state == pb.COMPUTING:
        await asyncio.sleep(0)
    return reply


def test_digests_do_not_depend_on_the_engine_or_on_which_entries_are_applied_together(tmp_path: Path) -> None:
    entries, rng = history(), Random(5)

    async def story(engine: Engine, most: int) -> tuple[bytes, bytes, list[bytes]]:
        machine = member(engine)
        checks, replies, at = Checks(machine), [], 0
        while at < len(entries):
            count = rng.randint(1, most)
            replies += machine.apply(entries[at : at + count])
            at += count
        reply = await complete(checks)
        assert reply.state == pb.COMPLETE and reply.index == CHECKED_AT
        assert [shard.pairs for shard in reply.shards] == [20] and reply.rest.pairs > 0
        await checks.stop()
        machine.close()
        return reply.shards[0].digest, reply.rest.digest, replies

    found = []
    for n, most in enumerate((1, 3, 1000)):
        for open_engine in ENGINES.values():
            found.append(asyncio.run(story(open_engine(tmp_path / str(n)), most)))
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_moment_is_the_entry_s_whatever_shares_its_batch(tmp_path: Path, engine: str) -> None:
    """What was written just before is in it, and what was written just after is not."""

    async def story() -> None:
        machine = member(ENGINES[engine](tmp_path))
        checks = Checks(machine)
        machine.apply(history())
        moment = checks.lend(ID)
        assert moment.view.applied.index == CHECKED_AT
        held = dict(moment.view.scan(b""))
        before = member(ENGINES["memory"](tmp_path))
        before.apply(history()[:CHECKED_AT])
        assert held == dict(before.engine.scan(b"", b"\xff"))
        assert machine.engine.get(b"dk0") == b"later" != held[b"dk0"]
        moment.release()
        await checks.stop()
        machine.close()

    asyncio.run(story())


def test_a_reply_does_not_tell_whether_a_view_was_opened(tmp_path: Path) -> None:
    class NoViews(MemoryEngine):
        def view(self) -> Any:
            raise OSError("too many open files")

    async def story() -> None:
        machine, other = (member(kind(SimDisk(Random(1)).open())) for kind in (NoViews, MemoryEngine))
        checks = Checks(machine)
        assert machine.apply(history()) == other.apply(history())
        assert list(machine.engine.scan(b"", b"\xff")) == list(other.engine.scan(b"", b"\xff"))
        assert checks.answer(pb.CheckRequest(id=ID)).state == pb.GONE

    asyncio.run(story())


def test_checks_are_few_and_go_when_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "IDLE_SECONDS", 0.05)

    async def story() -> None:
        machine = member(MemoryEngine(SimDisk(Random(1)).open()))
        checks = Checks(machine)
        machine.apply(history()[:CHECKED_AT])
        ids = [bytes([n]) * 16 for n in range(6)]
        for n, id in enumerate(ids):
            machine.apply([entry(CHECKED_AT + 1 + n, commands.check(id))])
        states = [checks.answer(pb.CheckRequest(id=id)).state for id in ids]
        assert states == [pb.GONE] * 2 + [pb.COMPUTING] * 4, "those that nobody had asked for made room"
        with pytest.raises(Busy):
            checks.check_free()
        machine.apply([entry(CHECKED_AT + 7, commands.check(ID))])
        assert checks.answer(pb.CheckRequest(id=ID)).state == pb.GONE, "not at the cost of one that is in use"
        moment = checks.lend(ids[5])
        await asyncio.sleep(0.2)
        assert all(checks.answer(pb.CheckRequest(id=id)).state == pb.GONE for id in ids)
        assert list(moment.view.scan(b"")), "who has borrowed it still has it"
        moment.release()
        with pytest.raises(ViewGone):
            list(moment.view.scan(b""))
        checks.check_free()

    asyncio.run(story())


def test_a_view_of_a_check_is_what_the_check_holds(tmp_path: Path) -> None:
    async def story() -> None:
        machine = member(RocksEngine(tmp_path))
        checks = Checks(machine)
        views = Views(machine, checks)
        machine.apply(history())
        reply = views.answer(pb.ViewRequest(check=ID))
        assert reply.applied_index == CHECKED_AT
        checks.answer(pb.CheckRequest(id=ID, close=True))
        _, _, pairs = frames.unpack_page(views.answer(pb.ViewRequest(id=reply.id)).page)
        assert dict(pairs)[b"dk0"] != b"later"
        with pytest.raises(ViewGone):
            views.answer(pb.ViewRequest(check=ID))
        views.close()
        await checks.stop()
        machine.close()

    asyncio.run(story())


# ---- in simulation


@pytest.mark.parametrize("seed", range(4))
def test_replicas_agree_while_shards_move_leaders_change_and_processes_die(seed: int) -> None:
    @in_world(seed=seed, weather=Weather(loss=0.01, repeat=0.01), compact_bytes=20_000, segment_bytes=5000)
    async def story(world: World) -> None:
        work = Workload(seed, keys=30)
        for _ in range(3):
            work.start(world.clerk())
        complete = 0

        async def check_again() -> None:
            nonlocal complete
            while True:
                for gid in (1, 2):
                    found = await world.check(gid, patience=1.0)
                    assert not list(found.differences()), found
                    complete += found.agrees
                await asyncio.sleep(0.1)

        checking = asyncio.ensure_future(check_again())
        for n in range(12):
            shards = list((await world.config()).shards())
            shard = world.rng.choice(shards)
            await world.move(shard.id, 3 - shard.gid)
            if n == 2:
                await world.split(shards[0].id, shards[0].start + b"5")
            process = world.rng.choice([*world.of(1), *world.of(2)])
            if n % 2:
                await world.restart(process)
            elif process.server is not None and process.rsm.is_leader:
                process.rsm.node.transfer(
                    next(m for m in process.rsm.core.membership.voters if m != process.replica)
                )
            await asyncio.sleep(world.rng.uniform(0.5, 3.0))
            assert not checking.done(), checking.result()
        await work.stop()
        await world.settle()
        checking.cancel()
        await world.check_groups()
        assert complete >= 2, "some of them are complete"

    story()


@in_world(groups=(1,), controllers=1)
async def test_a_flipped_value_is_named_with_its_shard_and_replica(world: World) -> None:
    clerk = world.clerk()
    for n in range(30):
        await clerk.put(b"k%d" % n, b"value")
    damaged = next(process for process in world.of(1) if not process.rsm.is_leader)
    engine = damaged.server.machine.engine  # type: ignore[union-attr]
    engine.write([], {layout.data_key(b"k7"): b"valuf"}, engine.applied)
    await clerk.put(b"again", b"1")
    found = await world.check(1)
    (difference,) = found.differences()
    assert difference.odd == (damaged.address,) and not found.agrees
    assert difference.part is not None and difference.part.shard == (await world.config()).lookup(b"k7").id
    assert {digest.pairs for digest in difference.digests.values()} == {
        31 - outside(await world.config(), b"k7")
    }
    record = SessionRecord(used_ms=damaged.server.machine.clock_ms)  # type: ignore[union-attr]
    engine.write([], {layout.record_key(1, b"s" * 16): record.encode()}, engine.applied)
    assert [found.part is None for found in (await world.check(1)).differences()] == [False, True]


def outside(config: Config, key: bytes) -> int:
    """How many of the keys of the test lie in other shards than `key`."""
    shard = config.lookup(key).id
    return sum(config.lookup(other).id != shard for other in [*(b"k%d" % n for n in range(30)), b"again"])


@in_world(groups=(1,), controllers=1)
async def test_a_replica_that_is_down_or_has_forgotten_is_named_and_never_agrees(world: World) -> None:
    await world.clerk().put(b"k", b"v")
    down = next(process for process in world.of(1) if not process.rsm.is_leader)
    await world.crash(down)
    found = await world.check(1, patience=2.0)
    assert not found.agrees and list(found.not_compared) == [down.address]
    assert not list(found.differences())
    await world.start(down)
    await world.check_groups()


@in_world(groups=(1,), controllers=1)
async def test_a_replica_that_is_behind_is_waited_for(world: World) -> None:
    await world.clerk().put(b"k", b"v")
    late = next(process for process in world.of(1) if not process.rsm.is_leader)
    others = [process.address for process in world.of(1) if process is not late]
    world.network.partition([late.address], others)
    checking = asyncio.ensure_future(world.check(1))
    await asyncio.sleep(5.0)
    assert not checking.done()
    world.network.heal()
    assert (await checking).agrees


def test_a_replica_whose_state_is_being_repaired_is_not_waited_for() -> None:
    """A backup waited for as long as the repair of two of three took, to hear that they had lost that moment."""

    class Repairing:
        asked = 0

        async def call(self, address: str, method: str, payload: bytes, timeout: float) -> bytes:
            self.asked += 1
            return refuse(Code.NOT_LEADER)

        async def close(self) -> None: ...

    dialer = Repairing()
    said = run(ask(dialer, "a:1", Begun(b"x", 5, 1, (), ("a:1",))))
    assert "damaged" in said.why_not and dialer.asked == 1


@in_world(groups=(1,))
async def test_controllers_are_compared_at_one_entry(world: World) -> None:
    async def compared(patience: float = 30.0) -> GroupCheck:
        return await check_controllers(world._dialer, world.controllers, patience)

    await world.join(2)
    found = await compared()
    assert found.agrees and len(found.said) == 3 and found.gid == 0
    assert len({said.whole for said in found.said.values()}) == 1
    odd = next(process for process in world.of(0) if not process.rsm.is_leader)
    machine = odd.rsm.machine
    machine._next_shard += 1  # type: ignore[attr-defined]
    odd.server._digest = (0, b"")  # type: ignore[union-attr]
    found = await compared()
    (difference,) = found.differences()
    assert difference.odd == (odd.address,) and not found.agrees
    await world.crash(odd)
    began = asyncio.get_running_loop().time()
    found = await compared(3.0)
    assert asyncio.get_running_loop().time() - began < 10
    assert odd.address in found.not_compared and not found.agrees and not list(found.differences())
    await world.start(odd)
    await world.converge(60.0)
    assert (await compared()).agrees, "its log has given it the right state again"


# ---- as processes


@pytest.fixture(scope="module")
def cluster() -> Iterator[LiveCluster]:
    with LiveCluster(groups=2, replicas=3, controllers=1, shards=4) as cluster:
        with cluster.clerk() as clerk, clerk.batch() as batch:
            for n in range(2000):
                batch.put(bytes([0x21 + n % 90]) + b"/%d" % n, b"%d" % n * 10)
        yield cluster


def check(cluster: LiveCluster, *arguments: str) -> tuple[int, Any, str]:
    done = attempt(cluster, "admin", "check", *arguments, "-o", "json")
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def test_check_of_a_sound_cluster_ends_with_0(cluster: LiveCluster) -> None:
    status, said, _ = check(cluster)
    assert status == 0 and said["ok"] and [group["gid"] for group in said["groups"]] == [0, 1, 2]
    assert [r["verdict"] for r in said["groups"].pop(0)["replicas"].values()] == [
        "alone: nothing to compare with"
    ]
    for group in said["groups"]:
        assert len(group["replicas"]) == 3 and len({r["digest"] for r in group["replicas"].values()}) == 1
        assert all(replica["verdict"] == "agrees" for replica in group["replicas"].values())
    keys = sum(next(iter(group["replicas"].values()))["keys"] for group in said["groups"])
    assert keys == 2000
    table = attempt(cluster, "admin", "check", "2")
    assert table.returncode == 0 and table.stdout.count("agrees") == 3
    none = attempt(cluster, "admin", "check", "9")
    assert none.returncode == 1 and "there is no group 9" in none.stderr


def test_a_value_that_one_replica_has_wrong_is_found_and_named(cluster: LiveCluster) -> None:
    """Its database is whole by every checksum: somebody, or a bug, has written something else into it."""
    groups = check(cluster, "1", "2")[1]["groups"]
    gid = next(group["gid"] for group in groups if any(r["keys"] for r in group["replicas"].values()))
    leader = cluster.leader(gid)
    running = cluster.cluster()
    victim = next(p for p in running.processes if (p.role, p.gid) == ("group", gid) and p.index != leader.index)
    running.stop([victim])
    silent = check(cluster, str(gid), "--patience", "1")
    assert silent[0] == 1 and "not_compared" in silent[1]["groups"][0]["replicas"][victim.address]
    key = overwrite_one(Path(victim.data))
    cluster.up()
    status, said, error = check(cluster)
    assert status == 1 and f"group {gid}" in error, error
    (difference,) = [found for group in said["groups"] for found in group["differences"]]
    starts = {shard["id"]: start_of(shard) for shard in cluster.json("admin", "query")["shards"]}
    owner = max((shard for shard in starts if starts[shard] <= key), key=lambda shard: starts[shard])
    assert difference["shard"] == owner and difference["odd"] == [victim.address]
    table = attempt(cluster, "admin", "check")
    assert table.returncode == 1 and "DIFFERS from the others" in table.stdout
    assert f"shard {owner}" in table.stdout and victim.address in table.stdout
    assert attempt(cluster, "admin", "check", str(3 - gid)).returncode == 0


def start_of(shard: dict[str, Any]) -> bytes:
    start = shard["start"]
    return start.encode() if isinstance(start, str) else base64.b64decode(start["base64"])


def overwrite_one(data: Path) -> bytes:
    """Another value for one key in a stopped replica's database. Returns the key."""
    engine = RocksEngine(data / "rocks")
    key, value = next(engine.scan(b"d", b"e"))
    assert value != b"another"
    engine.write([], {key: b"another"}, engine.applied)
    engine.close()
    return key[1:]
