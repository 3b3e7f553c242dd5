"""A call between processes, as both ends see it: who makes it, who answers, and one byte that says how it went.

Both services use it, so that clients treat "ask another replica" alike.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from enum import IntEnum
from math import ceil
from typing import Protocol


class Code(IntEnum):
    OK = 0
    NOT_LEADER = 1  # text: the leader's address, or empty; nothing was done
    BUSY = 2  # nothing was queued; back off, for as long as the text says (`retry_after`)
    RETRY = 3  # nothing is known, or nothing was done: ask again
    BAD_REQUEST = 4  # text: what is wrong; asking again will not help
    STOPPED = 5  # this replica is down; ask another
    NO_ROOM = 6  # the group's disks are nearly full; nothing was done
    DENIED = 7  # who asks may not do that; nothing was done


def answer(body: bytes) -> bytes:
    return b"\0" + body


def refuse(code: Code, text: str = "") -> bytes:
    return bytes([code]) + text.encode()


def parse(data: bytes) -> tuple[Code, bytes]:
    """(code, body). Raises ValueError for bytes that no server of this version sends."""
    if not data:
        raise ValueError("an empty answer")
    return Code(data[0]), data[1:]


def busy_text(why: str, seconds: float) -> str:
    """The text of a `Code.BUSY` that says when to come back. Older clients take it for a text."""
    return f"{why}; come back in {ceil(seconds * 1000)} ms"


_COME_BACK = re.compile(r"; come back in (\d{1,12}) ms$")


def retry_after(text: str) -> float:
    """The seconds that a `busy_text` names; 0 where there are none."""
    found = _COME_BACK.search(text)
    return int(found[1]) / 1000 if found is not None else 0.0


class Unreachable(Exception):
    """No answer: the peer is down, the connection broke, or the time ran out. It may have acted."""


class Dialer(Protocol):
    """Calls to other processes: clerk to server, group to group, anyone to the controller."""

    async def call(self, address: str, method: str, payload: bytes, timeout: float) -> bytes:
        """The peer's answer. Raises Unreachable within `timeout` seconds.

        The call reaches the peer at most once: one that was refused was not also carried out.
        """

    async def close(self) -> None: ...


Handler = Callable[[str, bytes], Awaitable[bytes]]
"""A server's side of `Dialer.call`: (method, payload) to answer. It does not raise on bad input."""
