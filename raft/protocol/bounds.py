"""What a message must satisfy by itself, whoever sent it: checked by the codec, before anything believes it.

Numbers are bounded so that whatever is computed from them still fits the log's 64 bits on disk.
The order of terms within one message is checked, since the log asserts it. Each entry is held
against its checksum: damage in a peer's memory, or on the way, ends here, before our own disk.
"""

from __future__ import annotations

from typing import assert_never

from shardkv.raft.protocol.messages import (
    AppendEntries,
    AppendReply,
    Envelope,
    InstallSnapshot,
    InstallSnapshotReply,
    ReadIndex,
    ReadIndexReply,
    RequestVote,
    RequestVoteReply,
    TimeoutNow,
)
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.types import MAX_NODE, Kind

MAX_NUMBER = (1 << 62) - 1  # terms, indexes, rounds, sizes and offsets
MAX_TERM_JUMP = 1 << 32  # of a message against our own term; elections take a second each
MAX_MEMBERS = 64


def flaw(envelope: Envelope) -> str | None:
    """Why no sound replica sends `envelope`; None if one may."""
    if not 0 < envelope.sender <= MAX_NODE or not 0 < envelope.to <= MAX_NODE:
        return f"mail from replica {envelope.sender} to {envelope.to}: replicas are numbered from 1"
    if envelope.term > MAX_NUMBER:
        return f"term {envelope.term} is out of bounds"
    message, term = envelope.message, envelope.term
    numbers: tuple[int, ...] = ()
    match message:
        case AppendEntries():
            return _append_flaw(message, term)
        case AppendReply():
            numbers = (message.match_index, message.read_seq, message.rejected_index, message.conflict_index)
            if message.conflict_term > term:
                return f"a reply of term {term} about an entry of term {message.conflict_term}"
        case RequestVote():
            numbers = (message.last_log_index,)
            if message.last_log_term >= term:
                return f"a candidate for term {term} with an entry of term {message.last_log_term}"
            if (message.last_log_index == 0) != (message.last_log_term == 0):
                return f"a last entry {message.last_log_index} of term {message.last_log_term}"
        case InstallSnapshot():
            numbers = (message.last_index, message.total, message.offset)
            if not 0 < message.last_term <= term or not message.last_index:
                return f"a snapshot at {message.last_index} of term {message.last_term}, sent in term {term}"
            if message.offset + len(message.data) > message.total:
                return f"a chunk of {len(message.data)} bytes at {message.offset} of {message.total}"
        case InstallSnapshotReply():
            numbers = (message.last_index, message.chunk_offset, message.offset)
        case ReadIndex():
            numbers = (message.seq,)
        case ReadIndexReply():
            numbers = (message.seq, message.index)
        case RequestVoteReply() | TimeoutNow():
            pass
        case _ as never:
            assert_never(never)
    if numbers and max(numbers) > MAX_NUMBER:
        return f"a number out of bounds: {max(numbers)}"
    return None


def _append_flaw(message: AppendEntries, term: int) -> str | None:
    numbers = (message.prev_log_index, message.prev_log_term, message.leader_commit, message.read_seq)
    if max(numbers) > MAX_NUMBER:
        return f"a number out of bounds: {max(numbers)}"
    if message.prev_log_term > term or (message.prev_log_index == 0) != (message.prev_log_term == 0):
        return f"a previous entry {message.prev_log_index} of term {message.prev_log_term}, sent in term {term}"
    before = message.prev_log_term
    for offset, entry in enumerate(message.entries, 1):
        if entry.index != message.prev_log_index + offset:
            return "entries that do not follow one another"
        if not before <= entry.term <= term or not entry.term:
            return f"entry {entry.index} of term {entry.term} after one of term {before}, sent in term {term}"
        if not entry.is_whole():
            return f"entry {entry.index} does not match its checksum"
        if entry.kind is Kind.MEMBERSHIP:
            why = _membership_flaw(entry.data)
            if why:
                return f"entry {entry.index}: {why}"
        before = entry.term
    return None


def _membership_flaw(data: bytes) -> str | None:
    try:
        membership = Membership.decode(data)
    except ValueError as error:
        return str(error)
    everyone = membership.everyone()
    if not membership.voters or len(everyone) > MAX_MEMBERS:
        return f"a membership of {len(everyone)} replicas, {len(membership.voters)} of them voters"
    return None
