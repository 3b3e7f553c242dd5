"""What `raft` raises at its callers.

RaftError
├── NotLeader           ask `leader` (0 if unknown); nothing was proposed or read
├── Busy                a bound was reached; nothing was queued, try again later
├── NoRoom              the disks of a quorum are nearly full; nothing was queued
├── Transferring        leadership is being handed over; nothing was queued
├── Lost                another leader's entry took the slot; it will never be applied
├── OutcomeUnknown      leadership was lost with the entry in flight: it may or may not apply
└── Stopped             this replica has stopped, by order or by a fault
PeerFault               a peer's message contradicts what is known for sure: it is refused, and changes nothing
StorageError
├── CorruptLog          damage before the tail of the log: names file and offset
├── CorruptEntry        an entry changed in this replica's memory before it was written
├── DamagedState        damage in the state machine's files; the log is whole: names the file
├── DirectoryInUse      another process has the data directory
├── WrongMembers        this replica and its leader were first started with different lists of members
└── WrongDirectory      the directory belongs to another replica or cluster
"""

from __future__ import annotations


class RaftError(Exception):
    """A request that this replica did not, or cannot know that it did, carry out."""


class NotLeader(RaftError):
    """This replica does not lead; `leader` is who does, as far as it knows (0: unknown)."""

    def __init__(self, leader: int = 0) -> None:
        super().__init__(f"not the leader; try {leader}" if leader else "not the leader")
        self.leader = leader


class Busy(RaftError):
    """A bounded queue is full. Nothing was queued."""


class NoRoom(RaftError):
    """The disks are nearly full: what makes the state grow is refused (`space_watch.py`). Nothing was queued."""


class Transferring(RaftError):
    """Proposals wait while leadership is handed over. Nothing was queued."""


class Lost(RaftError):
    """The entry was overwritten by another leader's: it will never be applied."""


class OutcomeUnknown(RaftError):
    """The entry is in the log of a replica that stopped leading: it may still commit."""


class Stopped(RaftError):
    """The replica has stopped and answers nothing more."""


class PeerFault(Exception):
    """A message that no sound peer sends. It is refused, and nothing changed (`border.py`)."""

    def __init__(self, sender: int, why: str) -> None:
        super().__init__(f"replica {sender} {why}")
        self.sender = sender


class StorageError(Exception):
    """The disk, or what is on it, cannot be used."""


class CorruptLog(StorageError):
    """A record before the log's tail is damaged. The replica refuses to start on it."""

    def __init__(self, file: str, offset: int, why: str) -> None:
        super().__init__(
            f"{file}: damaged at byte {offset}: {why}. What this replica promised may be lost: move its data "
            "directory away, start the replica on an empty directory with the command that it always had, and let "
            "it in with `shardkv admin member replace GID N N=HOST:PORT`, where N is its number"
        )
        self.file, self.offset, self.why = file, offset, why


class CorruptEntry(StorageError):
    """An entry that is to be written fails its checksum: it changed in this replica's memory.

    The entry was whole when it came in, so this machine's memory cannot be trusted. The replica
    stops before the damage is on its disk.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"entry {index} changed in memory before it was written")
        self.index = index


class DamagedState(StorageError):
    """A file of the state machine fails its checksum. The log is whole, so peers can repair this replica.

    The replica stops serving at once, since whatever it read beside the damage may be wrong.
    """

    def __init__(self, file: str, why: str) -> None:
        super().__init__(f"{file}: damaged: {why}")
        self.file, self.why = file, why


class DirectoryInUse(StorageError):
    """Another running process holds the data directory."""


class WrongMembers(StorageError):
    """This replica was first started with other members than its leader: their quorums need not overlap."""


class WrongDirectory(StorageError):
    """The data directory belongs to another replica, group or cluster, or another format version."""
