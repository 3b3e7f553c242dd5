"""A stream whose other end is gone is ended soon and dialled again; a malformed address holds up nobody."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from shardkv.wire.address import split_address
from shardkv.wire.calls import Unreachable
from shardkv.wire.dialer import Connection
from shardkv.wire.handshake import Greeter
from shardkv.wire.keepalive import ASK_SECONDS, SILENT_SECONDS, Silence
from shardkv.wire.node_name import Member
from shardkv.wire.server_stream import ServerStream


class Cable:
    """A server with a cable before it that can be pulled: bytes then go nowhere, and no end is told."""

    def __init__(self) -> None:
        self.plugged = True
        self.posts: list[bytes] = []
        self.streams: list[ServerStream] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def open(self) -> str:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._stream, "127.0.0.1", 0)
        inner = self._server.sockets[0].getsockname()[1]

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            plugged_in = self.plugged  # a stream that was on the cable when it was pulled is lost for good
            while data := await reader.read(65536):
                if not self.plugged:
                    plugged_in = False
                if plugged_in:
                    writer.write(data)

        async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far = await asyncio.open_connection("127.0.0.1", inner)
            self._writers += [writer, far[1]]
            await asyncio.gather(carry(reader, far[1]), carry(far[0], writer), return_exceptions=True)

        self._proxy = await asyncio.start_server(guest, "127.0.0.1", 0)
        return f"127.0.0.1:{self._proxy.sockets[0].getsockname()[1]}"

    def _stream(self) -> ServerStream:
        async def handler(method: str, payload: bytes) -> bytes:
            if method == "slow":
                await asyncio.sleep(SILENT_SECONDS + 2 * ASK_SECONDS)
            return payload

        stream = ServerStream(
            Greeter(Member("c", 1, 1)), handler, lambda method, payload, stream: self.posts.append(payload)
        )
        self.streams.append(stream)
        return stream

    async def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._proxy.close()
        self._server.close()


def on_a_cable(story: Callable[[Cable, Connection, list[float]], Awaitable[None]]) -> None:
    async def main() -> None:
        cable, broke = Cable(), list[float]()
        loop = asyncio.get_running_loop()
        connection = Connection(await cable.open(), lambda: "c", lambda: broke.append(loop.time()))
        try:
            async with asyncio.timeout(30):
                await story(cable, connection, broke)
        finally:
            await connection.close()
            await cable.close()

    asyncio.run(main())


def test_both_ends_give_up_a_stream_whose_cable_is_out_and_the_next_message_dials_again() -> None:
    async def story(cable: Cable, connection: Connection, broke: list[float]) -> None:
        loop = asyncio.get_running_loop()
        assert await connection.call("echo", b"1", 1.0) == b"1"
        cable.plugged = False
        pulled = loop.time()
        while not broke or cable.streams[0]._transport is not None:
            await asyncio.sleep(0.05)
        assert broke[0] - pulled < SILENT_SECONDS + 2 * ASK_SECONDS
        cable.plugged = True
        healed = loop.time()
        while True:
            try:
                assert await connection.call("echo", b"2", 1.0) == b"2"
                break
            except Unreachable:
                await asyncio.sleep(0.02)
        assert loop.time() - healed < 1.0, "level again at once"

    on_a_cable(story)


def test_a_stream_without_traffic_and_a_call_that_takes_long_are_kept() -> None:
    async def story(cable: Cable, connection: Connection, broke: list[float]) -> None:
        assert await connection.call("slow", b"1", 20.0) == b"1"
        assert not broke and len(cable.streams) == 1

    on_a_cable(story)


def test_a_call_without_an_answer_ends_a_stream_on_which_nothing_comes() -> None:
    async def story(cable: Cable, connection: Connection, broke: list[float]) -> None:
        assert await connection.call("echo", b"1", 1.0) == b"1"
        cable.plugged = False
        with pytest.raises(Unreachable, match="no answer within"):
            await connection.call("echo", b"2", 2 * ASK_SECONDS)
        await asyncio.sleep(0.05)
        assert broke, "the next call dials again, without waiting for the rest of the silence"

    on_a_cable(story)


def test_a_call_without_an_answer_leaves_a_stream_on_which_others_are_answered() -> None:
    async def story(cable: Cable, connection: Connection, broke: list[float]) -> None:
        slow = asyncio.create_task(connection.call("slow", b"1", 2 * ASK_SECONDS))
        while not slow.done():
            assert await connection.call("echo", b"2", 5.0) == b"2"
            await asyncio.sleep(0.05)
        with pytest.raises(Unreachable, match="no answer within"):
            slow.result()
        assert await connection.call("echo", b"3", 5.0) == b"3"
        assert not broke and len(cable.streams) == 1

    on_a_cable(story)


def test_a_process_that_stood_still_does_not_take_that_for_silence() -> None:
    silence = Silence(0.0)
    assert silence.look(0.5) == (False, False)
    assert silence.look(60.0) == (True, False), "it asks, and looks again"
    for now in (60.5, 61.0, 61.5):
        assert silence.look(now) == (True, False)
    assert silence.look(62.0) == (True, True)


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "a b:1"])
def test_a_malformed_address_ends_its_stream_and_queues_nothing(address: str) -> None:
    """`int(port)` once failed inside a task: the stream connected for ever, with 64 MiB queued."""
    with pytest.raises(ValueError, match="is not host:port"):
        split_address(address)

    async def main() -> None:
        connection = Connection(address, lambda: "c", lambda: None)
        for _ in range(50):
            connection.post("raft", bytes(1 << 20))
            await asyncio.sleep(0.001)
            assert connection._stream is None or connection._stream.queued_bytes <= 2 << 20
        with pytest.raises(Unreachable):
            await connection.call("echo", b"", 1.0)
        await connection.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("address", "parts"),
    [("127.0.0.1:1", ("127.0.0.1", 1)), ("[::1]:65535", ("::1", 65535)), ("kv-0.kv:7400", ("kv-0.kv", 7400))],
)
def test_a_sound_address_is_taken_apart(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts
    assert len(address) < 300
    with pytest.raises(ValueError, match="is not host:port"):
        split_address("h" * 256 + ":1")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has it")
def test_the_kernel_watches_both_ends() -> None:
    async def story(cable: Cable, connection: Connection, broke: list[float]) -> None:
        await connection.call("echo", b"1", 1.0)
        assert connection._stream is not None
        for stream in (connection._stream, cable.streams[0]):
            assert stream._transport is not None
            found = stream._transport.get_extra_info("socket")
            assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) > 0
            assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) > 0

    on_a_cable(story)
