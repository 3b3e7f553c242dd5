"""A restore at one group: it fences shards, puts chunks into them, and opens them again. Deterministic.

A fenced shard answers no client, and stays as it is on the map: moves, splits and merges of it
wait until the fence goes. Each step of a restore is an entry of the group's log. A step names the *run* (one
execution of `shardkv restore`), and has no effect unless that run holds the fence. So two runs never
mix their data, whatever is repeated, delayed or cut off.

    BEGIN   fence an empty shard; or take over the fence of a run that was cut off, whose data goes
    chunk   put pairs in; chunks are numbered, and a chunk that is in already changes nothing
    BEAT    show that the run lives
    SEAL    all chunks are in
    END     open the shard to clients

Who takes a fence over has a higher *generation*, and has seen the fence at its present beat. What decides
between runs of the whole cluster is the fence of the first shard in key order (`backup/install.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import lt

from shardkv import shardkv_pb2 as pb
from shardkv.state import layout
from shardkv.state.effects import Effect
from shardkv.state.ownership import Ownership
from shardkv.state.row import Fence, Row, State
from shardkv.state.rows import fence_to_pb
from shardkv.storage.engine import Batch
from shardkv.wire import frames
from shardkv.wire.frames import MalformedFrame

WINDOW = 64  # chunks that may be in before an earlier one is: the fence remembers their numbers

Step = pb.RestoreStep
Reply = pb.RestoreReply
Chunk = pb.RestoreChunk


class Restoring:
    """The steps of restores; they change rows of `ownership`, and put data into `batch`."""

    def __init__(self, ownership: Ownership, batch: Batch) -> None:
        self._ownership, self._batch = ownership, batch

    def step(self, step: Step) -> tuple[Reply, list[Effect]]:
        row = self._ownership.rows.get(step.shard)
        if step.kind == Step.END:
            return self._end(row, step.run)
        if row is None or row.state is not State.SERVING:
            return Reply(outcome=Reply.NOT_SERVED), []
        if step.kind == Step.BEGIN:
            return self._begin(row, step), []
        fence = row.fence
        if fence is None or fence.run != step.run:
            return _other(row), []
        if step.kind == Step.SEAL and (fence.next != step.chunks or fence.later):
            return Reply(outcome=Reply.INCOMPLETE, fence=fence_to_pb(fence)), []
        self._set(row, replace(fence, beat=fence.beat + 1, sealed=fence.sealed or step.kind == Step.SEAL))
        return _done(row), []

    def _begin(self, row: Row, step: Step) -> Reply:
        fence, new = row.fence, Fence(step.run, step.name, step.generation)
        data = layout.data_range(row.start, row.end)
        if fence is None:
            if row.queue:
                return Reply(outcome=Reply.NOT_SERVED)  # the map changes it first
            if step.generation <= row.restored:
                return _other(row)  # late: that run, or a newer one, has ended here
            if self._batch.first(*data, 1):
                return Reply(outcome=Reply.HAS_DATA)
        elif fence.run == step.run:
            new = replace(fence, generation=max(fence.generation, step.generation), beat=fence.beat + 1)
        elif (fence.run, fence.beat) != (step.over_run, step.over_beat) or step.generation <= fence.generation:
            return _other(row)
        else:
            self._batch.delete_range(*data)
        self._set(row, new)
        return _done(row)

    def _end(self, row: Row | None, run: str) -> tuple[Reply, list[Effect]]:
        if row is None or row.fence is None:
            return Reply(outcome=Reply.DONE), []  # by an earlier attempt
        if row.fence.run != run:
            return _other(row), []
        if not row.fence.sealed:
            return Reply(outcome=Reply.INCOMPLETE, fence=fence_to_pb(row.fence)), []
        return Reply(outcome=Reply.DONE), self._ownership.unfenced(row.shard)

    def chunk(self, chunk: Chunk) -> Reply:
        """Put the pairs of a chunk in. Its digest was checked before it was logged."""
        row = self._ownership.rows.get(chunk.shard)
        if row is None:
            return Reply(outcome=Reply.NOT_SERVED)
        fence = row.fence
        if fence is None or fence.run != chunk.run:
            return _other(row)
        if chunk.number < fence.next or chunk.number in fence.later:
            return _done(row)
        if chunk.number >= fence.next + WINDOW:
            return Reply(outcome=Reply.TOO_FAR, fence=fence_to_pb(fence))
        try:
            _, _, pairs = frames.unpack_page(chunk.page)
        except MalformedFrame:
            return Reply(outcome=Reply.MALFORMED)
        if fence.sealed or not _inside([key for key, _ in pairs], row):
            return Reply(outcome=Reply.MALFORMED)
        self._batch.changes.update(pairs)
        first, later = fence.next, {*fence.later, chunk.number}
        while first in later:
            later.remove(first)
            first += 1
        self._set(row, replace(fence, next=first, later=tuple(sorted(later))))
        return _done(row)

    def _set(self, row: Row, fence: Fence) -> None:
        row.fence = fence
        self._ownership.changed.add(row.shard)


def _inside(keys: Sequence[bytes], row: Row) -> bool:
    """Whether these are engine keys of the shard's data, each once and in order."""
    low, high = layout.data_range(row.start or b"\0", row.end)  # no key is empty
    return bool(keys) and low <= keys[0] and keys[-1] < high and all(map(lt, keys, keys[1:]))


def _done(row: Row) -> Reply:
    assert row.fence is not None
    return Reply(outcome=Reply.DONE, start=row.start, end=row.end, fence=fence_to_pb(row.fence))


def _other(row: Row) -> Reply:
    """The fence is another run's; where there is none, what is told is the generation to exceed."""
    fence = row.fence or Fence("", "", row.restored)
    return Reply(outcome=Reply.OTHER_RUN, fence=fence_to_pb(fence))


def fenced(ownership: Ownership) -> Reply:
    """The shards that are being restored."""
    reply = Reply(outcome=Reply.DONE)
    for row in ownership.rows.values():
        if row.fence is not None:
            reply.fenced.add(shard=row.shard, fence=fence_to_pb(row.fence), start=row.start, end=row.end)
    return reply
