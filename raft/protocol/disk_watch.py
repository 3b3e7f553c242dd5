"""Since when this replica's disk has not answered, in ticks: a disk that hangs says nothing by itself.

A write is *out* from when the core hands it to its driver until it is durable. The disk is silent
from when a write goes out, or from its last answer if others were waiting, until its next answer:
a disk that is slow but works through its queue is not taken for one that hangs.
"""

from __future__ import annotations


class DiskWatch:
    """Counts the writes that are out, and the ticks since the disk last answered."""

    def __init__(self) -> None:
        self.out = 0
        self.silent_ticks = 0

    def tick(self) -> None:
        """A tick passed."""
        if self.out:
            self.silent_ticks += 1

    def handed(self) -> None:
        """A write was handed out."""
        self.out += 1

    def answered(self) -> None:
        """The oldest write that is out reached the disk."""
        self.out -= 1
        self.silent_ticks = 0
        assert self.out >= 0, "a write that was never handed out"
