"""Replicas go and others come, at other addresses: clients, groups and admins find them by themselves."""

from __future__ import annotations

import asyncio
import json

import pytest

from shardkv.client.routing import STALE_SECONDS
from shardkv.shardctrler import planner
from shardkv.shardctrler.planner import Refused
from shardkv.shardctrler.shard_map import Change, Config, Group, Move
from shardkv.state.ownership import Ownership
from shardkv.wire.calls import Code
from tests.sim.network import SimDialer
from tests.sim.world import CONTROLLER, World, in_world


async def replace_everybody(world: World, gid: int, names: str, keep: int = 0) -> list[str]:
    """Three new replicas at new addresses take the place of the group's; the old processes end, but for `keep`."""
    old = world.of(gid)
    addresses = {100 + n: f"{names}-{n}:1" for n in (1, 2, 3)}
    for node in addresses:
        process = world._add(gid, node, addresses)
        process.joining = True
        await world.start(process)
    dialer, payload = SimDialer(world.network, "operator:1"), json.dumps({"voters": addresses}).encode()
    async with asyncio.timeout(60):
        while True:
            leader = await world.leader(gid)
            answer = await dialer.call(leader.address, "raft.members", payload, 30.0)
            if answer[0] == Code.OK:
                break
            await asyncio.sleep(0.1)
    for process in old[keep:]:
        world.kill(process)
    for process in old:
        del world.processes[process.address]
    return sorted(addresses.values())


@in_world(groups=(1, 2), controllers=3)
async def test_a_group_whose_replicas_all_moved_is_found_by_old_and_new_clerks(world: World) -> None:
    old_clerk = world.clerk()
    for n in range(20):
        await old_clerk.put(bytes([33 + 4 * n]), b"%d" % n)
    before = (await world.config()).num
    addresses = await replace_everybody(world, 1, "new")
    async with asyncio.timeout(30):
        while sorted((await world.config()).groups[1].addresses) != addresses:
            await asyncio.sleep(0.05)
    config = await world.config()
    assert config.num == before + 1, "told once, however many replicas and leaders there were"
    for clerk in (old_clerk, world.clerk()):
        for n in range(20):
            assert await clerk.get(bytes([33 + 4 * n])) == b"%d" % n
    # And other groups find them: everything moves away from them, and back.
    await world.leave(1)
    await world.settle()
    await world.join(1)
    await world.settle()
    for n in range(20):
        assert await old_clerk.get(bytes([33 + 4 * n])) == b"%d" % n


@in_world(groups=(1,), controllers=3)
async def test_controllers_that_moved_are_found_by_all_who_asked_while_one_was_left(world: World) -> None:
    """Groups wait for news all the time, and clerks in use ask now and then."""
    clerk = world.clerk()
    await clerk.put("k", "v")
    first = world.of(CONTROLLER)
    addresses = await replace_everybody(world, CONTROLLER, "ctl-new", keep=1)
    await world.controller.changes(0, 0.0, 30.0, limit=1)
    assert sorted(world.controller._addresses) == addresses
    group = await world.leader(1)
    async with asyncio.timeout(30):
        while sorted(group.group.migrator._controller._addresses) != addresses:
            await asyncio.sleep(0.05)
    for _ in range(2):
        await asyncio.sleep(STALE_SECONDS)
        await clerk.get("k")
    for process in first:
        world.kill(process)
    await world.join(2)
    await world.settle()
    assert await clerk.get("k") == b"v"
    assert await world.clerk().get("k") == b"v"


def two_groups() -> Config:
    config = Config()
    config.apply(planner.join(config, [Group(1, ("a:1", "b:1")), Group(2, ("c:1",))]))
    return config


@pytest.mark.quick
def test_what_makes_no_sense_as_an_address_is_refused() -> None:
    config = two_groups()
    for group, kind in (
        (Group(3, ("x:1",)), "UnknownGroup"),
        (Group(1, ()), "BadRequest"),
        (Group(1, ("nowhere",)), "BadRequest"),
        (Group(1, ("c:1",)), "BadRequest"),
        (Group(1, ("x:1", "x:1")), "BadRequest"),
    ):
        with pytest.raises(Refused) as refused:
            planner.readdress(config, group)
        assert refused.value.kind == kind
    assert planner.readdress(config, Group(2, ("c:1",))) is None, "the map says so already"
    change = planner.readdress(config, Group(1, ("b:1", "x:1")))
    assert change is not None
    config.apply(change)
    config.check()
    assert config.groups[1].addresses == ("b:1", "x:1")


@pytest.mark.quick
def test_a_hand_over_under_way_goes_on_at_the_new_address() -> None:
    ours = Ownership(1, joins=(1, 1))
    source, target = Group(2, ("old:1",), 1), Group(1, ("us:1",), 1)
    ours.learn(Change(1, joined=(source, target), moves=(Move(7, b"", b"", source, target),)))
    assert ours.addresses == ("us:1",)
    ours.changed.clear()
    ours.learn(Change(2, readdressed=(Group(2, ("new:1",), 1),)))
    assert ours.rows[7].peer == Group(2, ("new:1",), 1) and ours.changed == {7}
    ours.learn(Change(3, readdressed=(Group(1, ("us:2",), 1),)))
    assert ours.addresses == ("us:2",)
    ours.learn(Change(4, left=(1,)))
    assert ours.addresses == ()
