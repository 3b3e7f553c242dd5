"""The cluster as a backup reads it: views of groups, and their logs, from whichever replica answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Sequence
from random import Random

from google.protobuf.message import DecodeError

from shardkv import shardkv_pb2 as pb
from shardkv.backup.errors import BackupError
from shardkv.observe.compare import Begun, NotBegun, begin, close
from shardkv.shardctrler.client import AccessDenied
from shardkv.wire import frames
from shardkv.wire.calls import Code, Dialer, Unreachable, parse

CALL_SECONDS = 10.0
CLOCK_SECONDS = 2.0  # a replica that takes longer to say what time it is would say it too late
FAR = (1 << 63) - 1  # an index that no log comes to
PATIENCE_SECONDS = 30.0  # for some replica of a group to answer
RETRY_SECONDS = 0.1


class SourceLost(BackupError):
    """The replica that was read from is gone, or its view is: begin anew with another."""


class Compacted(BackupError):
    """The log does not reach back so far any more: it begins after `base_index`."""

    def __init__(self, base_index: int, after: int) -> None:
        super().__init__(f"the log begins after entry {base_index}, {after} was asked for")
        self.base_index = base_index


async def wall_clocks(dialer: Dialer, addresses: Sequence[str]) -> list[int]:
    """What the wall clocks of a group's replicas show (ms): of those that answer. Raises AccessDenied."""
    request = pb.LogRequest(after=FAR).SerializeToString()

    async def read(address: str) -> int:
        try:
            return pb.LogReply.FromString(await ask(dialer, address, "kv.log", request, CLOCK_SECONDS)).now_ms
        except (SourceLost, DecodeError):
            return 0

    return [now_ms for now_ms in await asyncio.gather(*map(read, addresses)) if now_ms]


class Throttle:
    """At most so many bytes a second, over all that share it."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._free_at = 0.0

    async def take(self, count: int) -> None:
        if self._rate <= 0:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        begin = max(now, self._free_at)
        self._free_at = begin + count / self._rate
        if begin > now:
            await asyncio.sleep(begin - now)


async def ask(
    dialer: Dialer, address: str, method: str, payload: bytes, timeout: float = CALL_SECONDS
) -> bytes:
    """Raises SourceLost, AccessDenied."""
    try:
        code, body = parse(await dialer.call(address, method, payload, timeout))
    except (Unreachable, ValueError) as error:
        raise SourceLost(str(error)) from None
    if code is Code.DENIED:
        raise AccessDenied(body.decode(errors="replace"))
    if code is not Code.OK:
        raise SourceLost(f"{address}: {code.name} {body.decode(errors='replace')}".strip())
    return body


class GroupView:
    """All that one replica held at one moment; the other members hold that moment as the check that began it."""

    def __init__(self, dialer: Dialer, address: str, first: pb.ViewReply, begun: Begun) -> None:
        self.address, self.begun = address, begun
        self.id, self.index, self.term = first.id, first.applied_index, first.applied_term
        self.config_num, self.clock_ms = first.config_num, first.clock_ms
        self.incarnation = first.incarnation
        self._dialer, self._first = dialer, first

    async def pages(self) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        """Pairs in key order. Raises SourceLost."""
        reply = self._first
        while True:
            finished, cursor, pairs = frames.unpack_page(reply.page)
            yield pairs
            if finished:
                return
            request = pb.ViewRequest(id=self.id, cursor=cursor)
            reply = await _view(self._dialer, self.address, request)

    async def close(self) -> None:
        """Let the replica go. Should it not hear of it, it finds out by itself."""
        try:
            await _view(self._dialer, self.address, pb.ViewRequest(id=self.id, close=True))
        except BackupError:
            pass


async def _view(dialer: Dialer, address: str, request: pb.ViewRequest) -> pb.ViewReply:
    try:
        return pb.ViewReply.FromString(await ask(dialer, address, "kv.view", request.SerializeToString()))
    except DecodeError as error:
        raise SourceLost(f"{address}: {error}") from None


async def open_view(
    dialer: Dialer, addresses: Sequence[str], rng: Random, without: Collection[str] = ()
) -> GroupView:
    """On any replica of a group but those in `without`, at an entry where all of them hold a view.

    Raises BackupError, AccessDenied.
    """
    try:
        begun = await begin(dialer, addresses)
    except NotBegun as error:
        raise SourceLost(f"no replica of {', '.join(addresses)} leads: {error}") from None
    why = "no replica is left that nothing is wrong with"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        sound = [address for address in begun.members if address not in without]
        for address in rng.sample(sound, len(sound)):
            try:
                request = pb.ViewRequest(check=begun.id)
                return GroupView(dialer, address, await _view(dialer, address, request), begun)
            except SourceLost as error:
                why = str(error)
        if not sound or time.monotonic() > deadline:
            await close(dialer, begun.members, begun.id)
            raise BackupError(f"no replica of {', '.join(addresses)} gives a view: {why}")
        await asyncio.sleep(RETRY_SECONDS)


async def read_log(
    dialer: Dialer, addresses: Sequence[str], after: int, wait: float, barrier: bool = False
) -> pb.LogReply:
    """What a group has applied after an index, from any replica that has it. Raises BackupError, Compacted."""
    request = pb.LogRequest(after=after, wait_ms=int(wait * 1000), barrier=barrier).SerializeToString()
    why, bases = "no replica is known", list[int]()
    for address in addresses:
        try:
            reply = pb.LogReply.FromString(await ask(dialer, address, "kv.log", request, CALL_SECONDS + wait))
        except (SourceLost, DecodeError) as error:
            why = str(error)
            continue
        if reply.base_index <= after:
            return reply
        bases.append(reply.base_index)
    if bases:
        raise Compacted(min(bases), after)  # the replica whose log reaches back furthest has the most to give
    raise SourceLost(why)
