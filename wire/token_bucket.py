"""A token bucket that may go into debt: who has any tokens left gets all that he asks for, and then waits. Pure.

So a request is never cut into parts, and one that is larger than the bucket is served as well: its sender
comes back when the debt is paid. Over any time t at most `rate` · t + `burst` and one request are taken.
"""

from __future__ import annotations


class TokenBucket:
    """`rate` tokens a second; at most `burst` of them are saved. Times are of any clock that does not go back."""

    __slots__ = ("_at", "_balance", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        assert rate > 0 and burst > 0, "a bucket that nothing comes into"
        self.rate, self.burst = rate, burst
        self._balance, self._at = burst, now

    def wait(self, now: float) -> float:
        """Seconds until something may be taken; 0: now."""
        self._fill(now)
        return max(0.0, -self._balance / self.rate)

    def take(self, amount: float, now: float) -> None:
        self._fill(now)
        self._balance -= amount

    def _fill(self, now: float) -> None:
        if now > self._at:
            self._balance = min(self.burst, self._balance + (now - self._at) * self.rate)
            self._at = now
