"""How one end of a stream finds out that the other end is gone: a cable that is pulled tells nobody.

TCP alone repeats what was not acknowledged, ever more rarely, for 15 minutes; after a cable was out
for a minute, the next attempt may be a minute away. So each end asks the other when it has heard
nothing for `ASK_SECONDS`, and gives the stream up when it has heard nothing for `SILENT_SECONDS`;
the next message dials again. Where there is traffic both ways nothing is asked.
"""

from __future__ import annotations

import os
import socket
from typing import Any

ASK_SECONDS = 1.0
SILENT_SECONDS = 3.0
SOCKET_SECONDS = 5  # for the kernel, which watches streams of a process that is itself held up

# Linux has all of these; another system goes without those that it lacks.
_OPTIONS = (
    ("TCP_USER_TIMEOUT", SOCKET_SECONDS * 1000),
    ("TCP_KEEPIDLE", SOCKET_SECONDS),
    ("TCP_KEEPINTVL", 1),
    ("TCP_KEEPCNT", 3),
)


class Silence:
    """When the other end was last heard. `now` is the event loop's clock."""

    def __init__(self, now: float) -> None:
        self.heard_at = now
        self._looked_at = now

    def look(self, now: float) -> tuple[bool, bool]:
        """(ask the other end now, the other end is gone). To be called every half `ASK_SECONDS`.

        If this process itself stood still, what came meanwhile is not read yet: that is no silence.
        """
        if now - self._looked_at > 2 * ASK_SECONDS:
            self.heard_at = max(self.heard_at, now - ASK_SECONDS)
        self._looked_at = now
        silent = now - self.heard_at
        return silent >= ASK_SECONDS, silent >= SILENT_SECONDS


def watch_socket(transport: Any) -> None:
    """Have the kernel give up what is not acknowledged in time."""
    found = transport.get_extra_info("socket")
    if found is None or found.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with socket.socket(fileno=os.dup(found.fileno())) as own:  # uvloop's stand-in has not all methods
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _OPTIONS:
            option = getattr(socket, name, None)
            if option is not None:
                own.setsockopt(socket.IPPROTO_TCP, option, value)
