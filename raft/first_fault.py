"""The fault that stopped a replica, and the owner who hears of it, whichever of the two comes first.

A replica's tasks run before its owner has looked at it. A fault that nobody hears of would
leave a process that is alive and answers nothing.
"""

from __future__ import annotations

from collections.abc import Callable


class FirstFault:
    """Base of what stops for good at its first fault."""

    def __init__(self) -> None:
        self.fault: BaseException | None = None
        self._on_fault: Callable[[BaseException], None] = lambda error: None

    @property
    def on_fault(self) -> Callable[[BaseException], None]:
        """Hears of the fault. An owner that comes after the fault hears of it at once."""
        return self._on_fault

    @on_fault.setter
    def on_fault(self, hear: Callable[[BaseException], None]) -> None:
        self._on_fault = hear
        if self.fault is not None:
            hear(self.fault)
