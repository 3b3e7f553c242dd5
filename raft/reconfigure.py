"""Leading a group to other voters: newcomers learn first, then all change at once (thesis §4.2.1, §4.3).

Every step is an entry in the log, so this may be cut off anywhere and begun anew, by
another leader too: it looks at where the group is and goes on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import replace

from shardkv.raft.errors import NotLeader, RaftError
from shardkv.raft.protocol.progress import Mode
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.roles import Leader
from shardkv.raft.protocol.types import NodeId
from shardkv.raft.replica import Replica

LEARNER_LAG = 64  # entries that a learner may be behind when it becomes a voter


async def reconfigure(
    replica: Replica,
    voters: Mapping[NodeId, str],
    learners: Mapping[NodeId, str] | None = None,
    disks: Mapping[NodeId, int] | None = None,
) -> None:
    """Return once exactly `voters` (to their addresses) vote in this group, `learners` learn, and nobody else is in it.

    `disks` are the incarnations that some of them are to have. A member that has another one is
    taken out first, and let in again, under its number, once that is committed: from then on no
    quorum counts the old disk, and whoever still counts it drops the mail of the new one.

    Takes as long as newcomers need to catch up: give it a time limit. Raises NotLeader,
    also when this leader is to go and has handed over (if all go, it leads to the end);
    Stopped; ValueError for no voters.
    """
    if not voters:
        raise ValueError("a group needs a voter")
    staying = learners or {}
    everybody = {**voters, **staying}
    if len(everybody) < len(voters) + len(staying):
        raise ValueError("a replica votes or learns, not both")
    core = replica.core
    while True:
        replica.check_running()
        if not isinstance(core.role, Leader):
            raise NotLeader(core.leader)
        current = core.membership
        settled = not current.is_joint and core.memberships.index <= core.commit_index
        if settled and current.voters & staying.keys():
            raise ValueError(
                "a replica that votes does not become a learner: take it out, and let a new one in"
            )
        if settled and core.commit_index >= core.role.term_start:
            others = frozenset(
                node for node, disk in (disks or {}).items() if current.incarnations.get(node, disk) != disk
            )
            unknown = frozenset(
                node for node in disks or {} if current.is_member(node) and node not in current.incarnations
            )
            if gone := others | unknown:
                _take_out(replica, core.role, gone)
                await replica.next_turn()
                continue
            if current.voters == voters.keys() and current.learners == staying.keys():
                if all(current.addresses.get(node) == address for node, address in everybody.items()):
                    return
                replica.node.change_membership(replace(current, addresses=everybody))  # some have moved
                await replica.next_turn()
                continue
            newcomers = frozenset(voters) - current.voters
            learning = newcomers | staying.keys()
            heirs = voters.keys() & set(core.role.heirs(current))
            if core.id not in voters and heirs:
                _hand_over(replica, core.role, heirs)
            elif not learning <= current.learners:
                # Beside those that learn already for another change: that one may have been given up.
                replica.node.change_membership(
                    Membership(
                        current.voters,
                        frozenset(),
                        learning,
                        {**current.addresses, **everybody},
                        {node: disk for node, disk in (disks or {}).items() if node in learning},
                    )
                )
            elif any(node in voters and peer.state_lost for node, peer in core.role.progress.items()):
                pass  # being repaired: were we to go now, nobody might be left that has the state
            elif all(_has_caught_up(core.role, node, core.commit_index) for node in newcomers):
                replica.node.change_membership(
                    Membership(frozenset(voters), frozenset(), frozenset(staying), everybody)
                )
        await replica.next_turn()


def _take_out(replica: Replica, leader: Leader, gone: frozenset[NodeId]) -> None:
    """Their disks are not those that the group knows, or it knows none. Raises ValueError where nobody would be left."""
    rest = replica.core.membership.without(gone)
    if not rest.voters:
        raise ValueError("no voter would be left while the disk is replaced")
    if replica.core.id in gone:
        _hand_over(replica, leader, rest.voters)
    else:
        replica.node.change_membership(rest)


async def hand_over(replica: Replica, seconds: float) -> None:
    """If this replica leads, let another: before it stops, so that the group need not find out.

    Returns once that has happened, or when `seconds` are over: then the group elects a
    leader by itself.
    """
    core = replica.core
    with suppress(TimeoutError, RaftError):
        async with asyncio.timeout(seconds):
            while isinstance(core.role, Leader) and (heirs := set(core.role.heirs(core.membership))):
                _hand_over(replica, core.role, heirs)
                await replica.next_turn()


def _has_caught_up(leader: Leader, node: NodeId, commit_index: int) -> bool:
    progress = leader.progress[node]
    return progress.mode is Mode.REPLICATE and progress.match_index + LEARNER_LAG >= commit_index


def transfer(replica: Replica, to: NodeId) -> None:
    """Have `to` lead, or whoever has most of the log if `to` is 0. Raises NotLeader."""
    if not to:
        role = replica.core.role
        if not isinstance(role, Leader):
            raise NotLeader(replica.leader)
        heirs = role.heirs(replica.core.membership)
        to = max(heirs, key=lambda node: role.progress[node].match_index, default=0)
    replica.node.transfer(to)


def _hand_over(replica: Replica, leader: Leader, heirs: Set[NodeId]) -> None:
    """A leader that is to go lets one that stays lead first: no gap while the others find out."""
    if leader.transfer_to not in heirs:
        replica.node.transfer(max(sorted(heirs), key=lambda node: leader.progress[node].match_index))
