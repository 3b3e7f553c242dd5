"""Every call of the tables at the other doors: streams and gRPC under TLS, by whoever a certificate names or wrongly claims to be; the page and the metrics."""

from __future__ import annotations

import asyncio
import base64
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from bench.live import LiveCluster, attempt, free_port_base
from shardkv.client import Login, Tls
from shardkv.wire.auth import Node, Who
from shardkv.wire.calls import Unreachable
from shardkv.wire.dialer import TcpDialer
from shardkv.wire.methods import PAGES, TABLE, UNARY, At, Right
from shardkv.wire.node_name import Member
from shardkv.wire.secrets import Secrets
from tests.test_call_matrix import ADMIN, ALLOWED, NODE, OPERATOR, READER, WRITER, denied, expected
from tests.test_tls import certify

pytestmark = pytest.mark.timeout(180)
ROLES = {READER: "read-only", WRITER: "read-write", ADMIN: "admin", "removed": "admin"}
CALLS = [call for call in TABLE if not call.post]


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ca")


@pytest.fixture(scope="module")
def live(ca: Path) -> Iterator[LiveCluster]:
    node, base = certify(ca, "node"), free_port_base()
    files = {"tls_cert": node.cert, "tls_key": node.key, "tls_ca": node.ca}
    ports = {"web_port": base + 25, "metrics_port": base + 30}
    with LiveCluster(groups=1, replicas=1, controllers=1, shards=1, **files, **ports) as cluster:
        yield cluster


def test_every_call_at_every_other_door(live: LiveCluster, ca: Path, tmp_path: Path) -> None:
    cluster = live.cluster().cluster
    controller, group = (process.address for process in live.cluster().processes)
    people = {name: certify(ca, name, options=["--client"]) for name in (*ROLES, "guest")}
    ninth = certify(ca, "ninth", options=["--cluster", cluster, "--group", "9"])
    foreign = certify(tmp_path, "reader", options=["--client"])
    outsider = Tls(
        foreign.cert, foreign.key, people["guest"].ca
    )  # it takes our servers, and they do not take it

    root = people[ADMIN]
    files = {
        "SHARDKV_TLS_CERT": str(root.cert),
        "SHARDKV_TLS_KEY": str(root.key),
        "SHARDKV_TLS_CA": str(root.ca),
    }

    def shardkv(*arguments: str) -> str:
        done = attempt(live, *arguments, **files, SHARDKV_SECRET_FILE="")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    for name, role in ROLES.items():
        shardkv("admin", "user", "add", name, "--role", role, "--certificate-only")
    token = shardkv("admin", "user", "add", "browser", "--role", "read-only")
    shardkv("admin", "access", "enable")
    shardkv("admin", "user", "remove", "removed")

    member = Member(cluster, 9, 1)
    callers: dict[str, tuple[Who, Tls]] = {name: (None, tls) for name, tls in people.items()} | {
        OPERATOR: (live.operator, people["guest"]),
        NODE: (Node(member, Secrets()), ninth),
        "another process's certificate": (Node(Member(cluster, 8, 1), Secrets()), ninth),
        "a node by a user's certificate": (Node(member, Secrets()), root),
        "a node's certificate, as a user": (None, ninth),
        "a wrong token under an admin's certificate": (Login(ADMIN, "a guess"), root),
    }

    async def by_streams() -> set[tuple[str, str]]:
        """What is not as the table says."""
        wrong = set()
        for kind, (who, tls) in callers.items():
            dialer = TcpDialer(cluster, tls, who)
            for call in CALLS:
                address = group if call.at is At.GROUP else controller
                if await denied(dialer, address, call) == expected(call, kind):
                    wrong.add((call.method, kind))
            await dialer.close()
        return wrong

    async def settled() -> None:
        async with asyncio.timeout(60):
            while await by_streams():  # until the group has heard of the users
                await asyncio.sleep(0.2)

    async def by_another_ca() -> None:
        for address in (controller, group):
            dialer = TcpDialer(cluster, outsider)
            for call in CALLS:
                with pytest.raises(Unreachable):
                    await dialer.call(address, call.method, b"", 0.5)
            await dialer.close()

    asyncio.run(settled())
    asyncio.run(by_another_ca())
    by_grpc(group, controller, people, outsider)
    pages(live, ca, token)


def by_grpc(group: str, controller: str, people: dict[str, Tls], outsider: Tls) -> None:
    for path, right in UNARY.items():
        if path.endswith(("/Watch", "/ServerReflectionInfo")):
            continue  # they answer in streams, to everybody
        address = group if ".KV/" in path else controller
        for name, tls in (people | {"another CA": outsider}).items():
            credentials = grpc.ssl_channel_credentials(
                tls.ca.read_bytes(), tls.key.read_bytes(), tls.cert.read_bytes()
            )
            with grpc.secure_channel(address, credentials) as channel:
                code = grpc.StatusCode.OK
                try:
                    if (right is None and "Watch" in path) or "Reflection" in path:
                        continue  # streams, which ask nobody: `None` in the table
                    channel.unary_unary(path)(b"", timeout=20)
                except grpc.RpcError as error:
                    code = error.code()
            if tls is outsider:
                assert code is grpc.StatusCode.UNAVAILABLE, path
            else:
                lets_in = right is None or name in ALLOWED[right]
                assert (code is not grpc.StatusCode.PERMISSION_DENIED) == lets_in, (path, name, code)


def pages(live: LiveCluster, ca: Path, token: str) -> None:
    page = next(process.web for process in live.cluster().processes if process.web)
    context = ssl.create_default_context(cafile=str(ca / "ca.pem"))
    logins = {"": False, f"browser:{token}": True, "browser:guess": False, f"nobody:{token}": False}
    for (door, path), right in PAGES.items():
        for login, known in logins.items():
            if door == "page":
                assert (status(f"https://{page}{path}", login, context) == 200) == (right is None or known), (
                    path
                )
                continue
            for process in live.cluster().processes:
                assert status(f"http://{process.metrics}{path}", login) == 200, "open to everybody"
    assert {right for (door, _), right in PAGES.items() if door == "metrics"} == {None}
    assert {right for (door, _), right in PAGES.items() if door == "page"} == {Right.USER}


def status(url: str, login: str, context: ssl.SSLContext | None = None) -> int:
    request = urllib.request.Request(url)
    if login:
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        refused.close()
        return refused.code
