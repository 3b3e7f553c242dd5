"""The gate of a server: lets through what the users' roles allow, once access control is on.

Processes of the cluster know each other by the organization in their certificates, or by a
secret that all of them have. Users come from the controller: a group follows its table by
long poll, and keeps the last one on its disk, so that it judges by that when it starts while
no controller answers. A server that never had one lets only processes of the cluster in.

The gate looks at keys only for users who have prefixes; for others at the method alone.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from raft.answers import Code, refuse
from raft.audit import Audit, NoAudit
from raft.frontdoor import Pipes
from raft.gate import Caller, Login, Standing, hash_token
from raft.sealed import seal, unseal
from raft.transport import MAIL
from shardctrler import shardctrler_pb2 as ctl
from shardctrler.accounts import Accounts, Role, User
from shardctrler.query import AccessDenied, BadQuery, ControllerClient, ControllerUnavailable
from shardkv import frames
from shardkv import shardkv_pb2 as pb
from shardkv.audit import CHANGES, describe, describe_admin
from shardkv.frames import READ, SCAN_OP, WRITE, Limits, MalformedFrame
from shardkv.options import NODE

log = logging.getLogger(__name__)

POLL_SECONDS = 20.0
CALL_SECONDS = 2.0
RETRY_SECONDS = 1.0
ACCOUNTS_MAGIC = b"SKVUSERS"  # the file's format: `raft/sealed.py`, then protobuf
ACCOUNTS_VERSION = 1


class Right(Enum):
    USER = auto()  # whoever is known
    READ = auto()
    WRITE = auto()
    ADMIN = auto()
    NODE = auto()  # processes of the cluster


RIGHTS = {
    "kv.write": Right.WRITE,
    "kv.read": Right.READ,
    "kv.stale": Right.READ,
    "kv.status": Right.USER,
    "kv.transfer": Right.ADMIN,
    "kv.log": Right.ADMIN,
    "kv.view": Right.ADMIN,
    "kv.check": Right.ADMIN,
    "kv.restore": Right.ADMIN,
    "kv.restore_chunk": Right.ADMIN,
    "raft.members": Right.ADMIN,
    "shard.pull": Right.NODE,
    "shard.serves": Right.NODE,
    MAIL: Right.NODE,
    "ctl.query": Right.USER,
    "ctl.changes": Right.USER,
    "ctl.status": Right.USER,
    "ctl.check": Right.ADMIN,
    "ctl.users": Right.ADMIN,
    "ctl.admin": Right.ADMIN,
    "ctl.accounts": Right.NODE,
    "ctl.claim": Right.NODE,
}


FRAME_KINDS = {"kv.write": WRITE, "kv.read": READ, "kv.stale": READ}


class Access:
    """See `raft.gate.Gate`."""

    def __init__(
        self,
        accounts: Callable[[], Accounts | None],
        secret: str,
        limits: Limits,
        audit: Audit | None = None,
    ) -> None:
        """`accounts`: the table of now, None while it is not known. `secret`: the processes' own, if any."""
        self._accounts, self._limits = accounts, limits
        self._audit: Audit = audit or NoAudit()
        # Without one nobody can log in as a process: a hash of something that nobody knows.
        self._secret_hash = hash_token(secret or secrets.token_hex())

    def standing(self, caller: Caller) -> tuple[Standing, str]:
        if self._is_node(caller):
            return Standing.NODE, NODE
        accounts = self._accounts()
        if accounts is None:
            return Standing.STRANGER, ""
        if not accounts.enabled:
            return Standing.KNOWN, ""
        user = self._user(accounts, caller)
        return (Standing.KNOWN, user.name) if user is not None else (Standing.STRANGER, "")

    def refusal(self, caller: Caller, method: str, payload: bytes) -> bytes | None:
        accounts = self._accounts()
        if (accounts is not None and not accounts.enabled) or self._is_node(caller):
            return None
        if accounts is None:
            return refuse(Code.RETRY, "who may do what is not known here yet")
        user = self._user(accounts, caller)
        why = self._why_not(user, method)
        if not why:
            return None
        return refuse(Code.DENIED, self._deny(caller, user, describe(method, payload), why))

    def _is_node(self, caller: Caller) -> bool:
        if caller.organization == NODE:
            return True
        return caller.login_name == NODE and hmac.compare_digest(caller.token_hash, self._secret_hash)

    @staticmethod
    def _user(accounts: Accounts, caller: Caller) -> User | None:
        """Whoever says who he is by a login is not somebody else by his certificate."""
        if caller.login_name:
            user = accounts.users.get(caller.login_name)
            return user if user is not None and user.has_token(caller.token_hash) else None
        return accounts.users.get(caller.certificate_name)

    def _why_not(self, user: User | None, method: str) -> str:
        right = RIGHTS.get(method, Right.USER)
        if user is None:
            return "who are you? no such user, or another token"
        if right is Right.NODE:
            return "only processes of the cluster may do that"
        if user.role is Role.ADMIN or right is Right.USER:
            return ""
        if right is Right.ADMIN:
            return "only an admin may do that"
        if right is Right.WRITE and not user.may_write():
            return f"{user.name} may only read"
        return ""

    def admitted(self, caller: Caller, method: str, payload: bytes) -> bytes:
        """A frame in which the operations outside the user's prefixes are marked: these alone are refused."""
        if method not in FRAME_KINDS:
            if method in CHANGES or (method == "kv.view" and _begins_view(payload)):
                self._note_change(caller, method, payload)
            return payload
        accounts = self._accounts()
        if accounts is None or not accounts.enabled or self._is_node(caller):
            return payload
        user = self._user(accounts, caller)
        if user is None or user.role is Role.ADMIN or not user.prefixes:
            return payload
        try:
            frames.check_frame(payload, FRAME_KINDS[method], self._limits)
        except MalformedFrame:
            return payload  # nothing of it will be done: it is refused as what it is
        marked = frames.forbid(payload, lambda kind, key, value: self._forbids(user, kind, key, value))
        if marked is not payload:
            self._deny(caller, user, method, f"{user.name} may not touch that key")
        return marked

    def _forbids(self, user: User, kind: int, key: bytes, value: bytes) -> bool:
        return not (self._scans_inside(user, key, value) if kind == SCAN_OP else user.may_touch([key]))

    @staticmethod
    def _scans_inside(user: User, start: bytes, packed: bytes) -> bool:
        try:
            return user.may_scan(start, frames.unpack_scan(packed)[0])
        except MalformedFrame:
            return False  # it is malformed, and refused either way

    def _note_change(self, caller: Caller, method: str, payload: bytes) -> None:
        kind = "admin" if method in CHANGES else "read-all"
        what = describe(method, payload)
        who, address = self._name(caller), caller.address
        self._audit.note(kind, who=who, address=address, door="main", what=what, allowed=True)

    def _name(self, caller: Caller) -> str:
        return NODE if self._is_node(caller) else caller.name

    def _deny(self, caller: Caller, user: User | None, what: str, why: str, door: str = "main") -> str:
        who = user.name if user is not None else caller.name
        self._audit.note(
            "denied", who=who, address=caller.address, door=door, what=what, allowed=False, why=why
        )
        return why

    def login_refusal(self, login: Login | None, address: str = "?") -> str:
        """Why somebody with this login, or none, may not look at the cluster; empty if he may."""
        accounts = self._accounts()
        if accounts is not None and not accounts.enabled:
            return ""
        caller = Caller(address) if login is None else Caller(address).logged_in(login.encode())
        user = self._user(accounts, caller) if accounts is not None else None
        why = self._why_not(user, "kv.status")
        # A browser asks without a login first: that is no news.
        return self._deny(caller, user, "kv.status", why, "page") if why and login is not None else why

    # ---- gRPC

    def grpc_caller(self, metadata: Any, address: str) -> Caller:
        """A login is `authorization: Bearer NAME:TOKEN`."""
        caller = Caller(address)
        for key, value in metadata or ():
            if key == "authorization" and isinstance(value, str) and value.startswith("Bearer "):
                name, _, token = value.removeprefix("Bearer ").partition(":")
                caller = caller.logged_in(Login(name, token).encode())
        return caller

    def grpc_refusal(self, caller: Caller, right: Right, request: Any) -> str:
        """Why a unary call is not let through; empty if it is. `request` is None while it is not read yet."""
        accounts = self._accounts()
        method = UNARY_METHODS.get(right, "ctl.query")
        what = describe_admin(request) if isinstance(request, ctl.AdminRequest) else method
        if accounts is None:
            return "who may do what is not known here yet"
        user = self._user(accounts, caller)
        why = self._why_not_unary(user, method, request) if accounts.enabled else ""
        if why:
            return self._deny(caller, user, what, why, "grpc")
        if right is Right.ADMIN and request is not None:
            self._audit.note(
                "admin", who=caller.name, address=caller.address, door="grpc", what=what, allowed=True
            )
        return ""

    def _why_not_unary(self, user: User | None, method: str, request: Any) -> str:
        if user is not None and user.prefixes and request is not None and method in ("kv.write", "kv.read"):
            scans = isinstance(request, pb.ScanRequest)
            inside = user.may_scan(request.start, request.end) if scans else user.may_touch([request.key])
            if not inside:
                return f"{user.name} may not touch that key"
            user = User(user.name, user.role)
        return self._why_not(user, method)


