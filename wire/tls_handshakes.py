"""TLS handshakes that wait for their turn: each costs the event loop some 1.6 ms, which calls under way wait for.

So many a second are begun, and so many are under way at once. Sources take turns; of one source the newest
goes first, for the client of an old one has most likely given up. A handshake that stands still is ended
by its connection's deadline, or when its place is needed.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from shardkv.wire.shares import Share

T = TypeVar("T", bound=Hashable)

A_SECOND = 100
BURST = 200  # after a quiet time: as many clients as lost their connection to a replica that is back
AT_ONCE = 128
A_TICK = 4  # not a whole burst in one turn of the loop
TICK_SECONDS = 0.01


class Handshakes(Generic[T]):
    """Calls `begin` for each that was added, in its turn, and `drop` for one that stands in the way."""

    def __init__(self, begin: Callable[[T], None], drop: Callable[[T], None]) -> None:
        self._begin, self._drop = begin, drop
        self._loop = asyncio.get_running_loop()
        self._waiting: OrderedDict[str, dict[T, None]] = OrderedDict()  # by source
        self._under_way: Share[T] = Share(AT_ONCE)
        self._tokens, self._counted_at = float(BURST), self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self.begun = 0

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    def add(self, item: T, source: str) -> None:
        self._waiting.setdefault(source, {})[item] = None
        if self._timer is None:
            self._go_on()

    def remove(self, item: T, source: str) -> None:
        """It has ended, well or not, or does not want its turn any more."""
        self._under_way.remove(item)
        of_source = self._waiting.get(source)
        if of_source is not None and item in of_source:
            del of_source[item]
            if not of_source:
                del self._waiting[source]

    def _go_on(self) -> None:
        self._timer = None
        now = self._loop.time()
        self._tokens = min(BURST, self._tokens + (now - self._counted_at) * A_SECOND)
        self._counted_at = now
        for _ in range(min(A_TICK, int(self._tokens))):
            if not self._waiting:
                return
            source, of_source = self._waiting.popitem(last=False)
            item, _ = of_source.popitem()
            if of_source:
                self._waiting[source] = of_source  # behind the others
            self._tokens -= 1
            self.begun += 1
            self._under_way.add(item, source)
            slowest = self._under_way.surplus()
            if slowest is not None:
                self._drop(slowest)
            self._begin(item)
        if self._waiting:
            self._timer = self._loop.call_later(TICK_SECONDS, self._go_on)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
