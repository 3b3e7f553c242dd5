"""A listener cannot be filled up: each of its shares is bounded, and whoever has most of one gives back first."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import uvloop

from shardkv.wire.acceptor import Acceptor
from shardkv.wire.auth import LOGIN, AllowAll, Caller, Login, Node, Standing, Who
from shardkv.wire.descriptors import MIN_DESCRIPTORS, OWN, Descriptors, TooFewDescriptors
from shardkv.wire.framing import ANSWER, ASK, CALL, HELLO, HERE, RECORD, SMALL_PAYLOAD_BYTES, Parser
from shardkv.wire.handshake import Channel, Dialling, Greeter
from shardkv.wire.held import HeldBytes
from shardkv.wire.hello import stranger
from shardkv.wire.inbound import Inbound, source_of
from shardkv.wire.listener import Listener
from shardkv.wire.node_name import Member
from shardkv.wire.proof import Verifier
from shardkv.wire.secrets import Secrets
from shardkv.wire.shares import Share
from shardkv.wire.tls import Tls
from tests.test_tls import certify

# ---- shares and numbers, pure


@pytest.mark.quick
def test_whoever_has_most_of_a_share_gives_back_the_oldest() -> None:
    share: Share[str] = Share(5)
    for item in ("a1", "b1", "a2", "a3", "c1"):
        share.add(item, item[0])
    assert share.surplus() is None
    share.add("d1", "d")
    assert share.surplus() == "a1"
    share.remove("a1")
    assert share.surplus() is None
    share.add("c2", "c", weight=3)  # one that costs as much as three
    assert share.used == 8 and share.surplus() == "c1"
    share.remove("c1")
    assert share.surplus() == "c2", "c still has most"
    share.remove("c2")
    share.remove("c2")
    assert share.used == 4 and share.surplus() is None


@pytest.mark.quick
def test_a_busy_one_is_passed_over_unless_all_are() -> None:
    busy = {"a1"}
    share: Share[str] = Share(1, lambda item: item in busy)
    share.add("a1", "a")
    share.add("a2", "a")
    assert share.surplus() == "a2"
    busy.add("a2")
    assert share.surplus() in busy


@pytest.mark.quick
def test_a_share_is_always_what_a_plain_count_says() -> None:
    rng = Random(1)
    share: Share[int] = Share(20)
    there: dict[int, tuple[str, int]] = {}
    for item in range(3000):
        if there and rng.random() < 0.45:
            gone = rng.choice(list(there))
            share.remove(gone)
            del there[gone]
        else:
            again = rng.choice(list(there)) if there and rng.random() < 0.3 else item
            there[again] = rng.choice("abc"), rng.choice([1, 3])
            share.add(again, *there[again])
        assert share.used == sum(weight for _, weight in there.values()) and len(share) == len(there)
        one = share.surplus()
        assert (one is None) == (share.used <= share.most)
        if one is not None:
            counts: dict[str, int] = {}
            for owner, weight in there.values():
                counts[owner] = counts.get(owner, 0) + weight
            assert counts[there[one][0]] == max(counts.values())
            share.remove(one)
            del there[one]


@pytest.mark.quick
def test_descriptors_are_kept_for_files_and_peers_whatever_the_limit() -> None:
    with pytest.raises(TooFewDescriptors, match=f"RLIMIT_NOFILE is 100: .* at least {MIN_DESCRIPTORS}"):
        Descriptors.divide(100)
    for limit in (MIN_DESCRIPTORS, 256, 1024, 20_000, 1 << 20):
        divided = Descriptors.divide(limit)
        clients = divided.known + divided.strangers + 2 * divided.pages
        assert clients + divided.peers + 2 * divided.tables + OWN <= limit
        assert min(divided.known, divided.strangers, divided.peers, divided.pages) >= 6, divided


@pytest.mark.quick
def test_a_machine_s_ipv6_network_is_one_source() -> None:
    assert source_of("2001:db8::1") == source_of("2001:db8::ffff") != source_of("2001:db8:0:1::1")
    assert source_of("::ffff:10.0.0.1") == source_of("10.0.0.1") != source_of("10.0.0.2")
    assert source_of("fe80::1%eth0") == source_of("fe80::2")


@pytest.mark.quick
def test_bytes_that_are_held_have_a_bound_and_a_node_is_ended_last() -> None:
    ended: list[Inbound] = []
    held = HeldBytes(ended.append, most=100)
    one, other, node = (Inbound(name, name, 0.0) for name in ("one", "other", "node"))
    node.standing = Standing.NODE
    held.hold(node, 60)
    held.hold(one, 30)
    assert held.crowded and not ended
    held.hold(other, 20)
    assert ended == [one] and held.total == 80
    held.hold(node, 90)
    assert ended == [one, other] and held.total == 90
    held.hold(node, 101)
    assert ended[-1] is node and held.total == 0
    held.hold(one, 10)
    held.release(one)
    assert held.total == 0


@pytest.mark.quick
def test_a_stranger_s_large_record_is_skipped_and_the_next_one_is_read() -> None:
    def record(number: int, size: int) -> bytes:
        return RECORD.pack(CALL, number, 7, size) + b"kv.read" + bytes(size)

    data = (
        record(1, 10) + record(2, SMALL_PAYLOAD_BYTES + 1) + record(3, 20) + record(4, 1 << 20) + record(5, 1)
    )
    for step in (7, 1000, len(data)):
        parser, found, most = Parser(small=True), [], 0
        for start in range(0, len(data), step):
            parser.feed(data[start : start + step])
            for _, number, method, payload in parser.records():
                assert method == "kv.read"
                found.append((number, None if payload is None else len(payload)))
            most = max(most, len(parser))
        assert found == [(1, 10), (2, None), (3, 20), (4, None), (5, 1)]
        assert len(parser) == 0 and most <= SMALL_PAYLOAD_BYTES + 100


# ---- one process


class Notes:
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def note(self, kind: str, **fields: Any) -> None:
        self.lines.append({"kind": kind, **fields})


class LoginAuthorizer(AllowAll):
    """Knows whoever has logged in as "user" or "node"."""

    def standing(self, caller: Caller) -> tuple[Standing, str]:
        if caller.member is not None:
            return Standing.NODE, "node"
        return (Standing.KNOWN, caller.user) if caller.user else (Standing.STRANGER, "")


SECRETS = Secrets(["secret"])
WHO: dict[str, Who] = {"user": Login("user", "token"), "node": Node(Member("c", 1, 2), SECRETS)}
GREETER = Greeter(Member("c", 1, 1), SECRETS, (), {"user": Verifier.of("token")}.get)


class Scene:
    """A listener of few places, and those who come to it."""

    def __init__(self) -> None:
        self.notes = Notes()
        self._held = contextlib.ExitStack()

    async def open(self, tls: Tls | None = None, **bounds: Any) -> None:
        async def echo(method: str, payload: bytes) -> bytes:
            await self.gate.wait()
            return payload

        self.gate = asyncio.Event()
        self.gate.set()
        self.listener = Listener(
            GREETER, echo, lambda *posted: None, "nobody", LoginAuthorizer(), audit=self.notes
        )
        few: dict[str, Any] = {"strangers": 4, "known": 4, "peers": 2, "audit": self.notes} | bounds
        factory = self.listener.acceptor._factory
        self.listener.acceptor = Acceptor("main", factory, **few)
        context = tls.server() if tls is not None else None
        await self.listener.open("127.0.0.1", 0, None if context is None else lambda: context)
        self.port = self.listener.acceptor.port

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        connection = self._held.enter_context(
            socket.create_connection(("127.0.0.1", self.port), timeout=10, source_address=(source, 0))
        )
        connection.setblocking(False)
        return connection

    async def login(self, name: str, source: str = "127.0.0.1") -> socket.socket:
        connection = self.connect(source)
        loop = asyncio.get_running_loop()
        address = f"127.0.0.1:{self.port}"
        dialling, channel = Dialling(WHO[name], "c", address, None), Channel(peer=address)
        await loop.sock_sendall(connection, dialling.begin(channel))
        _, status, length = HELLO.unpack(await self._receive(connection, HELLO.size))
        proof = dialling.welcomed(status, await self._receive(connection, length), channel)
        login = RECORD.pack(CALL, 0, len(LOGIN), len(proof)) + LOGIN.encode() + proof
        await loop.sock_sendall(connection, login + RECORD.pack(ASK, 0, 0, 0))
        kind, *_ = RECORD.unpack(await self._receive(connection, RECORD.size))
        assert kind == HERE, "the record before was taken"
        return connection

    async def _receive(self, connection: socket.socket, length: int) -> bytes:
        found = b""
        while len(found) < length:
            receiving = asyncio.get_running_loop().sock_recv(connection, length - len(found))
            more = await asyncio.wait_for(receiving, 10)
            assert more, "turned away"
            found += more
        return found

    async def call(self, connection: socket.socket, payload: bytes = b"x") -> bytes:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(connection, RECORD.pack(CALL, 7, 4, len(payload)) + b"echo" + payload)
        parser = Parser()
        while True:
            more = await asyncio.wait_for(loop.sock_recv(connection, 1 << 20), 10)
            assert more, "turned away"
            parser.feed(more)
            for kind, number, _, answer in parser.records():
                if (kind, number) == (ANSWER, 7):  # what else comes asks whether we are there
                    return answer or b""

    async def is_closed(self, connection: socket.socket) -> bool:
        """Within ten seconds."""
        try:
            async with asyncio.timeout(10):
                while await asyncio.get_running_loop().sock_recv(connection, 1000):
                    pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)

    async def close(self) -> None:
        await self.listener.close()
        self._held.close()


def story(work: Callable[[Scene], Awaitable[None]]) -> None:
    async def run() -> None:
        scene = Scene()
        try:
            await work(scene)
        finally:
            await scene.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(run(), 60))


def test_silent_connections_of_one_source_lock_out_neither_clients_nor_peers() -> None:
    async def work(scene: Scene) -> None:
        await scene.open()
        flood = [scene.connect("127.0.0.2") for _ in range(50)]
        peer, user = await scene.login("node"), await scene.login("user")
        await scene.until(
            lambda: scene.listener.acceptor.status()["turned_away"].get("no place is left", 0) >= 46
        )
        flood += [scene.connect("127.0.0.2") for _ in range(50)]
        assert await scene.call(peer) == await scene.call(user) == b"x"
        assert await scene.is_closed(flood[0])
        assert scene.listener.acceptor.status()["strangers"] <= 4
        lines = [line for line in scene.notes.lines if line["kind"] == "connection"]
        assert lines and all(line["address"].startswith("127.0.0.2:") and not line["allowed"] for line in lines)

    story(work)


def test_a_user_with_too_many_connections_loses_his_own_idlest() -> None:
    async def work(scene: Scene) -> None:
        await scene.open()
        peers = [await scene.login("node") for _ in range(2)]
        users = [await scene.login("user") for _ in range(4)]
        assert await scene.call(users[0]) == b"x"
        scene.listener.acceptor._look()  # those that were used until now are idle from now on
        assert await scene.call(users[0]) == b"x"
        users.append(await scene.login("user"))
        assert await scene.is_closed(users[1]), "the first was used last, the second is the idlest"
        for connection in (users[0], *users[2:], *peers):
            assert await scene.call(connection) == b"x"
        assert scene.listener.acceptor.status()["peers"] == 2

    story(work)


def test_who_does_not_say_in_time_who_he_is_is_let_go_and_who_is_idle_for_long() -> None:
    async def work(scene: Scene) -> None:
        await scene.open(hello_seconds=0.3, idle_seconds=0.3)
        silent, half = scene.connect(), scene.connect()
        hello = scene.connect()
        half.send(b"S")
        hello.send(stranger("c"))
        peer, user = await scene.login("node"), await scene.login("user")
        for connection in (silent, half, hello, user):
            assert await scene.is_closed(connection)
        assert await scene.call(peer) == b"x", "a peer may be idle"
        whys = scene.listener.acceptor.status()["turned_away"]
        assert whys == {"it did not say in time who it is": 3, "it was idle for long": 1}

    story(work)


def test_a_stranger_gets_no_memory_and_a_user_s_frames_are_counted() -> None:
    async def work(scene: Scene) -> None:
        await scene.open()
        held = lambda: scene.listener.acceptor.status()["held_bytes"]  # noqa: E731
        nobody = scene.connect()
        await asyncio.get_running_loop().sock_sendall(
            nobody,
            stranger("c") + RECORD.pack(CALL, 1, 4, 32 << 20) + b"echo" + bytes(1 << 20),
        )
        user = await scene.login("user")
        scene.gate.clear()
        await asyncio.get_running_loop().sock_sendall(
            user,
            RECORD.pack(CALL, 1, 4, 100_000)
            + b"echo"
            + bytes(100_000)
            + RECORD.pack(CALL, 2, 4, 50_000)
            + b"echo"
            + bytes(20_000),
        )
        await scene.until(lambda: held() >= 120_000)
        assert held() < 121_000, "a call under way, a frame that is not whole, and nothing of the stranger"
        scene.gate.set()
        await scene.until(lambda: held() < 21_000)
        user.close()
        await scene.until(lambda: held() == 0)

    story(work)


def test_no_descriptor_for_a_connection_is_no_fault_and_the_oldest_stranger_makes_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit of this process is set to what it has open: accept fails with EMFILE, and files can be opened after."""

    async def work(scene: Scene) -> None:
        await scene.open(strangers=50)
        strangers = [scene.connect("127.0.0.2") for _ in range(5)]
        user = await scene.login("user")
        await scene.until(lambda: scene.listener.acceptor.status()["strangers"] == 5)
        waiting = [scene.connect("127.0.0.3") for _ in range(3)]  # in the backlog until the loop turns
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
        try:
            fill_up(scene._held)
            await scene.until(lambda: scene.listener.acceptor.accept_failures > 0)
            assert scene.listener.acceptor.status()["accepting_pauses"]
            assert await scene.call(user) == b"x"
            await scene.until(lambda: scene.listener.acceptor.accepted == 9)
            assert await scene.is_closed(strangers[0])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert await scene.call(user) == b"x"
        await scene.until(lambda: not scene.listener.acceptor.paused)
        assert all(connection.fileno() >= 0 for connection in waiting)

    story(work)


