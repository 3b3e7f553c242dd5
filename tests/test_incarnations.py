"""A disk has an incarnation that its group knows: one that was lost does not come back as if nothing were lost."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from shardkv.process.identity import IDENTITY, Identity, claim
from shardkv.raft.errors import NotLeader, PeerFault, Stopped, WrongDirectory, WrongMembers
from shardkv.raft.incarnations import KnownDisks
from shardkv.raft.protocol.messages import AppendEntries, AppendReply, Envelope, RequestVote, RequestVoteReply
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.types import Entry, Kind
from shardkv.raft.reconfigure import reconfigure
from tests.sim.disk import SimDisk
from tests.sim.loop import run
from tests.sim.raft_world import RaftWorld, in_world

THREE = {1: "n1", 2: "n2", 3: "n3"}


def known(disks: dict[int, int]) -> Membership:
    return Membership(frozenset(THREE), addresses=THREE, incarnations=disks)


def mail(sender: int, message: object, disk: int, addressed: int = 0, term: int = 1) -> Envelope:
    return Envelope(sender, 1, term, message, disk, addressed)  # type: ignore[arg-type]


VOTE = RequestVoteReply(pre=False, granted=True)
ASK = RequestVote(pre=True, last_log_index=0, last_log_term=0)
HEARTBEAT = AppendEntries(0, 0, (), 0, 0)


# ---- whose mail is believed


@pytest.mark.quick
def test_votes_and_acknowledgements_of_another_disk_do_not_count() -> None:
    disks = KnownDisks(1, 11, Membership.of(THREE))
    membership = known({1: 11, 2: 22, 3: 33})
    for message in (VOTE, ASK, AppendReply(True, 5, 0), HEARTBEAT):
        assert disks.admits(mail(2, message, 22), membership, 1)
        assert not disks.admits(mail(2, message, 99), membership, 1), "not even where it does not know us"
    assert disks.refused == {2: 99} and disks.refused_mail == 4
    assert not disks.admits(mail(2, VOTE, 0), membership, 1), "a disk without an incarnation is another one too"


@pytest.mark.quick
def test_until_the_log_knows_the_first_disk_that_is_heard_from_counts() -> None:
    disks = KnownDisks(1, 11, Membership.of(THREE))
    assert disks.admits(mail(2, VOTE, 22), known({}), 1)
    assert not disks.admits(mail(2, VOTE, 99), known({}), 1)
    assert disks.admits(mail(2, VOTE, 99), known({2: 99}), 1), "the log rules"
    stranger = KnownDisks(1, 11, Membership.of(THREE))
    assert stranger.admits(mail(4, ASK, 44), known({}), 1) and stranger.admits(mail(4, ASK, 45), known({}), 1)


@pytest.mark.quick
def test_a_leader_whose_disk_was_replaced_is_heard_if_its_log_knows_ours() -> None:
    """Our log lags behind the replacement; only that leader can bring us there."""
    disks, membership = KnownDisks(1, 11), known({1: 11, 2: 22, 3: 33})
    assert disks.admits(mail(2, HEARTBEAT, 99, addressed=11), membership, 1)
    assert not disks.admits(mail(2, VOTE, 99, addressed=11), membership, 1), (
        "but its votes are not the old one's"
    )


@pytest.mark.quick
def test_a_disk_that_the_group_does_not_know_takes_no_part_until_a_leader_addresses_it() -> None:
    disks, membership = KnownDisks(1, 99, Membership.of(THREE)), known({})
    assert not disks.admits(mail(2, ASK, 22, addressed=11), membership, 1)
    assert disks.refusal(membership) == 11
    assert not disks.admits(mail(3, VOTE, 33), membership, 1), "no vote counts meanwhile"
    assert not disks.admits(mail(3, ASK, 33, addressed=99), membership, 1), "who asks for votes does not decide"
    assert not disks.admits(mail(3, HEARTBEAT, 33, addressed=99), membership, 2), "nor a leader of the past"
    assert disks.refusal(membership) == 11
    assert disks.admits(mail(3, HEARTBEAT, 33, addressed=99), membership, 1) and not disks.refusal(membership)
    assert KnownDisks(1, 99).refusal(known({1: 11})) == 11, "our own log may say so as well"


@pytest.mark.quick
def test_old_news_of_a_replica_that_lags_behind_refuse_nobody() -> None:
    disks, membership = KnownDisks(1, 99), known({1: 99, 2: 22, 3: 33})
    assert disks.admits(mail(2, ASK, 22, addressed=11), membership, 5)
    assert disks.admits(mail(2, HEARTBEAT, 22, addressed=11, term=4), membership, 5), "a leader of the past"
    assert not disks.refusal(membership)
    assert not disks.admits(mail(2, HEARTBEAT, 22, addressed=77, term=5), membership, 5)
    assert disks.refusal(membership) == 77, "replaced after our last news"


@pytest.mark.quick
def test_what_a_leader_learns_goes_into_one_entry() -> None:
    disks, membership = KnownDisks(1, 11, Membership.of(THREE)), known({})
    disks.admits(mail(2, VOTE, 22), membership, 1)
    assert disks.news(membership) is None, "one is missing: a little patience"
    disks.admits(mail(3, VOTE, 33), membership, 1)
    told = disks.news(membership)
    assert told is not None and told.incarnations == {1: 11, 2: 22, 3: 33} and disks.news(told) is None
    assert Membership.decode(told.encode()).incarnations == told.incarnations
    late = KnownDisks(1, 11, Membership.of(THREE))
    late.admits(mail(2, VOTE, 22), membership, 1)
    late.waited_ticks = 1000
    told = late.news(membership)
    assert told is not None and told.incarnations == {1: 11, 2: 22}


@pytest.mark.quick
def test_first_replicas_that_were_started_with_different_lists_find_out() -> None:
    first = Entry(1, 1, Kind.MEMBERSHIP, Membership.of({1: "n1", 2: "n2"}).encode())
    with pytest.raises(WrongMembers, match=r"1 at n1, 2 at n2, 3 at n3.*leader 2 with 1 at n1, 2 at n2:"):
        KnownDisks(1, 11, Membership.of(THREE)).admits(
            mail(2, AppendEntries(0, 0, (first,), 0, 0), 22), known({}), 1
        )
    joined = KnownDisks(1, 11, Membership(frozenset()))
    assert joined.admits(mail(2, AppendEntries(0, 0, (first,), 0, 0), 22), Membership(frozenset()), 1)


@pytest.mark.quick
def test_a_stranger_with_another_list_cannot_stop_a_group_that_has_begun() -> None:
    """Three new replicas were started with our addresses in their --peers: their leader is refused, and named."""
    first = Entry(1, 1, Kind.MEMBERSHIP, Membership.of({1: "n1", 9: "n9"}).encode())
    word = AppendEntries(0, 0, (first,), 0, 0)
    disks = KnownDisks(1, 11, Membership.of(THREE))
    for term, commit_index in ((1, 40), (51, 40), (1, 0)):
        with pytest.raises(PeerFault, match="begins with the members 1 at n1, 9 at n9"):
            disks.admits(mail(9, word, 99, term=term), known({}), 50, commit_index)


@pytest.mark.quick
def test_mail_for_the_replica_that_had_our_address_says_nothing_of_our_disk() -> None:
    disks = KnownDisks(4, 44)
    disks.admits(mail(2, HEARTBEAT, 22, addressed=11), known({1: 11, 2: 22}), 1)  # to replica 1
    assert not disks.refusal(known({}))


# ---- the identity of a directory


def claimed(disk: SimDisk, replica: int = 1, first: dict[int, str] | None = None, seed: int = 1) -> Identity:
    wanted = Identity(
        "c", 1, replica, "memory", Random(seed).getrandbits(64), THREE if first is None else first
    )
    found: list[Identity] = []

    async def story() -> None:
        found.append(await claim(disk.open(), wanted, "/data"))

    run(story())
    return found[0]


@pytest.mark.quick
def test_a_restart_keeps_the_incarnation_and_the_first_members() -> None:
    disk = SimDisk(Random(1))
    first = claimed(disk)
    assert claimed(disk, seed=2) == first
    moved = {1: "m1", 2: "n2", 3: "n3"}
    again = claimed(disk, first=moved, seed=3)
    assert again == first, "addresses may change, and the log says where they are"
    assert again.disks(moved).addresses(known({})) == moved
    elsewhere = Membership(frozenset(THREE), addresses={**THREE, 1: "z1"})
    assert again.disks(moved).addresses(elsewhere)[1] == "z1", "unless a command moved it since"
    assert claimed(disk, first={}, seed=4) == first, "--join only says where this one is"


@pytest.mark.quick
@pytest.mark.parametrize("other", [{1: "n1"}, {1: "n1", 2: "n2"}, {**THREE, 4: "n4"}])
def test_a_list_of_other_members_is_refused_with_both_lists(other: dict[int, str]) -> None:
    disk = SimDisk(Random(1))
    claimed(disk)
    before = dict(disk.files)
    with pytest.raises(WrongDirectory) as refused:
        claimed(disk, first=other)
    for members in (THREE, other):
        assert ", ".join(f"{node} at {at}" for node, at in members.items()) in str(refused.value)
    assert disk.files == before


@pytest.mark.quick
def test_who_joined_does_not_become_a_first_member() -> None:
    disk = SimDisk(Random(1))
    claimed(disk, replica=4, first={})
    with pytest.raises(WrongDirectory, match="--join"):
        claimed(disk, replica=4, first={**THREE, 4: "n4"})


@pytest.mark.quick
def test_a_flipped_bit_in_the_identity_is_found() -> None:
    disk = SimDisk(Random(1))
    claimed(disk)
    whole = disk.files[IDENTITY]
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        disk.put(IDENTITY, bytes(damaged))
        try:
            found = claimed(disk)
        except WrongDirectory:
            continue
        assert found == Identity.decode(whole), f"bit {bit} changed what it says"
    disk.put(IDENTITY, whole[:-20])
    with pytest.raises(WrongDirectory, match=f"/data/{IDENTITY}"):
        claimed(disk)


# ---- groups that lose disks


async def recorded(world: RaftWorld, nodes: list[int] | None = None) -> None:
    nodes = nodes or list(world.replicas)
    want = {node: world.incarnations[node] for node in nodes}
    await world.until(lambda: all(world.core(n).membership.incarnations == want for n in nodes))


def refusal(world: RaftWorld, node: int) -> int:
    return world.replicas[node].node.disks.refusal(world.core(node).membership)


def two_lives(world: RaftWorld) -> None:
    """Figure 3 speaks of one life of a group: two of its logs need not agree."""
    world.check = world.applied = lambda _: None  # type: ignore[method-assign, assignment]


@in_world(3)
async def test_the_log_records_the_disks_of_all_members(world: RaftWorld) -> None:
    leader = await world.propose("x")
    await recorded(world)
    entries = world.core(leader).log.slice(1, world.core(leader).log.last_index + 1, 1 << 30)
    assert [entry.kind for entry in entries].count(Kind.MEMBERSHIP) == 2, (
        "the first members, then all disks at once"
    )
    assert entries[0].kind is Kind.MEMBERSHIP and Membership.decode(entries[0].data).voters == {1, 2, 3}


@in_world(3, compact_bytes=200)
async def test_a_wiped_disk_does_not_vote_or_count(world: RaftWorld) -> None:
    """Acknowledged by two, of which one loses its disk: the third, which lags, must not be elected with it."""
    for n in range(3):
        await world.propose(f"{n}")
    await recorded(world)
    leader = await world.leader()
    lagging, lost = [node for node in (1, 2, 3) if node != leader]
    world.isolate(lagging)
    await world.propose("acknowledged", among=[leader, lost])
    await world.crash([leader])
    await world.wipe(lost)
    world.network.heal()
    await asyncio.sleep(20.0)
    assert not world.leaders_now(), "two of three, but one of them has forgotten what it promised"
    assert refusal(world, lost) and world.core(lost).log.last_index == 0
    asked: list[Envelope] = []
    world.network.on_mail = lambda source, target, letters: asked.extend(
        e for e in letters if e.sender == lost and isinstance(e.message, RequestVote)
    )
    await asyncio.sleep(20.0)
    assert not asked, "it does not campaign"
    with pytest.raises(Stopped, match="another disk"):
        await world.replicas[lost].read_barrier()
    await world.start([leader])
    await world.propose("by the two that have their disks", among=[leader, lagging])
    await asyncio.sleep(5.0)
    assert world.core(lost).log.last_index == 0, "and it is told nothing"
    assert "acknowledged" in world.values(lagging)


@in_world(3)
async def test_two_wiped_disks_of_three_stand_down_before_the_one_that_is_whole(world: RaftWorld) -> None:
    await world.propose("acknowledged")
    await recorded(world)
    await world.converge()
    whole = await world.leader()
    lost = [node for node in (1, 2, 3) if node != whole]
    two_lives(world)
    await world.wipe(*lost)
    await asyncio.sleep(20.0)
    assert world.values(whole) == ["acknowledged"] and not world.leaders_now()
    assert refusal(world, whole) == 0
    assert all(refusal(world, node) for node in lost), "named, and out of it"


@in_world(3)
async def test_a_wiped_disk_that_led_a_new_group_stands_down(world: RaftWorld) -> None:
    """The one that is whole was cut off: the two others elected each other. They end once they hear from it."""
    await world.propose("acknowledged")
    await recorded(world)
    await world.converge()
    world.isolate(3)
    two_lives(world)
    await world.wipe(1, 2)
    await world.leader([1, 2])
    world.network.heal()
    await world.until(lambda: not world.leaders_now())
    await asyncio.sleep(5.0)
    assert not world.leaders_now() and world.values(3) == ["acknowledged"]
    assert refusal(world, 1) and refusal(world, 2)


@in_world(3, compact_bytes=100)
async def test_a_snapshot_tells_whose_disks_they_are(world: RaftWorld) -> None:
    for n in range(100):
        await world.propose(f"{n:010}")
    await recorded(world)
    leader = await world.leader()
    lagging = leader % 3 + 1
    await world.crash([lagging])
    for n in range(100):
        await world.propose(f"{n:010}")
    await world.start([lagging])
    await world.converge()
    await world.restart(1, 2, 3)
    await world.leader()
    assert all(world.core(node).membership.incarnations.keys() == {1, 2, 3} for node in (1, 2, 3))


async def replaced(world: RaftWorld, node: int, address: str = "") -> None:
    """As the operator's one command has it: the same number, with the disk that it now has."""
    addresses = {n: f"n{n}" for n in (1, 2, 3)} | {node: address or f"n{node}"}
    async with asyncio.timeout(60):
        while True:
            leader = await world.leader([n for n in (1, 2, 3) if n != node])
            try:
                await reconfigure(world.replicas[leader], addresses, {}, {node: world.incarnations[node]})
                return
            except (NotLeader, Stopped):
                await asyncio.sleep(0.05)


