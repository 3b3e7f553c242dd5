"""The judge is judged: histories that are linearizable, some that are not, and a judge that cannot be wrong.

The brute-force judge tries every order of a small history. Generated histories come
from a register that takes each operation at some moment between call and answer, so
they are linearizable by construction; one changed answer makes most of them not so.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import permutations
from math import inf
from random import Random

import pytest

from tests.check.linearizability import NO_NUMBER, NotLinearizable, Operation, check, key_is_linearizable, step

pytestmark = pytest.mark.quick
KEY = b"k"


def op(kind: str, argument: object, result: object, called: float, returned: float = inf) -> Operation:
    return Operation(kind, KEY, argument, result, called, returned)


VALID = {
    "a read between": [op("put", b"1", None, 0, 1), op("get", None, b"1", 2, 3)],
    "a read beside a write may see either": [
        op("put", b"1", None, 0, 10),
        op("get", None, None, 1, 2),
        op("get", None, b"1", 3, 4),
    ],
    "an unanswered write shows late": [
        op("put", b"1", None, 0, 1),
        op("put", b"2", None, 2),
        op("get", None, b"1", 3, 4),
        op("get", None, b"2", 50, 51),
    ],
    "an unanswered write never shows": [op("put", b"1", None, 0), op("get", None, None, 5, 6)],
    "an unanswered delete": [
        op("put", b"1", None, 0, 1),
        op("delete", None, None, 2),
        op("get", None, b"1", 3, 4),
        op("get", None, None, 5, 6),
    ],
    "appends in either order": [
        op("append", b"a", None, 0, 10),
        op("append", b"b", None, 0, 10),
        op("get", None, b"ba", 11, 12),
    ],
    "a swap and one that failed": [
        op("cas", (None, b"1"), True, 0, 1),
        op("cas", (None, b"2"), False, 2, 3),
        op("delete", None, True, 4, 5),
        op("delete", None, False, 6, 7),
    ],
}
VALID |= {
    "counting": [
        op("incr", 5, 5, 0, 9),
        op("incr", 2, 7, 0, 9),
        op("get", None, b"7", 10, 11),
        op("count", None, True, 10, 11),
        op("erase", None, None, 12, 13),
        op("count", None, False, 14, 15),
        op("incr", 1, 1, 16, 17),
    ],
    "an incr without an answer": [
        op("incr", 5, None, 0),
        op("incr", 2, 2, 1, 2),
        op("get", None, b"7", 50, 51),
    ],
    "no counter": [op("put", b"x", None, 0, 1), op("incr", 1, NO_NUMBER, 2, 3), op("get", None, b"x", 4, 5)],
}
INVALID = {
    "a stale read": [
        op("put", b"1", None, 0, 1),
        op("put", b"2", None, 2, 3),
        op("get", None, b"1", 4, 5),
    ],
    "a lost write": [op("put", b"1", None, 0, 1), op("get", None, None, 2, 3)],
    "a read from the future": [op("get", None, b"1", 0, 1), op("put", b"1", None, 2, 3)],
    "an append applied twice": [op("append", b"a", None, 0, 1), op("get", None, b"aa", 2, 3)],
    "reads that go back": [
        op("put", b"1", None, 0, 100),
        op("get", None, b"1", 1, 2),
        op("get", None, None, 3, 4),
    ],
    "appends in an order that time forbids": [
        op("append", b"a", None, 0, 1),
        op("append", b"b", None, 2, 3),
        op("get", None, b"ba", 4, 5),
    ],
    "an incr done twice": [op("incr", 5, 5, 0, 1), op("get", None, b"10", 2, 3)],
    "two incrs of one number": [op("incr", 1, 1, 0, 9), op("incr", 1, 1, 0, 9)],
    "a key that outlives its range": [
        op("put", b"1", None, 0, 1),
        op("erase", None, None, 2, 3),
        op("count", None, True, 4, 5),
    ],
    "two that both swapped": [op("cas", (None, b"1"), True, 0, 9), op("cas", (None, b"2"), True, 0, 9)],
    "a delete of what was not there": [op("delete", None, True, 0, 1)],
    "a value that nobody wrote": [op("put", b"1", None, 0), op("get", None, b"2", 2, 3)],
    "an unanswered write that came and went": [
        op("put", b"1", None, 0, 1),
        op("put", b"2", None, 2),
        op("get", None, b"2", 3, 4),
        op("get", None, b"1", 5, 6),
    ],
}


@pytest.mark.parametrize("name", VALID)
def test_a_linearizable_history_passes(name: str) -> None:
    assert check(VALID[name]) == len(VALID[name])
    assert brute_force(VALID[name])


@pytest.mark.parametrize("name", INVALID)
def test_another_is_refused_and_shown(name: str) -> None:
    with pytest.raises(NotLinearizable) as refused:
        check(INVALID[name])
    assert not brute_force(INVALID[name])
    assert "no order explains" in str(pickle.loads(pickle.dumps(refused.value)))  # it travels between processes


def brute_force(history: list[Operation]) -> bool:
    """Try every order of every choice of unanswered operations."""
    answered = [op for op in history if op.returned != inf]
    unanswered = [op for op in history if op.returned == inf]
    for chosen in range(1 << len(unanswered)):
        some = answered + [op for n, op in enumerate(unanswered) if chosen >> n & 1]
        if any(_explains(order) for order in permutations(some)):
            return True
    return False


def _explains(order: tuple[Operation, ...]) -> bool:
    value: bytes | None = None
    for position, operation in enumerate(order):
        if any(later.returned < operation.called for later in order[position + 1 :]):
            return False
        fits, value = step(operation, value)
        if not fits:
            return False
    return True


def generate(rng: Random, count: int, clients: int, lost: float) -> list[Operation]:
    """A history that a real register made; a part of the answers is lost, and half of those writes with them."""
    starts = [rng.uniform(0, 3) for _ in range(clients)]
    planned = []
    for number in range(count):
        client = rng.randrange(clients)
        called = starts[client] + rng.uniform(0, 1)
        done, returned = called + rng.uniform(0, 2), 0.0
        returned = done + rng.uniform(0, 2)
        starts[client] = returned
        planned.append((done, called, returned, b"%d;" % number, rng.random()))
    value: bytes | None = None
    history = []
    for _done, called, returned, token, luck in sorted(planned):
        kind = rng.choice(["get", "get", "put", "append", "delete", "cas"])
        argument: object = {"put": token, "append": token}.get(kind)
        if kind == "cas":
            argument = (value if rng.random() < 0.7 else b"other", token)
        if luck < lost and kind != "get":
            history.append(Operation(kind, KEY, argument, None, called))
            if luck < lost / 2:
                continue  # it never took place
            _, value = step(history[-1], value)
            continue
        asked = Operation(kind, KEY, argument, None, called)
        _, after = step(asked, value)
        result = {"get": value, "delete": value is not None}.get(kind)
        if kind == "cas":
            result = value == argument[0]  # type: ignore[index]
        history.append(replace(asked, result=result, returned=returned))
        value = after
    return history


@pytest.mark.parametrize("seed", range(5))
def test_what_a_register_did_passes_however_long(seed: int) -> None:
    for count, clients, lost in ((30, 3, 0.2), (200, 6, 0.05), (3000, 4, 0.01)):
        assert check(generate(Random(seed), count, clients, lost)) == count


def test_small_histories_get_the_same_verdict_from_brute_force() -> None:
    rng = Random(1)
    verdicts = {True: 0, False: 0}
    for _ in range(1500):
        history = generate(rng, rng.randrange(2, 6), 3, 0.2)
        if rng.random() < 0.7:  # one answer is wrong, or was another's
            at = rng.randrange(len(history))
            wrong = {"get": rng.choice([None, b"0;", b"1;"])}.get(history[at].kind, rng.random() < 0.5)
            if history[at].returned != inf and history[at].kind in ("get", "delete", "cas"):
                history[at] = replace(history[at], result=wrong)
        told = sorted(
            (op for op in history if op.kind != "get" or op.returned != inf), key=lambda op: op.called
        )
        verdict = brute_force(history)
        verdicts[verdict] += 1
        assert key_is_linearizable(told) == verdict, history
        try:
            check(history)
            assert verdict, history
        except NotLinearizable:
            assert not verdict, history
    assert min(verdicts.values()) > 100, f"both kinds are tried: {verdicts}"


def test_many_unanswered_deletes_do_not_explode() -> None:
    history = [op("delete", None, None, n) for n in range(40)]
    for n in range(300):
        history.append(op("put", b"%d" % n, None, 3 * n, 3 * n + 1))
        history.append(op("get", None, b"%d" % n, 3 * n + 1.5, 3 * n + 2))
    assert check(history) == len(history)