def _begins_view(payload: bytes) -> bool:
    """Whether somebody begins to read all that a replica holds, rather than the next page."""
    try:
        request = pb.ViewRequest.FromString(payload)
    except DecodeError:
        return False
    return not request.id and not request.close


UNARY_METHODS = {Right.WRITE: "kv.write", Right.READ: "kv.read", Right.ADMIN: "ctl.admin"}
UNARY = {
    "/shardkv.shardkv.KV/Get": Right.READ,
    "/shardkv.shardkv.KV/Scan": Right.READ,
    "/shardkv.shardkv.KV/Put": Right.WRITE,
    "/shardkv.shardkv.KV/Append": Right.WRITE,
    "/shardkv.shardkv.KV/Delete": Right.WRITE,
    "/shardkv.shardkv.KV/Cas": Right.WRITE,
    "/shardkv.shardctrler.Controller/Query": Right.USER,
    "/shardkv.shardctrler.Controller/Admin": Right.ADMIN,
}


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """The same gate for unary gRPC calls. Health and reflection tell nothing of the data, and are open."""

    def __init__(self, access: Access, pipes: Pipes) -> None:
        self._access, self._pipes = access, pipes

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        right = UNARY.get(details.method)
        if handler is None or right is None:
            return handler
        serve = handler.unary_unary
        metadata = details.invocation_metadata

        # Served as a stream of one request, so that the caller is judged before the request is read.
        async def guarded(requests: Any, context: Any) -> Any:
            peer = context.peer()
            caller = self._access.grpc_caller(metadata, self._pipes.address(peer))
            self._pipes.settle(peer, *self._access.standing(caller))
            why = self._access.grpc_refusal(caller, right, None)
            if not why:
                request = await anext(aiter(requests), None)
                if request is None:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a call without a request")
                why = self._access.grpc_refusal(caller, right, request)
            if why:
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, why)
            return await serve(request, context)

        return grpc.stream_unary_rpc_method_handler(
            guarded, handler.request_deserializer, handler.response_serializer
        )


