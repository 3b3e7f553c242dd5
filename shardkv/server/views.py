"""For backups: views of all that a replica holds, page by page, and the log that it has applied since.

A view costs a replica little (RocksDB keeps old tables until it is closed), but must not be
forgotten: there are few at once, and one that nobody asks for is closed after a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from shardkv import shardkv_pb2 as pb
from shardkv.raft.errors import Busy
from shardkv.raft.replica import Replica
from shardkv.server.checking import Checks
from shardkv.state.machine import ShardMachine
from shardkv.storage.engine import View, ViewGone
from shardkv.wire import frames

MAX_VIEWS = 8
IDLE_SECONDS = 120.0
PAGE_BYTES = 256 << 10  # a millisecond of the event loop
LOG_BYTES = 4 << 20  # of one answer
MAX_WAIT_MS = 30_000


@dataclass(slots=True)
class _Open:
    view: View
    clock_ms: int
    config_num: int
    incarnation: int
    release: Callable[[], None]
    timer: asyncio.TimerHandle


class Views:
    """The views of one replica that are open."""

    def __init__(self, machine: ShardMachine, checks: Checks) -> None:
        self._machine, self._checks = machine, checks
        self._open: dict[int, _Open] = {}
        self._next = 0

    def answer(self, request: pb.ViewRequest) -> pb.ViewReply:
        """The next page of a view, or the first of a new one. Raises ViewGone, Busy."""
        if request.close:
            self._close(request.id)
            return pb.ViewReply(id=request.id)
        number = request.id or self._new(request.check)
        opened = self._open.get(number)
        if opened is None:
            raise ViewGone(f"there is no view {number} here any more")
        opened.timer.cancel()
        opened.timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._close, number)
        applied = opened.view.applied
        return pb.ViewReply(
            id=number,
            applied_index=applied.index,
            applied_term=applied.term,
            config_num=opened.config_num,
            clock_ms=opened.clock_ms,
            incarnation=opened.incarnation,
            page=_page(opened.view, request.cursor),
        )

    def _new(self, check: bytes) -> int:
        """A view of this moment, or the one that a check holds."""
        if len(self._open) >= MAX_VIEWS:
            raise Busy(f"{MAX_VIEWS} views are open")
        machine = self._machine
        if check:
            moment = self._checks.lend(check)
            view, clock_ms, config_num = moment.view, moment.clock_ms, moment.config_num
            incarnation = moment.incarnation
            release = moment.release
        else:
            view, clock_ms, config_num = machine.engine.view(), machine.clock_ms, machine.ownership.config_num
            incarnation = machine.incarnation
            release = view.close
        self._next += 1
        timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._close, self._next)
        self._open[self._next] = _Open(view, clock_ms, config_num, incarnation, release, timer)
        return self._next

    def _close(self, number: int) -> None:
        opened = self._open.pop(number, None)
        if opened is not None:
            opened.timer.cancel()
            opened.release()

    def close(self) -> None:
        for number in list(self._open):
            self._close(number)


def _page(view: View, cursor: bytes) -> bytes:
    pairs: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in view.scan(cursor):
        if size >= PAGE_BYTES:
            return frames.pack_page(False, key, pairs)
        pairs.append((key, value))
        size += len(key) + len(value)
    return frames.pack_page(True, b"", pairs)


async def read_log(replica: Replica, request: pb.LogRequest) -> pb.LogReply:
    """What this replica has applied after an index; nothing where that is compacted. Raises RaftError."""
    replica.check_serving()
    now_ms, clock_ms = replica.wall_ms(), replica.now_ms()  # when the call came, before the barrier
    if request.barrier:
        await replica.read_barrier()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + min(request.wait_ms, MAX_WAIT_MS) / 1000
    while replica.machine.applied.index <= request.after and loop.time() < deadline:
        await replica.next_turn()
    replica.check_running()
    applied = replica.machine.applied.index
    base_index, entries = replica.log_after(request.after, LOG_BYTES)
    assert isinstance(replica.machine, ShardMachine)
    reply = pb.LogReply(
        base_index=base_index,
        applied_index=applied,
        now_ms=now_ms,
        incarnation=replica.machine.incarnation,
        claimed=replica.machine.ownership.joins[0] > 0,
        clock_ms=clock_ms,
    )
    for entry in entries:
        reply.entries.add(index=entry.index, term=entry.term, kind=entry.kind, data=entry.data)
    return reply
