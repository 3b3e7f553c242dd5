"""Which disk stands behind each replica number, and whose mail is therefore not to be believed.

A replica that lost its disk has forgotten votes and entries that it promised to keep, and it
cannot know that: an empty directory looks like a new replica's. So each data directory has an
incarnation (64 random bits), every piece of mail names the sender's, and the membership in the
log records it for each number. A voter is thus a number *and* a disk:

  - mail of another disk than the recorded one is dropped: its votes and acknowledgements count
    nowhere. Until the log knows, the first disk that is heard from counts, in this life;
  - one exception: word of a leader whose log knows *our* disk. That leader's log is the group's,
    and its own disk was replaced by entries that we have yet to receive;
  - mail that is addressed to another disk under our number tells that we are the replacement,
    by accident: we take no part until a leader addresses our disk.

docs/raft.md, "Disks", has the argument and the window before the log knows. An incarnation of 0
means that nobody looks: cores in tests, which have no disks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from shardkv.raft.errors import PeerFault, WrongMembers
from shardkv.raft.protocol.messages import AppendEntries, Envelope, InstallSnapshot
from shardkv.raft.protocol.quorum import Membership, in_hex
from shardkv.raft.protocol.types import Index, Kind, NodeId, Term

log = logging.getLogger(__name__)

PATIENCE_TICKS = 20  # that a leader waits for the last members before it records the disks it knows


class KnownDisks:
    """What one replica knows of its own disk and of the others'. Belongs to the event loop's thread."""

    def __init__(
        self,
        id: NodeId,
        own: int = 0,
        first: Membership | None = None,
        moved: Mapping[NodeId, str] | None = None,
    ) -> None:
        """`first`: what this replica was first started with; `moved`: where it is told that some of those are now."""
        self.id, self.own = id, own
        self.first = first or Membership(frozenset())
        self._moved = dict(moved or {})
        self._heard: dict[NodeId, int] = {}  # in this life, from members that the log does not know yet
        self.heard_more = False  # since `news` was asked last
        self.waited_ticks = 0  # with something to record; the driver counts
        self.told = 0  # the disk that the group knows under our number, if that is not ours
        self.refused: dict[NodeId, int] = {}  # whose mail was dropped last, and the disk it came from
        self.refused_mail = 0

    # ---- mail

    def admits(self, envelope: Envelope, membership: Membership, term: Term, commit_index: Index = 0) -> bool:
        """Whether this mail is between the disks that the log knows. What it says is remembered.

        Raises WrongMembers where the log of our first leader begins with other members than ours were;
        PeerFault where somebody says so of a log of which we have committed entries.
        """
        if not self.own or envelope.to != self.id:
            return True  # not for us, but for who had our address before: the core drops it
        sender, disk, addressed = envelope.sender, envelope.incarnation, envelope.to_incarnation
        is_leaders = isinstance(envelope.message, AppendEntries | InstallSnapshot)
        recorded = membership.incarnations.get(sender, 0)
        known = recorded or self._heard.get(sender, 0)
        if known and disk != known and not (is_leaders and addressed == self.own):
            self._refuse(sender, disk, known)
            return False
        if addressed and addressed != self.own:
            # Old news, if the sender's disk is in our log and ours is too: its log lags behind.
            # A leader's log of our term does not.
            lags = recorded and membership.incarnations.get(self.id, 0) == self.own
            if not lags or (is_leaders and envelope.term >= term):
                self._be_refused(addressed)
                return False
        elif is_leaders and addressed == self.own and envelope.term >= term and self.told:
            log.info("replica %d: its group takes its disk %s in", self.id, in_hex(self.own))
            self.told = 0
        if self.told:
            return False
        self._check_first_members(envelope, term, commit_index)
        self.refused.pop(sender, None)
        if disk and not known and membership.is_member(sender):
            self._heard[sender] = disk
            self.heard_more = True
        return True

    def _refuse(self, sender: NodeId, disk: int, known: int) -> None:
        if self.refused.get(sender) != disk:
            log.warning(
                "replica %d drops the mail of replica %d: it comes from disk %s, and the group knows disk %s",
                self.id,
                sender,
                in_hex(disk),
                in_hex(known),
            )
        self.refused[sender] = disk
        self.refused_mail += 1

    def _be_refused(self, known: int) -> None:
        if self.told != known:
            log.error(
                "replica %d takes no part: its disk is %s, and its group knows replica %d with disk %s. Was the "
                "directory lost, or is another one mounted? Start it on the right one, or have the group "
                "take this one in: shardkv admin member replace GID %d %d=HOST:PORT",
                self.id,
                in_hex(self.own),
                self.id,
                in_hex(known),
                self.id,
                self.id,
            )
        self.told = known

    def _check_first_members(self, envelope: Envelope, term: Term, commit_index: Index) -> None:
        """Replicas that were first started with different lists meet when the first of them leads."""
        append = envelope.message
        if not isinstance(append, AppendEntries) or append.prev_log_index > 0 or not append.entries:
            return
        entry = append.entries[0]
        if entry.kind is not Kind.MEMBERSHIP or not self.first.voters:
            return
        theirs = Membership.decode(entry.data)
        if theirs.voters != self.first.voters:
            if commit_index > 0 or envelope.term < term:
                # Our group has begun. A stranger's word, or an old leader's, must not stop it.
                raise PeerFault(envelope.sender, f"its log begins with the members {_told(theirs)}")
            raise WrongMembers(
                f"replica {self.id} was first started with the members {_told(self.first)}, and its leader "
                f"{envelope.sender} with {_told(theirs)}: all first replicas need the same --peers, "
                "and one that comes later --join"
            )

    # ---- what follows

    def refusal(self, membership: Membership) -> int:
        """The disk that the group knows under our number, if that is not ours; else 0.

        As long as it is not 0, this replica does not campaign, lead or serve.
        """
        recorded = membership.incarnations.get(self.id, self.own)
        return self.told or (recorded if recorded != self.own else 0)

    def addresses(self, membership: Membership) -> Mapping[NodeId, str]:
        """Where the members are. Those that the log has where they first were may have moved."""
        first = self.first.addresses
        return {
            node: self._moved.get(node, address) if address == first.get(node) else address
            for node, address in membership.addresses.items()
        }

    def news(self, membership: Membership) -> Membership | None:
        """For a leader, at each tick and when it `heard_more`: what to append, if it knows what the log does not.

        All in one entry: it waits a little for those that have not been heard from.
        """
        self.heard_more = False
        for node in [node for node in self._heard if not membership.is_member(node)]:
            del self._heard[node]  # under this number another disk may come
        disks = {**self._heard, self.id: self.own} if membership.is_member(self.id) else self._heard
        disks = {node: disk for node, disk in disks.items() if disk and node not in membership.incarnations}
        addresses = self.addresses(membership)
        if not disks and addresses == membership.addresses:
            self.waited_ticks = 0
            return None
        unknown = [n for n in membership.everyone() if n not in disks and n not in membership.incarnations]
        if unknown and self.waited_ticks < PATIENCE_TICKS:
            return None
        return replace(membership, addresses=addresses, incarnations={**membership.incarnations, **disks})

    def tell(self, membership: Membership) -> dict[str, object]:
        """For people and their tools."""
        refusal = self.refusal(membership)
        return {
            "incarnation": in_hex(self.own),
            "known_as": in_hex(refusal) if refusal else "",  # not empty: this replica is refused
            "refuses": {str(node): in_hex(disk) for node, disk in sorted(self.refused.items())},
            "refused_mail": self.refused_mail,
            "members": {str(node): in_hex(disk) for node, disk in sorted(membership.incarnations.items())},
        }


def _told(membership: Membership) -> str:
    return ", ".join(f"{node} at {at}" for node, at in sorted(membership.addresses.items()))
