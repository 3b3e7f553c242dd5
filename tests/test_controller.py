"""The shard controller: MIT 6.824 lab 4A (scenarios C-1 to C-6), and its bad input."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv import shardkv_pb2 as kv
from shardkv.raft.machine import STAMP
from shardkv.raft.protocol.types import Entry, Kind
from shardkv.shardctrler import planner
from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.client import AdminRefused, ControllerClient
from shardkv.shardctrler.codec import change_from_pb, change_to_pb, config_from_pb, config_to_pb
from shardkv.shardctrler.machine import PAGE_BYTES, ControllerMachine
from shardkv.shardctrler.planner import Refused
from shardkv.shardctrler.rebalance import plan
from shardkv.shardctrler.shard_map import Change, Config, Group
from shardkv.state.machine import ShardMachine
from tests.sim.disk import SimDisk
from tests.sim.network import SimDialer
from tests.sim.world import World, in_world


def group(gid: int) -> Group:
    return Group(gid, (f"h{gid}:1",))


def config_with(gids: list[int], shards: int = 10) -> Config:
    config = Config()
    change = planner.initialize(config, shards)
    assert change is not None
    config.apply(change)
    if gids:
        config.apply(planner.join(config, [group(gid) for gid in gids]))
    return config


def join_request(*gids: int) -> pb.AdminRequest:
    groups = [pb.Group(gid=gid, addresses=[f"h{gid}:1"]) for gid in gids]
    return pb.AdminRequest(join=pb.Join(groups=groups))


def level(config: Config) -> bool:
    counts = config.counts().values()
    return not counts or max(counts) - min(counts) <= 1


@in_world(groups=(), shards=10)
async def test_c_1_many_admins_join_and_leave_at_once(world: World) -> None:
    admins = [
        ControllerClient(world.controllers, SimDialer(world.network, f"admin-{n}:1"), Random(n))
        for n in range(8)
    ]

    async def story(n: int, admin: ControllerClient) -> None:
        await admin.admin(join_request(n + 1, n + 101), 60)
        await admin.admin(pb.AdminRequest(leave=pb.Leave(gids=[n + 101])), 60)

    stories = [asyncio.ensure_future(story(n, admin)) for n, admin in enumerate(admins)]
    await asyncio.sleep(0.05)
    await world.restart(await world.leader(0))
    await asyncio.gather(*stories)
    config = await world.config()
    assert sorted(config.groups) == list(range(1, 9)), "exactly the groups asked for"
    assert level(config) and all(shard.gid in config.groups for shard in config.by_id.values())
    assert config.num == 1 + 16, "each request counted once, whatever was retried"
    told = config_to_pb(config).SerializeToString()
    for process in world.of(0):
        await world.crash(process)
    await world.start_all()
    assert config_to_pb(await world.config()).SerializeToString() == told, "the same after a restart"
    await asyncio.sleep(1.0)
    for process in world.of(0):
        assert config_to_pb(process.controller.machine.config).SerializeToString() == told, "on every replica"


@in_world(groups=(), shards=5)
async def test_c_2_history_does_not_change(world: World) -> None:
    admin = world.controller
    for request in (join_request(1), join_request(2, 3), pb.AdminRequest(leave=pb.Leave(gids=[1]))):
        await admin.admin(request, 60)
    told = [config_to_pb(await world.config(n)) for n in range(5)]
    assert [config.num for config in told] == list(range(5))
    await admin.admin(join_request(9), 60)
    for process in world.of(0):
        await world.restart(process)
    assert [config_to_pb(await world.config(n)) for n in range(5)] == told


def test_c_3_a_move_stays_until_a_rebalancing_needs_it() -> None:
    config = config_with([1, 2], shards=4)
    shard = next(shard for shard in config.by_id.values() if shard.gid == 1)
    config.apply(planner.move(config, shard.id, 2))
    assert config.by_id[shard.id].gid == 2 and config.num == 3
    assert config.counts() == {1: 1, 2: 3}
    config.apply(planner.join(config, [group(3)]))
    assert level(config)


def test_c_4_joins_and_leaves_move_the_fewest() -> None:
    config = config_with([1, 2, 3], shards=12)
    change = planner.join(config, [group(4)])
    assert len(change.moves) == 3 and all(move.target and move.target.gid == 4 for move in change.moves)
    config.apply(change)
    leaving = {shard.id for shard in config.by_id.values() if shard.gid == 2}
    change = planner.leave(config, [2])
    assert {move.shard for move in change.moves} == leaving


@given(
    st.dictionaries(st.integers(1, 40), st.integers(0, 8), max_size=40),
    st.sets(st.integers(1, 8), min_size=1),
)
@settings(max_examples=300, deadline=None)
def test_c_4_plans_are_level_minimal_and_deterministic(owners: dict[int, int], live: set[int]) -> None:
    moves = plan(owners, live)
    after = owners | moves
    counts = dict.fromkeys(live, 0)
    for gid in after.values():
        counts[gid] += 1
    assert max(counts.values()) - min(counts.values()) <= 1
    assert all(owners[shard] != gid for shard, gid in moves.items()), "nothing moves to where it is"
    # No plan can move fewer: every homeless shard must, and every one above the best targets.
    held = sorted((sum(1 for g in owners.values() if g == gid) for gid in live), reverse=True)
    least, extra = divmod(len(owners), len(live))
    above = sum(max(0, have - (least + (rank < extra))) for rank, have in enumerate(held))
    homeless = sum(1 for gid in owners.values() if gid not in live)
    assert len(moves) == homeless + above
    assert plan(dict(reversed(owners.items())), sorted(live, reverse=True)) == moves


def test_c_5_the_last_group_leaves_and_its_data_stays_known() -> None:
    config = config_with([1], shards=3)
    config.apply(planner.leave(config, [1], force=True))
    assert all(shard.gid == 0 and shard.holder == 1 for shard in config.by_id.values())
    change = planner.join(config, [group(2)])
    assert all(move.source and move.source.gid == 1 for move in change.moves), "the data comes from group 1"
    back = planner.join(config, [group(1)])
    assert not any(move.hands_over for move in back.moves), "its own data needs no hand-over"
    config.apply(back)
    config.check()


def test_c_5_more_groups_than_shards() -> None:
    config = config_with([1, 2, 3, 4, 5], shards=3)
    assert sorted(config.counts().values()) == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        ("DuplicateGroup", join_request(1)),
        ("DuplicateGroup", join_request(7, 7)),
        ("BadRequest", pb.AdminRequest(join=pb.Join())),
        ("BadRequest", pb.AdminRequest(join=pb.Join(groups=[pb.Group(gid=9)]))),
        ("BadRequest", pb.AdminRequest(join=pb.Join(groups=[pb.Group(gid=9, addresses=["nonsense"])]))),
        ("BadRequest", pb.AdminRequest(join=pb.Join(groups=[pb.Group(gid=9, addresses=["h1:1"])]))),
        ("BadRequest", pb.AdminRequest(join=pb.Join(groups=[pb.Group(gid=0, addresses=["h:9"])]))),
        ("UnknownGroup", pb.AdminRequest(leave=pb.Leave(gids=[9]))),
        ("BadRequest", pb.AdminRequest(leave=pb.Leave())),
        ("LastGroup", pb.AdminRequest(leave=pb.Leave(gids=[1, 2]))),
        ("LastGroup", pb.AdminRequest(leave=pb.Leave(gids=[2, 1, 2]))),
        ("UnknownGroup", pb.AdminRequest(move=pb.MoveShard(shard=1, gid=9))),
        ("UnknownShard", pb.AdminRequest(move=pb.MoveShard(shard=99, gid=1))),
        ("UnknownShard", pb.AdminRequest(split=pb.SplitShard(shard=99, key=b"k"))),
        ("KeyOutsideShard", pb.AdminRequest(split=pb.SplitShard(shard=1, key=b"\xff"))),
        ("KeyOutsideShard", pb.AdminRequest(split=pb.SplitShard(shard=1, key=b""))),
        ("UnknownShard", pb.AdminRequest(merge=pb.MergeShard(shard=99))),
        ("NoNeighbour", pb.AdminRequest(merge=pb.MergeShard(shard=4))),
        ("BadRequest", pb.AdminRequest()),
    ],
)
def test_c_5_bad_requests_are_refused_and_change_nothing(kind: str, request_: pb.AdminRequest) -> None:
    @in_world(groups=(), shards=4)
    async def story(world: World) -> None:
        await world.controller.admin(join_request(1, 2), 60)
        before = await world.config()
        with pytest.raises(AdminRefused) as refused:
            await world.controller.admin(request_, 60)
        assert refused.value.kind == kind
        assert config_to_pb(await world.config()) == config_to_pb(before)

    story()


def test_merging_across_groups_is_refused() -> None:
    config = config_with([1, 2], shards=2)
    with pytest.raises(Refused, match="move one of them first"):
        planner.merge(config, 1)


@given(st.lists(st.tuples(st.sampled_from("jlmsgr"), st.integers(0, 50), st.binary(max_size=3)), max_size=40))
@settings(max_examples=200, deadline=None)
def test_c_6_ranges_cover_all_keys_after_any_history(steps: list[tuple[str, int, bytes]]) -> None:
    config = config_with([1], shards=4)
    changes: list[Change] = []
    next_shard = 100
    for kind, number, key in steps:
        shard = sorted(config.by_id)[number % len(config.by_id)]
        gid = number % 6 + 1
        try:
            match kind:
                case "j":
                    change = planner.join(config, [group(gid)])
                case "l":
                    change = planner.leave(config, [gid], force=True)
                case "m":
                    change = planner.move(config, shard, gid)
                case "s":
                    change = planner.split(config, config.lookup(key).id, key, next_shard)
                    next_shard += 1
                case "g":
                    change = planner.merge(config, shard)
                case _:
                    change = planner.rebalance(config)
        except Refused:
            continue
        assert change_from_pb(change_to_pb(change)) == change, "what travels is what was planned"
        config.apply(change)
        changes.append(change)
        config.check()
        if kind in "jlr":
            assert level(config)
    for key in (b"\x00", b" ", b"m", b"\xff\xff"):
        assert config.lookup(key).contains(key)
    again = config_with([1], shards=4)
    for change in changes:
        again.apply(change)
    assert again == config == config_from_pb(config_to_pb(config)), "the changes are the whole history"


# ---- changes of any size


LONG_ADDRESSES = [f"{'a' * 240}-{n}.example:7400" for n in range(8)]


def far_group(gid: int) -> pb.Group:
    return pb.Group(gid=gid, addresses=[f"{gid}-{address}" for address in LONG_ADDRESSES])


class Asked:
    """A controller's machine, and requests as its log would bring them."""

    def __init__(self, shards: int) -> None:
        self.machine = ControllerMachine(SimDisk(Random(1)).open())
        self._index = 0
        self.ask(pb.AdminRequest(initialize=pb.Initialize(shards=shards)))

    def ask(self, request: pb.AdminRequest) -> pb.AdminReply:
        self._index += 1
        request.session, request.seq, request.issued_ms = bytes(16), self._index, 1
        entry = Entry(self._index, 1, Kind.COMMAND, STAMP.pack(1, 0) + request.SerializeToString())
        return pb.AdminReply.FromString(self.machine.apply([entry])[0])


