"""Snapshot streams: one at a time, the newest; never spliced together; proven before they are installed."""

from __future__ import annotations

import asyncio

import google_crc32c
import pytest

from shardkv.raft.codec import decode_mail, encode_mail
from shardkv.raft.protocol.messages import Envelope, InstallSnapshot, InstallSnapshotReply
from shardkv.raft.protocol.types import SnapshotMeta
from shardkv.raft.snapshot import (
    PROVING_SECONDS,
    BytesSink,
    BytesSource,
    SnapshotReceiver,
    SnapshotSender,
    SnapshotSink,
    StreamOptions,
)
from tests.sim.loop import run

META = SnapshotMeta(9, 3)
FAST = StreamOptions(chunk_bytes=4, answer_seconds=1.0, attempts=3)


def chunk(stream: int, data: bytes, offset: int, total: int = 12) -> InstallSnapshot:
    return InstallSnapshot(*_of(META), total, offset, data, int(google_crc32c.value(data)), stream)


def _of(meta: SnapshotMeta) -> tuple[int, int]:
    return meta.index, meta.term


class Receiving:
    """A follower's end, whose state is the bytes that were installed last."""

    def __init__(self, proof_seconds: float = 0.0, refuses: bool = False) -> None:
        self.installed = b""
        self.sinks: list[BytesSink] = []
        self._proof_seconds, self._refuses = proof_seconds, refuses
        self.receiver = SnapshotReceiver(lambda index: not self.installed, self._open, self._install)

    def _open(self, meta: SnapshotMeta) -> SnapshotSink:
        outer = self

        class Sink(BytesSink):
            async def finish(self) -> None:
                await asyncio.sleep(outer._proof_seconds)
                await super().finish()

        self.sinks.append(Sink(lambda data: None))
        return self.sinks[-1]

    def _install(self, meta: SnapshotMeta, sink: SnapshotSink) -> None:
        if self._refuses:
            raise ValueError("cannot be opened")
        assert isinstance(sink, BytesSink)
        self.installed = sink.data


@pytest.mark.quick
def test_the_number_of_a_stream_travels() -> None:
    sent = [
        Envelope(1, 2, 5, chunk(2**64 - 1, b"abcd", 0)),
        Envelope(2, 1, 5, InstallSnapshotReply(9, 0, 4, False, 2**63)),
    ]
    assert decode_mail("c", 1, encode_mail("c", 1, "a:1", sent))[1] == sent


@pytest.mark.quick
def test_two_streams_of_one_state_are_never_spliced() -> None:
    async def story() -> None:
        at = Receiving()
        for term in (5, 6):  # an old leader's and a new one's; the old one's chunks come late, in between
            assert await at.receiver.receive(chunk(term * 100, b"%d000" % term, 0), term)
        assert await at.receiver.receive(chunk(500, b"5111", 4), 5) is None, "it learns of the newer term"
        reply = await at.receiver.receive(chunk(600, b"6111", 4), 6)
        assert reply is not None and reply.offset == 8 and reply.stream == 600
        await at.receiver.receive(chunk(600, b"6222", 8), 6)
        assert at.installed == b"600061116222"

    run(story())


@pytest.mark.quick
def test_a_stream_that_was_replaced_does_not_come_back() -> None:
    """The leader gave stream 1 up and sends stream 2: late chunks of 1 must not throw it out."""

    async def story() -> None:
        at = Receiving()
        await at.receiver.receive(chunk(1, b"1000", 0), 5)
        for offset, data in ((0, b"2000"), (4, b"2111"), (8, b"2222")):
            assert await at.receiver.receive(chunk(2, data, offset), 5)
            assert at.installed or await at.receiver.receive(chunk(1, b"1000", 0), 5) is None
        assert at.installed == b"200021112222"
        assert len(at.sinks) == 2

    run(story())


@pytest.mark.quick
def test_a_leader_that_leads_again_goes_on_with_a_newer_term() -> None:
    async def story() -> None:
        at = Receiving()
        await at.receiver.receive(chunk(1, b"1000", 0), 5)
        reply = await at.receiver.receive(chunk(1, b"1111", 4), 7)
        assert reply is not None and reply.offset == 0, "from the start, but not never"

    run(story())


