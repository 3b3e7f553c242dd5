"""Which replica a data directory belongs to: written when the directory is first used, checked at every start.

A replica that starts on the data of another one breaks the promises of both. So the identity
is read before the log and the state machine are opened, and a directory of another cluster,
group, replica or engine is refused. It holds two things more:

  - the directory's incarnation, 64 random bits. The group's log records it, so an empty directory
    under an old number is found out (`raft/incarnations.py`);
  - the group's first members, as this replica was first started with: a later start with other
    replica numbers in --peers is refused, for a shorter list would make a smaller quorum. Their
    addresses may change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

import google_crc32c

from shardkv.process.options import ProcessOptions
from shardkv.raft.disk import RealDirectory
from shardkv.raft.errors import WrongDirectory
from shardkv.raft.incarnations import KnownDisks
from shardkv.raft.interfaces import Directory
from shardkv.raft.protocol.quorum import Membership, in_hex
from shardkv.raft.unreadable import Unreadable
from shardkv.shardctrler.client import ControllerClient, ControllerUnavailable
from shardkv.wire.auth import Node
from shardkv.wire.bounded_json import parse_json
from shardkv.wire.dialer import TcpDialer
from shardkv.wire.secrets import Secrets

FORMAT = 5  # 3: a group has an incarnation; 4: a disk has one; 5: shards are fenced by restores, records are inherited
MAX_BYTES = 1 << 20  # of the file
IDENTITY = "identity.json"
LEARN_SECONDS = 30.0


class CannotStart(Exception):
    """The process cannot do its work; the text says why in one line."""


@dataclass(frozen=True)
class Identity:
    """What identity.json says."""

    cluster: str
    gid: int
    replica: int
    engine: str
    incarnation: int
    first: Mapping[int, str]  # the group's first members; none for a replica that joined later

    @classmethod
    def new(cls, options: ProcessOptions, rng: Random) -> Identity:
        """What a replica that is started for the first time, with these options, is."""
        engine = "memory" if options.ephemeral else "rocksdb"
        disk = rng.getrandbits(64) or 1
        return cls(options.cluster, options.gid, options.replica, engine, disk, options.addresses)

    def disks(self, now_at: Mapping[int, str]) -> KnownDisks:
        """For the replica. `now_at`: where it is told this time that the first members are."""
        moved = {node: address for node, address in now_at.items() if self.first.get(node) != address}
        return KnownDisks(self.replica, self.incarnation, Membership.of(self.first), moved)

    def encode(self) -> bytes:
        fields = {
            "format": FORMAT,
            "cluster": self.cluster,
            "gid": self.gid,
            "replica": self.replica,
            "engine": self.engine,
            "incarnation": in_hex(self.incarnation),
            "first_members": {str(node): address for node, address in sorted(self.first.items())},
        }
        return json.dumps({**fields, "crc32c": _checksum(fields)}, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Identity:
        """Raises ValueError for damage and for another format."""
        try:
            fields = parse_json(data, MAX_BYTES)
        except ValueError:
            what = "is cut short or overwritten" if data.strip(b"\0 \n") else "is empty"
            raise ValueError(f"damaged: the file {what}, so nobody knows whose data this is") from None
        if not isinstance(fields, dict):
            raise ValueError("no identity")
        if fields.get("format") != FORMAT:  # first, for the formats before the fourth have no checksum
            raise ValueError(f"format {fields.get('format')}, this program reads {FORMAT}")
        if fields.pop("crc32c", None) != _checksum(fields):
            raise ValueError("damaged: it does not match its checksum")
        return cls(
            fields["cluster"],
            fields["gid"],
            fields["replica"],
            fields["engine"],
            int(fields["incarnation"], 16),
            {int(node): address for node, address in fields["first_members"].items()},
        )


def _checksum(fields: Mapping[str, object]) -> str:
    return f"{google_crc32c.value(json.dumps(fields, sort_keys=True).encode()):08x}"


def read_identity(directory: Directory, where: str) -> Identity | None:
    """What the directory is for; None if it is new. Raises WrongDirectory."""
    names = directory.names()
    if IDENTITY in names:
        try:
            return Identity.decode(directory.read(IDENTITY))
        except (ValueError, Unreadable) as error:
            raise WrongDirectory(f"{where}/{IDENTITY}: {error}") from None
    if any(name.startswith("wal-") or name == "state" for name in names):
        raise WrongDirectory(f"{where} has a replica's data but no {IDENTITY}")
    return None


async def claim(directory: Directory, wanted: Identity, where: str) -> Identity:
    """Refuse another replica's data, and other first members; make a new directory ours. Raises WrongDirectory.

    Returns what the directory says: its incarnation, and the members that it was first started with.
    """
    found = read_identity(directory, where)
    if found is None:
        await directory.replace(IDENTITY, wanted.encode())
        return wanted
    if replace(found, incarnation=0, first={}) != replace(wanted, incarnation=0, first={}):
        raise WrongDirectory(f"{where} belongs to {_told(found)}, not to {_told(wanted)}")
    # One that names no members (--join) changes none: it only says where this replica now is.
    if wanted.first and wanted.first.keys() != found.first.keys():
        first = f"the members {_members(found.first)}" if found.first else "--join, as a later member"
        raise WrongDirectory(
            f"--peers names the members {_members(wanted.first)}, and {where} was first started with {first}: "
            "a restart does not change who is in a group; `shardkv admin member` does"
        )
    return found


def _told(identity: Identity) -> str:
    return f"replica {identity.replica} of group {identity.gid} of cluster {identity.cluster!r} ({identity.engine})"


def _members(addresses: Mapping[int, str]) -> str:
    return ", ".join(f"{node} at {address}" for node, address in sorted(addresses.items()))


async def learn_cluster(
    directory: RealDirectory, options: ProcessOptions, secrets: Secrets, rng: Random
) -> str:
    """The cluster that our data belongs to or, for a new replica, that of the controllers.

    Raises CannotStart, WrongDirectory.
    """
    found = read_identity(directory, str(options.data))
    if found is not None:
        return found.cluster
    dialer = TcpDialer(tls=options.tls, login=Node(options.member, secrets))
    client = ControllerClient(options.controllers, dialer, rng)
    try:
        await client.changes(0, 0.0, LEARN_SECONDS, limit=1)
    except ControllerUnavailable as error:
        raise CannotStart(f"which cluster is this? {error}; or name it with --cluster") from None
    finally:
        await dialer.close()
    return client.cluster
