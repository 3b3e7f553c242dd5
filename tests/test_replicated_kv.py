"""One group as a replicated store: MIT 6.824 lab 3 (scenarios K-1 to K-5), and exactly-once in the small."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from shardkv.client.errors import DeadlineExceeded, KeyTooLarge, OutcomeUnknown, ValueTooLarge
from shardkv.state import layout
from shardkv.wire import frames
from shardkv.wire.calls import Unreachable
from tests.sim.network import SimDialer, Weather
from tests.sim.workload import Workload
from tests.sim.world import World, in_world


def _story_of_clients(clients: int, replicas: int, seed: int) -> Callable[[], None]:
    """Everything on together: loss, partitions that change, crashes, snapshots."""

    @in_world(
        groups=(1,),
        seed=seed,
        controllers=1,
        replicas=replicas,
        weather=Weather(loss=0.03, repeat=0.03, long_delay=0.05),
        compact_bytes=5000,
        segment_bytes=2000,
    )
    async def story(world: World) -> None:
        work = Workload(seed)
        for _ in range(clients):
            work.start(world.clerk())
        for _ in range(12):
            await asyncio.sleep(world.rng.uniform(0.1, 0.8))
            if world.rng.random() < 0.5:
                await world.restart(world.rng.choice(world.of(1)))
            else:
                names = [process.address for process in world.of(1)]
                world.rng.shuffle(names)
                cut = world.rng.randrange(1, len(names))
                world.network.partition(names[:cut], names[cut:])
                await asyncio.sleep(world.rng.uniform(0, 1.5))
                world.network.heal()
        world.network.heal()
        world.network.weather = Weather()
        await world.start_all()
        await work.stop()
        assert work.judge() > 20 * clients

    return story


@pytest.mark.parametrize(("clients", "replicas"), [(1, 5), (5, 5), (15, 5), (5, 7)])
def test_k_1_histories_are_linearizable(clients: int, replicas: int) -> None:
    _story_of_clients(clients, replicas, seed=clients * 10 + replicas)()


@in_world(groups=(1,), replicas=5, controllers=1)
async def test_k_2_a_leader_with_a_minority_completes_nothing_until_healed(world: World) -> None:
    clerk = world.clerk()
    await clerk.put("k", "before")
    leader = await world.leader(1)
    friend = next(process for process in world.of(1) if process is not leader)
    rest = [p.address for p in world.of(1) if p not in (leader, friend)]
    # The clerk reaches the minority only.
    world.network.partition([leader.address, friend.address], rest)
    world.network.partition(["clerk-0:1"], rest)
    put = asyncio.ensure_future(clerk.append("k", "+"))
    get = asyncio.ensure_future(clerk.get("k"))
    await asyncio.sleep(5)
    assert not put.done() and not get.done()
    other = world.clerk()
    assert await other.get("k") == b"before", "the majority serves on"
    world.network.heal()
    await put
    assert await get in (b"before", b"before+")
    assert await clerk.get("k") == b"before+"


@in_world(groups=(1,), controllers=1)
async def test_k_3_a_lone_client_is_not_paced_by_heartbeats(world: World) -> None:
    clerk = world.clerk()
    await clerk.put("k", "0")
    loop = asyncio.get_running_loop()
    began = loop.time()
    for n in range(100):
        await clerk.put("k", f"{n}")
    heartbeat = world.settings.core.heartbeat_ticks * 0.05
    assert (loop.time() - began) / 100 < heartbeat / 3


@in_world(groups=(1,), controllers=1, compact_bytes=10_000, segment_bytes=4000)
async def test_k_4_the_disk_follows_the_live_state_not_the_history(world: World) -> None:
    clerk = world.clerk()
    for n in range(1500):
        await clerk.put("k", f"{n}" * 10)
    await asyncio.sleep(1.0)
    for process in world.of(1):
        logs = sum(len(data) for name, data in process.disk.files.items() if name.startswith("wal-"))
        assert logs <= 8 * 10_000
        assert len(process.disk.files["state"]) < 2000, "one key and its client's record"


@in_world(groups=(1,), controllers=1, compact_bytes=500)
async def test_k_5_a_retry_returns_the_first_result_whatever_happened_between(world: World) -> None:
    """The reply is lost; then a leader change, a snapshot, a restart of all; then the retry."""
    clerk = world.clerk()
    await clerk.put("k", "old")
    shard = (await world.config()).lookup(b"k").id
    session, dialer = b"s" * 16, SimDialer(world.network, "raw:1")

    async def send(kind: int, seq: int, key: bytes, value: bytes) -> int:
        """One write frame under our own session and number, to whoever leads; its status."""
        section = frames.pack_section(shard, session, 0, bytes([kind]), [seq], [key], [value])
        now = (await world.leader(1)).group.now_ms()
        frame = frames.pack_frame(frames.WRITE, 0, now, [section])
        for _ in range(200):
            leader = await world.leader(1)
            try:
                answer = await dialer.call(leader.address, "kv.write", frame, 1.0)
            except Unreachable:
                continue
            if answer[0] == 0:
                return frames.unpack_reply(answer[1:])[1][0].statuses[0]
            await asyncio.sleep(0.1)
        raise AssertionError("no leader answered")

    swap = frames.pack_cas(b"old", b"new")
    for retry in range(3):
        assert await send(frames.CAS_OP, 1, b"k", swap) == frames.Status.OK, f"attempt {retry}"
        assert await send(frames.APPEND, 2, b"k", b"+") == frames.Status.OK
        if retry == 0:
            await world.restart(await world.leader(1))
        if retry == 1:
            for n in range(60):
                await clerk.put("other", f"{n}" * 20)
            assert max(process.rsm.core.log.base_index for process in world.of(1)) > 0
            for process in world.of(1):
                await world.crash(process)
            await world.start_all()
    assert await clerk.get("k") == b"new+"
    assert await send(frames.CAS_OP, 3, b"k", swap) == frames.Status.CAS_FAILED
    await clerk.put("k", "old")
    assert await send(frames.CAS_OP, 3, b"k", swap) == frames.Status.CAS_FAILED, "the first result"


@in_world(groups=(1,), controllers=1, session_ttl_ms=4000)
async def test_a_write_too_old_to_be_retried_is_refused_not_repeated(world: World) -> None:
    """Records go when they have not been used for their time to live; a retry from before then is refused."""
    leader = await world.leader(1)
    shard = (await world.config()).lookup(b"k").id
    section = frames.pack_section(shard, b"s" * 16, 0, bytes([frames.APPEND]), [1], [b"k"], [b"x"])
    frame = frames.pack_frame(frames.WRITE, 0, leader.group.now_ms(), [section])

    async def status() -> int:
        return frames.unpack_reply((await leader.group.handle("kv.write", frame))[1:])[1][0].statuses[0]

    assert [await status(), await status()] == [frames.Status.OK, frames.Status.OK]
    clerk = world.clerk()
    for _ in range(16):
        await asyncio.sleep(0.5)
        await clerk.put("other", "y")
    assert leader.group.machine.engine.get(layout.record_key(shard, b"s" * 16)) is None
    assert await status() == frames.Status.SESSION_EXPIRED
    assert await clerk.get("k") == b"x"


@in_world(groups=(1,), controllers=1, session_ttl_ms=4000)
async def test_a_clerk_that_was_silent_for_longer_than_its_session_lives_goes_on(world: World) -> None:
    """Its idea of the time is old, so its write is refused once, as too old; it learns the time and issues it again."""
    clerk, other = world.clerk(), world.clerk()
    await clerk.append("k", "1")
    for _ in range(120):
        await asyncio.sleep(1.0)
        await other.put("other", "y")
    await clerk.append("k", "2")
    assert await clerk.get("k") == b"12"


@in_world(groups=(1,), controllers=1)
async def test_operations_mean_what_they_say(world: World) -> None:
    clerk = world.clerk()
    assert await clerk.get("absent") is None
    assert await clerk.delete("absent") is False
    await clerk.append("log", "a")
    await clerk.append("log", b"\x00\xff")
    assert await clerk.get(b"log") == b"a\x00\xff"
    assert await clerk.cas("lock", None, "me") is True
    assert await clerk.cas("lock", None, "you") is False
    assert await clerk.cas("lock", "me", "you") is True
    assert await clerk.delete("lock") is True
    await clerk.put("empty", b"")
    assert await clerk.get("empty") == b""
    async with clerk.batch() as batch:
        for n in range(50):
            batch.put(f"n{n:02}", f"{n}")
    found = await clerk.multi_get([f"n{n:02}" for n in range(50)] + ["absent"])
    assert found["n07"] == b"7" and found["absent"] is None
    pairs = [pair async for pair in clerk.scan("n10", "n20", limit=5)]
    assert pairs == [(b"n%d" % n, b"%d" % n) for n in range(10, 15)]
    for key in (b"", b"k" * 4097):
        with pytest.raises(KeyTooLarge):
            await clerk.put(key, "v")
    with pytest.raises(ValueTooLarge):
        await clerk.put("k", b"v" * (1 << 20) + b"v")
    await clerk.put("big", b"v" * (1 << 20))
    with pytest.raises(ValueTooLarge):
        await clerk.append("big", "v")
    assert await clerk.get("big") == b"v" * (1 << 20)


@in_world(groups=(1,), controllers=1)
async def test_reads_from_any_replica_are_linearizable_and_spread(world: World) -> None:
    clerk = world.clerk()
    for n in range(30):
        await clerk.put("k", f"{n}")
        assert await clerk.get("k", consistency="any") == b"%d" % n
    assert await clerk.get("k", consistency="stale") is not None


@in_world(groups=(1,), controllers=1)
async def test_deadlines_are_kept_and_say_whether_it_may_be_done(world: World) -> None:
    clerk = world.clerk(timeout=1.0)
    await clerk.put("k", "v")
    for process in world.of(1):
        await world.crash(process)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(DeadlineExceeded):
        await clerk.get("k")
    with pytest.raises(OutcomeUnknown):
        await clerk.put("k", "w", timeout=0.5)
    assert loop.time() - began < 1.7
    await world.start_all()


@in_world(groups=(1,), controllers=1)
async def test_malformed_frames_are_refused_and_harm_nobody(world: World) -> None:
    leader = await world.leader(1)
    shard = (await world.config()).lookup(b"k").id
    good_section = frames.pack_section(shard, b"s" * 16, 0, bytes([frames.PUT]), [1], [b"k"], [b"v"])
    good = frames.pack_frame(frames.WRITE, 0, leader.group.now_ms(), [good_section])
    bad = [b"", b"SKF", b"x" * 100, good + b"!", b"SKF\x09" + good[4:], b"SKF\x01\x07" + good[5:]]
    bad += [good[:end] for end in range(len(good))]
    for frame in bad:
        answer = await leader.group.handle("kv.write", frame)
        assert answer[0] == 4, frame
    assert (await leader.group.handle("kv.write", good))[0] == 0
    section = frames.pack_section(
        shard, b"s" * 16, 0, bytes([frames.CAS_OP, 99]), [2, 3], [b"k", b"k"], [b"", b""]
    )
    answer = await leader.group.handle(
        "kv.write", frames.pack_frame(frames.WRITE, 0, leader.group.now_ms(), [section])
    )
    reply = frames.unpack_reply(answer[1:])[1][0]
    assert list(reply.statuses) == [frames.Status.BAD_OPERATION] * 2
    assert await world.clerk().get("k") == b"v"
