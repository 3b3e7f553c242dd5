"""Batches: writes that are collected, leave together, and are told of one by one. What both clerks' batches share.

Each write is exactly-once and in order with the clerk's other writes to its key; together they are not atomic.
"""

from __future__ import annotations

import warnings

from shardkv.client.errors import BatchError, ShardKVError
from shardkv.client.ranges import pack_step
from shardkv.client.requests import Key, check_key, check_value
from shardkv.wire import frames
from shardkv.wire.frames import APPEND, CAS_OP, DELETE, INCR, PUT, Limits, Status

Write = tuple[int, bytes, bytes]
Outcome = bool | int | ShardKVError | None


class Writes:
    """The collecting half of a batch."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._writes: list[Write] = []
        self.results: list[Outcome] = []
        """After the batch: for each write, in order, what its call would have returned, or the error of it."""

    def __del__(self) -> None:
        if getattr(self, "_writes", None):
            text = f"a batch of {len(self._writes)} writes was never executed: nothing of it was sent"
            warnings.warn(text, ResourceWarning, source=self, stacklevel=2)

    def put(self, key: Key, value: Key) -> None:
        self._add(PUT, key, check_value(value, self._limits))

    def append(self, key: Key, value: Key) -> None:
        self._add(APPEND, key, check_value(value, self._limits))

    def delete(self, key: Key) -> None:
        self._add(DELETE, key, b"")

    def cas(self, key: Key, expected: Key | None, new: Key) -> None:
        before = None if expected is None else check_value(expected, self._limits)
        self._add(CAS_OP, key, frames.pack_cas(before, check_value(new, self._limits)))

    def put_if_absent(self, key: Key, value: Key) -> None:
        self.cas(key, None, value)

    def incr(self, key: Key, by: int = 1) -> None:
        self._add(INCR, key, pack_step(by))

    def _add(self, kind: int, key: Key, value: bytes) -> None:
        self._writes.append((kind, check_key(key, self._limits), value))

    def _settle(self, writes: list[Write], answers: list[tuple[int, bytes] | ShardKVError]) -> None:
        """Note the results. Raises BatchError unless all were done."""
        self.results = [
            answer if isinstance(answer, ShardKVError) else _outcome(kind, *answer)
            for (kind, _, _), answer in zip(writes, answers, strict=True)
        ]
        first = next((answer for answer in answers if isinstance(answer, ShardKVError)), None)
        if first is not None:
            raise BatchError(self.results) from first


def _outcome(kind: int, status: int, value: bytes) -> Outcome:
    """What the call of this kind returns."""
    if kind == INCR:
        return int(value)
    return status == Status.OK if kind in (DELETE, CAS_OP) else None
