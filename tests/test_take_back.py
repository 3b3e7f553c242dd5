"""Hand-overs that cannot go on, or that the map ends: the giver serves again, and never beside the taker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

import pytest

from shardkv.client import AsyncShardClerk
from shardkv.observe.overview import problems, what_waits
from shardkv.raft.protocol.space import Room
from shardkv.server.giver import Closing, Pace
from shardkv.shardctrler.shard_map import Change, Group, Merge, Move, Split
from shardkv.state.cursor import JOURNAL
from shardkv.state.ownership import Ownership
from shardkv.state.row import Row, State
from shardkv.wire.calls import Unreachable
from tests.sim import world as sim
from tests.sim.world import World, in_world
from tests.test_sharded_kv import KEYS, all_there, fill, rows, shards_of

quick = pytest.mark.quick
SERVED_SECONDS = 8.0  # within which a shard is served again, virtual


async def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.0005)


def state_at(world: World, gid: int, shard: int) -> set[State]:
    """The states of the shard's row at the replicas of a group that are up."""
    up = [process for process in world.of(gid) if process.server is not None]
    return {rows(process)[shard].state for process in up if shard in rows(process)}


def cut(world: World, one: int, other: int) -> None:
    """The two groups do not hear each other any more; each goes on by itself."""
    pairs = {(a.address, b.address) for a in world.of(one) for b in world.of(other)}
    world.network.cut = pairs | {(b, a) for a, b in pairs}


async def _write_on(clerk: AsyncShardClerk, values: dict[bytes, bytes]) -> None:
    while True:
        await asyncio.gather(*(clerk.put(key, value) for key, value in values.items()))


async def freeze(world: World) -> tuple[int, list[bytes], dict[bytes, bytes]]:
    """Begin to move a shard from group 1 to 2, and cut them off from each other when it is frozen."""
    values = await fill(world, 200)
    shard = (await shards_of(world, 1))[0]
    keys = [key for key in KEYS if (await world.config()).by_id[shard].contains(key)]
    assert len(keys) > 2
    noise = {keys[0] + b"-%d" % n: bytes(50) for n in range(8)}
    clerk = world.clerk()
    await asyncio.gather(*(clerk.put(key, value) for key, value in noise.items()))
    writing = asyncio.ensure_future(_write_on(clerk, noise))  # so that something is left for the end
    await world.move(shard, 2)
    await wait_for(lambda: State.FROZEN in state_at(world, 1, shard))
    writing.cancel()
    values |= noise
    cut(world, 1, 2)
    await asyncio.sleep(1.0)
    assert State.SERVING not in state_at(world, 2, shard), "the last answer did not arrive"
    return shard, keys, values


async def is_served(world: World, key: bytes) -> None:
    clerk = world.clerk()
    async with asyncio.timeout(SERVED_SECONDS):
        await clerk.put(key, b"served")
        assert await clerk.get(key) == b"served"


@contextmanager
def no_pulls(world: World) -> Iterator[None]:
    """Questions of takers are lost, those of givers are not."""
    call = world.network.call

    async def lossy(source: str, target: str, method: str, payload: bytes, timeout: float) -> bytes:
        if method == "shard.pull":
            await asyncio.sleep(0.01)
            raise Unreachable(f"{target}: lost")
        return await call(source, target, method, payload, timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.network, "call", lossy)
        yield


@in_world()
async def test_a_taker_that_loses_its_room_lets_the_giver_serve_again(world: World) -> None:
    """In the middle of the pause: everything was copied but the end, and the taker's disks get low."""
    clerk = world.clerk()
    shard, keys, values = await freeze(world)
    append = asyncio.ensure_future(clerk.append(keys[0], b"+once"))
    for process in world.of(2):
        world.set_room(process, Room.LOW)
    await asyncio.sleep(1.0)
    assert not append.done(), "nobody serves it"
    world.network.heal()
    async with asyncio.timeout(SERVED_SECONDS):
        await append
    assert state_at(world, 1, shard) & {State.LENDING} and state_at(world, 2, shard) == {State.PULLING}
    assert not any(taken(world, shard)), "what it had taken in is gone: its disks may need the room"
    values[keys[0]] += b"+once"
    assert await clerk.delete(keys[1]) is True  # the taker has a copy of it from before
    del values[keys[1]]
    await clerk.put(keys[2], b"new")
    values[keys[2]] = b"new"
    await asyncio.sleep(10.0)
    assert State.FROZEN not in state_at(world, 1, shard), "it closes only for a taker that has room"
    await all_there(world, values)
    for process in world.of(2):
        world.set_room(process, Room.PLENTY)
    await world.settle()
    assert shard in await shards_of(world, 2)
    await world.converge(20.0)
    assert state_at(world, 2, shard) == {State.SERVING}
    await all_there(world, values)
    world.compare_replicas()
    world.check_leftovers()


