"""One run of a restore: it fences every shard of the cluster, and opens all of them when all is written.

The groups keep the fences in their logs (`shardkv/state/restoring.py`). The fence of the shard that holds the
first key decides between runs: who holds it may take the others. A run beats there each second.
A run that finds that fence held watches it. If it beats, another restore is at work, and the newcomer
is refused. If it does not, that run was cut off, and the newcomer takes its place: shard by shard what was written is deleted.
A run whose fences were taken notices by its next step or chunk, and fails. No clock is compared.

The run ends in two steps. It seals every shard, the first one last: from then on the restore is done, and
nobody takes it over. Then it opens every shard, the first one last. A run that is cut off
between is ended by the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

from shardkv import shardkv_pb2 as pb
from shardkv.backup.errors import BackupError, first_error
from shardkv.backup.target import Reply, Step, Target
from shardkv.shardctrler.client import ControllerClient
from shardkv.shardctrler.key_range import inside
from shardkv.shardctrler.shard_map import Config
from shardkv.wire.calls import Dialer

BEAT_SECONDS = 1.0
WATCH_SECONDS = 6.0  # a run that does not beat for so long was cut off
QUERY_SECONDS = 10.0
SETTLE_SECONDS = 30.0  # for a shard that is on its way when the restore begins
RETRY_SECONDS = 0.2
HAS_DATA = "the cluster has data: restore into an empty one"


class RunLost(BackupError):
    """Another run has taken this one's place."""


@dataclass
class Fenced:
    """A shard that this run has fenced."""

    shard: int
    target: Target
    start: bytes
    end: bytes
    chunks: int = 0  # that were sent


