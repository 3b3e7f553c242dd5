"""Who may do what: users, their roles and prefixes, as the controller keeps them. Pure.

    admin        everything
    read-write   gets, scans and writes of keys that begin with one of the prefixes
    read-only    gets and scans of them

A user without prefixes may touch every key. Users are known by a token, of which only a
verifier is kept (`wire/proof.py`), or by the common name of the certificate that they show. Nothing
is asked of anybody until access control is switched on, which takes an admin who can then log in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.planner import Refused
from shardkv.shardctrler.quotas import Quotas
from shardkv.wire.proof import Verifier

MAX_USERS = 10_000
MAX_PREFIXES = 64
MAX_NAME = 128


class Role(Enum):
    ADMIN = "admin"
    READ_WRITE = "read-write"
    READ_ONLY = "read-only"


@dataclass(frozen=True, slots=True)
class User:
    name: str
    role: Role
    prefixes: tuple[bytes, ...] = ()
    verifier: Verifier | None = field(
        default=None, repr=False
    )  # of the token; None: known by certificate alone

    def may_write(self) -> bool:
        return self.role is not Role.READ_ONLY

    def may_touch(self, keys: Iterable[bytes]) -> bool:
        return not self.prefixes or all(key.startswith(self.prefixes) for key in keys)

    def may_scan(self, start: bytes, end: bytes) -> bool:
        """Whether [start, end) lies within one of the prefixes; an empty end is open."""
        return not self.prefixes or any(
            start.startswith(prefix) and end and end <= (after(prefix) or end) for prefix in self.prefixes
        )


def after(prefix: bytes) -> bytes:
    """The first key that is above all that begin with `prefix`; empty where there is none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b""


@dataclass(frozen=True, slots=True)
class Accounts:
    """One version of all there is to know. Every change makes the next version."""

    version: int = 0
    enabled: bool = False
    users: dict[str, User] = field(default_factory=dict)
    quotas: Quotas = field(default_factory=Quotas)

    # ---- changes. Raise Refused

    def with_user(self, request: pb.SetUser) -> Accounts:
        """Make a user, or change one: what the request leaves out stays as it is."""
        name = request.name
        if not 0 < len(name) <= MAX_NAME or not name.isprintable() or ":" in name:
            raise Refused("BadUser", f"a name has 1 to {MAX_NAME} printable characters and no colon")
        known = self.users.get(name)
        if known is None and len(self.users) >= MAX_USERS:
            raise Refused("TooManyUsers", f"there are {MAX_USERS} users")
        if known is not None and request.create:
            raise Refused("UserExists", f"there is a user {name!r} already")
        if known is None and not request.create:
            raise Refused("UnknownUser", f"there is no user {name!r}")
        if len(request.prefixes) > MAX_PREFIXES or b"" in request.prefixes:
            raise Refused("BadUser", f"at most {MAX_PREFIXES} prefixes, none of them empty")
        try:
            role = Role(request.role) if request.role else known.role if known else None
        except ValueError:
            role = None
        if role is None:
            raise Refused("BadUser", f"a role is one of {', '.join(each.value for each in Role)}")
        prefixes = tuple(request.prefixes) if request.set_prefixes or known is None else known.prefixes
        if prefixes and role is Role.ADMIN:
            raise Refused("BadUser", "an admin may touch every key: give prefixes to other roles")
        verifier = known.verifier if known else None
        if request.verifier:
            try:
                verifier = Verifier.decode(request.verifier)
            except ValueError as error:
                raise Refused("BadUser", str(error)) from None
        return self._changed({**self.users, name: User(name, role, prefixes, verifier)})

    def without_user(self, name: str) -> Accounts:
        if name not in self.users:
            raise Refused("UnknownUser", f"there is no user {name!r}")
        changed = self._changed({key: user for key, user in self.users.items() if key != name})
        return replace(changed, quotas=self.quotas.without_user(name))

    def with_quota(self, request: pb.Quota) -> Accounts:
        user = self.users.get(request.user)
        if request.user and user is None:
            raise Refused("UnknownUser", f"there is no user {request.user!r}")
        if user is not None and user.role is Role.ADMIN:
            raise Refused("BadQuota", "an admin has no quota: somebody has to be able to change them")
        return replace(self, version=self.version + 1, quotas=self.quotas.with_quota(request))

    def without_quota(self, request: pb.Quota) -> Accounts:
        return replace(self, version=self.version + 1, quotas=self.quotas.without_quota(request))

    def switched(self, enabled: bool) -> Accounts:
        return self._check(replace(self, version=self.version + 1, enabled=enabled))

    def _changed(self, users: dict[str, User]) -> Accounts:
        return self._check(replace(self, version=self.version + 1, users=users))

    def _check(self, changed: Accounts) -> Accounts:
        if changed.enabled and not any(user.role is Role.ADMIN for user in changed.users.values()):
            raise Refused("NoAdmin", "access control without an admin would lock everybody out")
        return changed

    # ---- bytes

    def encode(self) -> bytes:
        message = pb.Accounts(version=self.version, enabled=self.enabled, quotas=self.quotas.encode())
        for name in sorted(self.users):
            user = self.users[name]
            message.users.add(
                name=name,
                role=user.role.value,
                prefixes=user.prefixes,
                verifier=user.verifier.encode() if user.verifier else b"",
            )
        return message.SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, data: bytes) -> Accounts:
        """Raises DecodeError, ValueError."""
        message = pb.Accounts.FromString(data)
        users = {
            user.name: User(
                user.name,
                Role(user.role),
                tuple(user.prefixes),
                Verifier.decode(user.verifier) if user.verifier else None,
            )
            for user in message.users
        }
        return cls(message.version, message.enabled, users, Quotas.decode(message.quotas))

    def listed(self) -> Sequence[dict[str, object]]:
        """For people: all but the verifiers."""
        return [
            {
                "name": user.name,
                "role": user.role.value,
                "prefixes": [prefix.decode(errors="backslashreplace") for prefix in user.prefixes],
                "token": user.verifier is not None,
            }
            for _, user in sorted(self.users.items())
        ]
