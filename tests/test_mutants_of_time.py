"""The mutants of issue 11, planted one at a time: each has a test by name that it must not survive.

They are about time, operations and ranges, and need an order of events that a directed test makes at once. Those of
`tests/test_mutants.py` are for the simulations to find.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from shardkv import shardkv_pb2 as kv
from shardkv.client.lane import Lane
from shardkv.client.operations import Operation
from shardkv.client.ranges import Scan
from shardkv.raft.sessions import SessionRecord
from shardkv.state import records
from shardkv.state.effects import Effect
from shardkv.state.machine import ShardMachine
from shardkv.state.row import Row
from shardkv.state.writes import Writing
from shardkv.storage.engine import Batch
from shardkv.wire import frames
from shardkv.wire.calls import Code
from shardkv.wire.frames import Section
from tests import test_answers, test_fates, test_time

Patch = Callable[[pytest.MonkeyPatch], None]


def records_expire_by_their_creation(patch: pytest.MonkeyPatch) -> None:
    original = ShardMachine._record_of

    def record_of(
        self: ShardMachine, section: Section, row: Row, late: bool, used_ms: int
    ) -> SessionRecord | None:
        known = None if section.session == frames.NO_SESSION else self._records.find(row, section.session)
        created_ms = known.used_ms if known is not None else used_ms
        record = original(self, section, row, late, used_ms)
        if record is not None:
            record.used_ms = created_ms
        return record

    patch.setattr(ShardMachine, "_record_of", record_of)


def the_clerk_says_now_as_the_time_of_issue(patch: pytest.MonkeyPatch) -> None:
    original = Lane._attempt

    async def attempt(self: Lane, operations: tuple[Operation, ...]) -> Callable[[], None]:
        for operation in operations:
            operation.issued_ms = 0
        return await original(self, operations)

    patch.setattr(Lane, "_attempt", attempt)


def the_taker_ignores_the_clock_of_the_giver(patch: pytest.MonkeyPatch) -> None:
    original = ShardMachine._install_chunk

    def install(self: ShardMachine, chunk: kv.Install) -> tuple[list[Effect], bool]:
        chunk.clock_ms = 0
        return original(self, chunk)

    patch.setattr(ShardMachine, "_install_chunk", install)


def late_duplicates_below_the_mark_are_done(patch: pytest.MonkeyPatch) -> None:
    original = ShardMachine._apply_once

    def once(
        self: ShardMachine, record: SessionRecord, late: bool, row: Row, writing: Writing, *write: int | bytes
    ) -> bytes:
        below, record.acked_below = record.acked_below, 0
        try:
            return original(self, record, late, row, writing, *write)  # type: ignore[arg-type]
        finally:
            record.acked_below = below

    patch.setattr(ShardMachine, "_apply_once", once)


def cas_takes_absent_for_empty(patch: pytest.MonkeyPatch) -> None:
    original = Writing._swap

    def swap(self: Writing, item: bytes, value: bytes) -> bytes:
        expected, new = frames.unpack_cas(value)
        if not expected and not self._batch.get(item):
            value = frames.pack_cas(self._batch.get(item), new)
        return original(self, item, value)

    patch.setattr(Writing, "_swap", swap)


def a_merge_overwrites_the_record_of_the_target(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(records, "_both", lambda own, theirs: theirs)


def a_page_of_a_scan_repeats_the_last_pair(patch: pytest.MonkeyPatch) -> None:
    original = Scan.take

    def take(self: Scan, page: bytes) -> list[tuple[bytes, bytes]]:
        pairs = original(self, page)
        if pairs and not self._finished:
            self._start = pairs[-1][0]
        return pairs

    patch.setattr(Scan, "take", take)


def a_range_delete_takes_its_end(patch: pytest.MonkeyPatch) -> None:
    original = Batch.delete_range
    patch.setattr(Batch, "delete_range", lambda self, start, end: original(self, start, end + b"\0"))


def new_numbers_after_lost_leadership(patch: pytest.MonkeyPatch) -> None:
    original = Lane._refused_whole

    def refused(
        self: Lane, operations: tuple[Operation, ...], code: Code, text: str, *addresses: tuple[str, ...] | str
    ) -> None:
        if code is Code.RETRY:
            for operation in operations:
                if operation.numbering is not None:
                    operation.seq = operation.numbering.take()
        original(self, operations, code, text, *addresses)  # type: ignore[arg-type]

    patch.setattr(Lane, "_refused_whole", refused)


MUTANTS: dict[Patch, Callable[[], None]] = {
    records_expire_by_their_creation: test_time.test_t_1_a_session_that_is_used_does_not_expire,
    the_clerk_says_now_as_the_time_of_issue: (
        test_time.test_t_2_a_clerk_that_was_cut_off_until_its_session_expired_does_nothing_twice
    ),
    the_taker_ignores_the_clock_of_the_giver: (
        test_time.test_t_2_a_retry_at_the_next_owner_is_too_old_by_the_giver_s_time
    ),
    late_duplicates_below_the_mark_are_done: (
        test_time.test_a_late_duplicate_of_an_acknowledged_write_is_not_done_again
    ),
    cas_takes_absent_for_empty: test_time.test_cas_tells_an_absent_key_from_an_empty_value,
    a_merge_overwrites_the_record_of_the_target: (
        test_time.test_a_merge_keeps_what_both_shards_remember_of_one_session
    ),
    a_page_of_a_scan_repeats_the_last_pair: test_fates.test_a_scan_over_many_pages_gives_each_pair_once,
    a_range_delete_takes_its_end: partial(test_answers.test_a_range_delete_leaves_its_end, "memory", Path()),
    new_numbers_after_lost_leadership: test_fates.test_a_retry_keeps_its_number_whatever_went_wrong,
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.__name__ for mutant in MUTANTS])
def test_a_named_test_finds(mutant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    """An AssertionError alone counts: any other would be the patch's own fault."""
    mutant(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        MUTANTS[mutant]()
