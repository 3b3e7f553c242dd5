"""Moments: one wrong wall clock spoils no other entry's, and its own entries are placed where they belong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv.backup.moments import TOLERANCE_MS, Moments

pytestmark = pytest.mark.quick
START = 1_700_000_000_000
HOUR = 3_600_000
QUARTER = 900_000


def log(*terms: tuple[int, int, int], step: int = 1000, clock: int = START) -> tuple[Moments, list[int]]:
    """Terms of (entries, how wrong the leader's wall clock is, ms the group sleeps before). (moments, the truth)."""
    moments, truth, now = Moments(), [], START
    for term, (entries, wrong, slept) in enumerate(terms, 1):
        now += slept
        for _ in range(entries):
            now, clock = now + step, clock + step
            truth.append(now)
            moments.add(len(truth), term, clock, now + wrong)
    return moments, truth


def close(moments: Moments, truth: list[int], tolerance: int = TOLERANCE_MS) -> None:
    for index, true in enumerate(truth, 1):
        assert abs(moments.moment_of(index) - true) <= tolerance, index


def test_right_clocks_are_taken_as_they_are() -> None:
    moments, truth = log((50, 0, 0), (50, 3, 700), (50, -4, 9000))
    assert [moments.moment_of(1), moments.moment_of(60)] == [truth[0], truth[59] + 3]
    for index in (1, 49, 50, 51, 100, 101, 150):
        assert moments.cut(moments.moment_of(index)) == index
        assert moments.cut(moments.moment_of(index) - 1) == index - 1


@pytest.mark.parametrize("wrong", [2 * HOUR, -2 * HOUR, 365 * 24 * HOUR])
@pytest.mark.parametrize("at", [1, 2, 10, 19, 20])
@pytest.mark.parametrize("count", [1, 3])
def test_an_entry_stamped_hours_off_hides_no_other_and_is_in_its_place(wrong: int, at: int, count: int) -> None:
    moments, truth = Moments(), []
    for n in range(1, 21):
        truth.append(START + 1000 * n)
        moments.add(n, 1, truth[-1], truth[-1] + (wrong if at <= n < at + count else 0))
    close(moments, truth)
    for index, true in enumerate(truth, 1):
        assert moments.cut(true) == index


@pytest.mark.parametrize("wrong", [QUARTER, -QUARTER, 2 * HOUR])
@pytest.mark.parametrize("sizes", [(40, 40, 40), (3, 500, 2), (500, 1, 500), (1, 1, 1), (40, 40, 40, 40, 40)])
def test_a_leader_whose_clock_is_wrong_for_its_whole_term_is_corrected(
    wrong: int, sizes: tuple[int, ...]
) -> None:
    moments, truth = log(*((size, wrong if n % 2 else 0, 500) for n, size in enumerate(sizes)))
    close(moments, truth, TOLERANCE_MS + 500 * len(sizes))
    assert moments.cut(truth[-1]) == len(truth) and moments.cut(truth[0]) == 1


@pytest.mark.parametrize("wrong", [QUARTER, -QUARTER])
def test_the_last_leader_is_corrected_by_what_others_said_when_the_archive_was_written(wrong: int) -> None:
    moments, truth = log((40, 0, 0), (40, wrong, 0))
    moments.anchor(truth[-1] + 500, truth[-1] + 500)
    close(moments, truth)
    assert moments.cut(truth[-1]) == 80


@pytest.mark.parametrize("wrong", [QUARTER, -QUARTER])
def test_the_first_leader_is_corrected_by_what_the_backup_says(wrong: int) -> None:
    moments = Moments()
    moments.anchor(START, START)
    truth = [START + 1000 * n for n in range(1, 81)]
    for n, true in enumerate(truth, 1):
        moments.add(n, 1 + n // 41, true, true + (wrong if n <= 40 else 0))
    close(moments, truth)


@pytest.mark.parametrize("wrong", [2 * HOUR, -2 * HOUR])
def test_first_entries_by_a_clock_that_was_set_right_later_are_in_their_place(wrong: int) -> None:
    """The group's own time begins wrong as well."""
    moments, truth = Moments(), [START + 1000 * n for n in range(1, 101)]
    for n, true in enumerate(truth, 1):
        moments.add(n, 1, true + wrong, true + (wrong if n <= 5 else 0))
    close(moments, truth)
    assert moments.cut(truth[6]) == 7


def test_a_first_leader_that_is_ahead_for_its_whole_term_is_corrected_by_those_after() -> None:
    moments, truth = Moments(), [START + 1000 * n for n in range(1, 101)]
    for n, true in enumerate(truth, 1):
        moments.add(n, 1 + n // 34, true + QUARTER, true + (QUARTER if n < 34 else 0))
    close(moments, truth)


@pytest.mark.parametrize("slept", [HOUR, 24 * HOUR])
def test_a_group_that_slept_is_not_taken_for_a_wrong_clock(slept: int) -> None:
    """Its time stood still while nobody led."""
    moments, truth = log((40, 0, 0), (40, 0, slept), (40, 0, 0))
    close(moments, truth)
    assert moments.cut(truth[40] - 1) == moments.cut(truth[39]) == 40
    last, _ = log((40, 0, 0), (1, 0, slept))
    assert last.cut(START + 40_000 + slept // 2) == 40, "also where there is one entry after"


def test_a_group_s_time_that_jumps_forward_is_not_taken_for_a_wrong_clock() -> None:
    """It slept for an hour and made a few writes; then a client told it the time of others."""
    moments, truth = Moments(), []
    for n in range(1, 121):
        true = START + 1000 * n + (HOUR if n > 40 else 0)
        truth.append(true)
        moments.add(n, 1 if n <= 40 else 2, true - (HOUR if 40 < n <= 80 else 0), true)
    close(moments, truth)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_few_entries_say_all_others_keep_their_moments(data: st.DataObject) -> None:
    count = data.draw(st.integers(3, 200))
    wrong = data.draw(
        st.dictionaries(st.integers(1, count), st.integers(-(10**9), 10**9), max_size=min(15, (count - 1) // 2))
    )
    moments = Moments()
    for n in range(1, count + 1):
        moments.add(n, 1, START + 100 * n, START + 100 * n + wrong.get(n, 0))
    for n in range(1, count + 1):
        if n not in wrong:
            assert moments.moment_of(n) == START + 100 * n