@in_world()
async def test_a_frozen_giver_keeps_its_copy_until_the_taker_serves(world: World) -> None:
    """They are cut off from each other before the last chunk: what the giver has is all that there is."""
    shard, _, values = await freeze(world)
    assert state_at(world, 1, shard) == {State.FROZEN}
    world.network.heal()
    await world.settle()
    await all_there(world, values)


@in_world()
async def test_a_write_whose_answer_was_lost_is_done_once_through_a_thaw(world: World) -> None:
    """Done at the giver before it closed; the retry comes after the giver serves again, and then the taker."""
    clerk = world.clerk()
    key = KEYS[0]
    shard = (await world.config()).lookup(key)
    giver, taker = shard.gid, 3 - shard.gid
    await clerk.append(key, b"1;")
    lost = {(process.address, "clerk-0:1") for process in world.of(giver)}
    world.network.cut = set(lost)  # answers vanish
    append = asyncio.ensure_future(clerk.append(key, b"2;"))
    await asyncio.sleep(0.2)
    await world.move(shard.id, taker)
    await wait_for(lambda: State.FROZEN in state_at(world, giver, shard.id))
    cut(world, giver, taker)
    await asyncio.sleep(1.0)
    with no_pulls(world):
        world.network.cut = set(lost)
        await wait_for(lambda: state_at(world, giver, shard.id) == {State.LENDING})
        assert not append.done()
        world.network.heal()
        await append
        assert state_at(world, giver, shard.id) == {State.LENDING}, "the giver answered"
        assert await world.clerk().get(key) == b"1;2;"
    await world.settle()
    assert await world.clerk().get(key) == b"1;2;"


@in_world()
async def test_a_giver_does_not_close_for_a_taker_without_room(world: World) -> None:
    values = await fill(world, 200)
    for process in world.of(2):
        world.set_room(process, Room.LOW)
    await asyncio.sleep(1.0)
    moved = await shards_of(world, 1)
    for shard in moved:
        await world.move(shard, 2)
    await wait_for(lambda: all(state_at(world, 1, shard) == {State.LENDING} for shard in moved))
    seen: set[State] = set()
    for _ in range(300):
        await asyncio.sleep(0.05)
        for shard in moved:
            seen |= state_at(world, 1, shard)
    assert seen == {State.LENDING}
    await all_there(world, values)
    assert any("have no room" in line for line in problems(await world.overview()))


@in_world(pace=Pace(close_at=-1, patience=1_000_000_000))
async def test_a_giver_does_not_close_for_a_taker_that_lost_its_room_at_the_end_of_the_copy(
    world: World,
) -> None:
    """All is copied and the giver has not closed yet; from there on it would close at the next question."""
    values = await fill(world, 200)
    shard = (await shards_of(world, 1))[0]
    await world.move(shard, 2)
    await wait_for(lambda: any(rows(p)[shard].cursor.phase == JOURNAL for p in world.of(2) if shard in rows(p)))
    for process in world.of(2):
        world.set_room(process, Room.LOW)
    await asyncio.sleep(1.0)
    for process in world.of(1):
        process.server._loans = Closing(Pace())  # type: ignore[union-attr]
    seen: set[State] = set()
    for _ in range(400):
        await asyncio.sleep(0.01)
        seen |= state_at(world, 1, shard)
    assert seen == {State.LENDING}
    for process in world.of(2):
        world.set_room(process, Room.PLENTY)
    await world.settle()
    await all_there(world, values)


@in_world()
async def test_a_shard_larger_than_the_taker_s_room_stays_where_it_is(world: World) -> None:
    """No disk is low, and the shard would not fit: the taker's other shards go on, and take writes."""
    values = await fill(world, 2000)
    shard = (await shards_of(world, 1))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sim.FREE_BYTES, Room.PLENTY, sim.FREE_BYTES[Room.LOW] + 5000)
        await asyncio.sleep(1.0)
        await world.move(shard, 2)
        await asyncio.sleep(15.0)
        assert state_at(world, 1, shard) == {State.LENDING}
        assert not any(row_bytes for row_bytes in taken(world, shard)), "nothing of it was taken in"
        await fill(world, 2000)
        assert any("have no room for the" in line for line in problems(await world.overview()))
    await world.settle()
    await all_there(world, values)


