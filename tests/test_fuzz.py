"""Bytes that nobody meant: every parser refuses them in its own words, and what it takes is what was meant.

Hypothesis makes the bytes: from nothing, and by damaging what is sound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from random import Random
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardkv import shardkv_pb2 as pb
from shardkv.backup.errors import Damaged
from shardkv.backup.manifest import Manifest
from shardkv.raft import wal
from shardkv.raft.codec import MalformedMail, decode_mail, encode_mail
from shardkv.raft.errors import PeerFault, RaftError, StorageError
from shardkv.raft.protocol.core import Raft
from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.membership import Memberships
from shardkv.raft.protocol.messages import (
    AppendEntries,
    AppendReply,
    Envelope,
    InstallSnapshot,
    InstallSnapshotReply,
    Message,
    ReadIndex,
    ReadIndexReply,
    RequestVote,
    RequestVoteReply,
    TimeoutNow,
)
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.ready import Options
from shardkv.raft.protocol.types import Entry, HardState, Kind
from shardkv.raft.wal import Recovered, Wal, open_wal
from shardkv.server.admission import Admission
from shardkv.server.reading import Reader
from shardkv.shardctrler import shardctrler_pb2 as ctl
from shardkv.shardctrler.accounts import Accounts
from shardkv.shardctrler.machine import ControllerMachine
from shardkv.state.machine import ShardMachine
from shardkv.storage.memory import MemoryEngine
from shardkv.wire import frames
from shardkv.wire.calls import Code, parse
from shardkv.wire.frames import APPEND, CAS_OP, DELETE, GET, PUT, SCAN_OP, Limits, MalformedFrame
from shardkv.wire.framing import CALL, RECORD, MalformedStream, Parser
from shardkv.wire.hello import Hello, Welcome, stranger
from shardkv.wire.node_name import Member
from tests.sim.disk import SimDisk
from tests.sim.world import World, in_world

LIMITS = Limits()
quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def damage(sound: bytes, rng: Random) -> bytes:
    """A few bytes changed, lost, doubled or made up."""
    data = bytearray(sound)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randrange(1, 9)]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
            case _:
                del data[at:]
    return bytes(data)


def garbage(sound: list[bytes]) -> st.SearchStrategy[bytes]:
    damaged = st.builds(damage, st.sampled_from(sound), st.integers(0, 1 << 32).map(Random))
    return st.one_of(st.binary(max_size=200), damaged)


def section(kinds: list[int], write: bool) -> bytes:
    keys = [b"key-%d" % n for n in range(len(kinds))]
    packed = {CAS_OP: frames.pack_cas(b"old", b"new"), SCAN_OP: frames.pack_scan(b"z", 7)}
    values = [packed.get(kind, b"" if kind in (GET, DELETE) else b"value") for kind in kinds]
    return frames.pack_section(
        1, b"s" * 16, 1, bytes(kinds), list(range(1, len(kinds) + 1)) if write else [], keys, values
    )


WRITES = frames.pack_frame(
    frames.WRITE, 1, 1000, [section([PUT, APPEND, DELETE, CAS_OP], True), section([PUT], True)]
)
READS = frames.pack_frame(frames.READ, 1, 0, [section([GET, GET], False), section([SCAN_OP, GET], False)])


@pytest.fixture
def machine() -> ShardMachine:
    """A group's state machine that serves all keys as shard 1."""
    machine = ShardMachine(1, MemoryEngine(SimDisk(Random(1)).open()))
    controller = ControllerMachine(SimDisk(Random(1)).open())
    requests = [
        ctl.AdminRequest(initialize=ctl.Initialize(shards=1)),
        ctl.AdminRequest(join=ctl.Join(groups=[ctl.Group(gid=1, addresses=["a:1"])]), session=b"s" * 16, seq=1),
    ]
    for index, request in enumerate(requests, 1):
        controller.apply([Entry(index, 1, Kind.COMMAND, bytes(16) + request.SerializeToString())])
    learn = pb.Learn(changes=[change.SerializeToString() for change in controller.changes_since(0, 10)])
    machine.ownership.claimed(2)
    machine.apply([Entry(1, 1, Kind.COMMAND, bytes(16) + b"\2" + learn.SerializeToString())])
    return machine


