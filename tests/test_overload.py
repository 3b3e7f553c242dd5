"""More work than a server takes: it says so, clerks back off, and everything is done in the end."""

from __future__ import annotations

import asyncio

from shardkv.client.errors import Busy
from shardkv.raft import errors
from shardkv.raft.protocol.ready import Options
from tests.sim.world import World, in_world

CALLERS = 400


@in_world(groups=(1,), core=Options(max_uncommitted_bytes=4_000))
async def test_a_leader_that_is_busy_sheds_and_clerks_come_back_later(world: World) -> None:
    leader = await world.leader(1)
    propose, shed = leader.rsm.core.propose, 0

    def counted(data: bytes) -> tuple[int, int]:
        nonlocal shed
        try:
            return propose(data)
        except errors.Busy:
            shed += 1
            raise

    leader.rsm.core.propose = counted  # type: ignore[method-assign]
    for process in world.of(1):
        process.disk.faults.sync_seconds = (0.02, 0.05)  # slow enough for work to pile up
    clerks = [world.clerk(timeout=60.0) for _ in range(40)]

    async def call(number: int) -> None:
        for turn in range(5):
            await clerks[number % len(clerks)].append(b"key-%d" % number, b"%d;" % turn)

    await asyncio.gather(*(call(number) for number in range(CALLERS)))
    assert shed > 0
    for number in range(CALLERS):
        assert await clerks[0].get(b"key-%d" % number) == b"0;1;2;3;4;", "once each, in order"
    world.check_failures()


@in_world(groups=(1,))
async def test_a_clerk_s_own_queue_is_bounded(world: World) -> None:
    clerk = world.clerk(timeout=5.0)
    await clerk.put(b"k", b"v")
    clerk._core._max_outstanding = 100
    done = await asyncio.gather(*(clerk.put(b"k%d" % n, b"v") for n in range(300)), return_exceptions=True)
    refused = [error for error in done if isinstance(error, Busy)]
    assert len(refused) == 200 and done.count(None) == 100
    await clerk.put(b"k", b"v")
