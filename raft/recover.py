"""Going on with one replica after the group has lost its quorum for good. Unsafe, and the last resort.

The replica's own log says from here on that it alone votes. Whatever the lost majority had
committed and not told it is gone, and what it had not yet committed itself becomes so. The
others must never start again on their old data: they might still be a majority of the old
group. (etcd calls this --force-new-cluster, CockroachDB "unsafe recovery".)
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from shardkv.raft.interfaces import Directory
from shardkv.raft.protocol.membership import Memberships
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.types import Entry, HardState, Index, Kind, NodeId, SnapshotMeta
from shardkv.raft.replica import entries_that_hold
from shardkv.raft.wal import open_wal


async def make_alone(
    directory: Directory,
    rng: Random,
    id: NodeId,
    incarnation: int,
    address: str,
    applied: SnapshotMeta,
    known: Membership,
) -> tuple[Index, Membership]:
    """Append to the log of a stopped replica that it is the only voter.

    `incarnation` is that of its disk, `applied` is where its state machine is, and `known` the
    membership that that has. An empty `address` is the one that the group knew it by. Returns the index of the entry, and who the
    members were. Raises StorageError; ValueError where no address is known.
    """
    wal, recovered = await open_wal(directory, rng)
    try:
        entries = await entries_that_hold(wal, recovered, applied)
        before = Memberships(applied.index, known, entries).current
        address = address or before.addresses.get(id, "")
        if not address:
            raise ValueError("the log does not say where this replica listens")
        # A term that nobody else has led: an entry of the same index and an old term might be elsewhere.
        newest = entries[-1].term if entries else applied.term
        term = max(recovered.hard_state.term, newest, applied.term) + 1
        alone = replace(Membership.of({id: address}), incarnations={id: incarnation})
        entry = Entry(recovered.last_index + 1, term, Kind.MEMBERSHIP, alone.encode())
        await wal.append(HardState(term, id), [entry])
        return entry.index, before
    finally:
        wal.close()
