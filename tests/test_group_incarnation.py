"""A group's number may come back without its data: the incarnation tells the groups apart (issue 10, B9).

Without one, a group that had lost all of its disks came back empty and answered "absent", and a
number that was used again left shards stuck: the mutants of `tests/test_mutants.py` bring both back.
"""

from __future__ import annotations

import asyncio

import pytest

from shardkv.client.errors import DeadlineExceeded
from shardkv.observe.overview import problems
from shardkv.shardctrler import planner
from shardkv.shardctrler.claims import Claims
from shardkv.shardctrler.client import AdminRefused
from shardkv.shardctrler.planner import Refused
from shardkv.shardctrler.shard_map import Change, Config, Group, Move
from shardkv.state.ownership import Ownership
from shardkv.state.row import State
from tests.sim.workload import Workload
from tests.sim.world import World, in_world
from tests.test_sharded_kv import KEYS, all_there, fill, shards_of

quick = pytest.mark.quick


async def keys_of(world: World, gid: int) -> list[bytes]:
    config = await world.config()
    return [key for key in KEYS if config.lookup(key).gid == gid]


async def wait_for(world: World, text: str, seconds: float = 60.0) -> list[str]:
    """Wait until `status` names a problem; returns all that it names."""
    async with asyncio.timeout(seconds):
        while True:
            found = problems(await world.overview())
            if any(text in line for line in found):
                return found
            await asyncio.sleep(0.2)


# ---- all disks of a group are gone


@in_world()
async def test_a_group_that_lost_all_of_its_disks_serves_nothing(world: World) -> None:
    values = await fill(world)
    gone = await keys_of(world, 1)
    await world.lose_group(1)
    found = await wait_for(world, "another incarnation")
    assert [line for line in found if line.startswith("group 1: its replicas hold")], found
    clerk = world.clerk()
    for key in KEYS:
        if key in gone:
            for consistency in ("leader", "any", "stale"):
                with pytest.raises(DeadlineExceeded):
                    await clerk.get(key, timeout=0.5, consistency=consistency)
            with pytest.raises(DeadlineExceeded):
                await clerk.put(key, b"new", timeout=0.5)
        else:
            assert await clerk.get(key) == values[key]
    await world.restart(await world.leader(1))  # whoever leads next knows no better
    with pytest.raises(DeadlineExceeded):
        await clerk.get(gone[0], timeout=2.0)
    with pytest.raises(AdminRefused) as refused:
        await world.join(1)
    assert refused.value.kind == "DuplicateGroup"


@in_world()
async def test_shards_of_a_lost_group_are_never_taken_for_empty_ones(world: World) -> None:
    """It is let go of: whoever gets its shards asks the empty replicas, and must not believe them."""
    values = await fill(world)
    gone = await keys_of(world, 1)
    await world.lose_group(1)
    await world.leave(1)
    found = await wait_for(world, "is another group now")
    assert any("is stuck at group 2 (pulling)" in line and "whose disks are gone" in line for line in found)
    clerk = world.clerk()
    for key in KEYS:
        if key in gone:
            with pytest.raises(DeadlineExceeded):
                await clerk.get(key, timeout=0.5)
        else:
            assert await clerk.get(key) == values[key]


@in_world()
async def test_a_replica_that_only_missed_the_claim_is_not_taken_for_another_group(world: World) -> None:
    values = await fill(world)
    for process in world.of(1):
        await world.restart(process)
    await world.crash_all()
    await world.start_all()
    await world.settle()
    await all_there(world, values)
    incarnations = {p.rsm.machine.incarnation for p in world.of(1)}  # type: ignore[attr-defined]
    assert incarnations == {(await world.config()).claims[1]}


# ---- a number that is used again


@pytest.mark.parametrize("seed", range(6))
def test_a_number_that_is_used_again_leaves_nothing_stuck(seed: int) -> None:
    """Shards were moved before; it leaves in good order, its disks are wiped, and it joins again. Under load."""

    @in_world(seed=seed)
    async def story(world: World) -> None:
        values = await fill(world)
        work = Workload(seed, is_alone=False)
        for _ in range(2):
            work.start(world.clerk(), 2)
        for shard in await shards_of(world, 1):
            await world.move(shard, 2)
        await world.settle()
        for shard in (await shards_of(world, 2))[:3]:
            await world.move(shard, 1)
        await world.settle()
        for _ in range(2):
            old = (await world.config()).claims[1]
            await world.leave(1)
            await world.settle()
            await world.lose_group(1)
            await world.join(1)
            await world.settle()
            assert (await world.config()).claims[1] != old
            assert await shards_of(world, 1), "it has its share again"
            leader = await world.leader(1)
            machine = leader.group.machine
            assert machine.ownership.joins[0] == (await world.config()).groups[1].joined
        await work.stop()
        await work.read_all(world.clerk())
        assert work.judge() > 100
        clerk = world.clerk()
        for key in values.keys() - set(work.keys):
            assert await clerk.get(key) == values[key]
        # The simulated wall clocks are up to two seconds wrong, which is no matter here.
        assert not [line for line in problems(await world.overview()) if "wall clock" not in line]

    story()


@in_world(groups=(1,))
async def test_the_last_group_leaves_is_wiped_and_joins_again(world: World) -> None:
    """The map left its shards with it: no group has them now, and the new one must not make them up."""
    await fill(world)
    await world.leave(1, force=True)
    await world.lose_group(1)
    await world.join(1)
    found = await wait_for(world, "is another group now")
    assert any("is stuck at group 1 (pulling)" in line for line in found), found
    with pytest.raises(DeadlineExceeded):
        await world.clerk().get(KEYS[0], timeout=0.5)