@in_world(3, compact_bytes=200)
async def test_a_wiped_disk_is_let_in_again_under_its_number_with_one_command(world: RaftWorld) -> None:
    for n in range(30):
        await world.propose(f"{n:010}")
    await recorded(world)
    lost = await world.leader() % 3 + 1
    await world.wipe(lost)
    await world.until(lambda: refusal(world, lost))
    await replaced(world, lost)
    await replaced(world, lost)  # asked for again: nothing to do
    await world.converge()
    await recorded(world)
    assert not refusal(world, lost)
    await world.crash([await world.leader()])
    await world.propose("the new disk counts")
    await world.restart(*world.replicas)
    await world.propose("and after a restart")


@in_world(3)
async def test_a_replica_that_moved_gets_its_new_address(world: RaftWorld) -> None:
    await world.propose("x")
    await recorded(world)
    moved = await world.leader() % 3 + 1
    before = world.core(moved).log.last_index
    await replaced(world, moved, "elsewhere")
    leader = await world.leader([n for n in (1, 2, 3) if n != moved])
    membership = world.core(leader).membership
    assert membership.addresses[moved] == "elsewhere" and membership.voters == {1, 2, 3}
    assert world.core(leader).log.last_index == before + 1, (
        "its disk is the same: it stays a voter all the time"
    )
