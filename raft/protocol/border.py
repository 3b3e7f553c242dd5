"""What a leader or a follower can tell about a message before it believes the message.

The codec has checked what a message says by itself (`codec.py`). Here a message is held against
what this replica knows for sure: its committed entries, who leads the term, what it has sent.
A message that contradicts that comes from a peer whose memory or disk is damaged. The message is
refused, and nothing changes; the peer is named in the log and counted. It must not stop this
replica, or one damaged peer would stop the whole group.

Why a refusal is safe: a leader whose entries contradict ours gets no acknowledgement from us, so
it cannot commit anything with our help, and CheckQuorum deposes it once a majority refuses it.
Of two leaders in one term, every follower keeps to the one that it heard first, so at most one of
the two reaches a quorum. If it is our own log that is wrong, we follow nobody, and so serve no
linearizable read.

What this replica itself believes is asserted where it could break, and does stop the replica.
"""

from __future__ import annotations

from typing import Protocol

from shardkv.raft.errors import PeerFault
from shardkv.raft.protocol.bounds import MAX_TERM_JUMP
from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.messages import (
    AppendEntries,
    AppendReply,
    Envelope,
    InstallSnapshot,
    InstallSnapshotReply,
)
from shardkv.raft.protocol.roles import Leader, Role
from shardkv.raft.protocol.types import NOBODY, Index, NodeId, Term


class Knowledge(Protocol):
    """What a replica knows for sure, which messages are held against. The core has all of it."""

    @property
    def term(self) -> Term: ...
    @property
    def term_leader(self) -> NodeId:
        """Who leads this term, as far as this replica heard; NOBODY if it did not."""

    @property
    def role(self) -> Role: ...
    @property
    def log(self) -> Log: ...
    @property
    def commit_index(self) -> Index: ...


def check(core: Knowledge, envelope: Envelope) -> None:
    """Raises PeerFault for a message that a sound peer cannot have sent to this replica."""
    message = envelope.message
    if core.term and envelope.term > core.term + MAX_TERM_JUMP:
        # Followed once, such a term leaves none above it, and the group could elect nobody ever again.
        raise PeerFault(envelope.sender, f"names term {envelope.term}; this replica is in term {core.term}")
    match message:
        case AppendEntries() | InstallSnapshot():
            if envelope.term == core.term and core.term_leader not in (NOBODY, envelope.sender):
                raise PeerFault(
                    envelope.sender, f"claims to lead term {core.term}, which replica {core.term_leader} leads"
                )
            if isinstance(message, AppendEntries) and envelope.term >= core.term:
                _check_committed(core, envelope.sender, message)
        case AppendReply() if envelope.term == core.term and isinstance(core.role, Leader):
            _check_reply(core, core.role, envelope.sender, message)
        case InstallSnapshotReply() if envelope.term == core.term and message.last_index > core.log.last_index:
            raise PeerFault(
                envelope.sender,
                f"answers for a snapshot at {message.last_index}; the log ends at {core.log.last_index}",
            )
        case _:
            pass


def _check_committed(core: Knowledge, sender: NodeId, message: AppendEntries) -> None:
    """Committed entries are equal everywhere (Leader Completeness, State Machine Safety)."""
    if message.prev_log_index >= core.commit_index:
        first = message.prev_log_index == core.commit_index
        claims = [(message.prev_log_index, message.prev_log_term)] if first else []
    else:
        claims = [(message.prev_log_index, message.prev_log_term)]
        claims += [(entry.index, entry.term) for entry in message.entries if entry.index <= core.commit_index]
    for index, term in claims:
        ours = core.log.term_at(index)
        if ours is not None and ours != term:
            raise PeerFault(sender, f"sends entry {index} of term {term}; committed is the one of term {ours}")


def _check_reply(core: Knowledge, leader: Leader, sender: NodeId, reply: AppendReply) -> None:
    """A follower's log cannot be ahead of its leader's, nor can it confirm or refuse what was never sent."""
    last = core.log.last_index
    if reply.match_index > last:
        raise PeerFault(
            sender, f"says that it stores entry {reply.match_index}; the leader's log ends at {last}"
        )
    if reply.rejected_index > last:
        raise PeerFault(sender, f"rejects entry {reply.rejected_index}; the leader's log ends at {last}")
    if reply.read_seq > leader.reads.seq:
        raise PeerFault(sender, f"confirms read round {reply.read_seq}; the newest is {leader.reads.seq}")
    if reply.conflict_index > reply.rejected_index or reply.conflict_term > core.term:
        raise PeerFault(
            sender,
            f"explains a rejection at {reply.rejected_index} with entry {reply.conflict_index}"
            f" of term {reply.conflict_term}",
        )
