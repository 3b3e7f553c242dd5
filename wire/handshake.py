"""Both ends of a new stream prove who they are, before anything else is said. No secret is ever sent.

    1. The dialling end says who it will prove to be, whom it dialled, and what it found there.
    2. The other end says which process it is, and proves it first.
    3. Only now the dialling end sends its own proof, and with it the first calls.

A proof is one of a secret (`proof.py`): a user's token, or the cluster's secret for processes and
operators. Under TLS processes know each other by their certificates (`node_name.py`) instead, and
need no secret. A dialling end that has something to prove insists on the other end's proof, so a
stranger at an address of ours learns the dialler's name, and nothing more.

Why a relay gains nothing: under TLS both proofs contain the hash of the certificate that the dialling
end sees, so whoever stands between two streams needs the right process's key. Without TLS they
contain the address that its socket is connected to, which must be the other end's own: a proof that is
passed on to another process is refused there. Whoever can change packets on the way can take over a
stream without TLS after both have proven themselves; only TLS helps against that.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets as random_bytes
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shardkv.wire.auth import STRANGER, Caller, Kind, Login, Node, Operator, Who
from shardkv.wire.framing import DENIED, PROTOCOL_VERSION, REFUSED, WELCOME, MalformedStream, pack_hello
from shardkv.wire.hello import NONCE_BYTES, Hello, Welcome, transcript
from shardkv.wire.node_name import Member, common_name, is_for
from shardkv.wire.proof import Verifier, client_proof, is_server_proof, key_id
from shardkv.wire.secrets import Secrets


class Refused(Exception):
    """The other end does not take us, or we do not take it. `denied`: by who we are, so asking again does not help."""

    def __init__(self, why: str, denied: bool = False) -> None:
        super().__init__(why)
        self.denied = denied


@dataclass(frozen=True, slots=True)
class Channel:
    """What a socket says of both of its ends."""

    peer: str = "?"
    own: str = "?"
    tls: bool = False
    certificate: Mapping[str, Any] | None = None  # the peer's
    certificate_hash: bytes = b""

    @classmethod
    def of(cls, transport: Any) -> Channel:
        shown = transport.get_extra_info("ssl_object")
        encoded = shown.getpeercert(True) if shown is not None else None
        return cls(
            _address(transport.get_extra_info("peername")),
            _address(transport.get_extra_info("sockname")),
            shown is not None,
            transport.get_extra_info("peercert"),
            certificate_hash(encoded) if encoded else b"",
        )


def certificate_hash(encoded: bytes) -> bytes:
    """What stands for a server's certificate in the proofs, like tls-server-end-point (RFC 5929)."""
    return hashlib.sha256(encoded).digest()


def _address(name: Any) -> str:
    if not isinstance(name, tuple):  # a socket that is gone, or none of the internet's
        return "?"
    try:
        host = ipaddress.ip_address(name[0].partition("%")[0])
    except ValueError:
        return "?"
    mapped = getattr(host, "ipv4_mapped", None)
    return f"{mapped or host}:{name[1]}"


# ---- the end that dials


class Dialling:
    """One attempt of `who` at `address`. `expected`: which group and replica must be there; None: any process."""

    def __init__(self, who: Who, cluster: str, address: str, expected: tuple[int, int] | None) -> None:
        self._who, self._expected = who, expected
        self._secret = ""
        self._hello = self._introduction(who, cluster, address)

    def _introduction(self, who: Who, cluster: str, address: str) -> Hello:
        hello = Hello(random_bytes.token_bytes(NONCE_BYTES), cluster=cluster, dialled=address)
        match who:
            case Login():
                self._secret = who.token
                return replace(hello, kind=Kind.USER, name=who.name)
            case Operator():
                self._secret = who.secret
                return replace(hello, kind=Kind.OPERATOR, key=key_id(who.secret))
            case Node():
                member, self._secret = who.member, who.secrets.first
                key = key_id(self._secret) if self._secret else b""
                return replace(hello, kind=Kind.NODE, group=member.group, replica=member.replica, key=key)
            case None:
                return hello

    def begin(self, channel: Channel) -> bytes:
        """The bytes that open the stream."""
        if channel.tls and self._hello.kind is Kind.NODE:
            self._secret = ""  # certificates decide, at both ends
            self._hello = replace(self._hello, key=b"")
        seen = channel.certificate_hash if channel.tls else channel.peer.encode()
        self._hello = replace(self._hello, seen=seen)
        return pack_hello(PROTOCOL_VERSION, self._hello.encode())

    def welcomed(self, status: int, body: bytes, channel: Channel) -> bytes:
        """Our proof, once the other end has given its own; empty where none is needed.

        Raises Refused, MalformedStream.
        """
        if status != WELCOME:
            raise Refused(body.decode(errors="replace")[:512], denied=status == DENIED)
        welcome = Welcome.decode(body)
        there = welcome.member
        if self._hello.cluster and there.cluster != self._hello.cluster:
            raise Refused(f"{there} is there, of another cluster")
        if self._expected is not None and (there.group, there.replica) != self._expected:
            raise Refused(f"{there} is there, and not replica {self._expected[1]} of group {self._expected[0]}")
        if channel.tls and not is_for(channel.certificate, there):
            raise Refused(f"the certificate there is not one of {there}")
        if not self._secret:
            return b""
        said = transcript(self._hello, welcome)
        if not is_server_proof(self._secret, said, welcome.proof):
            if self._hello.kind is Kind.USER:
                # A server that does not know the token proves something else, as an impostor would.
                raise Refused("who are you? no such user, or another token", denied=True)
            raise Refused("it has not proven that it belongs to the cluster")
        return client_proof(self._secret, said)


