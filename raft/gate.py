"""Who is at the other end of a stream, and whether a call of theirs is let through.

A stream may carry a login, sent before the first call, and under TLS it has the
certificate that the peer showed. What these allow is decided by a `Gate`, for each call
anew, since it may have changed. The default one lets everybody do everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol

LOGIN = "login"  # the method of the call that carries one
MAX_LOGIN_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Login:
    """A name and its token. The token is in no repr, and so in no log."""

    name: str
    token: str = field(repr=False)

    def encode(self) -> bytes:
        return self.name.encode() + b"\0" + self.token.encode()


@dataclass(frozen=True, slots=True)
class Caller:
    """What a stream shows of the one at its other end; nothing of it is believed yet but the certificate."""

    address: str = "?"
    certificate_name: str = ""  # the common name in it
    organization: str = ""
    login_name: str = ""
    token_hash: bytes = field(default=b"", repr=False)

    @property
    def name(self) -> str:
        """Who the caller says he is."""
        return self.login_name or self.certificate_name

    def logged_in(self, payload: bytes) -> Caller:
        """With the login that came. A malformed one is as good as none."""
        name, separator, token = payload[:MAX_LOGIN_BYTES].partition(b"\0")
        if not separator or not token:
            return self
        return Caller(
            self.address,
            self.certificate_name,
            self.organization,
            name.decode(errors="replace"),
            hash_token(token.decode(errors="replace")),
        )

    @classmethod
    def of(cls, address: str, certificate: Mapping[str, Any] | None) -> Caller:
        """From `ssl.SSLSocket.getpeercert`."""
        names: Sequence[Any] = (certificate or {}).get("subject", ())
        subject = {kind: value for group in names for kind, value in group}
        return cls(address, subject.get("commonName", ""), subject.get("organizationName", ""))


def hash_token(token: str) -> bytes:
    """What is kept of a token. One hash is enough: tokens are random, not thought up by people."""
    return hashlib.sha256(token.encode()).digest()


class Standing(Enum):
    """What a server knows of a caller, and so which share of its connections the caller may use."""

    STRANGER = auto()  # has not said who he is, or is nobody that we know
    KNOWN = auto()  # a user; anybody, while access control is off
    NODE = auto()  # a process of the cluster


class Gate(Protocol):
    def standing(self, caller: Caller) -> tuple[Standing, str]:
        """With the user's name; empty where nobody is asked who he is."""

    def refusal(self, caller: Caller, method: str, payload: bytes) -> bytes | None:
        """None: let it through. Else the answer (`answers.refuse`) that it gets instead."""

    def admitted(self, caller: Caller, method: str, payload: bytes) -> bytes:
        """What the server gets to see of a call that was let through: where a part is forbidden, that is marked."""


class OpenGate:
    def standing(self, caller: Caller) -> tuple[Standing, str]:
        return Standing.KNOWN, ""

    def refusal(self, caller: Caller, method: str, payload: bytes) -> bytes | None:
        return None

    def admitted(self, caller: Caller, method: str, payload: bytes) -> bytes:
        return payload
