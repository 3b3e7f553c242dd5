"""Space on the disk: a group takes no more in before its disks are full, and goes on when there is space again. Pure.

    PLENTY   as usual
    LOW      less than the reserve is free: this replica asks not to lead, and says so to its leader;
             where a quorum is LOW the leader refuses what makes the state grow (`NoRoom`)
    FULL     less than a quarter of it: entries of the leader are not taken any more, as if lost

What a group needs to keep itself going (elections, changes of its members, handing shards
over, deletes) fits into the reserve. A disk that somebody else fills in one go still fails
an append: that stops the replica, as any failed append does. `space_watch.py` looks at the disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from enum import IntEnum
from typing import TYPE_CHECKING

from shardkv.raft.protocol.messages import AppendEntries, Envelope, InstallSnapshot
from shardkv.raft.protocol.quorum import has_quorum
from shardkv.raft.protocol.roles import Leader

if TYPE_CHECKING:
    from shardkv.raft.protocol.core import Raft


FULL_PART = 4  # FULL at this part of the reserve
MAX_LOST_LOG_BYTES = 256 << 20  # of log in a replica without a state, which cannot compact it (repair.py)


class Room(IntEnum):
    PLENTY = 0
    LOW = 1
    FULL = 2


def judge(free_bytes: int, reserve_bytes: int, before: Room) -> Room:
    """LOW and FULL end a tenth above where they begin, so that a replica does not flap."""

    def below(bound: int, was: bool) -> bool:
        return free_bytes < (bound + bound // 10 if was else bound)

    if below(reserve_bytes // FULL_PART, before is Room.FULL):
        return Room.FULL
    return Room.LOW if below(reserve_bytes, before is not Room.PLENTY) else Room.PLENTY


def has_room(core: Raft) -> bool:
    """Whether a quorum has room on its disks, as far as this leader was told."""
    room = {core.id: not core.low}
    if isinstance(core.role, Leader):
        room |= {node: not peer.low for node, peer in core.role.progress.items()}
    return has_quorum(core.membership, room)


def bearable(envelopes: Iterable[Envelope], core: Raft, room: Room) -> Iterable[Envelope]:
    """What a replica takes in: everything, unless its disk is FULL or it holds MAX_LOST_LOG_BYTES without a state.

    Then it hears the leader, but takes nothing for the disk or the log to keep. To the leader it is as
    if a network had lost the rest, and it sends that again. A snapshot is what ends the second case.
    """
    log_is_full = core.state_lost and core.log.size_bytes > MAX_LOST_LOG_BYTES
    return _without_load(envelopes, room is not Room.FULL) if log_is_full or room is Room.FULL else envelopes


def _without_load(envelopes: Iterable[Envelope], snapshots: bool) -> Iterable[Envelope]:
    for envelope in envelopes:
        match envelope.message:
            case AppendEntries(entries=entries) as append if entries:
                yield replace(envelope, message=replace(append, entries=()))
            case InstallSnapshot() if not snapshots:
                pass
            case _:
                yield envelope
