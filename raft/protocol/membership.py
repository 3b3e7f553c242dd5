"""Which membership is in force: the newest in the log, committed or not (thesis §4.1).

Entries of kind MEMBERSHIP take effect when they are appended, and lose it when they
are truncated. Below the log's base the state machine knows: it stores the newest
membership that it has applied, and hands it on in snapshots.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.types import Entry, Index, Kind, NodeId


class Memberships:
    """The memberships of a log, each from its index on. The first is what held before them."""

    def __init__(self, index: Index, membership: Membership, entries: Iterable[Entry] = ()) -> None:
        self._history = [(index, membership)]
        self.current = membership  # the newest: asked for by every message
        self.extend(entries)

    @property
    def index(self) -> Index:
        """The entry that the current one came with; at or below the log's base if it is older."""
        return self._history[-1][0]

    def may_campaign(self, node: NodeId, commit_index: Index) -> bool:
        """Whether `node` votes now, or does unless what is not known to be committed holds.

        A replica that the newest membership leaves out may be the only one that has the
        log to lead with, until that membership is committed (thesis §4.2.2, Figure 4.6).
        """
        for index, membership in reversed(self._history):
            if membership.is_voter(node):
                return True
            if index <= commit_index:
                return False
        return False

    def extend(self, entries: Iterable[Entry]) -> bool:
        """These were appended to the log. Whether they changed the membership."""
        before = len(self._history)
        for entry in entries:
            if entry.kind is Kind.MEMBERSHIP and entry.index > self.index:
                self.current = Membership.decode(entry.data)
                self._history.append((entry.index, self.current))
        return len(self._history) > before

    def truncate(self, index: Index) -> bool:
        """The log from `index` on is gone: what it said no longer holds."""
        before = len(self._history)
        while len(self._history) > 1 and self._history[-1][0] >= index:
            self._history.pop()
        self.current = self._history[-1][1]
        return len(self._history) < before

    def compact(self, index: Index) -> None:
        """The log up to `index` is gone into the state machine."""
        while len(self._history) > 1 and self._history[1][0] <= index:
            del self._history[0]

    def restore(self, index: Index, membership: Membership) -> None:
        """The state machine is a snapshot at `index`; what the log says beyond still holds."""
        self._history = [(index, membership), *(item for item in self._history if item[0] > index)]
        self.current = self._history[-1][1]


def first_step(current: Membership, target: Membership) -> Membership:
    """What to append to get from `current` to `target`: itself, or the joint membership on the way.

    What the log knows of the members' disks is kept. Raises ValueError for a voter that was no
    learner, for a group without voters, or for another disk under the number of a member: the
    old disk's votes and the new one's would count as one replica's, so it has to be out first.
    """
    if target.is_joint or not target.voters:
        raise ValueError("a change leads to a plain membership with voters")
    strangers = target.voters - current.voters - current.learners
    if strangers:
        raise ValueError(f"replicas {sorted(strangers)} would vote without having been learners")
    for node in sorted(target.incarnations.keys() & current.incarnations.keys()):
        if target.incarnations[node] != current.incarnations[node]:
            raise ValueError(f"replica {node} is a member with another disk: it has to be taken out first")
    incarnations = {**current.incarnations, **target.incarnations}
    addresses = {**current.addresses, **target.addresses}
    if target.voters == current.voters:
        return replace(target, incarnations=incarnations).members_only()
    return Membership(target.voters, current.voters, target.learners - current.voters, addresses, incarnations)
