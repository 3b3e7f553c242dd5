"""The three roles of Figure 4, each with the state that lives and dies with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from raft.progress import Progress
from raft.reads import FollowerReads, LeaderReads
from raft.types import NOBODY, Index, NodeId


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


Role = Follower | Candidate | Leader