@pytest.mark.quick
@quick
@given(data=garbage([WRITES]))
def test_what_passes_the_check_of_a_frame_can_be_applied(machine: ShardMachine, data: bytes) -> None:
    """The leader looks at lengths alone, and then every replica has to live with what it let through."""
    try:
        header = frames.check_frame(data, frames.WRITE, LIMITS)
    except MalformedFrame:
        return
    frames.only_deletes(data)
    admission = None
    if not header.plain:
        admission = Admission(data, header, LIMITS, True)
        if admission.frame is None:
            frames.unpack_reply(admission.reply(0, None, lambda shard: None))
            return
        whole, data = data, admission.frame
        assert frames.check_frame(data, frames.WRITE, LIMITS).plain or frames.CAS_OP in data
    index = machine.applied.index + 1
    command = bytes(16) + b"\1" + (1 << 20).to_bytes(4, "little") + data
    (reply,) = machine.apply([Entry(index, 1, Kind.COMMAND, command)])
    _, sections = frames.unpack_reply(reply)
    assert len(sections) == frames.read_header(data).sections
    if admission is not None:
        _, merged = frames.unpack_reply(admission.reply(0, reply, lambda shard: None))
        assert len(merged) == frames.read_header(whole).sections
    machine.check()


@pytest.mark.quick
@quick
@given(data=garbage([READS]))
def test_what_passes_the_check_of_a_read_can_be_answered(machine: ShardMachine, data: bytes) -> None:
    try:
        frames.check_frame(data, frames.READ, LIMITS)
    except MalformedFrame:
        return
    frames.unpack_reply(read_frame(machine, data))


def read_frame(machine: ShardMachine, frame: bytes) -> bytes:
    return asyncio.run(Reader(machine, nullcontext).read(frame))


def refuses(read: Callable[[bytes], Any], *errors: type[Exception]) -> Callable[[bytes], None]:
    """Reads, or raises what it says that it raises."""

    def run(data: bytes) -> None:
        try:
            read(data)
        except errors:
            pass

    return run


def whole_stream(data: bytes) -> None:
    parser = Parser()
    for start in range(0, len(data), 7):
        parser.feed(data[start : start + 7])
        if parser.hello() is not None:
            break
    parser.feed(data[start + 7 :] if data else b"")
    for kind, _, method, payload in parser.records():
        assert kind in (1, 2, 3) and len(method) <= 64 and len(payload or b"") <= len(data)