class Run:
    """Get it from `held`."""

    def __init__(self, controller: ControllerClient, dialer: Dialer, name: str) -> None:
        self._controller, self._dialer = controller, dialer
        self._name, self._run, self._generation = name, secrets.token_hex(8), 1
        self._targets: dict[int, Target] = {}
        self.shards: list[Fenced] = []  # in key order

    @property
    def id(self) -> str:
        return self._run

    def check(self, fenced: Fenced, reply: Reply) -> None:
        """Raises BackupError where a step or chunk had no effect."""
        match reply.outcome:
            case Reply.DONE:
                return
            case Reply.OTHER_RUN:
                raise RunLost(
                    f"another run{_named(reply.fence)} has taken this restore's place at shard {fenced.shard}: "
                    "this run writes nothing more"
                )
            case outcome:
                raise BackupError(
                    f"shard {fenced.shard} of {fenced.target} does not go on with the restore: "
                    f"{Reply.Outcome.Name(outcome)}"
                )

    # ---- begin

    async def begin(self) -> None:
        """Fence every shard. Raises BackupError, AccessDenied, ControllerUnavailable."""
        position = b""
        try:
            while not self.shards or position:
                fenced = await self._fence(position)
                self.shards.append(fenced)
                position = fenced.end
        except _HasData:
            # Nothing was written. Open what was fenced.
            await self._end()
            raise BackupError(HAS_DATA) from None

    async def _fence(self, position: bytes) -> Fenced:
        """Fence the shard that holds the key `position`, wherever it is served."""
        deadline = asyncio.get_running_loop().time() + SETTLE_SECONDS
        why = "no group"
        while True:
            config = await self._controller.query(None, QUERY_SECONDS)
            shard = config.lookup(position)
            if shard.gid in config.groups:
                target, why = self._target(config, shard.gid), f"group {shard.gid}"
                reply = await self._begin(shard.id, target)
                if reply.outcome == Reply.DONE and _holds(reply, position):
                    return Fenced(shard.id, target, reply.start, reply.end)
            # A shard that was fenced by a run that was cut off stays where it was, whatever the map says now.
            for target, found in await self._look(config):
                if _holds(found, position):
                    reply = await self._begin(found.shard, target)
                    if reply.outcome == Reply.DONE:
                        return Fenced(found.shard, target, reply.start, reply.end)
            if asyncio.get_running_loop().time() > deadline:
                raise BackupError(
                    f"shard {shard.id}, which the map gives to {why}, is not served there: "
                    "`shardkv admin status` shows why"
                )
            await asyncio.sleep(RETRY_SECONDS)

    async def _begin(self, shard: int, target: Target) -> Reply:
        """Fence one shard, also in the place of a run that was cut off. Raises BackupError."""
        over = pb.RestoreFence()
        watched = False
        while True:
            reply = await target.step(
                Step(
                    kind=Step.BEGIN,
                    shard=shard,
                    run=self._run,
                    name=self._name,
                    generation=self._generation,
                    over_run=over.run,
                    over_beat=over.beat,
                )
            )
            if reply.outcome == Reply.HAS_DATA:
                raise _HasData
            if reply.outcome != Reply.OTHER_RUN:
                return reply
            if reply.fence.run and not self.shards:
                # The first shard: its fence decides.
                if watched:
                    raise BackupError(
                        f"another restore{_named(reply.fence)} is under way, or has just ended: "
                        "only one writes at a time"
                    )
                if reply.fence.sealed:
                    await self._end_other(reply.fence.run, shard, target)
                    raise BackupError(HAS_DATA)
                await asyncio.sleep(WATCH_SECONDS)
                watched = True
            over = reply.fence
            await self._exceed(reply.fence.generation)

    async def _exceed(self, generation: int) -> None:
        """Have a higher generation than that. Who holds the first shard's fence may."""
        if generation < self._generation:
            return
        self._generation = generation + 1
        if self.shards:
            first = self.shards[0]
            step = Step(
                kind=Step.BEGIN,
                shard=first.shard,
                run=self._run,
                name=self._name,
                generation=self._generation,
            )
            self.check(first, await first.target.step(step))

    def _target(self, config: Config, gid: int) -> Target:
        if gid not in self._targets:
            self._targets[gid] = Target(self._dialer, gid, config.groups[gid].addresses)
        return self._targets[gid]

    async def _look(self, config: Config) -> list[tuple[Target, pb.FencedShard]]:
        """All fences of the cluster."""
        targets = [self._target(config, gid) for gid in sorted(config.groups)]
        replies = await asyncio.gather(*(target.step(Step(kind=Step.LOOK)) for target in targets))
        return [
            (target, found) for target, reply in zip(targets, replies, strict=True) for found in reply.fenced
        ]

    # ---- while it lasts

    async def beat(self) -> None:
        """Show that this run lives, until it is cancelled. Raises BackupError, RunLost."""
        first = self.shards[0]
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            step = Step(kind=Step.BEAT, shard=first.shard, run=self._run)
            self.check(first, await first.target.step(step))

    # ---- end

    async def seal(self) -> None:
        """All is written. Raises BackupError, RunLost."""
        await asyncio.gather(*map(self._seal, self.shards[1:]))
        await self._seal(self.shards[0])

    async def _seal(self, fenced: Fenced) -> None:
        step = Step(kind=Step.SEAL, shard=fenced.shard, run=self._run, chunks=fenced.chunks)
        self.check(fenced, await fenced.target.step(step))

    async def open(self) -> None:
        """Open what is sealed to clients. Raises BackupError."""
        for fenced in reversed(self.shards):
            step = Step(kind=Step.END, shard=fenced.shard, run=self._run)
            self.check(fenced, await fenced.target.step(step))

    async def _end(self) -> None:
        if self.shards:
            await self.seal()
            await self.open()

    async def _end_other(self, run: str, first: int, target: Target) -> None:
        """A run that was cut off when all was written: open what it has not opened."""
        config = await self._controller.query(None, QUERY_SECONDS)
        for holder, found in await self._look(config):
            if found.fence.run == run and (found.shard, holder.gid) != (first, target.gid):
                await holder.step(Step(kind=Step.END, shard=found.shard, run=run))
        await target.step(Step(kind=Step.END, shard=first, run=run))


class _HasData(Exception):
    pass


def _holds(found: Reply | pb.FencedShard, key: bytes) -> bool:
    return inside(key, found.start, found.end)


def _named(fence: pb.RestoreFence) -> str:
    return f" ({fence.name})" if fence.name else ""


@contextlib.asynccontextmanager
async def held(controller: ControllerClient, dialer: Dialer, name: str) -> AsyncIterator[Run]:
    """Fence the cluster for a restore; when the block ends well, the cluster is opened. Raises BackupError.

    When the block fails, the fences stay, for what was written is not all.
    """
    run = Run(controller, dialer, name)
    await run.begin()
    try:
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(run.beat())
            yield run
            await run.seal()
            beating.cancel()
    except ExceptionGroup as failed:
        raise first_error(failed) from None
    await run.open()


async def abort(controller: ControllerClient, dialer: Dialer) -> int:
    """Delete what a restore that was cut off has written, and open the shards. Returns how many were fenced.

    Raises BackupError while that restore is at work.
    """
    run = Run(controller, dialer, "aborted")
    config = await controller.query(None, QUERY_SECONDS)
    found = sorted(await run._look(config), key=lambda item: item[1].start)
    for target, fenced in found:
        reply = await run._begin(fenced.shard, target)
        if reply.outcome != Reply.DONE:
            raise BackupError(f"shard {fenced.shard} of {target} changed meanwhile: abort again")
        run.shards.append(Fenced(fenced.shard, target, reply.start, reply.end))
    await run._end()
    return len(found)
