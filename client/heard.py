"""What a clerk knows of replicated time: what each group told it in its replies.

A write's time of issue is fixed when the write is first sent (`raft/sessions.py` says what for). It should be
no later than the group's own time when the write arrives, and not long before it: so it is that group's time as
the clerk heard it. Of a group that it has not heard from yet, the clerk takes the controller's time.
"""

from __future__ import annotations

from collections.abc import Callable

from shardkv.raft.protocol.clock import HeardClock

CONTROLLER = 0


class HeardClocks:
    def __init__(self, monotonic: Callable[[], float]) -> None:
        """`monotonic`: seconds."""
        self._monotonic = monotonic
        self._clocks: dict[int, HeardClock] = {}
        self._highest_ms = 0

    def hear(self, gid: int, clock_ms: int) -> None:
        """Group `gid` (0: the controller) says that its time is `clock_ms`."""
        clock = self._clocks.get(gid)
        if clock is None:
            clock = self._clocks[gid] = HeardClock(self._monotonic)
        clock.hear(clock_ms)
        self._highest_ms = max(self._highest_ms, clock_ms)

    def issue_ms(self, gid: int) -> int:
        """The time of issue of a write that is first sent now, to group `gid`.

        0 where nobody has told the time yet: the group refuses such a write as too old, and tells it.
        """
        clock = self._clocks.get(gid) or self._clocks.get(CONTROLLER)
        issued_ms = 0 if clock is None else clock.now_ms()
        self._highest_ms = max(self._highest_ms, issued_ms)
        return issued_ms

    @property
    def highest_ms(self) -> int:
        """No group has told us a later time, and no write of ours was issued at a later one."""
        return self._highest_ms
