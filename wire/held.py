"""How many bytes a server holds for its connections, all together: frames not whole yet, calls under way, answers not taken.

Above half of what is allowed a stream with calls under way is not read from until they are answered. Above
all of it the connection that holds most is ended, a process of the cluster last.
"""

from __future__ import annotations

from collections.abc import Callable

from shardkv.wire.auth import Standing
from shardkv.wire.inbound import Inbound

MAX_HELD_BYTES = 512 << 20


class HeldBytes:
    def __init__(self, end: Callable[[Inbound], None], most: int = MAX_HELD_BYTES) -> None:
        self._end, self.most = end, most
        self.total = 0
        self._holders: dict[Inbound, None] = {}

    @property
    def crowded(self) -> bool:
        return 2 * self.total > self.most

    def hold(self, inbound: Inbound, held: int) -> None:
        """This is what the connection holds now."""
        self.total += held - inbound.held_bytes
        inbound.held_bytes = held
        if not held:
            self._holders.pop(inbound, None)
            return
        self._holders[inbound] = None
        while self.total > self.most and self._holders:
            largest = max(self._holders, key=lambda one: (one.standing is not Standing.NODE, one.held_bytes))
            self.release(largest)
            self._end(largest)

    def release(self, inbound: Inbound) -> None:
        """It is being ended: what it holds is thrown away."""
        self.total -= inbound.held_bytes
        inbound.held_bytes = 0
        self._holders.pop(inbound, None)