def taken(world: World, shard: int) -> list[int]:
    found = []
    for process in world.of(2):
        row = rows(process)[shard]
        engine = process.group.machine.engine
        found.append(sum(1 for _ in engine.scan(b"d" + row.start, b"d" + row.end if row.end else b"e")))
    return found


@in_world()
async def test_a_taker_that_cannot_reach_the_giver_lets_it_serve_again(world: World) -> None:
    """Calls from 2 to 1 are lost and those from 1 to 2 are not: by time, for 1 says that it waits."""
    shard, keys, values = await freeze(world)
    with no_pulls(world):
        world.network.heal()
        await is_served(world, keys[0])
        assert state_at(world, 1, shard) >= {State.LENDING}
    await world.settle()
    await all_there(world, values | {keys[0]: b"served"})


@pytest.mark.parametrize("room", [Room.PLENTY, Room.LOW])
def test_a_move_back_ends_a_hand_over_that_is_not_finished(room: Room) -> None:
    @in_world()
    async def story(world: World) -> None:
        shard, keys, values = await freeze(world)
        for process in world.of(2):
            world.set_room(process, room)
        await world.move(shard, 1)
        await asyncio.sleep(1.0)
        epoch = (await world.config()).by_id[shard].epoch
        world.network.heal()
        await world.settle(10.0)
        row = rows(await world.leader(1))[shard]
        assert row.state is State.SERVING and row.epoch == epoch
        await wait_for(lambda: state_at(world, 2, shard) == {State.ABSENT})
        await all_there(world, values)
        await is_served(world, keys[0])
        world.check_leftovers()
        for process in world.of(2):
            world.set_room(process, Room.PLENTY)
        await world.move(shard, 2)  # and the next one is like any other
        await world.settle()
        await all_there(world, values | {keys[0]: b"served"})
        assert rows(await world.leader(2))[shard].given_up == ()

    story()


@in_world()
async def test_moves_back_and_forth_while_the_taker_is_down_end_where_the_map_says(world: World) -> None:
    values = await fill(world, 200)
    shard = (await shards_of(world, 1))[0]
    for process in world.of(2):
        await world.crash(process)
    for _ in range(3):
        await world.move(shard, 2)
        await world.move(shard, 1)
    clerk = world.clerk()
    assert await clerk.get(KEYS[0]) == values[KEYS[0]]
    await world.start_all()
    await world.settle()
    await wait_for(lambda: state_at(world, 2, shard) == {State.ABSENT})
    await all_there(world, values)


@in_world(groups=(1, 2, 3), shards=6)
async def test_a_move_to_a_dead_group_holds_up_no_split_or_merge_and_is_taken_back_without_it(
    world: World,
) -> None:
    """Of other shards at once; of the moved one as soon as the map gives it back: the giver asks nobody."""
    values = await fill(world, 200)
    config = await world.config()
    stuck, other = await shards_of(world, 1)
    third = (await shards_of(world, 3))[0]
    moved = [key for key in KEYS if config.by_id[stuck].contains(key)]
    for process in world.of(2):
        await world.crash(process)
    await world.move(stuck, 2)
    for shard in (other, third):
        await world.split(shard, [key for key in KEYS if config.by_id[shard].contains(key)][1])
        await has_done_all(world, config.by_id[shard].gid)
        await world.merge(shard)
        await has_done_all(world, config.by_id[shard].gid)
    assert state_at(world, 1, stuck) == {State.LENDING}
    await is_served(
        world, moved[0]
    )  # who asks is told nothing by the dead group: the map says who had it before
    told = f"take the move back: `shardkv admin move {stuck} 1`"
    assert any(told in line for line in problems(await world.overview()))
    assert any(told in line for line in what_waits(await world.overview())), "what `--wait` says"
    await world.move(stuck, 1)
    await wait_for(lambda: state_at(world, 1, stuck) == {State.SERVING}, SERVED_SECONDS)
    await world.split(stuck, moved[1])
    for key in moved:
        await is_served(world, key)
        values[key] = b"served"
    await world.start_all()
    await world.settle()
    await all_there(world, values)


