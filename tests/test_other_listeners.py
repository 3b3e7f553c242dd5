"""The smaller listeners and what stands beside them: the page, gRPC, the switch of access control, and the numbers by which writes are known."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from bench.live import SHARDKV, LiveCluster, attempt, free_port_base
from shardkv import shardkv_pb2 as pb
from shardkv import shardkv_pb2_grpc as kv_grpc
from shardkv.client import Login, ShardClerk, Tls
from shardkv.client.core import ClerkCore
from shardkv.process.listeners import why_elsewhere
from shardkv.state.owned_sessions import own_frame, owned
from shardkv.web.asking import why_foreign
from shardkv.wire import frames
from shardkv.wire.calls import Code, parse
from shardkv.wire.dialer import TcpDialer
from shardkv.wire.frames import NO_SESSION, PUT, READ, WRITE
from tests.test_access import eventually

pytestmark = pytest.mark.timeout(180)
SESSION = b"s" * 16

# ---- sessions, pure


def frame(kind: int, *sessions: bytes) -> bytes:
    sections = [
        frames.pack_section(
            n, session, 5, bytes([PUT, PUT]), [1, 2] if kind == WRITE else [], [b"k", b"kk"], [b"v", b""]
        )
        for n, session in enumerate(sessions, 1)
    ]
    return frames.pack_frame(kind, 3, 1000, sections)


@pytest.mark.quick
def test_a_session_is_the_user_s_and_all_else_in_a_frame_stays() -> None:
    whole = frame(WRITE, SESSION, NO_SESSION, b"t" * 16)
    ann, bob = own_frame(whole, "ann"), own_frame(whole, "bob")
    assert own_frame(whole, "") == whole, "without a name nothing changes"
    assert own_frame(whole, "ann") == ann != bob
    before, after = (list(frames.unpack_sections(each)) for each in (whole, ann))
    assert [each.session for each in after] == [owned(SESSION, "ann"), NO_SESSION, owned(b"t" * 16, "ann")]
    for one, other in zip(before, after, strict=True):
        assert (one.shard, one.acked_below, one.kinds, one.seqs, one.keys, one.values) == (
            other.shard, other.acked_below, other.kinds, other.seqs, other.keys, other.values,
        )  # fmt: skip
    assert len({owned(SESSION, "ann"), owned(SESSION, "bob"), owned(b"t" * 16, "ann"), SESSION}) == 4


@pytest.mark.quick
def test_what_is_no_write_frame_passes_as_it_is() -> None:
    whole = frame(WRITE, SESSION, SESSION)
    assert own_frame(frame(READ, SESSION), "ann") == frame(READ, SESSION)
    for wrong in (b"", b"SKF", b"x" * 100, whole[:40]):
        assert own_frame(wrong, "ann") == wrong
    for size in range(len(whole)):
        assert len(own_frame(whole[:size], "ann")) == size, "and no other bytes come of it"


# ---- the page, pure


@pytest.mark.quick
def test_a_page_of_another_site_gets_nothing() -> None:
    for host in ("localhost:1", "127.0.0.1", "[::1]:7500", "10.0.0.7:7500", "LOCALHOST.", "db.example:7500"):
        assert why_foreign("GET", {"Host": host}, {"db.example"}) is None, host
    for host in ("evil.example:7500", "127.0.0.1.evil.example", "", "db.example.evil"):
        refused = why_foreign("GET", {"Host": host}, {"db.example"})
        assert refused is not None and refused.status == 421, host
    own = {"Host": "localhost:7500"}
    assert (
        why_foreign("GET", own | {"Origin": "http://localhost:7500", "Sec-Fetch-Site": "same-origin"}, ())
        is None
    )
    assert why_foreign("GET", own | {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, ()) is None
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        refused = why_foreign("GET", own | headers, ())
        assert refused is not None and refused.status == 403, headers
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        refused = why_foreign(method, own, ())
        assert refused is not None and refused.status == 405


@pytest.mark.quick
def test_where_nobody_is_asked_who_he_is_other_machines_see_nothing() -> None:
    for address in ("127.0.0.1:5", "::1:5", "::ffff:127.0.0.1:5", "127.9.9.9:5"):
        assert why_elsewhere(address) == "", address
    for address in ("10.0.0.7:5", "::ffff:10.0.0.7:5", "fe80::1:5", "?"):
        assert "access control is off" in why_elsewhere(address), address


# ---- real processes


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ca")


def certify(ca: Path, name: str, *options: str) -> Tls:
    subprocess.run([*SHARDKV, "certs", str(ca), "--name", name, *options], check=True, capture_output=True)
    return Tls(ca / f"{name}.pem", ca / f"{name}.key", ca / "ca.pem")


@pytest.fixture(scope="module")
def live(ca: Path) -> Iterator[LiveCluster]:
    node = certify(ca, "node")
    options = {"tls_cert": node.cert, "tls_key": node.key, "tls_ca": node.ca, "web_port": free_port_base() + 25}
    with LiveCluster(groups=1, replicas=1, controllers=1, shards=1, **options) as cluster:
        yield cluster


def asked(live: LiveCluster, ca: Path, **headers: str) -> int:
    """The status of the page's data under TLS, as a browser on this machine gets it."""
    page = next(process.web for process in live.cluster().processes if process.web)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"https://{page}/api/cluster", headers=named)
    try:
        context = ssl.create_default_context(cafile=str(ca / "ca.pem"))
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            assert json.load(answer)["total"] == 1
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        refused.close()
        return refused.code


