"""Looks at the space on a replica's disk again and again, and tells the replica; the rules are in `protocol/space.py`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from shardkv.raft.errors import RaftError
from shardkv.raft.protocol.roles import Leader
from shardkv.raft.protocol.space import Room, has_room, judge
from shardkv.raft.protocol.types import NOBODY

if TYPE_CHECKING:
    from shardkv.raft.replica import Replica

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.5


def has_room_for(replica: Replica, size: int) -> bool:
    """Whether it leads, a quorum's disks have room, and its own for so many bytes on top of its reserve."""
    spare = replica.node.spare_bytes
    return replica.is_leader and has_room(replica.core) and (spare is None or size <= spare)


async def watch(replica: Replica, free_bytes: Callable[[], Awaitable[int]], reserve_bytes: int) -> None:
    """Tell the replica, for as long as it runs, what room its disk has."""
    while not replica.node.stopped:
        try:
            free = await free_bytes()
        except OSError as error:
            log.warning("cannot learn how much space is free on the disk: %s", error)
        else:
            replica.node.spare_bytes = free - reserve_bytes
            _note(replica, free, judge(free, reserve_bytes, replica.node.room))
        await asyncio.sleep(WATCH_SECONDS)


def _note(replica: Replica, free_bytes: int, room: Room) -> None:
    """This is the room that there is now. A leader without lets another lead that has some."""
    node = replica.node
    if room is not node.room:
        level = logging.WARNING if room > node.room else logging.INFO
        log.log(level, "replica %d: room on the disk is %s, %d bytes", replica.core.id, room.name, free_bytes)
    node.note_room(room, free_bytes)
    role = replica.core.role
    if room is Room.PLENTY or not isinstance(role, Leader) or role.transfer_to != NOBODY:
        return
    heirs = role.heirs(replica.core.membership)
    roomy = [peer for peer in heirs if not role.progress[peer].low and role.progress[peer].recently_active]
    if roomy:
        try:
            node.transfer(max(roomy, key=lambda peer: role.progress[peer].match_index))
        except RaftError as error:
            log.info("the leadership could not be handed over: %s", error)  # until the next look
