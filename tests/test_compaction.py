"""How far a leader compacts its log: what followers still need stays, within bounds, and nobody who is gone holds it."""

from __future__ import annotations

import pytest

from shardkv.raft.compaction import CATCHING_UP, KEEPING_UP, compact_to
from shardkv.raft.protocol.progress import Mode, Progress

pytestmark = pytest.mark.quick
UNIT = 1000  # bytes of log before the state is flushed


def follower(match: int, mode: Mode = Mode.REPLICATE) -> Progress:
    return Progress(next_index=match + 1, match_index=match, mode=mode)


def sent_a_snapshot(index: int) -> Progress:
    peer = follower(0, Mode.PROBE)
    peer.become_snapshot(index)
    assert peer.begin_snapshot()
    peer.chunk_answered()
    return peer


def test_a_follower_that_is_a_little_behind_is_spared_a_snapshot() -> None:
    assert compact_to(90, 2 * UNIT, UNIT, [follower(70), follower(80)]) == 70
    assert compact_to(90, KEEPING_UP * UNIT, UNIT, [follower(70)]) == 90, "but not for ever"
    assert compact_to(90, 2 * UNIT, UNIT, [follower(95)]) == 90, "only what is durable goes"


def test_a_follower_that_is_gone_holds_nothing_up() -> None:
    assert compact_to(90, 2 * UNIT, UNIT, [follower(10, Mode.PROBE)]) == 90


def test_the_log_stays_from_a_snapshot_on_until_its_receiver_has_come_to_the_end() -> None:
    """Seed 542 of the soak: under load the log was gone before the snapshot had arrived, again and again."""
    peer = sent_a_snapshot(50)
    large = (CATCHING_UP - 1) * UNIT
    assert compact_to(90, large, UNIT, [peer]) == 50, "while it travels"
    peer.snapshot_ended(60)
    assert compact_to(90, large, UNIT, [peer]) == 60, "after it came in"
    peer.become_replicate()
    peer.matched(80)
    peer.look_behind(commit_index=95)
    assert compact_to(90, large, UNIT, [peer]) == 80, "as long as it is behind"
    peer.matched(95)
    peer.look_behind(commit_index=95)
    peer.matched(96)
    assert compact_to(99, large, UNIT, [peer]) == 99, "it is one among others now"


def test_what_is_kept_for_a_snapshot_has_a_bound() -> None:
    assert compact_to(90, CATCHING_UP * UNIT, UNIT, [sent_a_snapshot(50)]) == 90


def test_who_answers_no_chunk_of_a_snapshot_holds_nothing_up() -> None:
    peer = follower(0, Mode.PROBE)
    peer.become_snapshot(50)
    assert peer.begin_snapshot()
    assert compact_to(90, UNIT, UNIT, [peer]) == 90


def test_a_snapshot_that_failed_holds_nothing_up() -> None:
    peer = sent_a_snapshot(50)
    peer.snapshot_ended(0)
    assert compact_to(90, UNIT, UNIT, [peer]) == 90


def test_who_is_not_heard_from_after_its_snapshot_holds_nothing_up() -> None:
    peer = sent_a_snapshot(50)
    peer.end_of_round()
    peer.end_of_round()
    assert compact_to(90, UNIT, UNIT, [peer]) == 50, "a stream that is out ends by itself, one way or the other"
    peer.recently_active = True
    peer.snapshot_ended(60)
    peer.end_of_round()
    assert compact_to(90, UNIT, UNIT, [peer]) == 60, "heard from in this round"
    peer.end_of_round()
    assert compact_to(90, UNIT, UNIT, [peer]) == 90, "in a whole round not"
