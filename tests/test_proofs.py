"""Who is at the other end of a stream: what a stranger, a relay and a replay get, which is nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv.process.certificates import Authority
from shardkv.raft.codec import encode_mail
from shardkv.raft.protocol.messages import Envelope, ReadIndex
from shardkv.raft.transport import MAIL, TcpTransport
from shardkv.wire.auth import LOGIN, STRANGER, AllowAll, Authorizer, Caller, Kind, Login, Node, Operator, Who
from shardkv.wire.calls import Code, Unreachable, parse
from shardkv.wire.dialer import Connection
from shardkv.wire.framing import CALL, HELLO, POST, RECORD, MalformedStream, Parser, pack_hello
from shardkv.wire.handshake import Channel, Dialling, Greeter, Greeting, NotKnownYet, Refused
from shardkv.wire.hello import NONCE_BYTES, Hello, Welcome, transcript
from shardkv.wire.node_name import Member, NodeName, common_name, is_for, names_in
from shardkv.wire.proof import Verifier, client_proof, key_id
from shardkv.wire.secrets import Secrets
from shardkv.wire.server_stream import ServerStream
from shardkv.wire.tls import Tls

SECRET, TOKEN = "the cluster's secret", "the user's token"
A, B = Member("c", 1, 1), Member("c", 1, 2)
USERS = {"app": Verifier.of(TOKEN)}


class Server:
    """One process's streams on loopback: keeps what was posted, and echoes calls."""

    def __init__(
        self,
        member: Member = A,
        secrets: Secrets | None = None,
        tls: Tls | None = None,
        authorizer: Authorizer | None = None,
    ) -> None:
        self.calls: list[tuple[str, bytes]] = []
        self.posts: list[tuple[bytes, ServerStream]] = []
        self.streams: list[ServerStream] = []
        hashes = (tls.certificate_hash(),) if tls is not None else ()
        known = Secrets([SECRET]) if secrets is None else secrets
        self.greeter = Greeter(member, known, (), USERS.get, lambda: hashes)
        self._tls, self._authorizer = tls, authorizer

    async def open(self) -> Server:
        loop = asyncio.get_running_loop()
        context = self._tls.server() if self._tls is not None else None
        self._server = await loop.create_server(self._stream, "127.0.0.1", 0, ssl=context)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def _stream(self) -> ServerStream:
        async def handler(method: str, payload: bytes) -> bytes:
            self.calls.append((method, payload))
            return b"\0" + payload

        stream = ServerStream(
            self.greeter,
            handler,
            lambda method, payload, stream: self.posts.append((payload, stream)),
            self._authorizer,
        )
        self.streams.append(stream)
        return stream

    @property
    def caller(self) -> Caller:
        return self.streams[-1].caller

    def close(self) -> None:
        self._server.close()
        for stream in self.streams:
            stream.abort()


