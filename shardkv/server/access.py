"""The authorizer of a server: lets through what the caller may do, by the table of calls (`methods.py`).

What only processes of the cluster may do is asked of everybody as soon as this process can tell who is
one: it has the cluster's secret, or TLS with certificates. The rest depends on the users' roles, once
access control is on. Users come from the controller; a group has a copy (`accounts_copy.py`).

The authorizer looks at keys only for users who have prefixes, and at what a process asks only where it may
ask for its own group alone; for others it looks at the method alone.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from shardkv import shardkv_pb2 as pb
from shardkv.raft.transport import MAIL
from shardkv.server.audit import CHANGES, describe, describe_admin
from shardkv.server.quotas import Enforcer
from shardkv.shardctrler import shardctrler_pb2 as ctl
from shardkv.shardctrler.accounts import Accounts, Role, User
from shardkv.state.owned_sessions import SESSION_BYTES, own_frame, owned
from shardkv.wire import frames
from shardkv.wire.audit import Audit, NoAudit
from shardkv.wire.auth import Caller, Login, Standing
from shardkv.wire.calls import Code, busy_text, refuse
from shardkv.wire.frames import DELETE_RANGE, RANGE, RANGE_BACK, READ, SCAN_OP, WRITE, Limits, MalformedFrame
from shardkv.wire.handshake import NotKnownYet
from shardkv.wire.inbound import OVER_QUOTA
from shardkv.wire.listener import Pipes
from shardkv.wire.methods import CALLS, UNARY, Right
from shardkv.wire.node_name import Member
from shardkv.wire.proof import Verifier
from shardkv.wire.ranges import unpack_look
from shardkv.wire.secrets import Secrets
from shardkv.wire.server_stream import OVER_QUOTA_SECONDS
from shardkv.wire.turns import OWNER

log = logging.getLogger(__name__)

NOT_KNOWN_YET = "who may do what is not known here yet"
# What a gRPC method is called in the audit log: as the call of a stream that does the same.
AS_STREAM = {Right.READ: "kv.read", Right.WRITE: "kv.write", Right.ADMIN: "ctl.admin", Right.USER: "ctl.query"}
RANGES = (pb.ScanRequest, pb.CountRequest, pb.DeleteRangeRequest)  # of keys; others are of one key
FRAME_KINDS = {"kv.write": WRITE, "kv.read": READ, "kv.stale": READ}


class Access:
    """See `wire.auth.Authorizer`."""

    def __init__(
        self,
        accounts: Callable[[], Accounts | None],
        member: Member,
        secrets: Secrets,
        tls: bool,
        limits: Limits,
        audit: Audit | None = None,
    ) -> None:
        """`accounts`: the table of now, None while it is not known. `member`: which process this is."""
        self._accounts, self._member, self._secrets, self._tls = accounts, member, secrets, tls
        self._limits = limits
        self._audit: Audit = audit or NoAudit()
        self.quotas = Enforcer(accounts, self._audit)

    @property
    def knows_processes(self) -> bool:
        """Whether this process can tell who belongs to the cluster, and show that it does."""
        return self._tls or bool(self._secrets)

    @property
    def is_open(self) -> bool:
        """Whether access control is known to be off."""
        accounts = self._accounts()
        return accounts is not None and not accounts.enabled

    @property
    def knows_users(self) -> bool:
        return self._accounts() is not None

    def user_verifier(self, name: str) -> Verifier | None:
        """See `Greeter`. Raises NotKnownYet."""
        accounts = self._accounts()
        if accounts is None:
            raise NotKnownYet(NOT_KNOWN_YET)
        user = accounts.users.get(name)
        return user.verifier if user is not None else None

    def is_still(self, caller: Caller) -> bool:
        if caller.key and not self._secrets.accepts(caller.key):
            return False
        accounts = self._accounts()
        if accounts is None or not caller.user:
            return True
        if caller.verifier is None:  # by certificate: until access control is on, such a name means nothing
            return not accounts.enabled or caller.user in accounts.users
        return self._user(accounts, caller) is not None

    def standing(self, caller: Caller) -> tuple[Standing, str]:
        if self._is_node(caller):
            return Standing.NODE, "node"
        if self._is_operator(caller):
            return Standing.KNOWN, caller.name
        accounts = self._accounts()
        if accounts is None:
            return Standing.STRANGER, ""
        if not accounts.enabled:
            return Standing.KNOWN, ""
        user = self._user(accounts, caller)
        return (Standing.KNOWN, user.name) if user is not None else (Standing.STRANGER, "")

    def refusal(self, caller: Caller, method: str, payload: bytes) -> bytes | None:
        if method == "ctl.admin" and (why := self._why_not_enable(caller, payload)):
            return refuse(Code.DENIED, self._deny(caller, describe(method, payload), why))
        call = CALLS.get(method)
        right = call.right if call is not None else Right.USER
        accounts = self._accounts()
        is_open = accounts is not None and not accounts.enabled
        if right is Right.NODE or right is Right.OPERATOR:
            if not self.knows_processes and is_open:
                return None
        elif is_open:
            return None
        if self._is_operator(caller):
            why = "only processes of the cluster may do that" if right is Right.NODE else ""
        elif self._is_node(caller):
            why = self._why_not_node(caller, method, payload)
        elif right is Right.NODE:
            why = "only processes of the cluster may do that"
        elif accounts is None:
            return refuse(Code.RETRY, NOT_KNOWN_YET)
        else:
            why = self._why_not(self._user(accounts, caller), right)
        return None if not why else refuse(Code.DENIED, self._deny(caller, describe(method, payload), why))

    def _is_node(self, caller: Caller) -> bool:
        return caller.member is not None and (not caller.key or self._secrets.accepts(caller.key))

    def _is_operator(self, caller: Caller) -> bool:
        return caller.operator and self._secrets.accepts(caller.key)

    def _why_not_node(self, caller: Caller, method: str, payload: bytes) -> str:
        """A process does what its own group needs, and no more: one stolen key is not the whole cluster's."""
        call, member = CALLS.get(method), caller.member
        assert member is not None
        if call is None or not (call.nodes_too or call.right is Right.NODE):
            return "a process of the cluster has no business with that"
        if method == MAIL and member.group != self._member.group:
            return f"mail of {member}, to {self._member}"
        if method == "ctl.claim" and _claimed_group(payload) != member.group:
            return f"{member} may claim for its own group alone"
        if method == "ctl.admin" and _readdressed_group(payload) != member.group:
            return f"{member} may tell its own group's addresses alone"
        return ""

    def _why_not_enable(self, caller: Caller, request: Any) -> str:
        """Access control is switched on only if an admin can log in then: by a token, or as this caller does now."""
        if isinstance(request, bytes):
            try:
                request = ctl.AdminRequest.FromString(request)
            except DecodeError:
                return ""
        if request.WhichOneof("op") != "access_control" or not request.access_control.enabled:
            return ""
        accounts = self._accounts()
        if accounts is None or accounts.enabled:
            return ""
        admins = [user for user in accounts.users.values() if user.role is Role.ADMIN]
        if not admins or any(user.verifier is not None or user.name == caller.user for user in admins):
            return ""  # without an admin the controller itself refuses
        names = ", ".join(user.name for user in admins)
        return (
            f"nobody could log in as an admin then: {names} has no token. Give one (`admin user token`), "
            "or ask again with the certificate of that name"
        )

    @staticmethod
    def _user(accounts: Accounts, caller: Caller) -> User | None:
        """The user that the caller has proven to be, if the proof would still do."""
        user = accounts.users.get(caller.user) if caller.user else None
        if user is None or (caller.verifier is not None and caller.verifier != user.verifier):
            return None
        return user

    def _why_not(self, user: User | None, right: Right) -> str:
        if user is None:
            return "who are you? no such user, or another token"
        if user.role is Role.ADMIN or right is Right.USER:
            return ""
        if right is Right.ADMIN or right is Right.OPERATOR:
            return "only an admin may do that"
        if right is Right.WRITE and not user.may_write():
            return f"{user.name} may only read"
        return ""

    def admitted(self, caller: Caller, method: str, payload: bytes) -> bytes:
        """A frame whose sessions are the user's own, and in which operations outside the user's prefixes are marked.

        The marked ones alone are refused.
        """
        if caller.user and method == "kv.write":
            payload = own_frame(payload, caller.user)
        if method not in FRAME_KINDS:
            if method in CHANGES or (method == "kv.view" and _begins_view(payload)):
                self._note_change(caller, method, payload)
            return payload
        accounts = self._accounts()
        user = self._user(accounts, caller) if accounts is not None and accounts.enabled else None
        bounded = user is not None and user.role is not Role.ADMIN and bool(user.prefixes)
        if not bounded and not self.quotas.of_prefixes:
            return payload
        try:
            frames.check_frame(payload, FRAME_KINDS[method], self._limits)
        except MalformedFrame:
            return payload  # nothing of it will be done: it is refused as what it is
        if user is not None and bounded:
            payload = self._inside(user, caller, method, payload)
        return self.quotas.marked(caller.name, caller.address, method, payload)

    def _inside(self, user: User, caller: Caller, method: str, payload: bytes) -> bytes:
        marked = frames.forbid(payload, lambda kind, key, value: self._forbids(user, kind, key, value))
        if marked is not payload:
            self._deny(caller, method, f"{user.name} may not touch that key")
        return marked

    def busy(self, caller: Caller, method: str, payload: bytes) -> str:  # hot: runs per frame
        """See `wire.auth.Authorizer`: the quota of the caller is used up."""
        if method not in FRAME_KINDS:
            return ""
        return self.quotas.frame(caller.user, caller.address, method, payload)

    def answered(self, caller: Caller, size: int) -> None:
        self.quotas.answered(caller.user, size)

    def _forbids(self, user: User, kind: int, key: bytes, value: bytes) -> bool:
        try:
            if kind == SCAN_OP:
                return not user.may_scan(key, frames.unpack_scan(value)[0])
            if kind in (RANGE, DELETE_RANGE):
                return not user.may_scan(key, unpack_look(value)[0])
            if kind == RANGE_BACK:
                return not user.may_scan(unpack_look(value)[0], key)
        except MalformedFrame:
            return True  # it is refused either way
        return not user.may_touch([key])

    def _note_change(self, caller: Caller, method: str, payload: bytes) -> None:
        kind = "admin" if method in CHANGES else "read-all"
        what = describe(method, payload)
        self._audit.note(kind, who=caller.name, address=caller.address, door="main", what=what, allowed=True)

    def _deny(self, caller: Caller, what: str, why: str, door: str = "main") -> str:
        self._audit.note(
            "denied", who=caller.name, address=caller.address, door=door, what=what, allowed=False, why=why
        )
        return why

    def login_refusal(self, login: Login | None, address: str = "?") -> str:
        """Why somebody with this login, or none, may not look at the cluster; empty if he may."""
        accounts = self._accounts()
        if accounts is not None and not accounts.enabled:
            return ""
        caller = self._sent(accounts, address, login)
        user = self._user(accounts, caller) if accounts is not None else None
        why = self._why_not(user, Right.USER)
        # A browser asks without a login first: that is no news.
        return self._deny(caller, "kv.status", why, "page") if why and login is not None else why

    @staticmethod
    def _sent(accounts: Accounts | None, address: str, login: Login | None) -> Caller:
        """Who has sent a login with its token, as browsers and gRPC do."""
        user = accounts.users.get(login.name) if accounts is not None and login is not None else None
        if user is None or login is None or user.verifier is None or not user.verifier.knows(login.token):
            return Caller(address)
        return Caller(address, user=user.name, verifier=user.verifier)

    # ---- gRPC

    def grpc_caller(self, metadata: Any, address: str, certified: str = "") -> Caller:
        """A login is `authorization: Bearer NAME:TOKEN`; without one, it is whom the certificate names."""
        login = None
        for key, value in metadata or ():
            if key == "authorization" and isinstance(value, str) and value.startswith("Bearer "):
                name, _, token = value.removeprefix("Bearer ").partition(":")
                login = Login(name, token)
        if login is None and certified:
            return Caller(address, user=certified)
        return self._sent(self._accounts(), address, login)

    def grpc_refusal(self, caller: Caller, path: str, request: Any) -> str:
        """Why a unary call is not let through; empty if it is. `request` is None while it is not read yet."""
        accounts = self._accounts()
        right = UNARY[path]
        assert right is not None
        what = describe_admin(request) if isinstance(request, ctl.AdminRequest) else AS_STREAM[right]
        if accounts is None:
            return NOT_KNOWN_YET
        if isinstance(request, ctl.AdminRequest) and not accounts.enabled:
            why = self._why_not_enable(caller, request)
        else:
            why = self._why_not_unary(self._user(accounts, caller), right, request) if accounts.enabled else ""
        if why:
            return self._deny(caller, what, why, "grpc")
        if right is Right.ADMIN and request is not None:
            self._audit.note(
                "admin", who=caller.name, address=caller.address, door="grpc", what=what, allowed=True
            )
        return ""

    def unary_wait(self, caller: Caller, path: str, request: Any) -> float:
        """Seconds until an operation may come again, where a quota is used up; 0: it is let through, and counted."""
        right = UNARY[path]
        if right is not Right.READ and right is not Right.WRITE:
            return 0.0
        key = request.start if isinstance(request, RANGES) else request.key
        return self.quotas.unary(caller.user, caller.address, AS_STREAM[right], key, request.ByteSize())

    def _why_not_unary(self, user: User | None, right: Right, request: Any) -> str:
        if user is not None and user.prefixes and request is not None and right in (Right.READ, Right.WRITE):
            scans = isinstance(request, RANGES)
            inside = user.may_scan(request.start, request.end) if scans else user.may_touch([request.key])
            if not inside:
                return f"{user.name} may not touch that key"
        return self._why_not(user, right)