def test_changes_are_paged_by_bytes_and_all_arrive() -> None:
    """66 changes of 2,048 moves with long addresses did not fit into one answer, and never arrived."""
    asked = Asked(shards=2048)
    asked.ask(pb.AdminRequest(join=pb.Join(groups=[far_group(1)])))
    for _ in range(4):
        asked.ask(pb.AdminRequest(join=pb.Join(groups=[far_group(2)])))
        asked.ask(pb.AdminRequest(leave=pb.Leave(gids=[1])))
        asked.ask(pb.AdminRequest(join=pb.Join(groups=[far_group(1)])))
        asked.ask(pb.AdminRequest(leave=pb.Leave(gids=[2])))
    known, pages = 0, 0
    while page := asked.machine.changes_since(known, 256):
        assert [change.num for change in page] == list(range(known + 1, known + 1 + len(page)))
        assert sum(change.ByteSize() for change in page) <= PAGE_BYTES or len(page) == 1
        known, pages = page[-1].num, pages + 1
    assert known == asked.machine.config.num == 18 and pages > 4
    assert any(change.ByteSize() > PAGE_BYTES for change in asked.machine.changes_since(1, 1)), (
        "alone on its page"
    )


def test_a_change_that_is_too_large_to_travel_is_refused_and_changes_nothing() -> None:
    asked = Asked(shards=4096)
    group = pb.Group(gid=1, addresses=[f"{n}-{address}" for n in range(5) for address in LONG_ADDRESSES])
    before = asked.machine.dump()
    reply = asked.ask(pb.AdminRequest(join=pb.Join(groups=[group])))
    assert reply.refusal == "TooLarge" and reply.num == asked.machine.config.num == 1
    assert not asked.machine.changes_since(1, 1) and not asked.machine.config.groups
    assert pb.State.FromString(before).config == pb.State.FromString(asked.machine.dump()).config
    assert not asked.ask(pb.AdminRequest(join=pb.Join(groups=[far_group(1)]))).refusal


