"""Quotas: what a user or a prefix may ask for, who is told to come back, and that nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.live import LiveCluster, attempt
from shardkv import shardkv_pb2 as pb
from shardkv import shardkv_pb2_grpc as kv_grpc
from shardkv.client import AsyncShardClerk, Busy, DeadlineExceeded, Login, ShardClerk
from shardkv.server.admission import Admission
from shardkv.server.quotas import Enforcer
from shardkv.shardctrler import shardctrler_pb2 as ctl
from shardkv.shardctrler.accounts import Accounts
from shardkv.shardctrler.planner import Refused
from shardkv.wire import frames
from shardkv.wire.audit import NoAudit
from shardkv.wire.calls import busy_text, retry_after
from shardkv.wire.frames import FIRST_BUSY, PUT, Limits, Status
from shardkv.wire.lines import Lines
from shardkv.wire.token_bucket import TokenBucket
from shardkv.wire.turns import Turns

# ---- the bucket, the lines and the turns, pure


@pytest.mark.quick
@settings(max_examples=200, deadline=None)
@given(
    rate=st.floats(0.5, 1e6),
    steps=st.lists(st.tuples(st.floats(0, 10), st.floats(0.001, 1e5)), min_size=1, max_size=60),
)
def test_a_bucket_gives_its_rate_and_no_more(rate: float, steps: list[tuple[float, float]]) -> None:
    bucket, now = TokenBucket(rate, rate, 0.0), 0.0
    taken: list[tuple[float, float]] = []
    for pause, amount in steps:
        now += pause
        wait = bucket.wait(now)
        if wait:
            assert bucket.wait(now + wait * 0.99) > 0, "no sooner than it says"
            assert bucket.wait(now + wait) <= 1e-6, "and no later"
            bucket = _again(rate, taken)
            continue
        bucket.take(amount, now)
        taken.append((now, amount))
    for at, (since, _) in enumerate(taken):
        total = sum(amount for _, amount in taken[at:])
        largest = max(amount for _, amount in taken[at:])
        assert total <= rate * (taken[-1][0] - since) + rate + largest + 1e-3


def _again(rate: float, taken: list[tuple[float, float]]) -> TokenBucket:
    """The bucket without the look into the future."""
    bucket = TokenBucket(rate, rate, 0.0)
    for at, amount in taken:
        bucket.take(amount, at)
    return bucket


@pytest.mark.quick
@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=300))
def test_a_line_always_has_a_place_for_who_holds_none(steps: list[tuple[bool, int]]) -> None:
    lines, held = Lines(20), dict.fromkeys(range(6), 0)
    for enters, owner in steps:
        if enters:
            entered = lines.enter(str(owner))
            assert entered or held[owner] > 0
            held[owner] += entered
        elif held[owner]:
            lines.leave(str(owner))
            held[owner] -= 1
        assert lines.used == sum(held.values()) <= 40
    greedy = Lines(20)
    assert sum(greedy.enter("greedy") for _ in range(100)) == 10, "half of them, for one alone"


@pytest.mark.quick
def test_owners_take_turns_and_who_leaves_holds_up_nobody() -> None:
    async def tell() -> None:
        turns, order = Turns(), list[str]()

        async def work(owner: str) -> None:
            await turns.acquire(owner)
            order.append(owner)
            await asyncio.sleep(0)
            turns.release()

        await turns.acquire("first")
        tasks = [asyncio.create_task(work(owner)) for owner in "aaaabbc"]
        await asyncio.sleep(0)
        tasks[1].cancel()
        turns.release()
        given_and_left = asyncio.create_task(work("d"))
        await asyncio.sleep(0)
        given_and_left.cancel()
        await asyncio.gather(*tasks, given_and_left, return_exceptions=True)
        assert order == ["a", "b", "c", "a", "b", "a"]
        async with asyncio.timeout(1.0):
            await turns.acquire("last")

    asyncio.run(tell())


@pytest.mark.quick
@given(st.floats(0, 1e6))
def test_what_is_told_is_what_is_understood(seconds: float) -> None:
    assert (
        seconds <= retry_after(busy_text("why; come back in 3 ms", seconds)) <= seconds + 0.001 + seconds * 1e-9
    )
    assert retry_after("200 bytes are uncommitted") == 0.0
    kind = frames.busy_kind(seconds)
    assert FIRST_BUSY <= kind < frames.FORBIDDEN
    if 0.001 <= seconds <= 40:
        assert seconds * 0.999 <= frames.busy_seconds(kind) <= seconds * 1.2


# ---- the rules and the enforcer


def change(accounts: Accounts, **fields: Any) -> Accounts:
    return accounts.with_quota(ctl.Quota(**fields))


@pytest.fixture
def accounts() -> Accounts:
    made = Accounts()
    for name, role in (("root", "admin"), ("app", "read-write"), ("other", "read-write")):
        made = made.with_user(ctl.SetUser(name=name, create=True, role=role, verifier=bytes(64)))
    return made


@pytest.mark.quick
def test_quotas_are_set_and_removed_by_rules(accounts: Accounts) -> None:
    one = change(accounts, user="app", operations=10, connections=3)
    two = change(one, prefix=b"a/", bytes=1000)
    assert Accounts.decode(two.encode()) == two and two.version == accounts.version + 2
    assert [each["user"] or each["prefix"] for each in two.quotas.listed()] == ["app", "a/"]
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("UnknownUser", {"user": "nobody", "operations": 1}),
        ("BadQuota", {"user": "root", "operations": 1}),
        ("BadQuota", {"user": "", "operations": 1}),
        ("BadQuota", {"prefix": b"", "operations": 1}),
        ("BadQuota", {"operations": 1}),
        ("BadQuota", {"user": "app"}),
        ("BadQuota", {"user": "app", "operations": 1 << 41}),
        ("BadQuota", {"user": "app", "connections": 1 << 41}),
        ("BadQuota", {"prefix": b"a/", "connections": 1}),
        ("BadQuota", {"prefix": b"a" * 2000, "operations": 1}),
    ]
    for kind, fields in wrong:
        with pytest.raises(Refused) as refused:
            change(two, **fields)
        assert refused.value.kind == kind, fields
    with pytest.raises(Refused) as refused:
        two.without_quota(ctl.Quota(user="other"))
    assert refused.value.kind == "UnknownQuota"
    assert two.without_quota(ctl.Quota(user="app")).quotas.listed() == two.without_user("app").quotas.listed()
    assert not two.without_quota(ctl.Quota(prefix=b"a/")).quotas.prefixes
    full = two
    for number in range(63):
        full = change(full, prefix=b"%d/" % number, operations=1)
    with pytest.raises(Refused, match="64 prefixes"):
        change(full, prefix=b"more", operations=1)


def frame(*keys: bytes, value: bytes = b"v") -> bytes:
    count = len(keys)
    section = frames.pack_section(
        1, b"s" * 16, 0, bytes([PUT]) * count, list(range(1, count + 1)), keys, [value] * count
    )
    return frames.pack_frame(frames.WRITE, 1, 1, [section])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.quick
def test_a_user_s_frame_is_refused_whole_until_the_debt_is_paid(accounts: Accounts) -> None:
    clock = Clock()
    current = change(accounts, user="app", operations=10)
    enforcer = Enforcer(lambda: current, NoAudit(), clock)
    assert enforcer.frame("app", "?", "kv.write", frame(*[b"k"] * 40)) == "", "more than it has, once"
    assert retry_after(enforcer.frame("app", "?", "kv.write", frame(b"k"))) == 3.0
    assert enforcer.frame("other", "?", "kv.write", frame(b"k")) == ""
    assert enforcer.refused == {"user": 1}
    current = current.with_user(ctl.SetUser(name="other", role="read-only"))
    clock.now = 2.9
    assert enforcer.frame("app", "?", "kv.write", frame(b"k")), "a change of something else forgives nothing"
    clock.now = 3.0
    assert enforcer.frame("app", "?", "kv.write", frame(b"k")) == ""
    current = current.with_user(ctl.SetUser(name="app", role="admin"))
    assert enforcer.frame("app", "?", "kv.write", frame(b"k")) == "", "an admin has none"


@pytest.mark.quick
def test_answers_count_as_a_user_s_bytes(accounts: Accounts) -> None:
    clock = Clock()
    current = change(accounts, user="app", bytes=1000)
    enforcer = Enforcer(lambda: current, NoAudit(), clock)
    assert enforcer.frame("app", "?", "kv.read", frame(b"k")) == ""
    enforcer.answered("app", 5000)
    assert 4.0 < retry_after(enforcer.frame("app", "?", "kv.read", frame(b"k"))) < 4.2
    assert enforcer.unary("app", "?", "kv.read", b"k", 10) > 4.0
    assert enforcer.unary("other", "?", "kv.read", b"k", 10) == 0.0


@pytest.mark.quick
def test_of_a_frame_only_the_operations_of_a_prefix_are_refused(accounts: Accounts) -> None:
    clock = Clock()
    current = change(change(accounts, prefix=b"a/", operations=2), prefix=b"a/b/", operations=1)
    enforcer = Enforcer(lambda: current, NoAudit(), clock)
    mixed = frame(b"a/1", b"x", b"a/b/1", b"a/2", b"a/b/2")
    assert enforcer.marked("", "?", "kv.write", mixed) == mixed, "nothing was used up when it came"
    clock.now = 0.5  # a/: 2 - 4 + 1 of 2; a/b/: 1 - 2 + 0.5 of 1
    marked = enforcer.marked("", "?", "kv.write", mixed)
    header = frames.check_frame(marked, frames.WRITE, Limits())
    assert not header.plain
    admission = Admission(marked, header, Limits(), True)
    assert admission.frame is not None
    (taken,) = frames.unpack_sections(admission.frame)
    assert taken.keys == [b"x"]
    _, (reply,) = frames.unpack_reply(
        admission.reply(
            1, frames.pack_reply(1, [frames.pack_results(bytes([Status.OK]), [b""])]), lambda shard: None
        )
    )
    assert [status >= FIRST_BUSY for status in reply.statuses] == [True, False, True, True, True]
    waits = [frames.busy_seconds(status) for status in reply.statuses if status >= FIRST_BUSY]
    assert all(0.5 <= wait <= 0.6 for wait in waits), waits
    clock.now = 1.0
    assert enforcer.marked("", "?", "kv.write", mixed) == mixed, "what was refused is not counted"
    assert enforcer.refused == {"prefix": 4}


@pytest.mark.quick
@given(st.binary(max_size=200))
def test_bytes_that_are_no_frame_count_as_one(data: bytes) -> None:
    assert frames.count_operations(b"nonsense" + data) >= 1


# ---- real processes

PATIENT, SHORT = 20.0, 0.3


@pytest.fixture(scope="module")
def live() -> Iterator[LiveCluster]:
    with LiveCluster(groups=1, replicas=1, controllers=1, shards=2) as cluster:
        for name, role in (("root", "admin"), ("greedy", "read-write"), ("polite", "read-write")):
            done = attempt(cluster, "admin", "user", "add", name, "--role", role)
            assert done.returncode == 0, done.stderr
            TOKENS[name] = done.stdout.strip()
        assert attempt(cluster, "admin", "access", "enable").returncode == 0
        yield cluster


TOKENS: dict[str, str] = {}


def clerk_of(live: LiveCluster, name: str, timeout: float = PATIENT) -> ShardClerk:
    return ShardClerk(live.controllers, login=Login(name, TOKENS[name]), timeout=timeout)


def quota(live: LiveCluster, *arguments: str) -> None:
    done = attempt(live, "admin", "quota", *arguments)
    assert done.returncode == 0, done.stderr


def until_refused(clerk: ShardClerk, key: str) -> Busy:
    """Write until the quota has come here and is used up."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            clerk.put(key, b"v")
        except Busy as busy:
            return busy
        except DeadlineExceeded:
            pass  # this machine was slow
    raise AssertionError("nothing was refused")


