"""Which process of a cluster a certificate is for: a URI in it, `shardkv://CLUSTER/group/G/replica/N`.

Group 0 is the controller. Without the last part the certificate is for every replica of the group,
without both for every process of the cluster: convenient for a trial, and one stolen key is then every
process's. A certificate without such a URI is a user's, whatever its subject says. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_URI = re.compile(r"shardkv://([^/\s]{1,128})(?:/group/(\d{1,19})(?:/replica/(\d{1,19}))?)?")


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a cluster: replica `replica` of group `group`."""

    cluster: str
    group: int
    replica: int

    def __str__(self) -> str:
        return f"replica {self.replica} of group {self.group} of cluster {self.cluster!r}"


@dataclass(frozen=True, slots=True)
class NodeName:
    """What one URI covers; None: all of them."""

    cluster: str
    group: int | None = None
    replica: int | None = None

    def covers(self, member: Member) -> bool:
        return (
            self.cluster == member.cluster
            and self.group in (None, member.group)
            and self.replica in (None, member.replica)
        )

    @property
    def uri(self) -> str:
        group = "" if self.group is None else f"/group/{self.group}"
        replica = "" if self.replica is None else f"/replica/{self.replica}"
        return f"shardkv://{self.cluster}{group}{replica}"

    @classmethod
    def parse(cls, uri: str) -> NodeName | None:
        """None for a URI that names no process of ours."""
        found = _URI.fullmatch(uri)
        if found is None:
            return None
        cluster, group, replica = found.groups()
        return cls(cluster, int(group) if group else None, int(replica) if replica else None)


def names_in(certificate: Mapping[str, Any] | None) -> tuple[NodeName, ...]:
    """The processes that a certificate (as `ssl.SSLSocket.getpeercert` shows it) is for; none: it is a user's."""
    alternatives = (certificate or {}).get("subjectAltName", ())
    names = (NodeName.parse(value) for kind, value in alternatives if kind == "URI")
    return tuple(name for name in names if name is not None)


def is_for(certificate: Mapping[str, Any] | None, member: Member) -> bool:
    return any(name.covers(member) for name in names_in(certificate))


def common_name(certificate: Mapping[str, Any] | None) -> str:
    """The user that a certificate is for; empty if it is a process's, or there is none."""
    if names_in(certificate):
        return ""
    subject = {kind: value for group in (certificate or {}).get("subject", ()) for kind, value in group}
    return str(subject.get("commonName", ""))
