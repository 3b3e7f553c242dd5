"""How much a user, or a part of the keys, may ask for: quotas, as the controller keeps them beside the users. Pure.

    operations   a second
    bytes        a second, of requests and, for users, of answers
    connections  at once, of users alone

Every process counts by itself. An admin has no quota, for somebody has to be able to change them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.planner import Refused

MAX_PREFIX_QUOTAS = 64
MAX_PREFIX_BYTES = 1024
MAX_RATE = 1 << 40
MAX_CONNECTIONS = 1_000_000


@dataclass(frozen=True, slots=True)
class Quota:
    """0: no bound."""

    operations: int = 0
    bytes: int = 0
    connections: int = 0


@dataclass(frozen=True, slots=True)
class Quotas:
    users: dict[str, Quota] = field(default_factory=dict)
    prefixes: dict[bytes, Quota] = field(default_factory=dict)

    def with_quota(self, request: pb.Quota) -> Quotas:
        """With the one that the request tells, in place of an older one. Raises Refused."""
        quota = _checked(request)
        if request.WhichOneof("whose") == "user":
            return Quotas({**self.users, request.user: quota}, self.prefixes)
        if request.prefix not in self.prefixes and len(self.prefixes) >= MAX_PREFIX_QUOTAS:
            raise Refused("TooManyQuotas", f"there are {MAX_PREFIX_QUOTAS} prefixes with quotas")
        return Quotas(self.users, {**self.prefixes, request.prefix: quota})

    def without_quota(self, request: pb.Quota) -> Quotas:
        """Raises Refused."""
        name = request.WhichOneof("whose")
        if (name == "user" and request.user in self.users) or request.prefix in self.prefixes:
            users = {
                user: quota for user, quota in self.users.items() if name != "user" or user != request.user
            }
            prefixes = {
                prefix: quota
                for prefix, quota in self.prefixes.items()
                if name != "prefix" or prefix != request.prefix
            }
            return Quotas(users, prefixes)
        raise Refused("UnknownQuota", "there is no quota of that user or prefix")

    def without_user(self, name: str) -> Quotas:
        return Quotas({user: quota for user, quota in self.users.items() if user != name}, self.prefixes)

    # ---- bytes

    def encode(self) -> list[pb.Quota]:
        found = [_message(quota, user=name) for name, quota in sorted(self.users.items())]
        return found + [_message(quota, prefix=prefix) for prefix, quota in sorted(self.prefixes.items())]

    @classmethod
    def decode(cls, messages: Iterable[pb.Quota]) -> Quotas:
        users, prefixes = dict[str, Quota](), dict[bytes, Quota]()
        for message in messages:
            quota = Quota(message.operations, message.bytes, message.connections)
            if message.WhichOneof("whose") == "user":
                users[message.user] = quota
            elif message.prefix:
                prefixes[message.prefix] = quota
        return cls(users, prefixes)

    def listed(self) -> Sequence[dict[str, object]]:
        """For people."""
        return [
            {
                "user": message.user or None,
                "prefix": message.prefix.decode(errors="backslashreplace") or None,
                "operations": message.operations,
                "bytes": message.bytes,
                "connections": message.connections,
            }
            for message in self.encode()
        ]


def _checked(request: pb.Quota) -> Quota:
    """Raises Refused."""
    name = request.WhichOneof("whose")
    if name is None or not (request.user or request.prefix):
        raise Refused("BadQuota", "a quota is of a user or of a prefix that is not empty")
    if len(request.prefix) > MAX_PREFIX_BYTES:
        raise Refused("BadQuota", f"a prefix has at most {MAX_PREFIX_BYTES} bytes")
    if not (request.operations or request.bytes or request.connections):
        raise Refused("BadQuota", "a quota without a bound; remove the quota to lift it")
    if max(request.operations, request.bytes) > MAX_RATE:
        raise Refused("BadQuota", f"at most {MAX_RATE:,} a second")
    if request.connections > MAX_CONNECTIONS:
        raise Refused("BadQuota", f"at most {MAX_CONNECTIONS:,} connections")
    if request.connections and name != "user":
        raise Refused("BadQuota", "connections are a user's, and no prefix's")
    return Quota(request.operations, request.bytes, request.connections)


def _message(quota: Quota, user: str = "", prefix: bytes = b"") -> pb.Quota:
    message = pb.Quota(operations=quota.operations, bytes=quota.bytes, connections=quota.connections)
    if user:
        message.user = user
    else:
        message.prefix = prefix
    return message