@in_world(groups=(1,))
async def test_the_last_group_leaves_and_comes_back_with_its_disks(world: World) -> None:
    values = await fill(world)
    claimed = (await world.config()).claims[1]
    await world.leave(1, force=True)
    for process in world.of(1):
        await world.restart(process)
    await world.join(1)
    await world.settle()
    await all_there(world, values)
    assert (await world.config()).claims == {1: claimed}


@in_world()
async def test_a_group_that_first_started_after_its_second_join_owes_what_the_first_got(world: World) -> None:
    """Joined, gone and joined again before a replica ran: group 2 waits for the shards of the first join."""
    values = await fill(world)
    for process in world.of(2):
        await world.crash(process)
    await world.join(3)
    await world.leave(3)
    await world.join(3)
    await world.start_all()
    await world.settle()
    await all_there(world, values)


# ---- the pieces


@quick
def test_a_join_belongs_to_the_first_incarnation_that_asks() -> None:
    claims = Claims()
    with pytest.raises(Refused):
        claims.claim(1, 7, 0)
    claims.joined(1, 2)
    assert claims.claim(1, 7, 0) == 2 and claims.claim(1, 7, 0) == 2 and claims.claim(1, 7, 2) == 2
    for num in (0, 2):
        with pytest.raises(Refused) as refused:
            claims.claim(1, 8, num)
        assert refused.value.kind == "OtherIncarnation"
    with pytest.raises(Refused) as refused:
        claims.claim(1, 7, 5)
    assert refused.value.kind == "UnknownGroup"
    with pytest.raises(Refused):
        claims.claim(1, 0, 2)
    claims.joined(1, 9)
    assert claims.claim(1, 8, 0) == 9 and claims.holder(1) == 8
    claims.joined(1, 12)
    with pytest.raises(Refused):
        claims.claim(1, 7, 12)  # 8 came between
    assert claims.claim(1, 7, 2) == 2, "what it has stays its own"
    assert claims.claim(1, 8, 12) == 12 and claims.claim(1, 8, 0) == 9


@quick
def test_nothing_is_learnt_before_a_claim_nor_before_the_join_that_was_claimed() -> None:
    one, two = Group(1, ("a:1",), 5), Group(2, ("b:1",), 2)
    ours = Ownership(1)
    before = Change(1, moves=(Move(1, b"", b"", None, Group(1, ("a:1",), 1)),))
    assert not ours.may_learn(before)
    assert ours.claimed(5) and not ours.claimed(5)
    assert ours.config_num == 4 and ours.is_other(1, 1) and not ours.is_us(1, 1)
    # Of the old group of our number: its shard goes to another group, and that is not about us.
    ours.learn(Change(5, joined=(one,), moves=(Move(1, b"", b"", Group(1, ("a:1",), 1), two),)))
    assert not ours.rows
    assert not ours.may_learn(Change(6, joined=(Group(1, ("a:1",), 6),)))
    assert not ours.is_us(1, 6) and not ours.is_other(1, 6), "it may turn out to be ours"
    assert ours.refused(6) and ours.is_other(1, 6) and ours.is_us(1, 5)


@quick
def test_a_shard_of_an_old_group_of_our_number_is_gained_like_any_other() -> None:
    old, new = Group(1, ("a:1",), 1), Group(1, ("a:1",), 5)
    ours = Ownership(1, joins=(5, 5), config_num=4)
    ours.learn(Change(5, joined=(new,), moves=(Move(1, b"", b"", old, new),)))
    assert ours.rows[1].state is State.PULLING and ours.rows[1].peer == old
    same = Ownership(1, joins=(1, 5), config_num=4)
    same.learn(Change(5, joined=(new,), moves=(Move(1, b"", b"", old, new),)))
    assert not same.rows, "the holder came back: nothing to hand over"


@quick
def test_the_addresses_of_a_peer_that_joined_again_are_asked_first_and_the_old_ones_too() -> None:
    ours = Ownership(2, joins=(1, 1))
    ours.learn(Change(1, moves=(Move(1, b"", b"", Group(1, ("a:1", "b:1"), 1), Group(2, ("c:1",), 1)),)))
    ours.learn(Change(2, joined=(Group(1, ("x:1", "a:1"), 2),)))
    assert ours.rows[1].peer == Group(1, ("x:1", "a:1", "b:1"), 1)


@quick
def test_the_map_names_the_join_with_every_move() -> None:
    config = Config()
    config.apply(planner.join(config, [Group(1, ("a:1",)), Group(2, ("b:1",))]))
    assert {group.joined for group in config.groups.values()} == {1}
    config.claims[1] = 7
    config.apply(planner.leave(config, [1]))
    assert not config.claims
    change = planner.join(config, [Group(1, ("a:1",))])
    config.apply(change)
    assert config.groups[1].joined == 3 and 1 not in config.claims
    moved = planner.move(config, 1, 1 if config.by_id[1].gid == 2 else 2)
    assert {moved.moves[0].source.joined, moved.moves[0].target.joined} == {1, 3}  # type: ignore[union-attr]
    assert planner.readdress(config, Group(1, ("a:1",))) is None
    readdressed = planner.readdress(config, Group(1, ("z:1",)))
    assert readdressed is not None and readdressed.readdressed[0].joined == 3