async def has_done_all(world: World, gid: int) -> None:
    """Until every replica of a group has done what the map of now asks it for."""
    num = (await world.config()).num
    machines = [process.group.machine.ownership for process in world.of(gid)]
    await wait_for(
        lambda: all(
            machine.config_num == num and not any(row.queue or row.inherits for row in machine.rows.values())
            for machine in machines
        ),
        SERVED_SECONDS,
    )


@pytest.mark.parametrize("side", ["giver", "taker"])
@pytest.mark.parametrize("seed", range(3))
def test_leaders_change_while_a_hand_over_is_taken_back(side: str, seed: int) -> None:
    @in_world(seed=seed)
    async def story(world: World) -> None:
        shard, keys, values = await freeze(world)
        for process in world.of(2):
            world.set_room(process, Room.LOW)
        await asyncio.sleep(0.8)
        world.network.heal()
        for _ in range(4):
            await asyncio.sleep(world.rng.uniform(0, 0.3))
            await world.restart(await world.leader(1 if side == "giver" else 2))
        async with asyncio.timeout(SERVED_SECONDS):
            assert await world.clerk().get(keys[0]) == values[keys[0]]
        if seed % 2:
            await world.move(shard, 1)
        for process in world.of(2):
            world.set_room(process, Room.PLENTY)
        await world.settle()
        await all_there(world, values)
        world.check_leftovers()

    story()


# ---- the rule, by itself: two groups, and answers that may be acted on at any time later

ONE, TWO = Group(1, ("a:1",), 1), Group(2, ("b:1",), 1)


