"""A group that a restore writes to: asks its leader, whoever that is, until it answers. Every step may be repeated."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from shardkv import shardkv_pb2 as pb
from shardkv.backup.errors import BackupError
from shardkv.shardctrler.client import AccessDenied
from shardkv.shardctrler.shard_map import Gid
from shardkv.wire.backoff import longer
from shardkv.wire.calls import Code, Dialer, Unreachable, parse

CALL_SECONDS = 10.0
PATIENCE_SECONDS = 60.0  # for a group to have a leader that answers
BACKOFF_SECONDS = (0.02, 0.5)

Step = pb.RestoreStep
Reply = pb.RestoreReply


class Target:
    def __init__(self, dialer: Dialer, gid: Gid, addresses: Sequence[str]) -> None:
        assert addresses, "a group has addresses"
        self.gid = gid
        self._dialer, self._addresses = dialer, tuple(addresses)
        self._leader = addresses[0]

    def __str__(self) -> str:
        return f"group {self.gid}"

    async def step(self, step: Step) -> Reply:
        """Raises BackupError, AccessDenied."""
        return await self._ask("kv.restore", step.SerializeToString())

    async def chunk(self, chunk: bytes) -> Reply:
        """`chunk`: an encoded RestoreChunk. Raises BackupError, AccessDenied."""
        return await self._ask("kv.restore_chunk", chunk)

    async def _ask(self, method: str, payload: bytes) -> Reply:
        loop = asyncio.get_running_loop()
        deadline, backoff = loop.time() + PATIENCE_SECONDS, BACKOFF_SECONDS[0]
        while True:
            address = self._leader
            try:
                code, body = parse(await self._dialer.call(address, method, payload, CALL_SECONDS))
                if code is Code.OK:
                    return Reply.FromString(body)
                why = f"{address}: {code.name} {body.decode(errors='replace')}".strip()
            except (Unreachable, ValueError, DecodeError) as error:
                code, body, why = Code.STOPPED, b"", str(error)
            if code is Code.DENIED:
                raise AccessDenied(body.decode(errors="replace"))
            if code in (Code.BAD_REQUEST, Code.NO_ROOM):
                raise BackupError(f"{self} does not take the restore: {why}")
            if loop.time() > deadline:
                raise BackupError(f"{self} has not answered for {PATIENCE_SECONDS:.0f} s: {why}")
            if self._leader == address:  # else another call has found out more
                hint = body.decode(errors="replace") if code is Code.NOT_LEADER else ""
                if hint and hint != address:
                    self._leader = hint
                elif code is not Code.BUSY:
                    at = self._addresses.index(address) if address in self._addresses else -1
                    self._leader = self._addresses[(at + 1) % len(self._addresses)]
            await asyncio.sleep(backoff)
            backoff = longer(backoff, BACKOFF_SECONDS)
