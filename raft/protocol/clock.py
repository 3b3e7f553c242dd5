"""Replicated time, as a leader tells it: it never goes back, and never runs much faster than time passes.

The largest stamp in a group's log is the group's time. Exactly-once records expire by that
time, so one wrong wall clock must not move it. A leader therefore counts the time
that passes by its monotonic clock, from the group's time on, and follows its wall clock
by at most `SLEW` of the time that passed, however wrong the wall clock is.

The time may jump forward only where two witnesses agree: this replica's wall clock, and the
highest group time that a client has heard elsewhere. So a group that was down for a day
catches up at once, while neither a wrong wall clock nor a client that lies moves
the time alone. Only a group's very first stamp rests on one wall clock; sessions and
hand-overs do not depend on two groups having the same time (`sessions.py`).

Wall time itself, which point-in-time restore needs, is stamped beside it (`replica.py::Stamp`).
"""

from __future__ import annotations

from collections.abc import Callable

PACE = 0.9  # of the time that passes at a client, whose clock may be fast while the group's is slow
SLEW = 0.01  # of the time that passes: far above the drift of quartz, far below what a session would notice


class ReplicatedClock:
    """One replica's reading of its group's time. Not shared between threads."""

    def __init__(self, wall_ms: Callable[[], int], monotonic: Callable[[], float]) -> None:
        """`wall_ms`: milliseconds since the epoch, perhaps wrong; `monotonic`: seconds."""
        self._wall_ms, self._monotonic = wall_ms, monotonic
        self._now_ms = 0.0
        self._read_at = monotonic()

    def wall_ms(self) -> int:
        """This machine's wall clock, right or wrong."""
        return self._wall_ms()

    def now_ms(self, applied_ms: int) -> int:
        """The group's time now, 0 before its first stamp.

        `applied_ms`: its time as far as this replica has applied the log.
        """
        # Before the first stamp nobody knows the time: least of all one replica's wall clock.
        return self.stamp_ms(applied_ms) if applied_ms or self._now_ms else 0

    def stamp_ms(self, applied_ms: int, heard_ms: int = 0) -> int:
        """The time to stamp an entry with, at a leader.

        `heard_ms`: the highest time of any group that the client who asks has heard (0: none).
        """
        at = self._monotonic()
        passed_ms = max(0.0, (at - self._read_at) * 1000)
        self._read_at = at
        wall_ms = self._wall_ms()
        before_ms = max(self._now_ms, applied_ms)
        if not before_ms:  # the group's first stamp
            self._now_ms = min(wall_ms, heard_ms) if heard_ms else wall_ms
            return int(self._now_ms)
        counted_ms = self._now_ms + passed_ms if self._now_ms else before_ms
        behind_ms = wall_ms - counted_ms
        counted_ms += max(-SLEW * passed_ms, min(behind_ms, SLEW * passed_ms))
        # Another leader's stamps may be ahead of what we counted; ours never fall behind them.
        self._now_ms = max(counted_ms, before_ms, min(wall_ms, heard_ms))
        return int(self._now_ms)


class HeardClock:
    """A group's time as a client knows it: what the group said last, and how long ago that was."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        """`monotonic`: seconds."""
        self._monotonic = monotonic
        self._clock_ms = 0
        self._heard_at = 0.0

    def hear(self, clock_ms: int) -> None:
        """The group says that this is its time. Late word of an earlier time is no news."""
        if clock_ms > self._clock_ms:
            self._clock_ms, self._heard_at = clock_ms, self._monotonic()

    def now_ms(self) -> int:
        """Hardly later than the group's time now, and not much earlier. 0: the group has not been heard."""
        if not self._clock_ms:
            return 0
        return self._clock_ms + int((self._monotonic() - self._heard_at) * 1000 * PACE)