def test_who_cannot_wait_is_told_when_to_come_back_and_others_wait(live: LiveCluster) -> None:
    quota(live, "set", "--for-user", "greedy", "--operations", "20")
    with (
        clerk_of(live, "greedy", 0.02) as hasty,
        clerk_of(live, "greedy") as patient,
        clerk_of(live, "polite") as polite,
    ):
        busy = until_refused(hasty, "k")
        assert 0.0 < busy.retry_after < 2.0 and "greedy" in str(busy)
        began = time.monotonic()
        for number in range(30):
            patient.append("appended", b"%d;" % number)
        took = time.monotonic() - began
        assert 1.0 < took < 10.0, "20 a second"
        assert patient.get("appended") == b"".join(b"%d;" % number for number in range(30))
        for _ in range(100):
            polite.put("p", b"v")
    told = json.loads(attempt(live, "admin", "quota", "list", "-o", "json").stdout)
    assert told["quotas"] == [
        {"user": "greedy", "prefix": None, "operations": 20, "bytes": 0, "connections": 0}
    ]
    assert "user greedy" in attempt(live, "admin", "quota", "list").stdout
    for wrong, kind in (
        (("--for-user", "nobody", "--bytes", "1"), "UnknownUser"),
        (("--for-user", "root", "--bytes", "1"), "BadQuota"),
    ):
        done = attempt(live, "admin", "quota", "set", *wrong)
        assert done.returncode == 1 and kind in done.stderr
    quota(live, "remove", "--for-user", "greedy")


