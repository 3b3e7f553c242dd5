"""Every call that a process answers: at which kind of server, and who may make it. One table for all listeners.

The authorizer (`access.py`) judges by this table, metrics take their labels from it, docs/security.md shows it,
and `tests/test_call_matrix.py` tries every entry with every kind of caller. A server that answers a call
without an entry, or does not answer one that is here, fails when it is imported (`check_streams`, `check_unary`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Right(Enum):
    """What a caller needs. The first four are asked for while access control is on.

    The last two are asked for as soon as the process can know who belongs to the cluster: it has a
    secret, or TLS with certificates. Whether access control is on does not matter to them.
    """

    USER = "any user"
    READ = "a user, within the user's prefixes"
    WRITE = "a user who may write, within the user's prefixes"
    ADMIN = "an admin"
    OPERATOR = "an admin, or whoever has the cluster's secret"
    NODE = "a process of the cluster"


class At(Enum):
    """Which servers answer."""

    GROUP = "group"
    CONTROLLER = "controller"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Call:
    method: str
    at: At
    right: Right
    nodes_too: bool = False  # processes of the cluster make it, besides those who have the right
    post: bool = False  # has no answer


TABLE = (
    Call("kv.write", At.GROUP, Right.WRITE),
    Call("kv.read", At.GROUP, Right.READ),
    Call("kv.stale", At.GROUP, Right.READ),
    Call("kv.status", At.GROUP, Right.USER, nodes_too=True),  # for the page
    Call("kv.transfer", At.GROUP, Right.ADMIN),
    Call("kv.log", At.GROUP, Right.OPERATOR),
    Call("kv.view", At.GROUP, Right.OPERATOR),
    Call("kv.check", At.GROUP, Right.OPERATOR),
    Call("kv.restore", At.GROUP, Right.OPERATOR),
    Call("kv.restore_chunk", At.GROUP, Right.OPERATOR),
    Call("shard.pull", At.GROUP, Right.NODE),
    Call("shard.serves", At.GROUP, Right.NODE),
    Call("raft", At.BOTH, Right.NODE, post=True),  # mail, of other replicas of the same group alone
    Call("raft.members", At.BOTH, Right.OPERATOR),
    Call("ctl.query", At.CONTROLLER, Right.USER, nodes_too=True),
    Call("ctl.changes", At.CONTROLLER, Right.USER, nodes_too=True),
    Call("ctl.status", At.CONTROLLER, Right.USER, nodes_too=True),
    Call("ctl.check", At.CONTROLLER, Right.OPERATOR),
    Call("ctl.users", At.CONTROLLER, Right.ADMIN),
    Call("ctl.admin", At.CONTROLLER, Right.ADMIN, nodes_too=True),  # a group tells its own addresses
    Call("ctl.accounts", At.CONTROLLER, Right.NODE),
    Call("ctl.claim", At.CONTROLLER, Right.NODE),  # for its own group
)
CALLS = {call.method: call for call in TABLE}
METHODS = frozenset(CALLS)

# gRPC. None: open to everybody, for it tells nothing of the data, and those who ask have no login.
UNARY: dict[str, Right | None] = {
    "/shardkv.shardkv.KV/Get": Right.READ,
    "/shardkv.shardkv.KV/Scan": Right.READ,
    "/shardkv.shardkv.KV/Count": Right.READ,
    "/shardkv.shardkv.KV/Put": Right.WRITE,
    "/shardkv.shardkv.KV/Append": Right.WRITE,
    "/shardkv.shardkv.KV/Delete": Right.WRITE,
    "/shardkv.shardkv.KV/Cas": Right.WRITE,
    "/shardkv.shardkv.KV/Incr": Right.WRITE,
    "/shardkv.shardkv.KV/DeleteRange": Right.WRITE,
    "/shardkv.shardctrler.Controller/Query": Right.USER,
    "/shardkv.shardctrler.Controller/Admin": Right.ADMIN,
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/Watch": None,
    "/grpc.health.v1.Health/List": None,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": None,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": None,
}

# HTTP, by listener and path.
PAGES: dict[tuple[str, str], Right | None] = {
    ("page", "/"): Right.USER,
    ("page", "/api/cluster"): Right.USER,
    ("metrics", "/metrics"): None,
}


class NotInTable(Exception):
    """A call is answered that the table does not have, or the other way round: nobody would know who may make it."""


def check_streams(at: At, answered: Collection[str]) -> None:
    """Raises NotInTable. To be called where a server is imported."""
    wanted = {call.method for call in TABLE if call.at in (at, At.BOTH) and not call.post}
    _check(at.value, wanted, answered)


def check_unary(service: Any) -> None:
    """`service`: a protobuf service descriptor. Raises NotInTable."""
    prefix = f"/{service.full_name}/"
    wanted = {path for path in UNARY if path.startswith(prefix)}
    _check(service.full_name, wanted, [prefix + method.name for method in service.methods])


def _check(what: str, wanted: Collection[str], answered: Iterable[str]) -> None:
    wrong = set(wanted) ^ set(answered)
    if wrong:
        raise NotInTable(f"{what}: {', '.join(sorted(wrong))}: not in both the table of calls and the server")