@pytest.mark.quick
def test_a_snapshot_that_cannot_be_installed_is_asked_for_again() -> None:
    async def story() -> None:
        at = Receiving(refuses=True)
        reply = await at.receiver.receive(chunk(1, b"abcd", 0, total=4), 5)
        assert reply is not None and (reply.done, reply.offset) == (False, 0)
        assert at.receiver.refused == "cannot be opened", "for status"
        at._refuses = False
        reply = await at.receiver.receive(chunk(1, b"abcd", 0, total=4), 5)
        assert reply is not None and reply.done and at.installed == b"abcd" and not at.receiver.refused

    run(story())


@pytest.mark.quick
def test_a_snapshot_that_the_log_overtook_while_it_was_proven_is_not_installed() -> None:
    """It would take the state back to before what was applied, and answered, since."""

    async def story() -> None:
        at = Receiving(proof_seconds=2 * PROVING_SECONDS)
        wanted = True
        at.receiver = SnapshotReceiver(lambda index: wanted, at._open, at._install)
        reply = await at.receiver.receive(chunk(1, b"abcd", 0, total=4), 5)
        assert reply is not None and not reply.done, "it is being proven"
        receiving = asyncio.create_task(at.receiver.receive(chunk(1, b"abcd", 0, total=4), 5))
        await asyncio.sleep(PROVING_SECONDS / 2)
        wanted = False
        reply = await receiving
        while reply is None or not reply.done:
            reply = await at.receiver.receive(chunk(1, b"abcd", 0, total=4), 5)
        assert at.installed == b""

    run(story())


async def converse(at: Receiving, options: StreamOptions = FAST, repeat: int = 1) -> tuple[int, int]:
    """A sender and this receiver, each message `repeat` times; what the sender says, and how much it sent."""
    queue: asyncio.Queue[InstallSnapshot] = asyncio.Queue()
    sent = 0

    def send(peer: int, message: InstallSnapshot) -> None:
        nonlocal sent
        sent += 1
        for _ in range(repeat):
            queue.put_nowait(message)

    sender = SnapshotSender(2, BytesSource(META, b"0123456789ab"), send, options, 77)

    async def receive() -> None:
        while True:
            reply = await at.receiver.receive(await queue.get(), 5)
            for _ in range(repeat):
                if reply is not None:
                    sender.answered(reply)

    receiving = asyncio.create_task(receive())
    index = await sender.run()
    receiving.cancel()
    return index, sent


@pytest.mark.quick
@pytest.mark.parametrize("repeat", [1, 3])
def test_a_sender_waits_while_the_receiver_reads_the_snapshot_through(repeat: int) -> None:
    """For far longer than it would wait for a receiver that does not answer."""

    async def story() -> None:
        seconds = 30 * PROVING_SECONDS + FAST.attempts * FAST.answer_seconds
        at = Receiving(proof_seconds=seconds)
        index, sent = await converse(at, repeat=repeat)
        assert (index, at.installed) == (META.index, b"0123456789ab")
        assert len(at.sinks) == 1, "received once"
        assert sent <= 4 + 2 * seconds / FAST.answer_seconds, "and asked now and then, whatever is repeated"

    run(story())


@pytest.mark.quick
def test_a_sender_whose_snapshot_is_refused_again_and_again_gives_it_up() -> None:
    async def story() -> None:
        at = Receiving(refuses=True)
        assert (await converse(at))[0] == 0
        assert len(at.sinks) == FAST.restarts + 1

    run(story())


@pytest.mark.quick
def test_an_answer_to_another_stream_is_not_taken_for_ours() -> None:
    async def story() -> None:
        sent: list[InstallSnapshot] = []
        sender = SnapshotSender(2, BytesSource(META, b"0123"), lambda _, c: sent.append(c), FAST, 77)
        for stream in (76, 0):
            sender.answered(InstallSnapshotReply(META.index, 0, 4, True, stream))
        assert await sender.run() == 0
        assert {each.stream for each in sent} == {77}

    run(story())