def test_grpc_is_told_the_same(live: LiveCluster) -> None:
    quota(live, "set", "--for-user", "greedy", "--operations", "5")
    group = next(p.address for p in live.cluster().processes if p.role == "group")
    metadata = [("authorization", f"Bearer greedy:{TOKENS['greedy']}")]
    with grpc.insecure_channel(group, options=[("grpc.enable_retries", 0)]) as channel:
        stub, deadline = kv_grpc.KVStub(channel), time.monotonic() + 20
        for ask, request in (
            (stub.Count, pb.CountRequest(start=b"g", end=b"h")),
            (stub.DeleteRange, pb.DeleteRangeRequest(start=b"g", end=b"h")),
            (stub.Scan, pb.ScanRequest(start=b"g", end=b"h")),
            (stub.Incr, pb.IncrRequest(key=b"n", by=1)),
        ):
            ask(request, metadata=metadata, timeout=10)

        def flood() -> None:
            while time.monotonic() < deadline:
                stub.Put(pb.PutRequest(key=b"g", value=b"v"), metadata=metadata, timeout=10)

        with pytest.raises(grpc.RpcError) as refused:
            flood()
        error: Any = refused.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 0 < retry_after(error.details()) < 2.0
        assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    quota(live, "remove", "--for-user", "greedy")


