"""A group that is one state machine behind a dialer: tests say what becomes of each frame on its way.

Everything but the network and the log is real: frames, admission, apply, exactly-once records and reads. So a
test can lose a request or its answer, or let a frame arrive after later ones, and see what the clerk makes of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from random import Random

from shardkv.raft.machine import STAMP
from shardkv.raft.protocol.types import Entry, Kind
from shardkv.server.admission import Admission
from shardkv.server.reading import Reader
from shardkv.shardctrler import planner
from shardkv.shardctrler import shardctrler_pb2 as ctl
from shardkv.shardctrler.codec import change_to_pb, config_to_pb
from shardkv.shardctrler.shard_map import Config, Group
from shardkv.state import commands
from shardkv.state.machine import ShardMachine
from shardkv.storage.memory import MemoryEngine
from shardkv.wire import frames
from shardkv.wire.calls import Code, Unreachable, answer, refuse
from shardkv.wire.frames import Limits
from tests.sim.disk import SimDisk

NOW_MS = 1_700_000_000_000

# What becomes of a frame.
DONE = "done"
LOST = "lost"  # it never arrives
MUTE = "mute"  # it is done, and its answer is lost
LATE = "late"  # nobody answers in time; it is done when the test says so (`arrive`)
Fate = str | Code


class OneGroup:
    """See `raft.interfaces.Dialer`. `fate` says what becomes of a frame; by default it is done."""

    def __init__(self, shards: int = 1) -> None:
        self.config = Config()
        self.machine = ShardMachine(1, MemoryEngine(SimDisk(Random(1)).open()))
        first = planner.initialize(self.config, shards)
        assert first is not None
        self.config.apply(first)
        second = planner.join(self.config, [Group(1, ("g:1",))])
        self.config.apply(second)
        self.machine.ownership.claimed(2)
        self._log(commands.learn([change_to_pb(change).SerializeToString() for change in (first, second)]))
        self.reader = Reader(self.machine, nullcontext)
        self.limits = Limits()
        self.has_room = True
        self.fate: Callable[[bytes], Fate] = lambda frame: DONE
        self.gate = asyncio.Event()
        self.gate.set()
        self.frames: list[bytes] = []
        self.late: list[bytes] = []

    def _log(self, command: bytes) -> bytes:
        index = self.machine.applied.index + 1
        data = STAMP.pack(NOW_MS + index, NOW_MS) + command
        (reply,) = self.machine.apply([Entry(index, 1, Kind.COMMAND, data)])
        return reply

    def arrive(self, frame: bytes) -> bytes:
        """A write frame comes to the leader."""
        header = frames.check_frame(frame, frames.WRITE, self.limits)
        admission = Admission(frame, header, self.limits, self.has_room)
        taken = admission.frame
        answered = self._log(commands.frame(taken, self.limits.value_bytes)) if taken is not None else None
        return admission.reply(self.machine.clock_ms, answered, lambda shard: None)

    async def read(self, frame: bytes) -> bytes:
        header = frames.check_frame(frame, frames.READ, self.limits)
        if header.plain:
            return await self.reader.read(frame)
        admission = Admission(frame, header, self.limits, True)
        answered = await self.reader.read(admission.frame) if admission.frame is not None else None
        return admission.reply(self.machine.clock_ms, answered, lambda shard: None)

    def value(self, key: bytes) -> bytes | None:
        return self.machine.engine.get(b"d" + key)

    async def call(self, address: str, method: str, payload: bytes, timeout: float) -> bytes:
        if method == "ctl.changes":
            return answer(
                ctl.ChangesReply(num=self.config.num, clock_ms=NOW_MS, cluster="c").SerializeToString()
            )
        if method == "ctl.query":
            return answer(config_to_pb(self.config).SerializeToString())
        self.frames.append(payload)
        fate = self.fate(payload)
        await asyncio.sleep(0)
        await self.gate.wait()
        if isinstance(fate, Code):
            return refuse(fate, "said the test")
        if fate in (LOST, LATE):
            if fate == LATE:
                self.late.append(payload)
            raise Unreachable("g:1: no answer within the test's patience")
        if method == "kv.write":
            reply = self.arrive(payload)
        else:
            reply = await self.read(payload)
        if fate == MUTE:
            raise Unreachable("g:1: the answer is lost")
        return answer(reply)

    async def close(self) -> None: ...


def operations(frame: bytes) -> list[tuple[int, int, bytes, bytes]]:
    """(kind, number, key, value) of each write in a frame."""
    return [
        operation
        for section in frames.unpack_sections(frame)
        for operation in zip(section.kinds, section.seqs, section.keys, section.values, strict=True)
    ]
