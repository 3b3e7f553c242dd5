"""What a leader sends one follower, and what that does to its log: entries as flow control allows, heartbeats, backing up (§5.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.membership import Memberships
from shardkv.raft.protocol.messages import AppendEntries, AppendReply
from shardkv.raft.protocol.progress import Mode, Progress
from shardkv.raft.protocol.ready import Options
from shardkv.raft.protocol.types import Entry, Index


def entries_for(
    peer: Progress, log: Log, options: Options, commit_index: Index, read_seq: int
) -> Iterator[AppendEntries]:
    """Appends to send now, noted in `peer` as sent. Turns it to SNAPSHOT where the log is compacted."""
    while peer.next_index <= log.last_index and peer.may_send(options.window_messages, options.window_bytes):
        prev_index = peer.next_index - 1
        prev_term = log.term_at(prev_index)
        if prev_term is None:
            if peer.may_get_snapshot:
                peer.become_snapshot(log.base_index)
            return
        entries = log.slice(peer.next_index, log.last_index + 1, options.max_append_bytes)
        peer.sent(entries[-1].index, sum(len(entry.data) for entry in entries))
        yield AppendEntries(prev_index, prev_term, entries, commit_index, read_seq)


def heartbeat_for(peer: Progress, log: Log, commit_index: Index, read_seq: int) -> AppendEntries:
    """An empty append. It also finds out whether the entries before it arrived."""
    prev_index = peer.next_index - 1
    prev_term = log.term_at(prev_index)
    if peer.mode is Mode.SNAPSHOT or prev_term is None:
        prev_index, prev_term = 0, 0  # matches everywhere: nothing is asked of the log
    return AppendEntries(prev_index, prev_term, (), commit_index, read_seq)


def take_in(entries: Sequence[Entry], log: Log, memberships: Memberships, commit_index: Index) -> None:
    """A follower's part: its log becomes the leader's, up to the last of `entries`.

    Only a conflict truncates: an old or repeated append must not cut entries that came
    after it (§5.3, Figure 2 step 3).
    """
    for position, entry in enumerate(entries):
        if log.term_at(entry.index) != entry.term:
            if entry.index <= log.last_index:
                assert entry.index > commit_index, "a committed entry conflicts with the leader's"
                log.truncate(entry.index)
                memberships.truncate(entry.index)
            log.append(entries[position:])
            memberships.extend(entries[position:])
            return


def back_up(peer: Progress, log: Log, message: AppendReply) -> None:
    """A follower's log differs: go back a term at a time, unless the rejection is old (§5.3)."""
    rejected = message.rejected_index
    if peer.mode is Mode.SNAPSHOT or rejected <= peer.match_index:
        return
    if peer.mode is Mode.PROBE and rejected != peer.next_index - 1:
        return
    if peer.mode is Mode.REPLICATE and rejected >= peer.next_index:
        return
    following = message.conflict_index
    if message.conflict_term:
        ours = log.last_index_of_term(message.conflict_term, rejected)
        if ours is not None:
            following = ours + 1
    peer.become_probe()
    peer.next_index = max(peer.match_index + 1, min(following, rejected))
