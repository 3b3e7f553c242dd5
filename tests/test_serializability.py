"""The judge of strict serializability is judged itself, by brute force; then it judges today's calls."""

from __future__ import annotations

import asyncio
import contextlib
from itertools import permutations
from random import Random

import pytest

from shardkv.client import AsyncShardClerk
from shardkv.client.errors import DeadlineExceeded, OutcomeUnknown, Unavailable
from shardkv.shardctrler.client import AdminRefused
from tests.check.serializability import Appended, Call, NotSerializable, Outcome, judge, judge_appends
from tests.sim.loop import world_time
from tests.sim.world import World, in_world

KEYS = (b"a", b"b", b"c")
HISTORIES = 1500


def some_order_explains(calls: list[Call]) -> bool:
    """By trying all of them."""
    return any(explains(order) for order in permutations(calls))


def explains(order: tuple[Call, ...]) -> bool:
    versions = dict.fromkeys(KEYS, 0)
    for place, call in enumerate(order):
        if any(later.returned < call.called for later in order[place + 1 :]):
            return False
        if any(versions[key] != version for key, version in call.reads.items()):
            return False
        for key, version in call.writes.items():
            if version != versions[key] + 1:
                return False
            versions[key] = version
    return True


def random_history(rng: Random) -> list[Call]:
    """Calls that took effect one after the other; then, mostly, something about them is made wrong."""
    versions, calls = dict.fromkeys(KEYS, 0), []
    most = rng.choice([0.5, 2.0, 5.0])
    for number in range(rng.randrange(2, 7)):
        reads = {key: versions[key] for key in KEYS if rng.random() < 0.5}
        writes = {key: versions[key] + 1 for key in KEYS if rng.random() < 0.4}
        versions |= writes
        called, returned = number - rng.uniform(0, most), number + rng.uniform(0, most)
        calls.append(
            Call(f"T{number}", called, returned if rng.random() < 0.9 else float("inf"), reads, writes)
        )
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(calls))
        call = calls[at]
        reads, called, returned = dict(call.reads), call.called, call.returned
        if reads and rng.random() < 0.7:
            key = rng.choice(list(reads))
            reads[key] = rng.randrange(versions[key] + 1)
        else:
            called, returned = called + 2, returned + 2
        calls[at] = Call(call.name, called, returned, reads, call.writes)
    rng.shuffle(calls)
    return calls


def test_the_judge_agrees_with_brute_force() -> None:
    rng, good = Random(1), 0
    for _ in range(HISTORIES):
        calls = random_history(rng)
        expected = some_order_explains(calls)
        try:
            judge(calls)
            found = True
        except NotSerializable:
            found = False
        assert found == expected, calls
        good += expected
    assert HISTORIES / 5 < good < HISTORIES * 4 / 5, "both verdicts are tried"


def done(name: str, when: int, reads: dict[bytes, bytes], appends: dict[bytes, bytes]) -> Appended:
    return Appended(name, when, when + 0.5, Outcome.DONE, reads, appends)


ANOMALIES = {
    "write skew": (
        [
            Appended("T1", 0, 9, Outcome.DONE, {b"a": b"", b"b": b""}, {b"a": b"1;"}),
            Appended("T2", 0, 9, Outcome.DONE, {b"a": b"", b"b": b""}, {b"b": b"2;"}),
        ],
        {b"a": b"1;", b"b": b"2;"},
        "a cycle",
    ),
    "a lost update": ([done("T1", 0, {b"a": b""}, {b"a": b"1;"})], {b"a": None}, "is not there"),
    "a doubled write": ([done("T1", 0, {}, {b"a": b"1;"})], {b"a": b"1;1;"}, "twice"),
    "a torn write": (
        [Appended("T1", 0, 9, Outcome.UNKNOWN, {}, {b"a": b"1;", b"b": b"1;"})],
        {b"a": b"1;"},
        "is torn",
    ),
    "told not to be done": (
        [Appended("T1", 0, 9, Outcome.NOT_DONE, {}, {b"a": b"1;"})],
        {b"a": b"1;"},
        "told not",
    ),
    "a stale read": (
        [done("T1", 0, {}, {b"a": b"1;"}), done("T2", 1, {b"a": b""}, {})],
        {b"a": b"1;"},
        "by time",
    ),
    "a fractured read": (
        [
            Appended("T1", 0, 9, Outcome.DONE, {}, {b"a": b"1;", b"b": b"1;"}),
            Appended("T2", 0, 9, Outcome.DONE, {b"a": b"1;", b"b": b""}, {}),
        ],
        {b"a": b"1;", b"b": b"1;"},
        "a cycle",
    ),
    "a read of what was undone": ([done("T1", 0, {b"a": b"1;"}, {})], {b"a": b""}, "which ended as"),
}


