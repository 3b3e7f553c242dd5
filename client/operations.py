"""One operation on its way: what it asks, until when, and who waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol


class Waiter(Protocol):
    """Who waits for an operation: an asyncio future, or a thread's stand-in for one."""

    def done(self) -> bool: ...

    def set_result(self, result: tuple[int, bytes], /) -> None: ...

    def set_exception(self, exception: Exception, /) -> None: ...


class Operation:
    """A call on a clerk. Made per operation, so it has slots and no ceremony."""

    __slots__ = (
        "after",
        "deadline",
        "doubt",
        "frame",
        "held",
        "issued_ms",
        "key",
        "kind",
        "numbering",
        "refusals",
        "sent",
        "seq",
        "shard",
        "value",
        "waiter",
        "why",
    )

    def __init__(  # hot: runs per operation
        self,
        kind: int,
        key: bytes,
        value: bytes,
        deadline: float,
        waiter: Waiter,
    ) -> None:
        self.kind = kind
        self.key = key
        self.value = value
        self.deadline = deadline
        self.waiter: Waiter | None = waiter  # None once it is over
        self.issued_ms = 0  # writes: fixed when first sent, by the newest replicated time heard then
        self.shard = 0
        self.seq = 0
        self.numbering: Numbering | None = None  # writes: the session that gave `seq`
        self.sent = False  # a frame with it is out, or one was whose fate is not known
        self.doubt = False  # … the latter: it may have been done
        self.frame = 0  # the number of the last frame that it was taken into
        self.after: Operation | None = None  # writes: the clerk's write to this key before this one
        self.held: Operation | None = None  # the next write to this key, while that waits for this one
        self.refusals = 0
        self.why = ""  # what went wrong last

    def before(self) -> Operation | None:
        """The clerk's last write to this key before this one that is not over."""
        before = self.after
        while before is not None and before.waiter is None:
            before = before.after
        self.after = before
        return before


class Nobody:
    """Who waits for a write whose caller was told that its outcome is unknown, or has left."""

    def done(self) -> bool:
        return False

    def set_result(self, result: tuple[int, bytes], /) -> None: ...

    def set_exception(self, exception: Exception, /) -> None: ...


NOBODY = Nobody()


class Numbering:
    """The writes of one clerk to one shard: a session of its own, numbered from 1.

    A session per shard keeps a shard that cannot be reached from holding back
    the low-water mark of the others. An operation keeps its number when a split
    or a move sends its retry elsewhere: the records went the same way.
    """

    __slots__ = ("_done", "_outstanding", "acked_below", "next_seq", "session")

    def __init__(self, clerk: bytes, shard: int) -> None:
        self.session = blake2b(clerk, digest_size=16, salt=shard.to_bytes(8, "big")).digest()
        self.next_seq = 1
        self.acked_below = 1
        self._outstanding: deque[int] = deque()
        self._done: set[int] = set()

    def take(self) -> int:  # hot: runs per operation
        seq = self.next_seq
        self.next_seq = seq + 1
        self._outstanding.append(seq)
        return seq

    def over(self, seqs: Sequence[int]) -> None:
        """The writes are answered or given up: their records may go once all before them are over."""
        outstanding, done = self._outstanding, self._done
        done.update(seqs)
        while outstanding and outstanding[0] in done:  # hot: runs per operation
            done.remove(outstanding.popleft())
        self.acked_below = outstanding[0] if outstanding else self.next_seq
