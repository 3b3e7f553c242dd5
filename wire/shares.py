"""A bounded set of connections, shared fairly: when it is full, whoever has most of it gives one back. Pure.

An owner is a source address, or a user once it is known who that is. One that opens ten thousand
connections so pushes out its own, and nobody else's. Among the connections of one owner the oldest
goes first; a busy one is passed over, a bounded number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

MAX_PASSED_OVER = 16


class Share(Generic[T]):
    """Its items have a weight: what they cost, in descriptors say. At most `most` of it is to be used."""

    def __init__(self, most: int, is_busy: Callable[[T], bool] = lambda item: False) -> None:
        self.most, self.used = most, 0
        self._is_busy = is_busy
        self._owner_of: dict[T, tuple[str, int]] = {}
        self._items: dict[str, dict[T, None]] = {}  # of each owner, the oldest first
        self._weights: dict[str, int] = {}
        self._owners: dict[int, dict[str, None]] = {}  # by weight
        self._top = 0  # the largest of these

    def __len__(self) -> int:
        return len(self._owner_of)

    def __contains__(self, item: T) -> bool:
        return item in self._owner_of

    def held_by(self, owner: str) -> int:
        """How many items the owner has."""
        return len(self._items.get(owner, ()))

    def add(self, item: T, owner: str, weight: int = 1) -> None:
        """Also for one that is in already: with another owner or weight."""
        self.remove(item)
        self._owner_of[item] = owner, weight
        self._items.setdefault(owner, {})[item] = None
        self._weigh(owner, weight)

    def remove(self, item: T) -> None:
        owner, weight = self._owner_of.pop(item, ("", 0))
        if not weight:
            return
        del self._items[owner][item]
        if not self._items[owner]:
            del self._items[owner]
        self._weigh(owner, -weight)

    def surplus(self) -> T | None:
        """Who is to go; None while there is room."""
        if self.used <= self.most:
            return None
        items = self._items[next(iter(self._owners[self._top]))]
        for _ in range(min(len(items), MAX_PASSED_OVER)):
            item = next(iter(items))
            if not self._is_busy(item):
                return item
            del items[item]  # to the end
            items[item] = None
        return next(iter(items))

    def _weigh(self, owner: str, change: int) -> None:
        before = self._weights.get(owner, 0)
        after = before + change
        self.used += change
        if before:
            del self._owners[before][owner]
            if not self._owners[before]:
                del self._owners[before]
        if after:
            self._weights[owner] = after
            self._owners.setdefault(after, {})[owner] = None
            self._top = max(self._top, after)
        else:
            del self._weights[owner]
        while self._top and self._top not in self._owners:  # by one weight at most, or to the next owner's
            self._top -= 1
