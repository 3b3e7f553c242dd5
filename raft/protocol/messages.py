"""What replicas say to one another: one frozen type a message, each with the reason it exists.

Every message may be lost, delayed, repeated or reordered. The sender, the
receiver and the sender's term travel in the `Envelope`, once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardkv.raft.protocol.types import Entry, Index, NodeId, Term


@dataclass(frozen=True, slots=True)
class RequestVote:
    """Asks for a vote (§5.2), or, with `pre`, whether a vote would be given (thesis §9.6).

    A pre-vote is asked for the term the sender *would* start, and changes no
    state at the receiver: a replica that was cut off cannot push terms up.
    `transfer` marks a campaign its leader asked for (TimeoutNow): receivers
    answer although they hear from a live leader (thesis §4.2.3).
    """

    pre: bool
    last_log_index: Index
    last_log_term: Term
    transfer: bool = False


@dataclass(frozen=True, slots=True)
class RequestVoteReply:
    """A vote, or a refusal. `pre` tells the two kinds of round apart."""

    pre: bool
    granted: bool


@dataclass(frozen=True, slots=True)
class AppendEntries:
    """Replicates entries, carries the commit index, and, empty, is the heartbeat (§5.2, §5.3).

    `read_seq` is the newest read round of the leader; a follower that answers
    confirms the leadership for every read up to it (thesis §6.4).
    """

    prev_log_index: Index
    prev_log_term: Term
    entries: tuple[Entry, ...]
    leader_commit: Index
    read_seq: int


@dataclass(frozen=True, slots=True)
class AppendReply:
    """How far the follower's *disk* matches the leader's log, or where it conflicts.

    `success`: everything up to `match_index` is durable and equal. Otherwise
    `rejected_index` repeats the prev_log_index that did not match, and
    (`conflict_term`, `conflict_index`) name the follower's term there and where
    that term begins, so that one round skips a whole term (§5.3, last part).
    """

    success: bool
    match_index: Index
    read_seq: int
    rejected_index: Index = 0
    conflict_term: Term = 0
    conflict_index: Index = 0
    low: bool = False  # the follower's disk has little room: space.py
    state_lost: bool = False  # the follower's state machine is damaged: it needs a snapshot, its log may match


@dataclass(frozen=True, slots=True)
class InstallSnapshot:
    """One chunk of a snapshot for a follower whose next entry is compacted away (§7, Figure 13)."""

    last_index: Index
    last_term: Term
    total: int  # bytes in the whole snapshot
    offset: int
    data: bytes
    crc: int  # CRC32C of `data`; end-to-end, from the sender's disk to the receiver's
    stream: int = 0  # which sending of which sender: two senders' snapshots at one index differ in their bytes


@dataclass(frozen=True, slots=True)
class InstallSnapshotReply:
    """Which byte of which stream the follower wants next; `done` once it is installed or not needed.

    `offset` at the snapshot's end, without `done`: the follower has all of it and is reading it through.

    `chunk_offset` names the chunk that this answers. The leader goes on at the answer to
    the chunk that is out, and at no other: were each repeated answer to make a chunk, and
    each chunk an answer, a network that repeats would soon carry nothing else.
    """

    last_index: Index
    chunk_offset: int
    offset: int
    done: bool
    stream: int = 0


@dataclass(frozen=True, slots=True)
class ReadIndex:
    """A follower asks its leader how far it must have applied to answer `seq` (thesis §6.4)."""

    seq: int


@dataclass(frozen=True, slots=True)
class ReadIndexReply:
    """The leader was the leader after `seq` was asked, and `index` was committed by then."""

    seq: int
    index: Index


@dataclass(frozen=True, slots=True)
class TimeoutNow:
    """The leader hands over: the receiver, which is caught up, campaigns at once (thesis §3.10)."""


Message = (
    RequestVote
    | RequestVoteReply
    | AppendEntries
    | AppendReply
    | InstallSnapshot
    | InstallSnapshotReply
    | ReadIndex
    | ReadIndexReply
    | TimeoutNow
)


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message with its address. `term` is the sender's, but a pre-vote's is the one it asks for.

    The incarnations are those of the mail that it came in (`raft/incarnations.py`): of the sender's
    disk, and of the receiver's as the sender's log knows it. 0: not said.
    """

    sender: NodeId
    to: NodeId
    term: Term
    message: Message
    incarnation: int = 0
    to_incarnation: int = 0