def test_a_prefix_s_quota_stops_nobody_elsewhere_and_keeps_the_order(live: LiveCluster) -> None:
    quota(live, "set", "--prefix", "hot/", "--operations", "30")

    async def heat(clerk: AsyncShardClerk) -> None:
        while True:
            with contextlib.suppress(DeadlineExceeded):  # this machine was slow
                await clerk.put("hot/x", b"v", timeout=0.02)

    async def tell() -> None:
        clerk = AsyncShardClerk(live.controllers, login=Login("polite", TOKENS["polite"]), timeout=PATIENT)
        async with clerk:
            async with asyncio.timeout(20):
                with pytest.raises(Busy) as busy:
                    await asyncio.gather(*(heat(clerk) for _ in range(2)))
                assert busy.value.retry_after > 0
            hot = [asyncio.ensure_future(clerk.append("hot/order", b"%d;" % number)) for number in range(60)]
            await asyncio.gather(*(clerk.put(f"cold/{number}", b"v") for number in range(60)))
            assert not hot[-1].done()
            await asyncio.gather(*hot)
            assert await clerk.get("hot/order") == b"".join(b"%d;" % number for number in range(60))

    asyncio.run(tell())
    quota(live, "remove", "--prefix", "hot/")


def test_a_connection_too_many_is_told_so_and_ends(live: LiveCluster) -> None:
    quota(live, "set", "--for-user", "greedy", "--connections", "2")
    with clerk_of(live, "greedy") as one, clerk_of(live, "greedy") as two:
        one.put("c", b"1")
        two.put("c", b"2")
        with clerk_of(live, "greedy", 2.0) as three, clerk_of(live, "polite") as other:
            other.put("c", b"3")
            with pytest.raises(Busy, match="as many connections as it may") as busy:
                three.put("c", b"4")  # its map comes from a controller, which counts too
            assert busy.value.retry_after == 1.0
        one.put("c", b"5")
    with clerk_of(live, "greedy") as later:
        later.put("c", b"6")
    quota(live, "remove", "--for-user", "greedy")


def test_a_greedy_user_leaves_the_others_latency_alone(live: LiveCluster) -> None:
    """A pipeline of 500 appends, again and again, of a user with 100 operations a second; one polite closed loop."""

    async def polite_p99(seconds: float) -> float:
        times = list[float]()
        async with AsyncShardClerk(
            live.controllers, login=Login("polite", TOKENS["polite"]), timeout=PATIENT
        ) as clerk:
            await clerk.put("lone", b"v")
            end = time.perf_counter() + seconds
            while (began := time.perf_counter()) < end:
                await clerk.put("lone", b"v")
                times.append(time.perf_counter() - began)
        return sorted(times)[len(times) * 99 // 100]

    async def greedy(ends: asyncio.Event) -> int:
        done = 0
        async with AsyncShardClerk(
            live.controllers, login=Login("greedy", TOKENS["greedy"]), timeout=PATIENT
        ) as clerk:

            async def caller(number: int) -> None:
                nonlocal done
                while not ends.is_set():
                    try:
                        await clerk.put(f"greedy/{number}", b"v" * 1000, timeout=SHORT)
                        done += 1
                    except (Busy, DeadlineExceeded):
                        pass

            await asyncio.gather(*(caller(number) for number in range(50)))
        return done

    async def tell() -> tuple[float, float, int]:
        alone = await polite_p99(2.0)
        ends = asyncio.Event()
        at_work = asyncio.create_task(greedy(ends))
        beside = await polite_p99(3.0)
        ends.set()
        return alone, beside, await at_work

    quota(live, "set", "--for-user", "greedy", "--operations", "100")
    alone, beside, done = asyncio.run(tell())
    print(f"p99 alone {alone * 1000:.1f} ms, beside {beside * 1000:.1f} ms, greedy did {done}")
    assert done < 1500
    assert beside < max(4 * alone, 0.05)
    quota(live, "remove", "--for-user", "greedy")