def _begins_view(payload: bytes) -> bool:
    """Whether somebody begins to read all that a replica holds, rather than the next page."""
    try:
        request = pb.ViewRequest.FromString(payload)
    except DecodeError:
        return False
    return not request.id and not request.close


def _claimed_group(payload: bytes) -> int:
    """0 for what is no claim: a group has another number."""
    try:
        return int(ctl.Claim.FromString(payload).gid)
    except DecodeError:
        return 0


def _readdressed_group(payload: bytes) -> int:
    try:
        request = ctl.AdminRequest.FromString(payload)
    except DecodeError:
        return 0
    return int(request.readdress.gid) if request.WhichOneof("op") == "readdress" else 0


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """The same authorizer for gRPC. A method that the table does not have is refused."""

    def __init__(self, access: Access, pipes: Pipes) -> None:
        self._access, self._pipes = access, pipes

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        path = details.method
        if handler is None:
            return None  # gRPC itself says that there is no such method
        if path not in UNARY:
            return grpc.unary_unary_rpc_method_handler(_not_in_table)
        if UNARY[path] is None:
            return handler
        serve = handler.unary_unary
        metadata = details.invocation_metadata

        # Served as a stream of one request, so that the caller is judged before the request is read.
        async def guarded(requests: Any, context: Any) -> Any:
            peer = context.peer()
            caller = self._access.grpc_caller(metadata, self._pipes.address(peer), self._pipes.certified(peer))
            owner = self._pipes.settle(peer, *self._access.standing(caller))
            OWNER.set(owner)
            why, request = self._access.grpc_refusal(caller, path, None), None
            if not why:
                request = await anext(aiter(requests), None)
                if request is None:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a call without a request")
                why = self._access.grpc_refusal(caller, path, request)
            if why:
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, why)
            assert request is not None
            if not owner:
                await _come_back(context, OVER_QUOTA, OVER_QUOTA_SECONDS)
            if wait := self._access.unary_wait(caller, path, request):
                await _come_back(context, "a quota is used up", wait)
            if UNARY[path] is Right.WRITE and len(request.identity.session) == SESSION_BYTES:
                request.identity.session = owned(request.identity.session, caller.user)
            reply = await serve(request, context)
            self._access.answered(caller, reply.ByteSize())
            return reply

        return grpc.stream_unary_rpc_method_handler(
            guarded, handler.request_deserializer, handler.response_serializer
        )


async def _come_back(context: Any, why: str, seconds: float) -> None:
    """As gRPC's proposal A6 has it, which some clients' retries heed."""
    pushback = ("grpc-retry-pushback-ms", str(max(1, round(seconds * 1000))))
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, busy_text(why, seconds), (pushback,))


async def _not_in_table(request: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.PERMISSION_DENIED, "nobody may call this method")