@pytest.mark.parametrize("name", ANOMALIES)
def test_an_anomaly_is_named(name: str) -> None:
    history, final, why = ANOMALIES[name]
    with pytest.raises(NotSerializable, match=why):
        judge_appends(history, final)  # type: ignore[arg-type]


def test_what_may_be_so_is_let_through() -> None:
    history = [
        Appended("T1", 0, 9, Outcome.DONE, {b"a": b""}, {b"a": b"1;"}),
        Appended("T2", 0, 9, Outcome.DONE, {b"a": b"1;", b"b": None}, {b"b": b"2;"}),
        Appended("T3", 0, outcome=Outcome.UNKNOWN, appends={b"a": b"3;", b"b": b"3;"}),
        Appended("T4", 0, outcome=Outcome.UNKNOWN, appends={b"a": b"4;"}),
        Appended("T5", 0, 9, Outcome.NOT_DONE, {b"a": b"never"}, {b"a": b"5;"}),
    ]
    assert judge_appends(history, {b"a": b"1;3;", b"b": b"2;3;"}) == 3


@in_world((1, 2), seed=5, shards=4)
async def test_todays_calls_are_strictly_serializable(world: World) -> None:
    """Single calls, and pages of a scan as reads of many keys at once, while shards move and replicas restart."""
    rng, history, stop = Random(5), list[Appended](), False
    keys = [b"%c/%d" % (letter, number) for letter in b"!7Me" for number in range(3)]

    async def call(clerk: AsyncShardClerk, number: int) -> None:
        turn = 0
        while not stop:
            turn += 1
            key, name, called = rng.choice(keys), f"{number}.{turn}", world_time()
            token, reads, appends = f"{name};".encode(), dict[bytes, bytes | None](), dict[bytes, bytes]()
            outcome = Outcome.DONE
            try:
                if rng.random() < 0.5:
                    appends[key] = token
                    await clerk.append(key, token)
                elif rng.random() < 0.5:
                    reads[key] = await clerk.get(key, consistency=rng.choice(["leader", "any"]))
                else:  # the keys of one letter lie in one shard, and so in one page
                    found = dict([pair async for pair in clerk.scan(key[:2], key[:1] + b"0")])
                    reads = {each: found.get(each) for each in keys if each[:2] == key[:2]}
            except OutcomeUnknown:
                outcome = Outcome.UNKNOWN
            except (DeadlineExceeded, Unavailable):
                outcome = Outcome.NOT_DONE
            known = outcome is not Outcome.UNKNOWN
            history.append(
                Appended(name, called, world_time() if known else float("inf"), outcome, reads, appends)
            )
            await asyncio.sleep(rng.uniform(0, 0.02))

    callers = [asyncio.create_task(call(world.clerk(2.0), number)) for number in range(4)]
    shards = sorted((await world.config()).by_id)
    for turn in range(8):
        await asyncio.sleep(rng.uniform(0.1, 0.5))
        with contextlib.suppress(AdminRefused):  # it is there already
            await world.move(rng.choice(shards), 1 + turn % 2)
        if turn % 3 == 0:
            await world.restart(await world.leader(1 + turn % 2))
    stop = True
    await asyncio.gather(*callers)
    final = await world.clerk().multi_get(keys)
    assert judge_appends(history, final) > 300
