"""The giver's side of a hand-over: answers "this shard, this epoch, from this cursor".

A copy runs through three phases. Records and data are scanned in key order while
the shard is served, so the copy is fuzzy; the journal then names every item that
changed since the loan began, and replaying it with *current* values makes the copy
exact. Once the shard is frozen and the cursor is at the journal's end, the copy is
complete. Nothing here changes state: every answer is read from what is applied, so
any replica may give it, and any message may be lost or repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from shardkv import shardkv_pb2 as pb
from shardkv.state import layout
from shardkv.state.cursor import DATA, JOURNAL, RECORDS, Cursor
from shardkv.state.machine import ShardMachine
from shardkv.state.row import Row, State
from shardkv.state.rows import cursor_from_pb, cursor_to_pb
from shardkv.storage.engine import Engine


@dataclass(frozen=True, slots=True)
class Pace:
    """How large the steps of a copy are."""

    chunk_bytes: int = 512 << 10
    journal_keys: int = 4096  # looked at for one chunk
    close_at: int = 512  # journal entries left, at most, when the giver stops serving
    patience: int = 32  # requests without getting closer, after which it stops all the same


PACE = Pace()


def lent_row(machine: ShardMachine, request: pb.PullRequest) -> Row | None:
    """The row, if we are the giver, and this replica has come to that hand-over and still has the copy."""
    ownership = machine.ownership
    row = ownership.rows.get(request.shard)
    if row is None or row.epoch != request.epoch or row.state not in (State.LENDING, State.FROZEN):
        return None
    # What is asked for an attempt that ended is old, and what a frozen giver has is for one attempt alone.
    if request.attempt < row.attempt or (row.state is State.FROZEN and request.attempt != row.attempt):
        return None
    return row if ownership.is_us(request.gid, request.joined) else None


class Closing:
    """When serving may stop for the rest of a copy: when little is left, or when it is a race without end.

    Clients may write faster than the taker copies. Then what is left grows, and the move
    would never end: better a pause as long as what is left takes. And only for a taker that says it
    has room for all of it: else nobody would serve the shard.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        # shard -> epoch and attempt, least left, requests since
        self._least: dict[int, tuple[tuple[int, int], int, int]] = {}

    def is_due(self, row: Row, request: pb.PullRequest) -> bool:
        """Judge one request for the shard in `row`."""
        cursor = cursor_from_pb(getattr(request, "from"))
        if row.state is not State.LENDING or cursor.phase != JOURNAL or not request.can_finish:
            return False
        left = row.journal - cursor.position
        copy = (row.epoch, request.attempt)
        known, least, since = self._least.get(row.shard, (copy, left + 1, 0))
        if known != copy or left < least:
            least, since = left, 0
        self._least[row.shard] = (copy, least, since + 1)
        return left <= self._pace.close_at or since >= self._pace.patience


def pull(machine: ShardMachine, request: pb.PullRequest, pace: Pace) -> pb.PullReply:
    """The next chunk of the copy. `ready` false: not lent here yet, or not any more.

    Asked for what another group of our number had, we say so: we never had its data, and
    an empty answer would be taken for an empty shard.
    """
    if machine.ownership.is_other(request.gid, request.joined):
        return pb.PullReply(other_group=True, incarnation=machine.incarnation)
    row = lent_row(machine, request)
    if row is None:
        ownership = machine.ownership
        ended = ownership.is_us(request.gid, request.joined) and ownership.has_ended(
            request.shard, request.epoch
        )
        return pb.PullReply(ready=False, ended=ended, incarnation=machine.incarnation)
    cursor = cursor_from_pb(getattr(request, "from"))
    reply = pb.PullReply(ready=True, clock_ms=machine.clock_ms, incarnation=machine.incarnation)
    reply.left_bytes = _left_bytes(machine.engine, row, cursor)
    size = 0
    # One chunk may span phases, so that a small shard takes few round trips.
    while request.can_finish and size < pace.chunk_bytes:
        if cursor.phase == JOURNAL:
            cursor, size = _replay(machine.engine, row, cursor, reply, size, pace)
            break
        start, end = (
            layout.record_range(row.shard) if cursor.phase == RECORDS else layout.data_range(row.start, row.end)
        )
        cursor, size = _copy(machine.engine, cursor, max(start, cursor.key), end, reply, size, pace.chunk_bytes)
    reply.next.CopyFrom(cursor_to_pb(cursor))
    reply.frozen = row.state is State.FROZEN
    reply.final = row.state is State.FROZEN and cursor == Cursor(JOURNAL, b"", row.journal)
    return reply


def _left_bytes(engine: Engine, row: Row, cursor: Cursor) -> int:
    """About how much data is still to come. What is in the journal replaces, as a rule, what came before: 0."""
    if cursor.phase == JOURNAL:
        return 0
    start, end = layout.data_range(row.start, row.end)
    return engine.estimate(max(start, cursor.key) if cursor.phase == DATA else start, end)


def _copy(
    engine: Engine, cursor: Cursor, start: bytes, end: bytes, reply: pb.PullReply, size: int, limit: int
) -> tuple[Cursor, int]:
    for key, value in engine.scan(start, end):
        if size >= limit:
            return Cursor(cursor.phase, key), size
        reply.items.add(key=key, value=value)
        size += len(key) + len(value)
    return Cursor(DATA if cursor.phase == RECORDS else JOURNAL), size


def _replay(
    engine: Engine, row: Row, cursor: Cursor, reply: pb.PullReply, size: int, pace: Pace
) -> tuple[Cursor, int]:
    """Items that changed from the cursor on, as they are now. Each is in the journal once, where it changed last."""
    position = cursor.position
    looked = islice(engine.scan(*layout.journal_range(row.shard, position)), pace.journal_keys + 1)
    for count, (place, key) in enumerate(looked):
        if size >= pace.chunk_bytes or count >= pace.journal_keys:
            return Cursor(JOURNAL, b"", position), size
        position = layout.journal_position(place) + 1
        value = engine.get(key)
        reply.items.add(key=key, value=value or b"", absent=value is None)
        size += len(key) + len(value or b"")
    # Behind the last one, also where what was there has moved; this replica may be behind the cursor itself.
    return Cursor(JOURNAL, b"", max(position, row.journal)), size
