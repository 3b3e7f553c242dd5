"""What a replica tells of itself: for `admin status` as a dictionary, for metrics as figures.

Nothing outside of this package looks into the core of a replica: who wants to know more, adds it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardkv.raft.protocol.roles import Leader
from shardkv.raft.protocol.types import Index, NodeId, Term
from shardkv.raft.replica import Replica


@dataclass(frozen=True, slots=True)
class Figures:
    """The state of a replica's Raft at one moment."""

    term: Term
    is_leader: bool
    has_leader: bool
    commit_index: Index
    log_entries: int
    log_bytes: int
    unsynced_entries: int  # in the log, and not on this disk yet
    uncommitted_bytes: int | None  # proposed and not yet committed; None on a follower
    followers: Mapping[
        NodeId, tuple[int, bool]
    ]  # entries yet to store, and whether heard from lately; empty on a follower
    state_lost: bool  # the state is damaged and being repaired


def figures(replica: Replica) -> Figures:
    core = replica.core
    log, leader = core.log, core.role if isinstance(core.role, Leader) else None
    progress = leader.progress if leader is not None else {}
    return Figures(
        term=core.term,
        is_leader=core.is_leader,
        has_leader=core.leader != 0,
        commit_index=core.commit_index,
        log_entries=log.last_index - log.base_index,
        log_bytes=log.size_bytes,
        unsynced_entries=log.last_index - log.durable_index,
        uncommitted_bytes=leader.uncommitted_bytes if leader is not None else None,
        followers={n: (log.last_index - p.match_index, p.recently_active) for n, p in progress.items()},
        state_lost=core.state_lost,
    )


def status(replica: Replica) -> dict[str, object]:
    """What `admin status` shows of a replica of either service."""
    core = replica.core
    return {
        "replica": core.id,
        "role": "leader" if replica.is_leader else "follower",
        "leader": replica.leader_address,
        "term": core.term,
        "members": replica.members,
        "disks": replica.disks,
        "commit_index": core.commit_index,
        "applied_index": replica.machine.applied.index,
        "log_bytes": core.log.size_bytes,
        "wall_ms": replica.wall_ms(),
        "room": replica.node.room.name,
        "disk": replica.node.disk,
        "free_bytes": replica.node.free_bytes,
        "damage": replica.damage_status(),
        "log_cut": replica.log_cut,
    }


def settled_voters(replica: Replica) -> tuple[str, ...]:
    """Where the voters listen, in the order of their numbers; empty while the membership is about to change."""
    core = replica.core
    if core.membership.is_joint or core.memberships.index > core.commit_index:
        return ()
    return voters(replica)


def voters(replica: Replica) -> tuple[str, ...]:
    """Where the voters listen, in the order of their numbers."""
    return _addresses(replica, replica.core.membership.voters)


def everybody(replica: Replica) -> tuple[str, ...]:
    """Where voters, learners and those on their way out listen."""
    membership = replica.core.membership
    return _addresses(replica, membership.voters | membership.outgoing | membership.learners)


def _addresses(replica: Replica, nodes: frozenset[NodeId]) -> tuple[str, ...]:
    known = replica.core.membership.addresses
    return tuple(known[node] for node in sorted(nodes))
