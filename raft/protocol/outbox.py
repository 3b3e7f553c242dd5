"""What the core has for its driver until the next `Ready`, and which messages may leave before the write.

A replica speaks in a term only once its disk knows that term: a replica that crashes and falls
back to an older term may contradict whatever it said in the newer one. Every message therefore
takes one of three ways, and the parameter types name the kinds that each way carries:

    promise    a vote, an acknowledgement, a real campaign: always part of the `Write`, so it
               leaves after everything that was decided before it is durable
    send       adds no promise; leaves at once where the disk knows the term, else with the write
    ask        a pre-vote and its grant: they name a term that nobody has started, so they leave
               at once

`promise`, kind by kind:
  - RequestVote: a candidate that asks before its own term, vote and log are durable, and crashes,
    campaigns in the same term again. Votes of both rounds then count together: it leads one term
    twice, with two logs (Figure 2: "updated on stable storage before responding to RPCs" covers
    the candidate's vote for itself; thesis §3.8).
  - RequestVoteReply that grants, AppendReply for entries on their way to the disk (thesis §3.8).
An envelope keeps the term in which the core made it. Stamped with a newer term, an
acknowledgement would tell the new leader that a log matches which it never compared.

`send`, kind by kind, with what may go wrong in a term that the disk does not know:
  - AppendEntries, TimeoutNow, ReadIndexReply: only a leader sends them, and a leader's term is
    durable since it asked for votes. Entries may leave before the leader's own disk has them, for
    the leader counts itself only from its disk on (thesis §10.2.1).
  - ReadIndex: a question. Asked again where it is lost.
  - RequestVoteReply that refuses: no promise, but its term makes others follow that term.
  - AppendReply that refuses, or confirms what is on the disk already: back in the older term, an
    older leader could still truncate what this answer confirmed; the newer leader would ignore
    the follower's rejections from then on as outdated, and never repair its log.
  - InstallSnapshotReply: what it confirms is durable already. Its term matters as that of the
    AppendReply before: the leader counts the snapshot's index as matched.
"""

from __future__ import annotations

from collections.abc import Iterable

from shardkv.raft.protocol.messages import (
    AppendEntries,
    AppendReply,
    Envelope,
    InstallSnapshotReply,
    ReadIndex,
    ReadIndexReply,
    RequestVote,
    RequestVoteReply,
    TimeoutNow,
)
from shardkv.raft.protocol.ready import Ready, Write
from shardkv.raft.protocol.types import Entry, Index, NodeId, Term

Promise = RequestVote | RequestVoteReply | AppendReply
Statement = (
    AppendEntries
    | AppendReply
    | InstallSnapshotReply
    | RequestVoteReply
    | ReadIndex
    | ReadIndexReply
    | TimeoutNow
)
Question = RequestVote | RequestVoteReply


class Outbox:
    """One replica's work for its driver. `disk_term` is the term that its disk knows."""

    def __init__(self, id: NodeId, disk_term: Term) -> None:
        self._id = id
        self._disk_term = disk_term
        self._messages: list[Envelope] = []
        self._promises: list[Envelope] = []
        self._reads: list[tuple[int, Index]] = []
        self._failed_reads: list[int] = []
        self._snapshots_wanted: list[NodeId] = []
        self._snapshot_mail: list[Envelope] = []

    # ---- messages

    def promise(self, to: NodeId, term: Term, message: Promise) -> None:
        """Leaves once everything that was decided until now is durable."""
        self._promises.append(Envelope(self._id, to, term, message))

    def send(self, to: NodeId, term: Term, message: Statement) -> None:
        """Leaves at once if the disk knows `term`, else with the write that tells it."""
        assert not (isinstance(message, RequestVoteReply) and message.granted), "a vote is a promise"
        envelope = Envelope(self._id, to, term, message)
        (self._messages if self.is_known(term) else self._promises).append(envelope)

    def ask(self, to: NodeId, term: Term, message: Question) -> None:
        """A pre-vote, or its grant: `term` is the one that is asked about."""
        assert message.pre, "a real campaign rests on the disk"
        self._messages.append(Envelope(self._id, to, term, message))

    def is_known(self, term: Term) -> bool:
        """Whether the disk knows `term`, so that a statement in it leaves at once."""
        return term <= self._disk_term

    def disk_knows(self, term: Term) -> None:
        """A write that holds `term` is durable."""
        self._disk_term = max(self._disk_term, term)

    # ---- everything else

    def release_read(self, number: int, index: Index) -> None:
        self._reads.append((number, index))

    def fail_reads(self, numbers: Iterable[int]) -> None:
        self._failed_reads.extend(numbers)

    def want_snapshot(self, peer: NodeId) -> None:
        self._snapshots_wanted.append(peer)

    def pass_on(self, envelope: Envelope) -> None:
        """Snapshot mail that came in; the driver carries snapshots."""
        self._snapshot_mail.append(envelope)

    # ---- for `Raft.ready`

    @property
    def has_promises(self) -> bool:
        return bool(self._promises)

    def take_promises(self) -> tuple[Envelope, ...]:
        promises, self._promises = tuple(self._promises), []
        return promises

    def drain(self, write: Write | None, committed: tuple[Entry, ...]) -> Ready:
        """Everything since the last call. `write` holds the promises already."""
        messages, self._messages = self._messages, []
        if not (self._reads or self._failed_reads or self._snapshots_wanted or self._snapshot_mail):
            return Ready(tuple(messages), write, committed)  # most turns of a busy group
        ready = Ready(
            tuple(messages),
            write,
            committed,
            tuple(self._reads),
            tuple(self._failed_reads),
            tuple(self._snapshots_wanted),
            tuple(self._snapshot_mail),
        )
        self._reads.clear()
        self._failed_reads.clear()
        self._snapshots_wanted.clear()
        self._snapshot_mail.clear()
        return ready
