"""Is a history strictly serializable? A graph of what must come before what, and one search for a cycle.

After Kingsbury and Alvaro, "Elle" (2020). The order of every key's versions is known, so nothing is guessed:
if the graph has no cycle, any order that it allows explains every answer, and if it has one, no order does.

    ww   the version before this one was written by …
    wr   the version that was read was written by …
    rw   the version after the one that was read was written by …
    time … had returned before this one was called

Real time is a chain of moments, one for each return: two edges a call instead of one a pair of calls.

A call on one key is a transaction of one. A range that was read is a read of each key that may lie in it, absent ones
included. A call without an answer counts if a version of it is there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf


class Outcome(Enum):
    """What the caller was told."""

    DONE = "done"
    NOT_DONE = "not done"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One transaction: the versions that it read and wrote, by key. Version 0 is the key's absence, 1 its first value."""

    name: str
    called: float
    returned: float = inf
    reads: Mapping[bytes, int] = field(default_factory=dict)  # before its own writes
    writes: Mapping[bytes, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Appended:
    """One transaction on keys that hold lists: each value is the tokens that were added to it, ended by ";"."""

    name: str
    called: float
    returned: float = inf
    outcome: Outcome = Outcome.DONE
    reads: Mapping[bytes, bytes | None] = field(default_factory=dict)
    appends: Mapping[bytes, bytes] = field(default_factory=dict)  # the token, with its ";"


class NotSerializable(AssertionError):
    """No order explains the answers; the text says why not."""


def judge(calls: Iterable[Call]) -> int:
    """How many calls were judged. Raises NotSerializable."""
    told = list(calls)
    writers = _writers(told)
    edges: list[dict[int, str]] = [{} for _ in range(2 * len(told))]  # the second half: moments of return
    for key, by_version in writers.items():
        for version, number in enumerate(by_version[1:], 1):
            if version > 1:
                _add(edges, by_version[version - 1], number, f"ww {key!r}")
    for number, call in enumerate(told):
        for key, version in call.reads.items():
            by_version = writers.get(key, [-1])
            if version >= len(by_version):
                raise NotSerializable(f"{call.name} read version {version} of {key!r}, which nobody wrote")
            if version and by_version[version] == number:
                raise NotSerializable(
                    f"{call.name} read what it wrote to {key!r} itself, as if it had been there"
                )
            if version:
                _add(edges, by_version[version], number, f"wr {key!r}")
            if version + 1 < len(by_version):
                _add(edges, number, by_version[version + 1], f"rw {key!r}")
    _add_time(edges, told)
    _check_acyclic(edges, told)
    return len(told)


def judge_appends(history: Sequence[Appended], final: Mapping[bytes, bytes | None]) -> int:
    """The same for keys that hold lists, whose order of versions is in the lists themselves.

    `final`: every key's value when all was over. Also raises NotSerializable where a list is not a part of the final
    one, or a write is there twice, in part, though it was told not to be done, or is not there though it was.
    """
    places: dict[bytes, dict[bytes, int]] = {}
    prefixes: dict[bytes, list[int]] = {}
    for key, value in final.items():
        tokens = _tokens(value)
        places[key] = {token: number for number, token in enumerate(tokens, 1)}
        if len(places[key]) < len(tokens):
            raise NotSerializable(f"{key!r} has a write twice: {value!r}")
        ends = [0]
        for token in tokens:
            ends.append(ends[-1] + len(token))
        prefixes[key] = ends
    calls = [
        Call(each.name, each.called, each.returned, _versions(each, final, prefixes), writes)
        for each in history
        if (writes := _written(each, places)) is not None
    ]
    return judge(calls)


def _tokens(value: bytes | None) -> list[bytes]:
    return [token + b";" for token in (value or b"").split(b";")[:-1]]


def _versions(
    call: Appended, final: Mapping[bytes, bytes | None], prefixes: Mapping[bytes, list[int]]
) -> dict[bytes, int]:
    versions = {}
    for key, seen in call.reads.items():
        value, whole = seen or b"", final.get(key) or b""
        if not whole.startswith(value) or len(value) not in prefixes.get(key, [0]):
            raise NotSerializable(f"{call.name} read {value!r} of {key!r}, which ended as {whole!r}")
        versions[key] = prefixes[key].index(len(value)) if value else 0
    return versions


def _written(call: Appended, places: Mapping[bytes, Mapping[bytes, int]]) -> dict[bytes, int] | None:
    """The versions that a call made; None where it took no effect, and so tells nothing."""
    made = {key: places.get(key, {}).get(token) for key, token in call.appends.items()}
    there = {key: version for key, version in made.items() if version is not None}
    if there and len(there) < len(made):
        raise NotSerializable(f"{call.name} is torn: of {sorted(made)} only {sorted(there)} is there")
    if call.outcome is Outcome.NOT_DONE:
        if there:
            raise NotSerializable(f"{call.name} was told not to be done, and is there")
        return None
    if call.outcome is Outcome.DONE and len(there) < len(made):
        raise NotSerializable(f"{call.name} was told to be done, and is not there")
    return None if call.outcome is Outcome.UNKNOWN and not there else there


def _writers(told: Sequence[Call]) -> dict[bytes, list[int]]:
    """By key and version, the call that wrote it. Nobody wrote version 0. Raises NotSerializable."""
    made: dict[bytes, dict[int, int]] = defaultdict(dict)
    for number, call in enumerate(told):
        for key, version in call.writes.items():
            if made[key].setdefault(version, number) != number:
                other = told[made[key][version]].name
                raise NotSerializable(f"{call.name} and {other} both wrote version {version} of {key!r}")
    for key, versions in made.items():
        if versions.keys() != set(range(1, len(versions) + 1)):
            raise NotSerializable(f"nobody wrote some of the versions of {key!r} below {max(versions)}")
    return {
        key: [-1, *(versions[version] for version in range(1, len(versions) + 1))]
        for key, versions in made.items()
    }


def _add(edges: list[dict[int, str]], before: int, after: int, why: str) -> None:
    if before != after:
        edges[before].setdefault(after, why)


def _add_time(edges: list[dict[int, str]], told: Sequence[Call]) -> None:
    """At one moment a call comes before a return: the two may have overlapped."""
    count, last = len(told), -1
    events = [(call.called, 0, number) for number, call in enumerate(told)]
    events += [(call.returned, 1, number) for number, call in enumerate(told) if call.returned != inf]
    for _, is_return, number in sorted(events):
        if is_return:
            edges[number][count + number] = "time"
            if last >= 0:
                edges[last][count + number] = "time"
            last = count + number
        elif last >= 0:
            edges[last][number] = "time"


def _check_acyclic(edges: list[dict[int, str]], told: Sequence[Call]) -> None:
    """Kahn's algorithm: what cannot be taken away in turn lies on a cycle, or behind one."""
    waits = [0] * len(edges)
    for after in edges:
        for number in after:
            waits[number] += 1
    free = [number for number, count in enumerate(waits) if not count]
    left = len(edges)
    while free:
        left -= 1
        for number in edges[free.pop()]:
            waits[number] -= 1
            if not waits[number]:
                free.append(number)
    if left:
        raise NotSerializable(_tell_cycle(edges, waits, told))


def _tell_cycle(edges: list[dict[int, str]], waits: Sequence[int], told: Sequence[Call]) -> str:
    before: dict[int, int] = {}  # of each that waits, one that it waits for and that waits too
    for number, after in enumerate(edges):
        if waits[number]:
            before.update((other, number) for other in after if waits[other])
    at, path = next(iter(before)), list[int]()
    while at not in path:
        path.append(at)
        at = before[at]
    cycle = [*reversed(path[path.index(at) :])]
    lines = []
    for number, following in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        if number < len(told):
            call = told[number]
            took = f"{call.called:.4f} – {call.returned:.4f}"
            lines.append(f"  {call.name} ({took}) read {dict(call.reads)}, wrote {dict(call.writes)}")
            lines.append(f"    before, by {edges[number][following]}:")
    return "a cycle, so no order explains the answers of\n" + "\n".join(lines)
