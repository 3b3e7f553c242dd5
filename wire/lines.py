"""Places for calls that wait, shared by owners: one who fills them keeps nobody else out. Pure.

Half of the places is anybody's. Beyond that an owner gets in who holds less than an even share of the other
half, so somebody who holds none always gets in. With n owners at most (1 + 1 + 1/2 + … + 1/n) halves are used.
"""

from __future__ import annotations


class Lines:
    """An owner is a user or, where nobody is asked who he is, a source address."""

    def __init__(self, places: int) -> None:
        self._half = max(1, places // 2)
        self._held: dict[str, int] = {}
        self.used = 0

    def enter(self, owner: str) -> bool:
        """Whether `owner` gets a place; if so, it is to be given back by `leave`."""
        held = self._held.get(owner, 0)
        if self.used >= self._half and held and held >= self._half // len(self._held):
            return False
        self._held[owner] = held + 1
        self.used += 1
        return True

    def leave(self, owner: str) -> None:
        self.used -= 1
        if self._held[owner] == 1:
            del self._held[owner]
        else:
            self._held[owner] -= 1
