"""One shard at one group, as a row: its state, what it waits for, and who has or gets it. Pure.

What changes a row is in `ownership.py` (the map, and hand-overs) and in `restoring.py` (a restore).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from shardkv.shardctrler.key_range import KeyRange
from shardkv.shardctrler.shard_map import Group, ShardId
from shardkv.state.cursor import START, Cursor


@dataclass(frozen=True, slots=True)
class Fence:
    """A restore writes this shard: clients do not use it, and the map's changes to it wait."""

    run: str  # of the command that restores
    name: str  # of what it restores: the backup, and the moment
    generation: int  # a run that takes another one's place has a higher one
    beat: int = 0  # steps of the run at this shard: whoever watches sees whether it lives
    next: int = 0  # every chunk before this number is in
    later: tuple[int, ...] = ()  # and so are these
    sealed: bool = False  # all chunks are in


class State(IntEnum):
    ABSENT = 0  # Not ours; we hold nothing of it.
    PULLING = 1  # Ours by the map; its data is on its way.
    SERVING = 2  # Ours, complete, open to clients.
    LENDING = 3  # Given away by the map; we serve while the next owner copies.
    FROZEN = 4  # Given away and closed; kept until the next owner has it all.


class Event(IntEnum):
    CREATED = 0  # nobody had it before
    GAINED = 1  # another group has it
    INSTALLED = 2  # the last of its data is in, through our log
    LOST = 3  # the map gives it to another group
    CLOSED = 4  # what is left to copy is small enough to stop for
    RELEASED = 5  # the next owner serves it; our log says so
    SPLIT = 6  # a part of it becomes a shard of its own
    BORN = 7  # it is that part
    MERGE = 8  # it takes in its right neighbour
    MERGED = 9  # it is that neighbour
    ABANDONED = 10  # the taker cannot go on now: it drops what it has and begins again
    THAWED = 11  # the taker abandoned the attempt that the giver closed for: the giver serves again
    GIVEN_UP = 12  # the map gives it back before the taker has it all: the taker lets go of it
    TAKEN_BACK = 13  # the taker has let go of it: it is the giver's as if it had come back


SERVED = (State.SERVING, State.LENDING)


@dataclass(frozen=True, slots=True)
class Pending(KeyRange):
    """An event in a row's queue, with what it needs when it fires."""

    event: Event
    epoch: int = 0
    start: bytes = b""
    end: bytes = b""
    peer: Group | None = None  # GAINED: the source; LOST: the taker
    other: ShardId = 0  # SPLIT, BORN, MERGE, MERGED: the other shard
    key: bytes = b""  # SPLIT: where
    cut: int = 0  # GAINED: as `Row.cut` when it was queued


@dataclass(slots=True)
class Row(KeyRange):
    """One shard at this group."""

    shard: ShardId
    state: State = State.ABSENT
    epoch: int = 0  # the hand-over (or creation) that the state belongs to
    start: bytes = b""
    end: bytes = b""
    peer: Group | None = None  # PULLING: who has it; LENDING, FROZEN: who gets it
    served_epoch: int = 0  # the newest epoch that we have served; 0: none
    journal: int = 0  # LENDING, FROZEN: changes since the copy began
    cursor: Cursor = START  # PULLING
    queue: list[Pending] = field(default_factory=list)
    attempt: int = 0  # PULLING: ours; LENDING, FROZEN: the taker's, as far as we rest on it
    given_up: tuple[int, ...] = ()  # hand-overs to us that we let go of; the givers may not know it yet
    fence: Fence | None = None  # SERVING: a restore is under way
    restored: int = 0  # the generation of the last restore that ended here
    inherits: ShardId = (
        0  # SERVING: a shard whose exactly-once records are still to be taken over (`records.py`); 0: none
    )
    folds: bool = False  # … and that has ended, in a merge: its records go as they are taken over
    inherited: bytes = b""  # where the next step of that begins: a session
    cut: int = 0  # the last configuration in which another group split or merged the shard; 0: none

    @property
    def serves(self) -> bool:
        return self.state in SERVED

    @property
    def goes_on(self) -> bool:
        """Whether the map says that the shard, while it is still on its way to us, has another owner next."""
        return self.state is State.PULLING and bool(self.queue) and self.queue[0].event is Event.LOST

    @property
    def comes_back(self) -> bool:
        """Whether the map has ended the hand-over: the shard goes, or has gone, back to where it came from.

        Not if the taker is to split or merge the shard before it gives it back: then it needs to have it first.
        """
        if not self.queue or self.peer is None or self.queue[0].peer is None:
            return False
        following, back = self.queue[0], self.queue[0].peer
        same = (back.gid, back.joined) == (self.peer.gid, self.peer.joined)
        if self.state is State.PULLING:
            return same and following.event is Event.LOST
        lent = self.state in (State.LENDING, State.FROZEN)
        unchanged = (following.start, following.end) == (self.start, self.end)
        return lent and same and unchanged and following.cut <= self.epoch and following.event is Event.GAINED