class Wire:
    """Listens where a process was expected: records what it hears, passes it on to `target`, or answers `says`."""

    def __init__(self, target: str = "", says: Callable[[bytes], bytes] = lambda heard: b"") -> None:
        self.heard, self.answered = b"", b""
        self._target, self._says = target, says

    async def open(self) -> Wire:
        self._server = await asyncio.start_server(self._guest, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def _guest(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far: Any = None
        if self._target:
            host, _, port = self._target.rpartition(":")
            far = await asyncio.open_connection(host, int(port))
            answering = asyncio.create_task(self._answer(far[0], writer))
        while data := await reader.read(65536):
            self.heard += data
            if far is not None:
                far[1].write(data)
            writer.write(self._says(data))
        if far is not None:
            far[1].close()
            await answering
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.answered += data
            writer.write(data)
        writer.close()

    def close(self) -> None:
        self._server.close()


@contextlib.asynccontextmanager
async def dialled(
    address: str, who: Who, expected: tuple[int, int] | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Connection]:
    contexts = None if tls is None else lambda: tls
    connection = Connection(address, lambda: "c", lambda: None, contexts, who, expected)
    try:
        yield connection
    finally:
        await connection.close()


def story(tell: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await tell()

    asyncio.run(main())


async def eventually(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def node(member: Member = B, *secrets: str) -> Node:
    return Node(member, Secrets(secrets or [SECRET]))


EVERYBODY = [node(), Login("app", TOKEN), Operator(SECRET)]


@pytest.mark.quick
@pytest.mark.parametrize("who", EVERYBODY, ids=lambda who: type(who).__name__)
def test_both_ends_prove_themselves_and_calls_follow(who: Who) -> None:
    async def tell() -> None:
        server = await Server().open()
        async with dialled(server.address, who) as connection:
            connection.post("posted", b"first")
            assert await connection.call("echo", b"x", 5.0) == b"\0x"
            assert server.posts[0][0] == b"first" and server.calls == [("echo", b"x")]
        caller = server.caller
        match who:
            case Node():
                assert caller.member == B and caller.key == key_id(SECRET) and not caller.user
            case Login():
                assert caller.user == "app" and caller.member is None and not caller.operator
            case _:
                assert caller.operator and caller.member is None
        server.close()

    story(tell)


@pytest.mark.quick
@pytest.mark.parametrize("who", EVERYBODY, ids=lambda who: type(who).__name__)
def test_a_stranger_at_an_address_hears_a_hello_and_nothing_more(who: Who) -> None:
    """A login was once sent in clear to any address that forged mail named."""

    def pretends(heard: bytes) -> bytes:
        return pack_hello(0, Welcome(bytes(32), A, bytes(32)).encode())

    async def tell() -> None:
        for says in (lambda heard: b"", pretends):
            recorder = await Wire(says=says).open()
            async with dialled(recorder.address, who) as connection:
                connection.post("raft", b"mail for a member")
                with contextlib.suppress(Unreachable):
                    code, _ = parse(await connection.call("echo", b"a question", 1.0))
                    assert code is Code.DENIED
                parser = Parser()
                parser.feed(recorder.heard)
                assert parser.hello() is not None
                while (again := parser.hello()) is not None:  # it may have dialled once more
                    assert Hello.decode(again[1]).dialled == recorder.address
                assert not list(parser.records())
                for secret in (SECRET, TOKEN, "mail for", "a question"):
                    assert secret.encode() not in recorder.heard
            recorder.close()

    story(tell)


@pytest.mark.quick
@pytest.mark.parametrize("who", EVERYBODY, ids=lambda who: type(who).__name__)
def test_a_relay_to_another_process_proves_nothing(who: Who) -> None:
    async def tell() -> None:
        server = await Server().open()
        relay = await Wire(target=server.address).open()
        async with dialled(relay.address, who) as connection:
            code, why = parse(await connection.call("echo", b"a question", 2.0))
            assert code is Code.DENIED and b"this is another process" in why
        assert not server.calls and server.caller == STRANGER
        assert b"a question" not in relay.heard
        relay.close()
        server.close()

    story(tell)


@pytest.mark.quick
def test_a_proxy_of_ours_that_stands_at_our_address_is_let_through() -> None:
    async def tell() -> None:
        server = await Server().open()
        proxy = await Wire(target=server.address).open()
        server.greeter._addresses = frozenset({proxy.address})  # as --peers says; it binds at --listen
        async with dialled(proxy.address, node()) as connection:
            assert await connection.call("echo", b"x", 5.0) == b"\0x"
        for secret in (SECRET, TOKEN):
            assert secret.encode() not in proxy.heard + proxy.answered
        proxy.close()
        server.close()

    story(tell)


@pytest.mark.quick
def test_replayed_proofs_are_refused() -> None:
    async def tell() -> None:
        server = await Server().open()
        wire = await Wire(target=server.address).open()
        server.greeter._addresses = frozenset({wire.address})
        async with dialled(wire.address, node()) as connection:
            await connection.call("echo", b"x", 5.0)
        before = len(server.calls)
        host, _, port = server.address.rpartition(":")
        for skipped in (
            0,
            HELLO.size + HELLO.unpack_from(wire.heard)[2],
        ):  # all of it; the proof without a hello
            reader, writer = await asyncio.open_connection(host, int(port))
            if skipped:
                fresh = Hello(
                    bytes(32),
                    kind=node_hello().kind,
                    cluster="c",
                    group=1,
                    replica=2,
                    key=key_id(SECRET),
                    dialled=wire.address,
                )
                writer.write(pack_hello(3, fresh.encode()))
            writer.write(wire.heard[skipped:])
            answer = await reader.read()
            assert answer[3] == 0 and len(answer) < 200, "a welcome, and then the end"
            writer.close()
        assert len(server.calls) == before
        wire.close()
        server.close()

    story(tell)


def node_hello() -> Hello:
    return Dialling(node(), "c", "127.0.0.1:1", None)._hello


@pytest.mark.quick
def test_calls_before_the_proof_end_the_stream() -> None:
    async def tell() -> None:
        server = await Server().open()
        host, _, port = server.address.rpartition(":")
        for record in (
            RECORD.pack(CALL, 1, 4, 1) + b"echox",
            RECORD.pack(POST, 0, 4, 1) + b"raftx",
            RECORD.pack(CALL, 0, 5, 32) + LOGIN.encode() + bytes(32),
            RECORD.pack(CALL, 0, 5, 0) + LOGIN.encode(),
        ):
            reader, writer = await asyncio.open_connection(host, int(port))
            hello = Hello(
                bytes(32),
                kind=node_hello().kind,
                key=key_id(SECRET),
                replica=2,
                group=1,
                seen=server.address.encode(),
            )
            writer.write(pack_hello(3, hello.encode()) + record)
            assert (await reader.read())[3] == 0
            writer.close()
        assert not server.calls and not server.posts
        server.close()

    story(tell)


@pytest.mark.quick
def test_who_proves_by_another_secret_or_token_is_told_so() -> None:
    async def tell() -> None:
        server = await Server().open()
        for who, said in (
            (node(B, "an old secret"), "does not know the secret"),
            (Operator("a guess"), "does not know the secret"),
            (Login("app", "an old token"), "who are you?"),
            (Login("nobody", TOKEN), "who are you?"),
        ):
            async with dialled(server.address, who) as connection:
                code, why = parse(await connection.call("echo", b"x", 5.0))
                assert code is Code.DENIED and said in why.decode()
        assert not server.calls
        server.close()

    story(tell)


@pytest.mark.quick
def test_a_replica_talks_to_the_replica_that_its_log_names_and_to_no_other() -> None:
    async def tell() -> None:
        server = await Server(A).open()
        for expected in ((1, 3), (2, 1)):
            async with dialled(server.address, node(), expected) as connection:
                with pytest.raises(Unreachable, match="is there, and not replica"):
                    await connection.call("echo", b"x", 5.0)
        unproven = await Server(A, Secrets()).open()
        async with dialled(unproven.address, node(), (1, 1)) as connection:
            with pytest.raises(Unreachable, match="not proven that it belongs"):
                await connection.call("echo", b"x", 5.0)
        assert not server.calls and not unproven.calls
        server.close()
        unproven.close()

    story(tell)


@pytest.mark.quick
def test_a_secret_is_renewed_while_both_are_accepted() -> None:
    async def tell() -> None:
        secrets = Secrets([SECRET])
        server = await Server(secrets=secrets).open()
        for accepted, secret, works in (
            ([SECRET, "new"], SECRET, True),
            (["new", SECRET], "new", True),
            (["new"], "new", True),
            (["new"], SECRET, False),
        ):
            secrets.replace(accepted)
            async with dialled(server.address, node(B, secret)) as connection:
                code, _ = parse(await connection.call("echo", b"x", 5.0))
                assert (code is Code.OK) == works
        server.close()

    story(tell)


class Changing(AllowAll):
    """Everybody may do everything, until `still` is false."""

    still = True

    def is_still(self, caller: Caller) -> bool:
        return self.still


@pytest.mark.quick
def test_the_stream_of_a_caller_who_is_not_accepted_any_more_is_ended() -> None:
    async def tell() -> None:
        authorizer = Changing()
        server = await Server(authorizer=authorizer).open()
        async with dialled(server.address, node()) as connection:
            await connection.call("echo", b"x", 5.0)
            (stream,) = server.streams
            stream.recheck()
            await connection.call("echo", b"nothing has changed for this caller", 5.0)
            authorizer.still = False
            stream.recheck()
            await eventually(lambda: not stream.is_open)
        server.close()

    story(tell)


# ---- under TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def certified(authority: Authority, name: NodeName | str) -> Tls:
    if isinstance(name, str):
        path = authority.directory / name
        authority.ensure()
        authority.for_user(name, path)
    else:
        path = authority.directory / f"{name.cluster}-{name.group}-{name.replica}"
        authority.ensure()
        authority.for_process(name, ["127.0.0.1"], path)
    return Tls(Path(f"{path}.pem"), Path(f"{path}.key"), authority.certificate)


def test_under_tls_a_process_is_the_one_that_its_certificate_names(authority: Authority) -> None:
    a, b = certified(authority, NodeName("c", 1, 1)), certified(authority, NodeName("c", 1, 2))
    other, user = certified(authority, NodeName("other", 1, 2)), certified(authority, "app")

    async def tell() -> None:
        server = await Server(A, Secrets(), a).open()
        relay = await Wire(target=server.address).open()
        async with dialled(server.address, Node(B, Secrets()), (1, 1), b.client()) as connection:
            assert await connection.call("echo", b"x", 5.0) == b"\0x"
            assert server.caller.member == B
        for tls in (other, user, a):  # one of another cluster, a user's, another replica's
            async with dialled(server.address, Node(B, Secrets([SECRET])), (1, 1), tls.client()) as connection:
                code, why = parse(await connection.call("echo", b"x", 5.0))
                assert code is Code.DENIED and b"is not one of replica 2" in why
        async with dialled(server.address, Login("app", TOKEN), None, user.client()) as connection:
            assert await connection.call("echo", b"x", 5.0) == b"\0x"
            assert server.caller.user == "app" and server.caller.verifier is not None
        async with dialled(server.address, None, None, user.client()) as connection:
            assert await connection.call("echo", b"x", 5.0) == b"\0x"
            assert server.caller.user == "app" and server.caller.verifier is None
        async with dialled(server.address, None, None, b.client()) as connection:
            assert await connection.call("echo", b"x", 5.0) == b"\0x"
            assert not server.caller.user, "a process's certificate is no user's, whatever its name"
        server.close()
        # B's key was stolen, and its holder answers as if it were A.
        thief = await Server(A, Secrets([SECRET]), b).open()
        third = certified(authority, NodeName("c", 1, 3))
        for who in (Node(Member("c", 1, 3), Secrets()), Login("app", TOKEN), None):
            async with dialled(thief.address, who, None, third.client()) as connection:
                with pytest.raises(Unreachable, match="is not one of replica 1"):
                    await connection.call("echo", b"x", 5.0)
        assert not thief.calls
        thief.close()
        relay.close()

    story(tell)


def test_a_user_s_certificate_cannot_be_a_server_s(authority: Authority) -> None:
    user = certified(authority, "app")

    async def tell() -> None:
        server = await Server(A, Secrets([SECRET]), user).open()
        context = certified(authority, NodeName("c", 1, 2)).client()
        context.check_hostname = False  # it has no host, so that alone would do
        async with dialled(server.address, None, None, context) as connection:
            with pytest.raises(Unreachable, match=r"purpose|certificate"):
                await connection.call("echo", b"x", 5.0)
        server.close()

    story(tell)


def test_a_relay_with_the_key_of_another_process_changes_the_transcript(authority: Authority) -> None:
    """Both proofs have the hash of the certificate that the dialling end sees."""
    a, b = certified(authority, NodeName("c", 1, 1)), certified(authority, NodeName("c", 1, 2))
    greeter = Greeter(A, Secrets([SECRET]), (), USERS.get, lambda: (a.certificate_hash(),))
    shown = {"subjectAltName": (("URI", "shardkv://c"),)}
    for who in (Login("app", TOKEN), Operator(SECRET)):
        dialling = Dialling(who, "c", "127.0.0.1:1", None)
        hello = dialling.begin(Channel(tls=True, certificate=shown, certificate_hash=b.certificate_hash()))
        greeting = greeter.greet(3, hello[HELLO.size :], Channel(tls=True))
        assert "another process" in greeting.refusal


# ---- pure


@pytest.mark.quick
@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("shardkv://c", NodeName("c")),
        ("shardkv://c/group/0", NodeName("c", 0)),
        ("shardkv://c/group/7/replica/3", NodeName("c", 7, 3)),
        ("shardkv://c/replica/3", None),
        ("shardkv://c/group/x", None),
        ("shardkv://", None),
        ("https://c/group/1", None),
        ("shardkv://c/group/1/replica/2/more", None),
    ],
)
def test_the_name_in_a_certificate(uri: str, name: NodeName | None) -> None:
    assert NodeName.parse(uri) == name
    if name is not None:
        assert name.uri == uri
    certificate = {"subject": ((("commonName", "root"),),), "subjectAltName": (("DNS", "h"), ("URI", uri))}
    assert names_in(certificate) == ((name,) if name is not None else ())
    assert common_name(certificate) == ("" if name is not None else "root")
    assert is_for(certificate, Member("c", 7, 3)) == (name in (NodeName("c"), NodeName("c", 7, 3)))


def meet(
    who: Who, expected: tuple[int, int] | None, damage: Callable[[int, bytes], bytes], users: Any = USERS.get
) -> Caller:
    """The whole handshake, with `damage` done to each of its three messages. Raises Refused, MalformedStream."""
    greeter = Greeter(A, Secrets([SECRET]), (), users)
    dialling = Dialling(who, "c", "127.0.0.1:1", expected)
    hello = damage(0, dialling.begin(Channel(peer="127.0.0.1:1")))
    greeting: Greeting = greeter.greet(*cut(hello), Channel(own="127.0.0.1:1"))
    proof = damage(2, dialling.welcomed(*cut(damage(1, greeting.reply)), Channel(peer="127.0.0.1:1")))
    return greeting.proven(proof)


def cut(data: bytes) -> tuple[int, bytes]:
    parser = Parser()
    parser.feed(data)
    found = parser.hello()
    if found is None:
        raise MalformedStream("cut short")
    return found


@pytest.mark.quick
@pytest.mark.parametrize("who", EVERYBODY, ids=lambda who: type(who).__name__)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_no_handshake_that_was_tampered_with_proves_anything(who: Who, data: st.DataObject) -> None:
    """Any byte of any of the three messages changed, added or taken away: no end believes the other."""
    assert meet(who, (1, 1), lambda number, message: message) != STRANGER
    which = data.draw(st.integers(0, 2))

    def damage(number: int, message: bytes) -> bytes:
        if number != which:
            return message
        at = data.draw(st.integers(0, len(message) - 1))
        new = data.draw(st.one_of(st.just(b""), st.binary(min_size=1, max_size=40)))
        width = data.draw(st.integers(0, 8))
        changed = message[:at] + new + message[at + width :]
        if changed == message:
            changed = message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]
        return changed

    with pytest.raises((Refused, MalformedStream)):
        meet(who, (1, 1), damage)


@pytest.mark.quick
def test_a_proof_is_one_of_all_that_both_ends_have_said() -> None:
    """A relay that writes into a hello what the other process wants to see there changes the transcript."""
    hello = Hello(bytes(NONCE_BYTES), Kind.NODE, "c", 1, 2, "app", b"key", "h:1", b"seen")
    welcome = Welcome(bytes(NONCE_BYTES), A, b"")
    other = bytes([1]) * NONCE_BYTES
    hellos = [
        replace(hello, **change)
        for change in (
            {"nonce": other},
            {"kind": Kind.OPERATOR},
            {"cluster": "d"},
            {"group": 2},
            {"replica": 3},
            {"name": "root"},
            {"key": b"other"},
            {"dialled": "h:2"},
            {"seen": b"what the other process wants to see"},
        )
    ]
    assert len(hellos) == len(fields(Hello)), "a field that is not in the transcript is not proven"
    said = {transcript(each, welcome) for each in (hello, *hellos)}
    said |= {transcript(hello, replace(welcome, nonce=other)), transcript(hello, replace(welcome, member=B))}
    assert len(said) == 1 + len(hellos) + 2


@pytest.mark.quick
@settings(deadline=None, max_examples=300)
@given(version=st.integers(0, 255), body=st.binary(max_size=400))
def test_a_greeter_answers_any_bytes_or_calls_them_malformed(version: int, body: bytes) -> None:
    greeter = Greeter(A, Secrets([SECRET]), (), USERS.get)
    try:
        greeting = greeter.greet(version, body, Channel())
    except MalformedStream:
        return
    assert len(greeting.reply) < 1024
    if not greeting.refusal:
        with pytest.raises(MalformedStream):
            greeting.proven(body[:32])


@pytest.mark.quick
def test_a_user_who_is_not_known_yet_is_to_ask_again() -> None:
    def unknown(name: str) -> Verifier | None:
        raise NotKnownYet("who may do what is not known here yet")

    with pytest.raises(Refused, match="not known here yet") as refused:
        meet(Login("app", TOKEN), None, lambda number, message: message, unknown)
    assert not refused.value.denied


@pytest.mark.quick
def test_what_checks_a_login_proves_nothing_elsewhere() -> None:
    verifier = Verifier.of(TOKEN)
    assert TOKEN.encode() not in verifier.encode() and repr(verifier.stored_key) not in repr(verifier)
    proof = client_proof(TOKEN, b"one stream")
    assert verifier.accepts(b"one stream", proof) and not verifier.accepts(b"another", proof)
    for guess in (verifier.stored_key, verifier.server_key, verifier.server_proof(b"another"), b"", bytes(31)):
        assert not verifier.accepts(b"another", guess)
    assert Verifier.decode(verifier.encode()) == verifier and verifier.knows(TOKEN) and not verifier.knows("x")
    with pytest.raises(ValueError, match="verifier of 32"):
        Verifier.decode(bytes(32))


# ---- raft's mail


@pytest.mark.quick
def test_mail_makes_us_dial_nobody_and_is_answered_on_its_stream() -> None:
    async def tell() -> None:
        recorder = await Wire().open()
        server = await Server(A, Secrets()).open()
        transport = TcpTransport("c", 1, server.address, {})
        refused: list[str] = []
        transport.on_refused = lambda sender, why: refused.append(why)
        forged = encode_mail("c", 1, recorder.address, [Envelope(9, 1, 3, ReadIndex(1))], 7, 7)
        answers: list[bytes] = []
        connection = Connection(server.address, lambda: "c", lambda: None, on_post=answers.append)
        connection.post(MAIL, forged)
        await eventually(lambda: server.posts)
        payload, stream = server.posts[0]
        assert transport.unpack(payload, stream) == [Envelope(9, 1, 3, ReadIndex(1), 7, 7)]
        transport.send([Envelope(1, 9, 3, ReadIndex(2))])
        await eventually(lambda: answers)
        assert not recorder.heard, "nobody dials an address that mail names"
        transport.set_peers({9: recorder.address}, {})  # the log does
        transport.send([Envelope(1, 9, 3, ReadIndex(3))])
        await eventually(lambda: recorder.heard)
        assert len(answers) == 1
        await connection.close()
        await transport.close()
        server.close()
        recorder.close()

    story(tell)


@pytest.mark.quick
def test_a_replica_sends_mail_in_its_own_name_alone() -> None:
    async def tell() -> None:
        server = await Server(A).open()
        transport = TcpTransport("c", 1, server.address, {})
        refused: list[str] = []
        transport.on_refused = lambda sender, why: refused.append(why)
        async with dialled(server.address, node(B)) as connection:
            for sender in (2, 3):
                connection.post(MAIL, encode_mail("c", 1, "", [Envelope(sender, 1, 3, ReadIndex(1))], 7, 7))
            await eventually(lambda: len(server.posts) == 2)
            taken = [transport.unpack(payload, stream) for payload, stream in server.posts]
            assert [len(envelopes) for envelopes in taken] == [1, 0]
            assert "as if from replica 3, by replica 2 of group 1" in refused[0]
        await transport.close()
        server.close()

    story(tell)