def fill_up(held: contextlib.ExitStack) -> None:
    """Use the descriptors below the highest that are free."""
    try:
        while True:
            held.callback(os.close, os.dup(0))
    except OSError:
        pass  # that was the last one


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return certify(tmp_path_factory.mktemp("ca"), "node")


def shake_hands(scene: Scene, context: ssl.SSLContext, source: str) -> float:
    """Seconds until the server has welcomed us over TLS. Raises OSError."""
    began = time.monotonic()
    with (
        socket.create_connection(("127.0.0.1", scene.port), 10, source_address=(source, 0)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(stranger("c"))
        welcome = connection.recv(6)
        if not welcome:
            raise ConnectionError("closed")
        assert welcome[3] == 0
    return time.monotonic() - began


def test_half_open_handshakes_hold_up_no_other_and_each_refusal_leaves_one_line(
    node: Tls, tmp_path: Path
) -> None:
    async def work(scene: Scene) -> None:
        await scene.open(node, strangers=400)
        hello = b"\x16\x03\x01\x02\x00"  # of a handshake: the head of a record whose rest never comes
        silent = [scene.connect("127.0.0.2") for _ in range(150)]
        for connection in (scene.connect("127.0.0.2") for _ in range(200)):
            connection.send(hello)
        assert await asyncio.to_thread(shake_hands, scene, node.client(), "127.0.0.1") < 1.0
        status = scene.listener.acceptor.status()
        assert status["handshakes_under_way"] <= 128 and status["strangers"] <= 400
        assert scene.listener.acceptor.status()["turned_away"].get("TLS", 0) == 0
        stranger = certify(tmp_path, "stranger")
        client = Tls(stranger.cert, stranger.key, node.ca).client()
        with pytest.raises(OSError):
            await asyncio.to_thread(shake_hands, scene, client, "127.0.0.4")
        plain = scene.connect("127.0.0.5")
        plain.send(b"GET / HTTP/1.1\r\n\r\n")
        assert await scene.is_closed(plain)
        lines = [line for line in scene.notes.lines if line["kind"] == "tls"]
        by_source = {line["address"].partition(":")[0]: line["why"] for line in lines}
        assert "certificate" in by_source["127.0.0.4"] and by_source["127.0.0.5"] == "it does not speak TLS"
        assert len(lines) == 2 and silent
        before, there = len(os.listdir("/proc/self/fd")), scene.listener.acceptor.status()["strangers"]
        assert there >= 200
        scene.listener.acceptor._hello_seconds = 0.0
        await scene.until(lambda: scene.listener.acceptor.status()["strangers"] == 0)
        await scene.until(lambda: len(os.listdir("/proc/self/fd")) <= before - there)

    story(work)


def test_an_answer_record_of_a_client_is_ignored() -> None:
    async def work(scene: Scene) -> None:
        await scene.open()
        user = await scene.login("user")
        user.send(RECORD.pack(ANSWER, 1, 0, 3) + b"abc")
        assert await scene.call(user) == b"x"

    story(work)