# ---- the end that was dialled


class NotKnownYet(Exception):
    """Users are not known here yet."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a hello is answered, and who has said it."""

    reply: bytes
    refusal: str = ""  # why not; the stream is closed
    caller: Caller = STRANGER  # as far as the socket alone shows it; if a proof is to come, only after it
    transcript: bytes = b""
    verifier: Verifier | None = field(default=None, repr=False)

    @property
    def awaits_proof(self) -> bool:
        return self.verifier is not None

    def proven(self, proof: bytes) -> Caller:
        """The caller, once it has proven who it is. Raises MalformedStream."""
        if self.verifier is None or not self.verifier.accepts(self.transcript, proof):
            raise MalformedStream("a login without the right proof")
        return self.caller


class Greeter:
    """One process, as those who dial it meet it. Shared by all of its streams."""

    def __init__(
        self,
        member: Member,
        secrets: Secrets | None = None,
        addresses: Collection[str] = (),
        user_verifier: Callable[[str], Verifier | None] = lambda name: None,
        certificate_hashes: Callable[[], Collection[bytes]] = tuple,
    ) -> None:
        """`addresses`: under which others dial this process. `user_verifier` raises NotKnownYet."""
        self.member, self._secrets, self._addresses = member, secrets or Secrets(), frozenset(addresses)
        self._user_verifier, self._certificate_hashes = user_verifier, certificate_hashes
        self._nobody = random_bytes.token_hex()

    def greet(self, version: int, body: bytes, channel: Channel) -> Greeting:
        """Raises MalformedStream."""
        if version != PROTOCOL_VERSION:
            return _refused(f"protocol version {version}, this server speaks {PROTOCOL_VERSION}")
        hello = Hello.decode(body)
        if hello.cluster and hello.cluster != self.member.cluster:
            return _refused(f"this server belongs to cluster {self.member.cluster!r}, not {hello.cluster!r}")
        welcome = Welcome(random_bytes.token_bytes(NONCE_BYTES), self.member)
        caller = Caller(channel.peer, user=common_name(channel.certificate))
        match hello.kind:
            case Kind.NOBODY:
                return _welcomed(welcome, caller)
            case Kind.NODE if channel.tls:
                member = Member(self.member.cluster, hello.group, hello.replica)
                if not is_for(channel.certificate, member):
                    return _refused(f"the certificate shown is not one of {member}", DENIED)
                return _welcomed(welcome, Caller(channel.peer, member=member))
            case Kind.NODE if not self._secrets or not hello.key:
                # One of us cannot prove anything: it decides itself whether it goes on, and is a stranger here.
                return _welcomed(welcome, caller)
            case _:
                return self._challenged(hello, welcome, channel)

    def _challenged(self, hello: Hello, welcome: Welcome, channel: Channel) -> Greeting:
        if not self._is_us(hello, channel):
            return _refused(f"you dialled {hello.dialled}; this is another process, {self.member}", DENIED)
        try:
            verifier, caller = self._claimed(hello, channel.peer)
        except NotKnownYet as error:
            return _refused(str(error))
        if verifier is None:
            return _refused("this process does not know the secret that you have", DENIED)
        said = transcript(hello, welcome)
        greeting = _welcomed(replace(welcome, proof=verifier.server_proof(said)), caller)
        return replace(greeting, transcript=said, verifier=verifier)

    def _is_us(self, hello: Hello, channel: Channel) -> bool:
        """Whether the dialling end is connected to this process itself, and not to one that passes its bytes on."""
        if channel.tls:
            return hello.seen in self._certificate_hashes()
        # A proxy of ours stands at an address of ours; a stranger's is at another address.
        return hello.seen == channel.own.encode() or hello.dialled in self._addresses

    def _claimed(self, hello: Hello, peer: str) -> tuple[Verifier | None, Caller]:
        """How to check that the other end is who it says it is. Raises NotKnownYet."""
        if hello.kind is Kind.USER:
            known = self._user_verifier(hello.name)
            # Whether there is such a user is not told: nobody can prove to be one that there is not.
            verifier = known or Verifier.of(f"{self._nobody}{hello.name}")
            return verifier, Caller(peer, user=hello.name, verifier=verifier)
        verifier_of_key = self._secrets.verifier(hello.key)
        if hello.kind is Kind.OPERATOR:
            return verifier_of_key, Caller(peer, operator=True, key=hello.key)
        member = Member(self.member.cluster, hello.group, hello.replica)
        return verifier_of_key, Caller(peer, member=member, key=hello.key)


def _welcomed(welcome: Welcome, caller: Caller) -> Greeting:
    return Greeting(pack_hello(WELCOME, welcome.encode()), caller=caller)


def _refused(why: str, status: int = REFUSED) -> Greeting:
    return Greeting(pack_hello(status, why.encode()), refusal=why)
