"""Damage in a replica's own state: it stops, says which file, and is repaired by its peers. No promise is broken on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random

import pytest

from shardkv.observe.overview import notes, problems
from shardkv.raft.damage import DAMAGE_FILE, OFTEN, DamageBook
from shardkv.raft.errors import DamagedState, NotLeader, StorageError
from shardkv.raft.protocol.core import Raft
from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.membership import Memberships
from shardkv.raft.protocol.messages import (
    AppendEntries,
    AppendReply,
    Envelope,
    Message,
    RequestVote,
    RequestVoteReply,
    TimeoutNow,
)
from shardkv.raft.protocol.progress import OLD_NEWS_BEATS, Mode
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.ready import Options
from shardkv.raft.protocol.roles import Leader
from shardkv.raft.protocol.types import Entry, HardState, Kind
from shardkv.raft.reconfigure import reconfigure
from shardkv.raft.state_file import STATE_ASIDE, STATE_FILE
from tests.sim import loop
from tests.sim.disk import SimDirectory, SimDisk
from tests.sim.raft_world import RaftWorld, in_world
from tests.sim.world import World
from tests.sim.world import in_world as in_cluster

THREE = Membership.of({1: "n1", 2: "n2", 3: "n3"})

# ---- the bare core


def entries(first: int, last: int, term: int = 1) -> tuple[Entry, ...]:
    return tuple(Entry(index, term, Kind.COMMAND, b"%d" % index) for index in range(first, last + 1))


def without_state(id: int = 2) -> Raft:
    """A follower whose log goes from entry 11 to 20, and whose state machine is empty."""
    log = Log(10, 1, entries(11, 20))
    core = Raft(
        id, Memberships(10, Membership(frozenset())), log, HardState(1), 10, Random(id), Options(), True
    )
    return core


def said(core: Raft, kind: type[Message]) -> list[Message]:
    """The messages of this kind that leave now, and those that leave once the disk has what they rest on."""
    ready = core.ready(0.0)
    promises: tuple[Envelope, ...] = ()
    if ready.write is not None:
        core.written(ready.write)
        promises = ready.write.promises
    core.check()
    return [e.message for e in (*ready.messages, *promises) if isinstance(e.message, kind)]


@pytest.mark.quick
def test_a_replica_without_a_state_keeps_its_promises_and_makes_new_ones() -> None:
    core = without_state()
    core.step(Envelope(1, 2, 1, AppendEntries(20, 1, entries(21, 22), 20, 0)))
    [reply] = said(core, AppendReply)
    assert isinstance(reply, AppendReply)
    assert reply.success and reply.match_index == 22 and reply.state_lost
    core.step(Envelope(3, 2, 2, RequestVote(False, 21, 1, transfer=True)))
    assert said(core, RequestVoteReply) == [RequestVoteReply(False, False)], "its log is longer: it counts"
    core.step(Envelope(3, 2, 3, RequestVote(False, 22, 1, transfer=True)))
    assert said(core, RequestVoteReply) == [RequestVoteReply(False, True)]


@pytest.mark.quick
def test_a_replica_without_a_state_never_leads_and_answers_no_reads() -> None:
    core = without_state()
    core.memberships.restore(10, THREE)  # even where it knows that it votes
    for _ in range(200):
        core.tick(0.0)
    core.step(Envelope(1, 2, 1, AppendEntries(20, 1, (), 20, 0)))
    core.step(Envelope(1, 2, 1, TimeoutNow()))
    for _ in range(200):
        core.tick(0.0)
    assert not said(core, RequestVote) and core.term == 1
    core.step(Envelope(1, 2, 1, AppendEntries(20, 1, (), 20, 0)))
    with pytest.raises(NotLeader):
        core.read(1, 0.0)


@pytest.mark.quick
def test_nothing_is_applied_or_compacted_before_the_snapshot_is_in() -> None:
    core = without_state()
    core.step(Envelope(1, 2, 1, AppendEntries(20, 1, (), 20, 0)))
    assert core.ready(0.0).committed == () and not core.has_more_to_apply() and core.commit_index == 20
    with pytest.raises(AssertionError):
        core.compact(10)
    assert core.wants_snapshot(10) and not core.wants_snapshot(9), "its log goes on from 10, not from 9"
    assert not core.restore(15, 1, THREE), "the log has the entry: its suffix is kept"
    assert core.log.base_index == 10 and core.log.last_index == 20 and core.commit_index == 20
    assert [entry.index for entry in core.ready(0.0).committed] == [16, 17, 18, 19, 20]
    assert core.membership == THREE and not core.wants_snapshot(20)
    core.read(1, 0.0)
    core.step(Envelope(1, 2, 1, AppendEntries(20, 1, (), 20, 0)))
    [reply] = said(core, AppendReply)
    assert isinstance(reply, AppendReply) and not reply.state_lost
    core.check()


@pytest.mark.quick
def test_a_snapshot_beyond_the_log_begins_it_anew() -> None:
    core = without_state()
    assert core.restore(30, 1, THREE)
    assert (core.log.base_index, core.log.last_index, core.handed_index) == (30, 30, 30)
    core.check()


def leader() -> Raft:
    """Replica 1 of three leads term 1; both others have its no-op."""
    core = Raft(1, Memberships(0, THREE), Log(), HardState(), 0, Random(1), Options())
    while core.term == 0:
        core.tick(0.0)
        core.step(Envelope(2, 1, 1, RequestVoteReply(True, True)))
    said(core, RequestVote)
    core.step(Envelope(2, 1, 1, RequestVoteReply(False, True)))
    said(core, AppendEntries)
    for node in (2, 3):
        core.step(Envelope(node, 1, 1, AppendReply(True, 1, 0)))
    assert core.is_leader and core.commit_index == 1
    return core


@pytest.mark.quick
def test_a_leader_sends_its_state_to_a_follower_whose_log_matches() -> None:
    core = leader()
    core.step(Envelope(2, 1, 1, AppendReply(True, 1, 0, state_lost=True)))
    assert core.ready(0.0).snapshots_wanted == (2,)
    core.step(Envelope(2, 1, 1, AppendReply(True, 1, 0, state_lost=True)))
    assert core.ready(0.0).snapshots_wanted == (), "one is out already"
    core.propose(b"beside the snapshot")
    assert isinstance(core.role, Leader) and core.role.progress[2].mode is Mode.REPLICATE
    sent = core.ready(0.0)
    assert 2 in [e.to for e in sent.messages if isinstance(e.message, AppendEntries) and e.message.entries]
    assert sent.write is not None
    core.written(sent.write)
    core.step(Envelope(2, 1, 1, AppendReply(True, 2, 0, state_lost=True)))
    assert core.commit_index == 2, "what it acknowledges counts"
    core.snapshot_reported(2, 0)
    core.step(Envelope(2, 1, 1, AppendReply(True, 2, 0, state_lost=True)))
    assert core.ready(0.0).snapshots_wanted == (), "the stream failed: not again at once"
    for _ in range(3 * core.options.heartbeat_ticks):
        core.tick(0.0)
    core.step(Envelope(2, 1, 1, AppendReply(True, 2, 0, state_lost=True)))
    assert core.ready(0.0).snapshots_wanted == (2,), "but a little later"
    core.snapshot_reported(2, 2)
    core.step(Envelope(2, 1, 1, AppendReply(True, 2, 0)))
    assert core.ready(0.0).snapshots_wanted == ()


@pytest.mark.quick
def test_an_answer_from_before_the_repair_asks_for_no_second_snapshot() -> None:
    """A promise waits for the disk, and may say that the state is lost after the state came in."""
    core = leader()
    late = Envelope(2, 1, 1, AppendReply(True, 1, 0, state_lost=True))
    core.step(late)
    assert core.ready(0.0).snapshots_wanted == (2,)
    core.snapshot_reported(2, 1)
    for _ in range(3 * core.options.heartbeat_ticks):
        core.step(late)
        assert core.ready(0.0).snapshots_wanted == ()
        core.tick(0.0)
    for _ in range(OLD_NEWS_BEATS * core.options.heartbeat_ticks):
        core.tick(0.0)
        core.step(Envelope(3, 1, 1, AppendReply(True, 1, 0)))
    core.step(late)
    assert core.ready(0.0).snapshots_wanted == (2,), "it was lost once more"


@pytest.mark.quick
def test_who_was_repaired_may_lead_again() -> None:
    core = leader()
    for lost, heirs in ((True, [3]), (False, [2, 3])):
        core.step(Envelope(2, 1, 1, AppendReply(True, 1, 0, state_lost=lost)))
        assert isinstance(core.role, Leader) and sorted(core.role.heirs(core.membership)) == heirs


@pytest.mark.quick
def test_leadership_goes_to_nobody_without_a_state() -> None:
    core = leader()
    core.transfer(2)
    core.step(Envelope(2, 1, 1, AppendReply(True, 1, 0, state_lost=True)))
    core.ready(0.0)
    assert isinstance(core.role, Leader) and core.role.heirs(core.membership) == [3]
    core.step(Envelope(2, 1, 1, AppendReply(True, 1, 0, state_lost=True)))
    assert not said(core, TimeoutNow)
    core = leader()
    core.step(Envelope(2, 1, 1, AppendReply(True, 1, 0, state_lost=True)))
    with pytest.raises(ValueError, match="replica 2 cannot lead"):
        core.transfer(2)


# ---- a group in virtual time


def flip(disk: SimDisk, name: str = STATE_FILE, bit: int = 8 * 30) -> None:
    """One bit of a file flips at rest."""
    data = bytearray(disk.files[name])
    data[bit // 8] ^= 1 << bit % 8
    disk.put(name, bytes(data))


def book(world: RaftWorld, node: int) -> DamageBook:
    found = world.replicas[node].damage
    assert found is not None
    return found


async def fill(world: RaftWorld, count: int = 60) -> None:
    """Enough for every replica to have compacted its log."""
    start = len(world.committed)
    for n in range(count):
        await world.propose(f"{start}-{n:08}")
    await world.converge()
    await world.until(lambda: all(replica.core.log.base_index > 0 for replica in world.replicas.values()))


@in_world(3, compact_bytes=100)
async def test_one_flipped_bit_in_the_index_of_a_state_is_repaired(world: RaftWorld) -> None:
    """A3: the header was outside of the checksum, and six acknowledged writes were gone on all three."""
    await fill(world)
    victim = next(node for node in world.ids if node != world.leaders_now()[0])
    await world.crash([victim])
    flip(world.disks[victim], bit=8 * 24 + 16)  # the index: plus 65,536
    await world.start([victim])
    assert world.core(victim).state_lost
    for n in range(6):
        await world.propose(f"acknowledged-{n}")
    await world.until(lambda: not world.core(victim).state_lost)
    await world.converge()
    damage = book(world, victim)
    assert (damage.found, damage.repaired) == (1, 1) and damage.present is None
    assert damage.history[0].file == STATE_FILE and damage.history[0].repaired_from in world.ids
    await world.until(lambda: STATE_ASIDE not in world.disks[victim].files)
    await world.restart(victim)
    await world.converge()
    assert world.values(victim)[-6:] == [f"acknowledged-{n}" for n in range(6)]


@in_world(3, compact_bytes=100)
async def test_two_of_three_without_a_state_go_on_and_are_repaired_by_the_third(world: RaftWorld) -> None:
    await fill(world)
    whole = await world.leader()
    victims = [node for node in world.ids if node != whole]
    await world.crash(victims)
    for node in victims:
        flip(world.disks[node])
    await world.start(victims)
    assert all(world.core(node).state_lost for node in victims)
    await world.propose("their acknowledgement counts")
    await world.until(lambda: not any(world.core(node).state_lost for node in victims))
    await world.converge()
    await world.crash([whole])
    await world.propose("each of them can lead", among=victims)


@in_world(3, compact_bytes=100)
async def test_only_who_has_a_state_leads(world: RaftWorld) -> None:
    """The leader of two damaged ones dies: they elect nobody, and wait for the one that can."""
    await fill(world)
    whole = await world.leader()
    victims = [node for node in world.ids if node != whole]
    await world.crash(world.ids)
    for node in victims:
        flip(world.disks[node])
    await world.start(victims)
    await asyncio.sleep(20.0)
    assert not world.leaders_now() and all(world.core(node).state_lost for node in victims)
    for node in victims:
        with pytest.raises(NotLeader):
            world.replicas[node].check_serving()
        with pytest.raises(NotLeader):
            await world.replicas[node].read_barrier()
    await world.restart(*victims)  # once more, in the middle of it
    assert [book(world, node).found for node in victims] == [1, 1], "found once, not at each start"
    await world.start([whole])
    assert await world.leader() == whole
    await world.converge()


@in_world(3, compact_bytes=100)
async def test_a_membership_that_was_compacted_away_with_the_state_comes_back_with_it(world: RaftWorld) -> None:
    """The damaged replica began with 1, 2, 3; the group is 2, 3, 4 by now, and its log does not say so."""
    await fill(world)
    await world.add(4)
    async with asyncio.timeout(60):
        while world.core(2).membership.voters != {2, 3, 4}:
            node = await world.leader()
            try:
                await reconfigure(world.replicas[node], {n: f"n{n}" for n in (2, 3, 4)})
            except NotLeader:
                await asyncio.sleep(0.05)
    await world.crash([1])
    for n in range(60):
        await world.propose(f"after-{n}", among=[2, 3, 4])
    await world.converge([2, 3, 4])
    await world.crash([2, 3, 4])
    flip(world.disks[2])
    await world.start([1, 2])
    await asyncio.sleep(20.0)
    assert world.core(2).state_lost and not world.leaders_now(), "1 and 2 were two of the first three"
    assert world.core(2).membership.voters == frozenset(), "it takes no guess"
    await world.start([3, 4])
    await world.until(lambda: not world.core(2).state_lost)
    await world.converge([2, 3, 4])
    assert world.core(2).membership.voters == {2, 3, 4}
    await world.crash([3])
    await world.propose("2 votes again", among=[2, 4])


@in_world(1, compact_bytes=100)
async def test_a_single_replica_loses_nothing_and_serves_nothing(world: RaftWorld) -> None:
    await fill(world)
    await world.crash([1])
    whole = world.disks[1].files[STATE_FILE]
    flip(world.disks[1])
    damaged = world.disks[1].files[STATE_FILE]
    for _ in range(2):
        await world.start([1])
        await asyncio.sleep(10.0)
        assert world.core(1).state_lost and not world.core(1).is_leader
        status = world.replicas[1].damage_status()
        assert status is not None and status["alone"] and status["state_lost"] and not status["leader"]
        assert world.disks[1].files[STATE_ASIDE] == damaged, "kept for whoever can read it"
        await world.crash([1])
    world.disks[1].put(STATE_ASIDE, whole)


@in_world(1)
async def test_a_log_that_has_everything_repairs_its_replica_alone(world: RaftWorld) -> None:
    for n in range(20):
        await world.propose(f"{n}")
    await world.replicas[1].machine.flush()
    values = list(world.values(1))
    await world.crash([1])
    flip(world.disks[1])
    await world.start([1])
    assert not world.core(1).state_lost and world.core(1).log.base_index == 0
    await world.propose("goes on")
    assert world.values(1) == [*values, "goes on"]
    assert (book(world, 1).found, book(world, 1).repaired) == (1, 1)
    assert STATE_ASIDE not in world.disks[1].files


@in_world(3, compact_bytes=100)
async def test_a_state_that_went_back_below_the_log_is_damage(world: RaftWorld) -> None:
    """Somebody put an old copy of the file in its place: whole, and not ours any more."""
    await fill(world)
    old = world.disks[2].files[STATE_FILE]
    await fill(world)
    await world.crash([2])
    assert world.disks[2].files[STATE_FILE] != old
    world.disks[2].put(STATE_FILE, old)
    await world.start([2])
    assert world.core(2).state_lost
    await world.converge()
    assert "the log begins after" in book(world, 2).history[0].why


@in_world(3, compact_bytes=100)
async def test_a_damaged_note_of_damage_counts_as_damage(world: RaftWorld) -> None:
    await fill(world)
    await world.crash([2])
    flip(world.disks[2])
    await world.start([2])
    await world.converge()
    await world.crash([2])
    for bit in (0, 8 * 9, 8 * 60):
        flip(world.disks[2], DAMAGE_FILE, bit)
        await world.start([2])
        assert world.core(2).state_lost, "nobody knows what it said of the state"
        await world.until(lambda: not world.core(2).state_lost)
        await world.converge()
        await world.crash([2])
    await world.start([2])


@pytest.mark.parametrize("step", range(1, 9))
def test_a_crash_at_any_step_of_a_repair_goes_on_from_there(step: int) -> None:
    @in_world(3, compact_bytes=100)
    async def story(world: RaftWorld) -> None:
        await fill(world)
        await world.crash([2])
        flip(world.disks[2])
        values = world.values(1)
        world.disks[2].faults.fail_at = step
        try:
            await world.start([2])
        except OSError:
            world.disks[2].crash()
            await world.start([2])
        async with asyncio.timeout(60):
            while world.core(2).state_lost or world.core(2).handed_index < world.core(1).commit_index:
                if world.replicas[2].node.stopped:
                    await world.restart(2)
                await asyncio.sleep(0.05)
        if world.replicas[2].node.stopped:
            await world.restart(2)
        await world.converge()
        assert world.values(2)[: len(values)] == values
        await world.until(lambda: book(world, 2).present is None and STATE_ASIDE not in world.disks[2].files)

    story()


@in_world(3, compact_bytes=100)
async def test_what_was_set_aside_goes_once_the_repair_is_noted_and_the_older_file_stays_until_then(
    world: RaftWorld,
) -> None:
    await fill(world)
    await world.crash([2])
    disk = world.disks[2]
    flip(disk)
    oldest = disk.files[STATE_FILE]
    unrepaired: list[bool] = []

    def look(names: Sequence[str]) -> None:
        if STATE_ASIDE in names:
            unrepaired.append(DamageBook.load(disk.open()).present is not None)

    world.isolate(2)
    await world.start([2])
    await world.until(lambda: STATE_ASIDE in disk.files)
    await world.crash([2])
    disk.put(STATE_FILE, b"begun anew, and damaged too")
    await world.start([2])
    assert disk.files[STATE_ASIDE] == oldest and book(world, 2).found == 2
    disk.on_remove = look
    world.network.heal()
    await world.until(lambda: not world.core(2).state_lost)
    await world.until(lambda: STATE_ASIDE not in disk.files)
    assert unrepaired == [False], "a crash between the two would leave a damage without its state"
    assert all(damage.repaired_ms for damage in book(world, 2).history), "one snapshot repairs both"


def test_damage_again_and_again_makes_the_disk_suspect() -> None:
    async def story() -> None:
        directory = SimDisk(Random(1)).open()
        for n in range(OFTEN + 2):
            damage = DamageBook.load(directory)
            await damage.note_found(DamagedState("f", "w"), 1_000_000 + n)
            await damage.note_set_aside()
            await damage.note_repaired(2_000_000, 2)
        damage = DamageBook.load(directory)
        assert damage.told(2_000_000)["suspect_disk"] and damage.pause_seconds(2_000_000) > 0
        later = 2_000_000 + 2 * 60 * 60 * 1000
        assert not damage.told(later)["suspect_disk"] and damage.pause_seconds(later) == 0

    loop.run(story())


# ---- a cluster


@in_cluster(groups=(1,))
async def test_a_replica_that_meets_damage_while_it_runs_stops_and_does_not_trust_its_state_again(
    world: World,
) -> None:
    clerk = world.clerk()
    for n in range(40):
        await clerk.put(f"k{n}", b"v" * 40_000)
    await world.converge(60.0)
    victim = await world.leader(1)
    machine = victim.rsm.machine
    before = victim.disk.files.get(STATE_FILE)
    assert before is not None and victim.rsm.core.log.base_index > 0

    def damaged(*_: object) -> None:
        raise DamagedState("rocks/db-1/000007.sst", "block checksum mismatch")

    machine.engine.get = machine.engine.multi_get = damaged  # type: ignore[attr-defined]
    async with asyncio.timeout(60):
        while world.deaths == 0:  # each clerk keeps to a replica of its own
            assert await world.clerk().get("k7") == b"v" * 40_000, "another replica answers"
        while victim.server is None or victim.rsm.damage is None or victim.rsm.damage.repaired == 0:
            await asyncio.sleep(0.05)
    assert victim.rsm.machine is not machine
    status = victim.rsm.damage_status()
    assert status is not None and status["found"] == 1
    assert status["history"][0]["file"] == "rocks/db-1/000007.sst"
    assert status["history"][0]["repaired_from"] in (1, 2, 3)
    await world.converge(60.0)
    world.compare_replicas()
    told = notes(await world.overview())
    assert any("000007.sst was found damaged" in line and "repaired from replica" in line for line in told), (
        told
    )
    assert not [line for line in problems(await world.overview()) if "damaged" in line], "nobody has to act"


@in_cluster(groups=(1,))
async def test_a_controller_whose_state_file_is_damaged_is_repaired(world: World) -> None:
    for n in range(10):
        shard = next(iter((await world.config()).shards()))
        await world.split(shard.id, b"\x01%04d" % n) if n % 2 == 0 else await world.merge(shard.id)
    victim = next(p for p in world.of(0) if p.rsm.core.id == 2)
    await victim.rsm.machine.flush()
    victim.rsm.node.compact(min(victim.rsm.machine.applied.index, victim.rsm.core.log.durable_index))
    await asyncio.sleep(1.0)
    await world.crash(victim)
    flip(victim.disk)
    await world.start(victim)
    assert victim.rsm.damage is not None and victim.rsm.damage.found == 1
    async with asyncio.timeout(60):
        while victim.rsm.core.state_lost:
            await asyncio.sleep(0.05)
    await world.converge(60.0)
    assert any("state was found damaged" in line for line in notes(await world.overview()))


def test_an_empty_state_that_is_damaged_too_is_refused_by_name() -> None:
    from shardkv.raft.damage import DamageBook as Book
    from shardkv.raft.repair import open_or_repair
    from shardkv.raft.replica import ReplicaOptions

    class Broken:
        aside = 0

        def open(self):  # type: ignore[no-untyped-def]
            raise DamagedState("state", "does not match its checksum")

        async def set_aside(self) -> None:
            self.aside += 1

        async def drop_aside(self) -> None:
            raise AssertionError

    async def story() -> None:
        directory: SimDirectory = SimDisk(Random(1)).open()
        store = Broken()
        with pytest.raises(StorageError, match="not to be trusted") as refused:
            await open_or_repair(
                1,
                THREE,
                directory,
                None,  # type: ignore[arg-type]  # it is not sent through
                store,
                Random(1),
                lambda: 5,
                ReplicaOptions(),
            )
        assert not isinstance(refused.value, DamagedState), "no restart would help"
        assert store.aside == 1 and Book.load(directory).present is not None

    loop.run(story())
