"""What the servers of both services answer alike: a replica's refusals, and changes of the group's members."""

from __future__ import annotations

import asyncio

from shardkv.raft.errors import Busy, Lost, NoRoom, NotLeader, OutcomeUnknown, RaftError, Stopped, Transferring
from shardkv.raft.reconfigure import reconfigure
from shardkv.raft.replica import Replica
from shardkv.wire.bounded_json import parse_json
from shardkv.wire.calls import Code, answer, refuse

MAX_MEMBERS_BYTES = 1 << 20  # of a request to change the members
MEMBERS_SECONDS = 30.0  # one attempt at a change of the membership


def refusal_of(error: RaftError, replica: Replica) -> bytes:
    """How a server tells a client that its replica did not, or may not have, done it."""
    match error:
        case NotLeader():
            return refuse(Code.NOT_LEADER, replica.leader_address)
        case Busy():
            return refuse(Code.BUSY, str(error))
        case NoRoom():
            return refuse(Code.NO_ROOM, str(error))
        case Lost() | OutcomeUnknown() | Transferring():
            return refuse(Code.RETRY, str(error))
        case Stopped():
            return refuse(Code.STOPPED, str(error))
        case _:
            raise error


def _members(fields: object) -> dict[int, str]:
    """Raises ValueError."""
    if not isinstance(fields, dict) or not all(isinstance(address, str) for address in fields.values()):
        raise ValueError("members are replica numbers to addresses")
    return {int(node): address for node, address in fields.items()}


async def change_members(replica: Replica, payload: bytes) -> bytes:
    """Have those in `payload` be the members: JSON of "voters" and "learners", replica numbers to addresses.

    "disks", the incarnations (hex) that some of them are to have, may be left out. Asked again, it goes on from where the group is. Raises RaftError, ValueError.
    """
    fields = parse_json(payload, MAX_MEMBERS_BYTES)
    if not isinstance(fields, dict) or not isinstance(fields.get("voters"), dict):
        raise ValueError("members are voters and learners")
    voters, learners = _members(fields["voters"]), _members(fields.get("learners", {}))
    disks = {node: int(disk, 16) for node, disk in _members(fields.get("disks", {})).items()}
    if not disks.keys() <= voters.keys() | learners.keys():
        raise ValueError("disks are those of members")
    try:
        async with asyncio.timeout(MEMBERS_SECONDS):
            await reconfigure(replica, voters, learners, disks)
    except TimeoutError:
        return refuse(Code.BUSY, "the change is still under way; ask again")
    return answer(replica.core.membership.encode())
