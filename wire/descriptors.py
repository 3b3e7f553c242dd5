"""How a process divides the file descriptors that it may have: files first, then its peers, then everybody else. Pure.

A replica whose log cannot be opened for want of a descriptor must stop, so connections never get what
files may need. A group whose replicas cannot reach each other has no leader, so clients never get what
peers may need.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_DESCRIPTORS = 192
OWN = 64  # the log's segments, event loops, pipes, standard streams, listeners, connections that we dial
MAX_TABLES = 256  # tables that RocksDB keeps open
MAX_PEERS = 4096
MAX_CLIENTS = 10_000
MAX_STRANGERS = 2_048
PIPE = 3  # descriptors of a gRPC connection: ours, and both ends of the socket to the gRPC server


class TooFewDescriptors(Exception):
    """The process cannot run with so few file descriptors; the text says how many it needs."""


@dataclass(frozen=True, slots=True)
class Descriptors:
    limit: int
    tables: int  # files that a database keeps open; twice so many are kept free: a repair opens a second one
    peers: int  # connections kept for processes of the cluster
    known: int  # connections of clients that have said who they are
    strangers: int  # connections that have not, yet
    pages: int  # connections of each of the other listeners: metrics, the page

    @classmethod
    def divide(cls, limit: int) -> Descriptors:
        """Raises TooFewDescriptors."""
        if limit < MIN_DESCRIPTORS:
            raise TooFewDescriptors(
                f"RLIMIT_NOFILE is {limit}: this process needs at least {MIN_DESCRIPTORS} file descriptors "
                "(ulimit -n; LimitNOFILE= of systemd)"
            )
        tables = min(MAX_TABLES, limit // 8)
        peers = min(MAX_PEERS, limit // 8)
        pages = min(64, limit // 32)
        clients = min(MAX_CLIENTS, limit - OWN - 2 * tables - peers - 2 * pages)
        strangers = min(MAX_STRANGERS, clients // 3)
        return cls(limit, tables, peers, clients - strangers, strangers, pages)
