"""Is a history linearizable? Lowe's just-in-time search with memoization, one key at a time.

Operations on different keys commute, so each key is judged alone (Horn & Kroening).
An operation without an answer may have taken effect at any time after its call, or
never. See G. Lowe, "Testing for linearizability" (2017), and Wing & Gong (1993).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf

Value = bytes | None


@dataclass(frozen=True, slots=True)
class Operation:
    """One call: what was asked, what was answered, and when. `returned` inf: no answer came."""

    kind: str  # get, put, append, delete, cas, incr; count: is it there; erase: a delete that does not say
    key: bytes
    argument: object
    result: object
    called: float
    returned: float = inf


SHOWN = 40
READS = ("get", "count")
DELETES = ("delete", "erase")


class NotLinearizable(AssertionError):
    """No order of a key's operations explains the answers: those up to the first impossible one are shown."""

    def __init__(self, key: bytes, operations: list[Operation]) -> None:
        super().__init__(key, operations)
        self.key, self.operations = key, operations

    def __str__(self) -> str:
        told = sorted(self.operations, key=lambda op: op.called)
        lines = [
            f"  {op.called:10.4f} – {op.returned:10.4f}  {op.kind} {op.argument!r} → {op.result!r}"
            for op in told[-SHOWN:]
        ]
        left_out = f"  … {len(told) - SHOWN} earlier ones\n" if len(told) > SHOWN else ""
        return f"key {self.key!r}: no order explains the last answer of\n{left_out}" + "\n".join(lines)


NO_NUMBER = "no number"  # the answer to an incr of something else


def counter(value: Value) -> int | None:
    """The number in a value; the tests' counters have no signs."""
    if value is None:
        return 0
    return int(value) if value.isdigit() else None


def step(operation: Operation, value: Value) -> tuple[bool, Value]:
    """Whether the answer fits the state (an unknown answer fits all), and the state after."""
    known = operation.returned != inf
    match operation.kind:
        case "get":
            return (not known or operation.result == value), value
        case "count":
            return (not known or operation.result == (value is not None)), value
        case "erase":
            return True, None
        case "incr":
            number = counter(value)
            if number is None:
                return (not known or operation.result == NO_NUMBER), value
            after = number + operation.argument  # type: ignore[operator]
            return (not known or operation.result == after), b"%d" % after
        case "put":
            return True, operation.argument  # type: ignore[return-value]
        case "append":
            return True, (value or b"") + operation.argument  # type: ignore[operator]
        case "delete":
            return (not known or operation.result == (value is not None)), None
        case "cas":
            assert isinstance(operation.argument, tuple)
            expected, new = operation.argument
            swaps = value == expected
            return (not known or operation.result == swaps), new if swaps else value
        case kind:
            raise AssertionError(f"an operation of kind {kind}")


def check(history: Iterable[Operation]) -> int:
    """Judge a whole history; returns the number of operations. Raises NotLinearizable."""
    by_key: dict[bytes, list[Operation]] = defaultdict(list)
    for operation in history:
        by_key[operation.key].append(operation)
    for key, operations in by_key.items():
        # A read without an answer tells nothing.
        told = [op for op in operations if not (op.kind in READS and op.returned == inf)]
        told.sort(key=lambda op: op.called)
        # A write without an answer that nobody ever saw may be taken not to have happened:
        # that is one of its two explanations, and by far the cheaper to search.
        seen = [op for op in told if op.returned != inf or is_seen(op, told)]
        if not key_is_linearizable(seen) and (len(seen) == len(told) or not key_is_linearizable(told)):
            raise NotLinearizable(key, shortest_wrong_prefix(told))
    return sum(len(operations) for operations in by_key.values())


def shortest_wrong_prefix(operations: list[Operation]) -> list[Operation]:
    """The history as it was known at the first answer that nothing explains."""

    def known_at(now: float) -> list[Operation]:
        return [
            op if op.returned <= now else replace(op, result=None, returned=inf)
            for op in operations
            if op.called <= now and not (op.kind in READS and op.returned > now)
        ]

    answers = sorted(op.returned for op in operations if op.returned != inf)
    low, high = 0, len(answers) - 1
    while low < high:
        middle = (low + high) // 2
        if key_is_linearizable(known_at(answers[middle])):
            low = middle + 1
        else:
            high = middle
    return known_at(answers[low])


def is_seen(write: Operation, operations: list[Operation]) -> bool:
    """Whether what an unanswered write wrote shows in any answer. Written values are unique, and end in a ";"."""
    if write.kind in DELETES or write.kind == "incr":
        return True  # what they leave tells nothing of who did it
    token = write.argument[1] if isinstance(write.argument, tuple) else write.argument
    assert isinstance(token, bytes)
    return any(isinstance(op.result, bytes) and b";" + token in b";" + op.result for op in operations)


def prefix_of(write: Operation, operations: list[Operation]) -> bytes | None:
    """What an append was added to, if any answer shows it: values only grow until they are replaced."""
    if write.kind == "append":
        assert isinstance(write.argument, bytes)
        for operation in operations:
            if isinstance(operation.result, bytes):
                prefix, token, _ = (b";" + operation.result).partition(b";" + write.argument)
                if token:
                    return (prefix + b";")[1:]
    return None


def key_is_linearizable(operations: list[Operation]) -> bool:
    """Depth-first search over (what has taken effect, state); states seen before are not searched again.

    `operations` are in the order of their calls. What has taken effect is kept small, so that
    long histories stay cheap: the answered ones are all that were called before number
    `first`, and a set of bits from there on; the unanswered ones are a set of their own.
    """
    known = [op for op in operations if op.returned != inf]
    open_ended = [op for op in operations if op.returned == inf]
    before = {i: prefix for i, op in enumerate(open_ended) if (prefix := prefix_of(op, known)) is not None}
    # What is known to lead nowhere, or is being tried: (first, later, value) -> sets of unanswered ones.
    seen: dict[tuple[int, int, Value], list[int]] = defaultdict(list)
    stack: list[tuple[int, int, int, Value]] = []

    def consider(first: int, later: int, unanswered: int, value: Value) -> None:
        """Try it unless it was, with no more of the unanswered used up: those may always wait, or never be."""
        tried = seen[first, later, value]
        if not any(used & unanswered == used for used in tried):
            tried.append(unanswered)
            stack.append((first, later, unanswered, value))

    consider(0, 0, 0, None)
    while stack:
        first, later, unanswered, value = stack.pop()
        if first == len(known):
            return True
        # Whatever is next must have been called before the first pending answer came.
        horizon, candidates = inf, []
        for i in range(first, len(known)):
            if known[i].called > horizon:
                break
            if not later >> (i - first) & 1:
                candidates.append(i)
                horizon = min(horizon, known[i].returned)
        # The last one pushed is tried first: what returned first most likely came first,
        # and what never returned most likely never came.
        deleted = False
        for i, operation in enumerate(open_ended):
            if operation.called > horizon:
                break
            if unanswered >> i & 1 or (operation.kind in DELETES and deleted):
                continue  # all unanswered that could delete here are alike: the oldest will do
            deleted = deleted or operation.kind in DELETES
            if i in before and before[i] != (value or b""):
                continue  # not where those who saw it saw it
            _, after = step(operation, value)
            if after != value:
                consider(first, later, unanswered | 1 << i, after)
        for i in sorted(candidates, key=lambda i: -known[i].returned):
            if known[i].called > horizon:
                continue
            fits, after = step(known[i], value)
            if fits:
                done, begin = later | 1 << (i - first), first
                while done & 1:
                    done, begin = done >> 1, begin + 1
                consider(begin, done, unanswered, after)
    return False
