"""Every call of the table, by every kind of caller, at real processes: let through or denied as the table says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest

from bench.live import LiveCluster, attempt
from shardkv.client import Login
from shardkv.process.secret_file import read_secrets
from shardkv.wire import methods
from shardkv.wire.auth import Node, Who
from shardkv.wire.calls import Code, parse
from shardkv.wire.dialer import TcpDialer
from shardkv.wire.methods import TABLE, UNARY, At, NotInTable, Right
from shardkv.wire.node_name import Member
from shardkv.wire.secrets import Secrets

READER, WRITER, ADMIN, OPERATOR, NODE = "reader", "writer", "admin", "operator", "node"
# Who is let through by a right; who else is denied.
ALLOWED = {
    Right.USER: {READER, WRITER, ADMIN, OPERATOR},
    Right.READ: {READER, WRITER, ADMIN, OPERATOR},
    Right.WRITE: {WRITER, ADMIN, OPERATOR},
    Right.ADMIN: {ADMIN, OPERATOR},
    Right.OPERATOR: {ADMIN, OPERATOR},
    Right.NODE: {NODE},
}
OWN_GROUP_ONLY = {"ctl.claim", "ctl.admin"}  # an empty request is for no group at all


@pytest.mark.quick
def test_a_call_without_an_entry_fails_at_import() -> None:
    group = {call.method for call in TABLE if call.at in (At.GROUP, At.BOTH) and not call.post}
    methods.check_streams(At.GROUP, group)
    for wrong in (group | {"kv.new"}, group - {"kv.read"}):
        with pytest.raises(NotInTable, match=r"kv\.(new|read)"):
            methods.check_streams(At.GROUP, wrong)


@pytest.fixture(scope="module")
def live() -> Iterator[LiveCluster]:
    with LiveCluster(groups=1, replicas=1, controllers=1, shards=1) as cluster:
        yield cluster


def make_user(live: LiveCluster, name: str, role: str) -> Login:
    done = attempt(live, "admin", "user", "add", name, "--role", role)
    assert done.returncode == 0, done.stderr
    return Login(name, done.stdout.strip())


def expected(call: methods.Call, kind: str) -> bool:
    if kind == NODE and call.nodes_too:
        return call.method not in OWN_GROUP_ONLY
    return kind in ALLOWED[call.right] and not (kind == NODE and call.method in OWN_GROUP_ONLY)


def test_every_call_by_every_kind_of_caller(live: LiveCluster) -> None:
    cluster = live.cluster()
    controller, group = (p.address for p in cluster.processes)
    (secret,) = read_secrets(live.secret_file)
    users = {
        READER: make_user(live, "reader", "read-only"),
        WRITER: make_user(live, "writer", "read-write"),
        ADMIN: make_user(live, "root", "admin"),
        "removed": make_user(live, "removed", "admin"),
    }
    kinds: dict[str, Who] = {
        **users,
        "stranger": None,
        "wrong token": Login("root", "a guess"),
        "no such user": Login("nobody", "a guess"),
        OPERATOR: live.operator,
        NODE: Node(Member(cluster.cluster, 9, 1), Secrets([secret])),
        "node with another secret": Node(Member(cluster.cluster, 1, 1), Secrets(["a guess"])),
        "node without a secret": Node(Member(cluster.cluster, 1, 1), Secrets()),
    }
    asyncio.run(without_access_control(cluster.cluster, kinds, controller, group))
    assert attempt(live, "admin", "access", "enable").returncode == 0
    assert attempt(live, "admin", "user", "remove", "removed").returncode == 0
    asyncio.run(matrix(cluster.cluster, kinds, controller, group))
    by_grpc(
        group, controller, {name: users.get(name) for name in (READER, WRITER, ADMIN, "removed", "stranger")}
    )


async def denied(dialer: TcpDialer, address: str, call: methods.Call) -> bool:
    code, _ = parse(await dialer.call(address, call.method, b"", 20.0))
    return code is Code.DENIED


async def each(cluster: str, kinds: dict[str, Who], controller: str, group: str) -> dict[tuple[str, str], bool]:
    """Whether each call that has an answer is let through, by method and kind of caller."""
    found = {}
    for kind, who in kinds.items():
        dialer = TcpDialer(cluster, login=who)
        for call in TABLE:
            if not call.post:
                address = group if call.at is At.GROUP else controller
                found[call.method, kind] = not await denied(dialer, address, call)
        await dialer.close()
    return found


async def without_access_control(cluster: str, kinds: dict[str, Who], controller: str, group: str) -> None:
    """What belongs to the processes and the operator is closed as soon as there is a secret."""
    found = await each(cluster, {"stranger": None, NODE: kinds[NODE]}, controller, group)
    for call in TABLE:
        if not call.post:
            closed = call.right in (Right.NODE, Right.OPERATOR)
            assert found[call.method, "stranger"] == (not closed), call.method
            if closed:
                assert found[call.method, NODE] == expected(call, NODE), call.method


async def matrix(cluster: str, kinds: dict[str, Who], controller: str, group: str) -> None:
    async with asyncio.timeout(60):
        while True:  # until the group has heard of the users and of their removal
            found = await each(cluster, kinds, controller, group)
            wrong = {
                (call.method, kind): found[call.method, kind]
                for call in TABLE
                for kind in kinds
                if not call.post and found[call.method, kind] != expected(call, kind)
            }
            if not wrong:
                break
            await asyncio.sleep(0.2)


def by_grpc(group: str, controller: str, users: dict[str, Login | None]) -> None:
    for path, right in UNARY.items():
        if right is None:
            continue
        with grpc.insecure_channel(group if ".KV/" in path else controller) as channel:
            for name, login in users.items():
                metadata = [("authorization", f"Bearer {login.name}:{login.token}")] if login else []
                try:
                    channel.unary_unary(path)(b"", timeout=20, metadata=metadata)
                    code = grpc.StatusCode.OK
                except grpc.RpcError as error:
                    code = error.code()
                assert (code is not grpc.StatusCode.PERMISSION_DENIED) == (name in ALLOWED[right]), (path, name)