@in_world(groups=(), shards=2048, replicas=1, controllers=1)
async def test_groups_learn_large_changes_page_by_page(world: World) -> None:
    """A group that was down for many of them."""
    await world.start_group(1)
    groups = [pb.Group(gid=gid, addresses=far_group(gid).addresses) for gid in (2, 3)]
    first = pb.Group(gid=1, addresses=[process.address for process in world.of(1)])
    await world.controller.admin(pb.AdminRequest(join=pb.Join(groups=[first])), 60)
    process = world.of(1)[0]
    await world.crash(process)
    for _ in range(3):
        await world.controller.admin(pb.AdminRequest(join=pb.Join(groups=groups)), 60)
        await world.controller.admin(pb.AdminRequest(leave=pb.Leave(gids=[2, 3])), 60)
    latest = (await world.config()).num
    learns: list[int] = []
    apply = ShardMachine._learn

    def learn(self: ShardMachine, message: kv.Learn):  # type: ignore[no-untyped-def]
        learns.append(message.ByteSize())
        return apply(self, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardMachine, "_learn", learn)
        await world.start(process)
        async with asyncio.timeout(60):
            while process.server is None or process.group.machine.ownership.config_num < latest:
                await asyncio.sleep(0.05)
    assert len(learns) > 1 and max(learns) < 2 * PAGE_BYTES