MAIL = encode_mail(
    "c",
    1,
    "a:1",
    [
        Envelope(1, 2, 3, AppendEntries(4, 2, (Entry(5, 3, Kind.COMMAND, b"data"),), 4, 9)),
        Envelope(1, 2, 3, RequestVote(True, 5, 3, False)),
    ],
)
STREAM = stranger("c") + RECORD.pack(CALL, 1, 7, 5) + b"kv.read" + b"12345"
REPLY = frames.pack_reply(
    5,
    [
        frames.pack_results(b"\0\1", [b"v", b""]),
        frames.pack_refusal(frames.SectionStatus.WRONG_GROUP, 2, ["a:1"]),
    ],
)
PARSERS = {
    "stream": (STREAM, refuses(whole_stream, MalformedStream)),
    "mail": (MAIL, refuses(lambda data: decode_mail("c", 1, data), MalformedMail)),
    "reply": (REPLY, refuses(frames.unpack_reply, MalformedFrame)),
    "page": (frames.pack_page(False, b"c", [(b"k", b"v")]), refuses(frames.unpack_page, MalformedFrame)),
    "answer": (b"\1text", refuses(parse, ValueError)),
    "membership": (Membership.of({1: "a:1"}).encode(), refuses(Membership.decode, ValueError)),
    "hello": (Hello(bytes(32), name="n", dialled="a:1").encode(), refuses(Hello.decode, MalformedStream)),
    "welcome": (
        Welcome(bytes(32), Member("c", 1, 2), bytes(32)).encode(),
        refuses(Welcome.decode, MalformedStream),
    ),
    "users": (Accounts(3, True).encode(), refuses(Accounts.decode, DecodeError, ValueError)),
    "manifest": (Manifest("i", "c", 1, 2).encode(), refuses(lambda data: Manifest.decode("n", data), Damaged)),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_reads_or_says_that_it_does_not(name: str) -> None:
    sound, run = PARSERS[name]

    @quick
    @given(data=garbage([sound]))
    def story(data: bytes) -> None:
        run(data)

    run(sound)
    story()


ADMIN = ctl.AdminRequest(
    session=b"s" * 16, seq=1, issued_ms=5, join=ctl.Join(groups=[ctl.Group(gid=1, addresses=["a:1"])])
).SerializeToString()
USER = ctl.AdminRequest(
    session=b"s" * 16, seq=2, set_user=ctl.SetUser(name="n", create=True, role="admin", prefixes=[b"p"])
).SerializeToString()


@in_world(groups=(1,), controllers=1)
async def test_servers_answer_whatever_they_are_sent(world: World) -> None:
    """Any bytes to any call: an answer by its code, no exception, and the cluster goes on."""
    rng = Random(7)
    sound = {
        "ctl.admin": [ADMIN, USER],
        "kv.write": [WRITES],
        "kv.read": [READS],
        "raft.members": [
            b'{"voters": {"1": "a"}}',
            b'{"voters": 3}',
            b'{"voters": {"x": "a"}}',
            b'{"voters": {}}',
        ],
        "kv.transfer": [b"2", b"x", b""],
        "kv.view": [pb.ViewRequest(id=9, cursor=b"k").SerializeToString()],
        "kv.log": [pb.LogRequest(after=3).SerializeToString()],
        "shard.pull": [pb.PullRequest(shard=1, epoch=1, gid=1, joined=2).SerializeToString()],
        "ctl.claim": [ctl.Claim(gid=1, incarnation=7, joined=2).SerializeToString()],
    }
    methods = [*sound, "kv.stale", "shard.serves", "ctl.query", "ctl.changes", "ctl.accounts", "no.such"]
    for process in (world.of(0)[0], world.of(1)[0]):
        assert process.server is not None
        for turn in range(1500):
            method = rng.choice(methods)
            base = rng.choice(sound.get(method, [b""]))
            data = damage(base, rng) if rng.random() < 0.8 else rng.randbytes(rng.randrange(60))
            if method == "raft.members":
                data = rng.choice(
                    [b"", b"[]", b'{"voters": 3}', b'{"voters": {"x": "a"}}', b'{"voters": {}}', b"\xff"]
                )
            if method == "ctl.changes":
                data = b"" if turn % 2 else b"\xff"  # else it might wait a minute
            code, _ = parse(await asyncio.wait_for(process.server.handle(method, data), 40))
            assert code in Code
    world.check_failures()
    clerk = world.clerk()
    await clerk.put(b"after", b"it")
    assert await clerk.get(b"after") == b"it"


# ---- the log


def log_of(disk: SimDisk, seed: int) -> list[Entry]:
    """A log of several segments on `disk`, and the entries in it."""
    rng = Random(seed)
    entries = [Entry(n, 1, Kind.COMMAND, rng.randbytes(rng.randrange(60))) for n in range(1, 41)]

    async def write() -> None:
        wal, _ = await open_wal(disk.open(), Random(seed), 700)
        position = 0
        while position < len(entries):
            count = rng.randrange(1, 4)
            await wal.append(HardState(1, 1), entries[position : position + count])
            position += count
        wal.close()

    asyncio.run(write())
    return entries


@pytest.mark.quick
@quick
@given(seed=st.integers(0, 1 << 32))
def test_a_damaged_log_is_refused_or_is_a_beginning_of_what_was_written(seed: int) -> None:
    """Never an entry that nobody wrote, nor one missing in the middle."""
    rng = Random(seed)
    disk = SimDisk(Random(1))
    entries = log_of(disk, seed % 5)
    name = rng.choice(sorted(disk.files))
    disk.put(name, damage(disk.files[name], rng))

    async def read() -> tuple[Wal, Recovered]:
        return await open_wal(disk.open(), Random(1), 700)

    try:
        wal, recovered = asyncio.run(read())
    except StorageError:
        return
    wal.close()
    assert recovered.base_index == 0 and recovered.entries == entries[: len(recovered.entries)]
    if name != max(disk.files):
        assert len(recovered.entries) == len(entries), "only the last segment may have a torn end"


@pytest.mark.quick
def test_the_sound_frames_are_taken(machine: ShardMachine) -> None:
    """Else the stories above would say nothing."""
    frames.check_frame(WRITES, frames.WRITE, LIMITS)
    frames.check_frame(READS, frames.READ, LIMITS)
    command = bytes(16) + b"\1" + (1 << 20).to_bytes(4, "little") + WRITES
    (reply,) = machine.apply([Entry(2, 1, Kind.COMMAND, command)])
    assert [section.status for section in frames.unpack_reply(reply)[1]] == [frames.SectionStatus.OK] * 2
    (first, _) = frames.unpack_reply(read_frame(machine, READS))[1]
    assert first.values[0] == b"value"


# ---- mail of a peer that says anything

SMALL = st.integers(0, 6)
NUMBERS = st.one_of(SMALL, st.sampled_from([1 << 40, (1 << 62) - 1, 1 << 62, (1 << 64) - 1]))


@st.composite
def entries_after(draw: st.DrawFn, prev_index: int) -> tuple[Entry, ...]:
    kinds = draw(st.lists(st.sampled_from(list(Kind)), max_size=4))
    terms = [draw(SMALL) for _ in kinds]
    if draw(st.booleans()):
        terms.sort()
    others = Membership(draw(st.frozensets(st.integers(1, 5), min_size=1)))
    data = {Kind.NOOP: b"", Kind.COMMAND: b"x", Kind.MEMBERSHIP: others.encode()}
    return tuple(Entry(prev_index + n, terms[n - 1], kind, data[kind]) for n, kind in enumerate(kinds, 1))


@st.composite
def any_message(draw: st.DrawFn) -> Message:
    number = lambda: draw(NUMBERS)  # noqa: E731
    flag = lambda: draw(st.booleans())  # noqa: E731
    match draw(st.integers(0, 8)):
        case 0:
            prev = draw(SMALL)
            return AppendEntries(prev, draw(SMALL), draw(entries_after(prev)), number(), number())
        case 1:
            few = lambda: number() if draw(st.integers(0, 3)) == 0 else 0  # noqa: E731  # a sound reply has few
            return AppendReply(flag(), number(), few(), few(), few(), few(), flag())
        case 2:
            return RequestVote(flag(), number(), number(), flag())
        case 3:
            return RequestVoteReply(flag(), flag())
        case 4:
            return InstallSnapshot(number(), number(), number(), number(), b"abc", 0)
        case 5:
            return InstallSnapshotReply(number(), number(), number(), flag())
        case 6:
            return ReadIndex(number())
        case 7:
            return ReadIndexReply(number(), number())
        case _:
            return TimeoutNow()


def any_mail(sender: int) -> st.SearchStrategy[Envelope]:
    near = st.builds(Envelope, st.just(sender), st.just(1), SMALL, any_message())
    far = st.builds(Envelope, st.just(sender), NUMBERS, NUMBERS, any_message())
    return st.one_of(near, near, near, far)


def carry_out(raft: Raft) -> None:
    """An instant disk, which must be able to hold what it is given."""
    while True:
        ready = raft.ready(0.0)
        for envelope in ready.messages:
            encode_mail("c", 1, "a:1", [envelope])
        if ready.write is None:
            return
        if ready.write.hard_state is not None:
            wal.HARD_STATE.pack(1, ready.write.hard_state.term, ready.write.hard_state.voted_for)
        for entry in ready.write.entries:
            wal.ENTRY.pack(1, entry.index, entry.term, entry.kind, entry.crc, len(entry.data))
        encode_mail("c", 1, "a:1", ready.write.promises)
        raft.written(ready.write)


@pytest.mark.quick
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    leads=st.booleans(),
    mail=st.lists(st.one_of(any_mail(3), st.just("tick"), st.just("propose"), st.just("read")), max_size=25),
)
def test_no_mail_of_one_peer_stops_a_replica_or_changes_what_is_committed(
    leads: bool, mail: list[Envelope | str]
) -> None:
    """It is dropped by the codec, refused by the border, or lived with; never more."""
    raft = Raft(
        1, Memberships(0, Membership(frozenset({1, 2, 3}))), Log(), HardState(), 0, Random(1), Options(3, 1)
    )
    if leads:
        raft.step(Envelope(2, 1, 0, TimeoutNow()))
        carry_out(raft)
        raft.step(Envelope(2, 1, 1, RequestVoteReply(False, True)))
        raft.propose(b"1")
        carry_out(raft)
        raft.step(Envelope(2, 1, 1, AppendReply(True, 2, 0)))
        assert raft.is_leader and raft.commit_index == 2
    else:
        entries = (Entry(1, 1, Kind.NOOP, b""), Entry(2, 1, Kind.COMMAND, b"1"))
        raft.step(Envelope(2, 1, 1, AppendEntries(0, 0, entries, 2, 0)))
    carry_out(raft)
    committed = raft.log.slice(1, raft.commit_index + 1, 1 << 30)
    for number, item in enumerate(mail):
        try:
            if item == "tick":
                raft.tick(number / 20)
            elif item == "propose":
                raft.propose(b"p")
            elif item == "read":
                raft.read(number, number / 20)
            elif isinstance(item, Envelope):
                for envelope in decode_mail("c", 1, encode_mail("c", 1, "a:1", [item]))[1]:
                    raft.step(envelope)
        except (MalformedMail, PeerFault, RaftError, ValueError):
            pass
        carry_out(raft)
        raft.check()
        assert raft.log.slice(1, raft.commit_index + 1, 1 << 30)[: len(committed)] == committed
        committed = raft.log.slice(1, raft.commit_index + 1, 1 << 30)