def put(live: LiveCluster, who: Tls, key: bytes, value: bytes, identity: pb.Identity) -> None:
    """By gRPC, as whoever the certificate names."""
    address = next(process.address for process in live.cluster().processes if process.role == "group")
    credentials = grpc.ssl_channel_credentials(who.ca.read_bytes(), who.key.read_bytes(), who.cert.read_bytes())
    with grpc.secure_channel(address, credentials) as channel:
        kv_grpc.KVStub(channel).Put(pb.PutRequest(key=key, value=value, identity=identity), timeout=10)


def test_the_smaller_listeners_of_a_cluster_with_tls(
    live: LiveCluster, ca: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, ann, guest = (certify(ca, name, "--client") for name in ("root", "ann", "guest"))

    def shardkv(who: Tls, *arguments: str) -> subprocess.CompletedProcess[str]:
        files = {
            "SHARDKV_TLS_CERT": str(who.cert),
            "SHARDKV_TLS_KEY": str(who.key),
            "SHARDKV_TLS_CA": str(who.ca),
        }
        return attempt(live, *arguments, **files, SHARDKV_SECRET_FILE="")

    def has_once(log: Path, line: str) -> bool:
        return log.read_text().count(line) == 1

    for process in live.cluster().processes:
        log, line = Path(process.data) / "log", "access control is off: whoever has a certificate of the CA may"
        eventually(partial(has_once, log, line))

    # The page answers browsers on this machine, and no other site's page in them.
    assert asked(live, ca) == 200
    assert asked(live, ca, Host="evil.example") == 421
    assert asked(live, ca, Origin="https://evil.example") == 403

    # Access control needs an admin who can log in: root has no token, and it is not root who asks.
    assert (
        shardkv(guest, "admin", "user", "add", "root", "--role", "admin", "--certificate-only").returncode == 0
    )
    assert (
        shardkv(guest, "admin", "user", "add", "ann", "--role", "read-write", "--certificate-only").returncode
        == 0
    )
    refused = shardkv(guest, "admin", "access", "enable")
    assert refused.returncode == 1 and "root has no token" in refused.stderr, refused.stderr
    assert json.loads(shardkv(guest, "admin", "user", "list", "-o", "json").stdout)["enabled"] is False
    enabled = shardkv(root, "admin", "access", "enable")
    assert enabled.returncode == 0, enabled.stderr
    assert asked(live, ca) == 401

    # gRPC knows users by their certificates; and ann's numbers are not root's.
    identity = pb.Identity(session=SESSION, seq=1)
    with ShardClerk(live.controllers, timeout=10, tls=ann) as clerk:
        clerk.put("k", "v")  # the group has heard of the users
        put(live, ann, b"by-ann", b"1", identity)
        put(live, root, b"by-root", b"2", identity)
        put(live, ann, b"by-ann", b"again", identity)
        assert clerk.get("by-ann") == b"1", "a retry is answered and not done"
        assert clerk.get("by-root") == b"2", "root's write is another one, whatever ann has numbered"
    with pytest.raises(grpc.RpcError) as denied:
        put(live, guest, b"by-guest", b"3", pb.Identity())
    assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED

    # A document that is nested too deep is refused, and the process goes on.
    async def ask(address: str) -> tuple[Code, bytes]:
        dialer = TcpDialer(tls=root)
        try:
            return parse(await dialer.call(address, "raft.members", b"[" * 100_000, 10.0))
        finally:
            await dialer.close()

    for process in live.cluster().processes:
        code, why = asyncio.run(ask(process.address))
        assert code is not Code.OK and b"deep" in why, (code, why)
        assert process.running

    # Two clerks of the same number: each one's first write is done.
    begin = ClerkCore.__init__

    def begin_alike(core: ClerkCore, *arguments: object, **options: object) -> None:
        begin(core, *arguments, **options)  # type: ignore[arg-type]
        core._clerk = SESSION

    monkeypatch.setattr(ClerkCore, "__init__", begin_alike)
    added = shardkv(root, "admin", "user", "add", "bob", "--role", "read-write")
    bob = Login("bob", added.stdout.strip())
    with (
        ShardClerk(live.controllers, timeout=10, tls=ann) as one,
        ShardClerk(live.controllers, timeout=10, tls=guest, login=bob) as other,
    ):
        one.put("from-one", "1")
        other.put("from-other", "2")
        assert other.get("from-one") == b"1" and other.get("from-other") == b"2"
