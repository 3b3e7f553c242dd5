"""Who is at the other end of a stream, and whether a call of theirs is let through.

The handshake (`handshake.py`) has proven who it is before the first call; under TLS there is the
certificate that the peer showed, too. What a caller may do is decided by an `Authorizer`, for each call anew,
since it may have changed. The default one lets everybody do everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto
from typing import Protocol

from shardkv.wire.node_name import Member
from shardkv.wire.proof import Verifier
from shardkv.wire.secrets import Secrets

LOGIN = "login"  # the method of the record that carries the dialling end's proof


class Kind(IntEnum):
    """As whom an end that dials introduces itself."""

    NOBODY = 0
    USER = 1  # by a token
    NODE = 2  # a process of the cluster: by a secret or, under TLS, by its certificate
    OPERATOR = 3  # whoever can read the file with the cluster's secret


@dataclass(frozen=True, slots=True)
class Login:
    """A user's name and token. The token is in no repr, and so in no log."""

    name: str
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Operator:
    """Whoever can read the cluster's secret: may do what an admin may."""

    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Node:
    """A process of the cluster, as it introduces itself to others."""

    member: Member
    secrets: Secrets


Who = Login | Operator | Node | None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end of a stream: only what has been proven. All empty: a stranger."""

    address: str = "?"
    user: str = ""
    verifier: Verifier | None = field(default=None, repr=False)  # of the user's token; None: by certificate
    member: Member | None = None
    operator: bool = False
    key: bytes = (
        b""  # names the secret by which a process or an operator has proven itself; empty: by certificate
    )

    @property
    def name(self) -> str:
        """For the audit log."""
        if self.member is not None:
            return f"replica {self.member.replica} of group {self.member.group}"
        return "operator" if self.operator else self.user


STRANGER = Caller()


class Standing(Enum):
    """What a server knows of a caller, and so which share of its connections the caller may use."""

    STRANGER = auto()  # has not said who he is, or is nobody that we know
    KNOWN = auto()  # a user; anybody, while access control is off
    NODE = auto()  # a process of the cluster


class Authorizer(Protocol):
    def standing(self, caller: Caller) -> tuple[Standing, str]:
        """With the user's name; empty where nobody is asked who he is."""

    def refusal(self, caller: Caller, method: str, payload: bytes) -> bytes | None:
        """None: let it through. Else the answer (`answers.refuse`) that it gets instead."""

    def admitted(self, caller: Caller, method: str, payload: bytes) -> bytes:
        """What the server gets to see of a call that was let through: where a part is forbidden, that is marked."""

    def busy(self, caller: Caller, method: str, payload: bytes) -> str:
        """Why a call that may be made is not let through now, and when to come back (`busy_text`); empty if it is."""

    def answered(self, caller: Caller, size: int) -> None:
        """An answer of so many bytes goes to the caller."""

    def is_still(self, caller: Caller) -> bool:
        """Whether `caller` would be accepted again if it logged in now. If not, its streams are ended."""


class AllowAll:
    def standing(self, caller: Caller) -> tuple[Standing, str]:
        return Standing.KNOWN, ""

    def refusal(self, caller: Caller, method: str, payload: bytes) -> bytes | None:
        return None

    def admitted(self, caller: Caller, method: str, payload: bytes) -> bytes:
        return payload

    def busy(self, caller: Caller, method: str, payload: bytes) -> str:
        return ""

    def answered(self, caller: Caller, size: int) -> None:
        pass

    def is_still(self, caller: Caller) -> bool:
        return True
