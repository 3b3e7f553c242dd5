"""The three roles of Figure 4, each with the state that lives and dies with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import assert_never

from shardkv.raft.protocol.progress import Progress
from shardkv.raft.protocol.quorum import Membership, has_quorum
from shardkv.raft.protocol.reads import FollowerReads, LeaderReads, Ticket, lease_start
from shardkv.raft.protocol.types import NOBODY, Index, NodeId


@dataclass(slots=True)
class Follower:
    leader: NodeId = NOBODY
    reads: FollowerReads = field(default_factory=FollowerReads)


@dataclass(slots=True)
class Candidate:
    """Also the pre-candidate: `pre` asks whether an election would succeed (thesis §9.6)."""

    pre: bool
    votes: dict[NodeId, bool] = field(default_factory=dict)


@dataclass(slots=True)
class Leader:
    """State that lives and dies with one leadership."""

    progress: dict[NodeId, Progress]
    term_start: Index  # the no-op: once committed, the commit index is known to be current (§8)
    reads: LeaderReads = field(default_factory=LeaderReads)
    uncommitted_bytes: int = 0
    transfer_to: NodeId = NOBODY
    lease_forfeited: bool = False  # a transfer began: TimeoutNow lets a candidate pass our lease

    def heirs(self, membership: Membership) -> list[NodeId]:
        """The voters that could take this leader's place: not those whose state is damaged."""
        return [n for n, peer in self.progress.items() if n in membership.voters and not peer.state_lost]


Role = Follower | Candidate | Leader


def waiting_reads(role: Role) -> list[Ticket]:
    """The reads that wait in this role, for a round or for the leader's answer."""
    match role:
        case Leader(reads=leader_reads):
            return leader_reads.out + leader_reads.waiting
        case Follower(reads=reads):
            return reads.everything()
        case Candidate():
            return []
        case _ as never:
            assert_never(never)


def lease_holds(leader: Leader, id: NodeId, membership: Membership, now: float, seconds: float) -> bool:
    """Whether nobody else can lead now: a quorum confirmed a round that was sent less than `seconds` ago."""
    if seconds <= 0 or leader.lease_forfeited:
        return False
    confirmed_at = {node: peer.confirmed_at for node, peer in leader.progress.items()} | {id: now}
    start = lease_start(membership, confirmed_at)
    return start > 0 and now < start + seconds  # 0: some majority has confirmed nothing yet


def successor(leader: Leader, membership: Membership) -> NodeId:
    """Who should lead in place of this leader: the voter that stores most. NOBODY where the others are no quorum."""
    active = {node: peer.recently_active for node, peer in leader.progress.items()}
    if not has_quorum(membership, active):
        return NOBODY  # they could elect nobody without us
    heirs = [node for node in leader.heirs(membership) if active[node]]
    return max(heirs, key=lambda node: leader.progress[node].match_index, default=NOBODY)