class AccountsFollower:
    """A group replica's copy of the users: what its disk has, and then what the controller says."""

    def __init__(self, known: bytes | None, keep: Callable[[bytes], Awaitable[None]], secured: bool) -> None:
        """`known`: the file on the disk, if there is one. `secured`: this process can show that it

        belongs to the cluster; one that cannot, and was never told of users, is of a cluster where
        access control is not in use. A file that is damaged says that we were told, and not what:
        nobody is let in until a controller has told us again.
        """
        self.accounts: Accounts | None = None if secured else Accounts()
        if known is not None:
            try:
                self.accounts = Accounts.decode(unseal(ACCOUNTS_MAGIC, ACCOUNTS_VERSION, known))
            except (ValueError, DecodeError) as error:
                self.accounts = None
                log.error("accounts: damaged: %s; asking the controllers for the users anew", error)
        self._keep = keep

    async def follow(self, controller: ControllerClient) -> None:
        """For as long as this process runs."""
        while True:
            since = self.accounts.version if self.accounts is not None else 0
            try:
                news = await controller.accounts(
                    since, POLL_SECONDS if self.accounts is not None else 0.0, CALL_SECONDS
                )
            except AccessDenied as error:
                log.error("the controllers do not know this process as one of the cluster: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            except (ControllerUnavailable, BadQuery, DecodeError, ValueError) as error:
                log.debug("no news of the users: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if self.accounts is None or news.version > self.accounts.version:
                self.accounts = news  # at once, then for the next start
                await self._keep(seal(ACCOUNTS_MAGIC, ACCOUNTS_VERSION, news.encode()))
