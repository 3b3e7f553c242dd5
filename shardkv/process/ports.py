"""Free ports on loopback, for clusters that come and go."""

from __future__ import annotations

import os
import socket

FIRST, LAST = 10_000, 30_000  # below the ports that Linux gives to outgoing connections


def free_port_base(count: int = 40) -> int:
    """The first of `count` consecutive ports on which nothing listens now.

    Processes that ask at the same time begin to search at different places. Nothing reserves the
    ports: a process that takes one before its owner binds it makes that owner fail, in one line.
    """
    base = FIRST + (os.getpid() * 101) % (LAST - FIRST - count)
    while not all(_is_free(port) for port in range(base, base + count)):
        base += count
        if base + count > LAST:
            base = FIRST
    return base


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