class Two:
    """The rows of one shard at giver and taker, and every answer that either ever gave."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.config: list[Change] = [Change(1, moves=(Move(1, b"", b"", None, ONE),))]
        self.holder, self.other = ONE, TWO
        self.groups = {1: Ownership(1, joins=(1, 1)), 2: Ownership(2, joins=(1, 1))}
        self.answers: list[Callable[[], object]] = []
        self.counts = {"thaws": 0, "taken back": 0, "kept": 0, "installs": 0, "ended": 0}

    def move(self) -> None:
        """To the other group, which may have left and joined again since it had the shard."""
        num = len(self.config) + 1
        joined: tuple[Group, ...] = ()
        if self.rng.random() < 0.3:
            self.config.append(Change(num, left=(self.other.gid,)))
            num += 1
            self.other = Group(self.other.gid, self.other.addresses, num)
            joined = (self.other,)
        self.config.append(Change(num, joined=joined, moves=(Move(1, b"", b"", self.holder, self.other),)))
        self.holder, self.other = self.other, self.holder

    def cut(self) -> None:
        """Whoever has the shard by the map splits it and merges it again."""
        num, gid = len(self.config) + 1, self.holder.gid
        self.config.append(Change(num, split=Split(1, b"m", 2 * num, gid)))
        self.config.append(Change(num + 1, merge=Merge(1, 2 * num, gid)))

    def learn(self, mine: Ownership) -> None:
        change = self.config[mine.config_num]
        if not mine.may_learn(change):
            mine.claimed(change.num)
        mine.learn(change)

    def step(self) -> None:
        rng = self.rng
        gid = rng.choice([1, 2])
        mine, other = self.groups[gid], self.groups[3 - gid]
        row, far = mine.rows.get(1), other.rows.get(1)
        action = rng.randrange(9)
        for each in mine.rows.values():
            if each.inherits and rng.random() < 0.5:
                mine.inherited(each.shard)
                return
        if action == 0 and len(self.config) < 12:
            self.cut() if rng.random() < 0.3 else self.move()
        elif action <= 2 and mine.config_num < len(self.config):
            self.learn(mine)
        elif action == 3 and self.answers:
            rng.choice(self.answers)()  # however old
        elif row is None or far is None:
            return
        elif action == 4 and row.state is State.PULLING:
            mine.abandoned(1, row.epoch, row.attempt) if rng.random() < 0.3 else None
            if row.comes_back and rng.random() < 0.5:
                mine.gave_up(1, row.epoch)
            elif other.has_ended(1, row.epoch):
                epoch = row.epoch
                self.answers.append(self._counted("ended", lambda: mine.gave_up(1, epoch, is_ended=True)))
        elif action == 8 and row.comes_back:  # whatever state the leader saw before
            epoch = row.epoch
            self.answers.append(self._counted("kept", lambda: mine.took_back(1, epoch, False)))
        elif (
            action == 5 and far.state is State.PULLING
        ):  # it has all but the end: a question may be old when heard
            epoch, attempt = far.epoch, rng.choice([far.attempt, max(0, far.attempt - 1)])
            self.answers.append(lambda: mine.closed(1, epoch, attempt))
            if rng.random() < 0.8:
                mine.closed(1, epoch, attempt)
        elif action == 6 and row.state is State.FROZEN:  # the end of the copy, for one attempt
            self.answers.append(self._installing(other, row.epoch, row.attempt))
        elif action == 7 and far.state in (State.FROZEN, State.LENDING):  # "do you serve?"
            epoch = far.epoch
            if mine.serves_epoch(1, epoch):
                self.answers.append(lambda: other.released(1, epoch))
            if mine.has_given_up(1, epoch):
                self.answers.append(self._counted("taken back", lambda: other.took_back(1, epoch, True)))
            attempt = mine.attempt_at(1, epoch)
            self.answers.append(self._counted("thaws", lambda: other.thawed(1, epoch, attempt)))

    def finish(self) -> None:
        """Both hear everything and run their errands until nothing is left to do."""
        for _ in range(80):
            for gid, mine in self.groups.items():
                other = self.groups[3 - gid]
                if mine.config_num < len(self.config):
                    self.learn(mine)
                for each in list(mine.rows.values()):
                    if each.inherits:
                        mine.inherited(each.shard)
                row, far = mine.rows.get(1), other.rows.get(1)
                if row is not None and far is not None:
                    self._errand(mine, row, other, far)
                self.check()

    @staticmethod
    def _errand(mine: Ownership, row: Row, other: Ownership, far: Row) -> None:
        """As the migrator of `mine` would, with answers of now."""
        epoch = row.epoch
        if row.state is State.PULLING:
            if row.comes_back:
                mine.gave_up(1, epoch)
            elif other.has_ended(1, epoch) and row.goes_on:
                mine.gave_up(1, epoch, is_ended=True)
            elif far.epoch == epoch and far.attempt <= row.attempt:
                other.closed(1, epoch, row.attempt)
                if (far.state, far.attempt) == (State.FROZEN, row.attempt):
                    mine.installed(1, epoch)
        elif row.state is State.LENDING and row.comes_back:
            mine.took_back(1, epoch, was_asked=False)
        elif row.state is State.FROZEN and other.serves_epoch(1, epoch):
            mine.released(1, epoch)
        elif row.state is State.FROZEN and other.has_given_up(1, epoch):
            mine.took_back(1, epoch, was_asked=True)
        elif row.state is State.FROZEN:
            mine.thawed(1, epoch, other.attempt_at(1, epoch))

    def check_settled(self) -> None:
        """As the map says, and nobody waits."""
        for gid, group in self.groups.items():
            row = group.rows.get(1)
            serves = row is not None and row.state is State.SERVING
            assert serves == (gid == self.holder.gid), f"group {gid}: {row}"
            assert all(not row.queue for row in group.rows.values()), f"group {gid}: {group.rows}"

    def _counted(self, name: str, act: Callable[[], object]) -> Callable[[], object]:
        def acted() -> None:
            self.counts[name] += bool(act())

        return acted

    def _installing(self, taker: Ownership, epoch: int, attempt: int) -> Callable[[], object]:
        def install() -> None:  # as `ShardMachine._install_chunk` judges it
            row = taker.rows.get(1)
            if row is not None and (row.state, row.epoch, row.attempt) == (State.PULLING, epoch, attempt):
                taker.installed(1, epoch)
                self.counts["installs"] += 1

        return install

    def check(self) -> None:
        serving = [gid for gid, group in self.groups.items() if 1 in group.rows and group.rows[1].serves]
        assert len(serving) < 2, "both serve it"
        for group in self.groups.values():
            group.check()

    def held(self) -> bool:
        """Somebody has all of it: it serves, or keeps it closed."""
        full = (State.SERVING, State.LENDING, State.FROZEN)
        return any(1 in group.rows and group.rows[1].state in full for group in self.groups.values())


def walk(seed: int) -> Two:
    two = Two(Random(seed))
    two.groups[1].learn(two.config[0])
    for _ in range(300):
        two.step()
        two.check()
        assert two.held(), "nobody has the data any more"
    two.finish()
    two.check_settled()
    return two


@quick
def test_giver_and_taker_never_both_serve_whatever_is_taken_back_when() -> None:
    totals = {"thaws": 0, "taken back": 0, "kept": 0, "installs": 0, "ended": 0}
    for seed in range(1500):
        for name, count in walk(seed).counts.items():
            totals[name] += count
    assert min(totals.values()) > 100, totals


@quick
def test_a_giver_that_joined_again_says_that_it_has_taken_back() -> None:
    """Seed 8 of the soak: for the taker the shard goes on to another group, and it pulled for ever."""
    again = Group(1, ("a:1",), 3)
    giver, taker = Ownership(1, joins=(1, 1)), Ownership(2, joins=(1, 1))
    there = Change(2, moves=(Move(1, b"", b"", ONE, TWO),), left=(1,))
    back = Change(3, moves=(Move(1, b"", b"", TWO, again),), joined=(again,))
    giver.learn(Change(1, moves=(Move(1, b"", b"", None, ONE),)))
    taker.learn(Change(1))
    giver.learn(there)
    giver.claimed(3)
    taker.learn(there)
    assert not taker.gave_up(1, 2, is_ended=True), "it does not know yet where the shard goes next"
    for group in (giver, taker):
        group.learn(back)
    assert not taker.rows[1].comes_back and not taker.gave_up(1, 2)
    assert not giver.has_ended(1, 2)
    assert giver.took_back(1, 2, was_asked=False) and giver.rows[1].state is State.SERVING
    assert giver.has_ended(1, 2)
    assert taker.gave_up(1, 2, is_ended=True) and taker.rows[1].state is State.ABSENT


def _always_thaws(patch: pytest.MonkeyPatch) -> None:
    """Without asking: by time alone."""

    def thawed(self: Ownership, shard: int, epoch: int, attempt: int) -> bool:
        row = self.rows[shard]
        return original(self, shard, epoch, row.attempt + 1)

    original = Ownership.thawed
    patch.setattr(Ownership, "thawed", thawed)


def _abandons_after_it_installed(patch: pytest.MonkeyPatch) -> None:
    """It answers that it let go, and installs all the same."""
    patch.setattr(Ownership, "attempt_at", lambda self, shard, epoch: self.rows[shard].attempt + 1)


def _installs_any_attempt(patch: pytest.MonkeyPatch) -> None:
    def installing(self: Two, taker: Ownership, epoch: int, attempt: int) -> Callable[[], object]:
        def install() -> None:
            row = taker.rows.get(1)
            if row is not None and (row.state, row.epoch) == (State.PULLING, epoch):
                taker.installed(1, epoch)

        return install

    patch.setattr(Two, "_installing", installing)


def _takes_back_without_asking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ownership, "has_given_up", lambda self, shard, epoch: True)


def _keeps_what_it_closed(patch: pytest.MonkeyPatch) -> None:
    """The leader saw that it had not closed; its log closed meanwhile."""

    def took_back(self: Ownership, shard: int, epoch: int, was_asked: bool) -> object:
        return original(self, shard, epoch, True)

    original = Ownership.took_back
    patch.setattr(Ownership, "took_back", took_back)


def _gives_up_what_goes_on(patch: pytest.MonkeyPatch) -> None:
    """The taker says so, and keeps its row."""

    def gave_up(self: Ownership, shard: int, epoch: int, is_ended: bool = False) -> list[object]:
        self.rows[shard].given_up += (epoch,)
        return []

    patch.setattr(Ownership, "gave_up", gave_up)


def _keeps_what_the_taker_splits(patch: pytest.MonkeyPatch) -> None:
    """The taker waits for the shard, to split it; nobody will ever give it."""
    patch.setattr(Ownership, "_note_cuts", lambda self, change: None)


def _never_says_that_it_took_it_back(patch: pytest.MonkeyPatch) -> None:
    """Seeds 0 to 99 of the soak: a taker whose giver has joined again waited for ever."""
    patch.setattr(Ownership, "has_ended", lambda self, shard, epoch: False)


@quick
@pytest.mark.parametrize(
    "mutant",
    [
        _keeps_what_the_taker_splits,
        _never_says_that_it_took_it_back,
        _always_thaws,
        _abandons_after_it_installed,
        _installs_any_attempt,
        _takes_back_without_asking,
        _keeps_what_it_closed,
        _gives_up_what_goes_on,
    ],
)
def test_the_walk_finds_what_takes_back_unsafely(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def walk_on() -> None:
        for seed in range(1500):
            walk(seed)

    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        walk_on()
