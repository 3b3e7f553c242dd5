"""Opens a replica, whatever state its state machine is in: as usual, or empty and to be repaired by its peers.

A replica that meets damage in its state machine stops at once, since whatever it read beside the
damage may be wrong. It notes the damage (`damage.py`), and starts afresh through here:

    1  the damage is noted       no start trusts the state any more
    2  the state is set aside    renamed, and noted again: what is there from now on is new
    3  the replica opens with an empty state machine, and its log and hard state as they were
    4  it says in its append replies that its state is lost, and its leader sends a snapshot
    5  the snapshot is in: the repair is noted, and the files that were set aside are removed

A crash anywhere in between goes on from the last of these. Step 3 breaks no promise, because the
promises (term, vote, entries acknowledged) are in the log's files alone, which have checksums of
their own. Where the log begins at its first entry, it has all that the state had: the replica
applies its log again, and needs nobody.

A damaged log is another matter: promises are lost with it. `open_wal` refuses it by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from random import Random
from typing import Protocol

from shardkv.raft.damage import DamageBook
from shardkv.raft.errors import DamagedState, StorageError
from shardkv.raft.incarnations import KnownDisks
from shardkv.raft.interfaces import Directory, Transport
from shardkv.raft.machine import StateMachine
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.types import NodeId
from shardkv.raft.replica import Replica, ReplicaOptions, open_replica

log = logging.getLogger(__name__)


class StateStore(Protocol):
    """Where a replica's state machine is on the disk."""

    def open(self) -> StateMachine:
        """Raises DamagedState; StorageError where nothing can be repaired."""

    async def set_aside(self) -> None:
        """Rename the state's files out of the way, durably.

        Files that were set aside before stay, and those of now go: until a repair has ended,
        the older ones may be all that is left of the state.
        """

    async def drop_aside(self) -> None:
        """Remove what was set aside."""


async def note_damage(directory: Directory, error: DamagedState, now_ms: int) -> float:
    """A running replica met damage and has stopped: the next start must know.

    Returns how many seconds to wait before that. Raises OSError.
    """
    book, _ = _load(directory)
    await book.note_found(error, now_ms)
    return book.pause_seconds(now_ms)


async def open_or_repair(
    id: NodeId,
    bootstrap: Membership,
    directory: Directory,
    transport: Transport,
    store: StateStore,
    rng: Random,
    clock_ms: Callable[[], int],
    options: ReplicaOptions,
    disks: KnownDisks | None = None,
) -> Replica:
    """See `open_replica`. Raises StorageError, also where an empty state is damaged as well."""
    book, damage = _load(directory)
    for _ in range(2):
        if damage is not None:
            log.critical("replica %d: %s; to be repaired from the other replicas", id, damage)
            await book.note_found(damage, clock_ms())
        if book.present is not None and not book.present.set_aside:
            await store.set_aside()
            await book.note_set_aside()
        try:
            replica = await _open(
                id, bootstrap, directory, transport, store, rng, clock_ms, options, book, disks
            )
        except DamagedState as error:
            damage = error
            continue
        return replica
    raise StorageError(f"{damage}, in a state that was just begun: the disk itself is not to be trusted")


def _load(directory: Directory) -> tuple[DamageBook, DamagedState | None]:
    """The damage book. Where that is damaged itself, nobody knows what it said: the state counts as damaged."""
    try:
        return DamageBook.load(directory), None
    except DamagedState as error:
        return DamageBook(directory), error


async def _open(
    id: NodeId,
    bootstrap: Membership,
    directory: Directory,
    transport: Transport,
    store: StateStore,
    rng: Random,
    clock_ms: Callable[[], int],
    options: ReplicaOptions,
    book: DamageBook,
    disks: KnownDisks | None,
) -> Replica:
    lost = book.present is not None
    machine = store.open()

    async def repaired(source: NodeId) -> None:
        await book.note_repaired(clock_ms(), source)
        await store.drop_aside()
        log.warning(
            "replica %d: its state is repaired, from %s", id, f"replica {source}" if source else "its log"
        )

    try:
        replica = await open_replica(
            id, bootstrap, directory, transport, machine, rng, clock_ms, options, disks, lost
        )
    except BaseException:
        machine.close()
        raise
    replica.damage = book
    try:
        if replica.core.state_lost:
            replica.on_repaired = repaired
        elif lost:
            await repaired(0)  # a snapshot came in before the last crash, or the log has everything
        else:
            await store.drop_aside()  # a crash came between the two steps of `repaired`
    except BaseException:
        await replica.stop()
        raise
    return replica
