"""What one server process is told about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from shardkv.raft.replica import ReplicaOptions
from shardkv.wire.descriptors import Descriptors
from shardkv.wire.frames import Limits
from shardkv.wire.node_name import Member
from shardkv.wire.tls import Tls

CONTROLLER_GROUP = 0
STDERR = "stderr"


@dataclass(frozen=True)
class ProcessOptions:
    """What one process is. `peers` are the addresses of the group's first replicas; replica n is the n-th.

    One that joins a group later has no peers, but its own address: whoever leads the group
    makes it a member, and from then on its log says who the others are.
    """

    replica: int
    peers: tuple[str, ...]
    data: Path
    cluster: str
    gid: int = CONTROLLER_GROUP
    controllers: tuple[str, ...] = ()
    initial_shards: int = 8
    ephemeral: bool = False
    listen: str = (
        ""  # host:port to bind, where that is not `address`: behind a NAT, a container's port, a proxy
    )
    joins_as: str = ""  # host:port of a replica that joins
    metrics: str = ""  # host:port for Prometheus
    web: str = ""  # host:port for browsers; controllers only
    web_names: tuple[str, ...] = ()  # host names under which browsers may ask, besides this machine's
    web_open: bool = False  # under TLS, answer browsers on other machines also while access control is off
    tls: Tls | None = None
    secret_file: Path | None = None  # with the secrets by which the cluster's processes know each other
    audit: str = "file"  # in the data directory, or STDERR
    descriptors: Descriptors = field(default_factory=lambda: Descriptors.divide(4096))
    log_format: str = "text"
    log_level: str = "INFO"
    reserve_bytes: int = (
        512 << 20
    )  # with less free on the disk, the group takes no more in: raft/space_watch.py
    scrub_bytes_per_second: int = 10 << 20  # at which tables are read through, again and again; 0: never
    limits: Limits = field(default_factory=Limits)
    raft: ReplicaOptions = field(default_factory=ReplicaOptions)

    @property
    def address(self) -> str:
        return self.joins_as or self.peers[self.replica - 1]

    @property
    def member(self) -> Member:
        """Which process of the cluster this is."""
        return Member(self.cluster, self.gid, self.replica)

    @property
    def addresses(self) -> dict[int, str]:
        """The group's first members; none for one that joins."""
        return {} if self.joins_as else dict(enumerate(self.peers, 1))
