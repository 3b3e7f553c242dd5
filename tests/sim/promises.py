"""What a replica promises rests on bytes that a power loss at that moment would leave.

The judge looks at a message when it leaves, not after a crash that may or may not come: it recovers
the log and the state file from what the medium surely holds, with the code that recovers them in
production, and holds the message against that. So a missing sync is seen without any luck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from shardkv.raft.errors import DamagedState, StorageError
from shardkv.raft.protocol.messages import (
    AppendReply,
    Envelope,
    InstallSnapshotReply,
    RequestVote,
    RequestVoteReply,
)
from shardkv.raft.protocol.types import Index
from shardkv.raft.state_file import STATE_FILE, _unpack
from shardkv.raft.wal import Recovered, open_wal
from tests.sim.disk import SimDisk

SAMPLE = 8  # one of so many acknowledged appends is judged; of everything else each


class Photograph:
    """The files of a disk at one moment, as a `Directory` that nothing is kept of."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files

    def names(self) -> list[str]:
        return sorted(self._files)

    def read(self, name: str) -> bytes:
        return self._files[name]

    async def rewrite_tail(self, name: str, offset: int, data: bytes) -> None: ...

    async def remove(self, names: Sequence[str]) -> None: ...


def recover(files: Mapping[str, bytes]) -> Recovered:
    """The log that a replica would find. Raises StorageError."""
    opening: Any = open_wal(Photograph(files), Random(1))  # type: ignore[arg-type]
    try:
        opening.send(None)
    except StopIteration as done:
        wal, recovered = done.value
        wal.close()
        return recovered
    opening.close()
    raise AssertionError("the log is read without waiting")


def read_state(files: Mapping[str, bytes]) -> Index:
    """The last entry in the state file, 0 where there is none. Raises DamagedState."""
    try:
        return _unpack(files[STATE_FILE])[0].index if STATE_FILE in files else 0
    except ValueError as error:
        raise DamagedState(STATE_FILE, str(error)) from None


def state_index(files: Mapping[str, bytes]) -> Index:
    """The same, and 0 for a damaged one."""
    try:
        return read_state(files)
    except DamagedState:
        return 0


class Promises:
    """Judges what leaves one disk's replica. It draws nothing: traces do not change with it."""

    def __init__(self, disk: SimDisk) -> None:
        self._disk = disk
        self._version = -1
        self._recovered = Recovered()
        self._state: Index = 0
        self._acknowledged = 0
        self.judged = 0
        disk.on_remove = self.check_removal

    def check(self, envelope: Envelope) -> None:
        """Raises AssertionError where a power loss now would break what this message says."""
        message, term = envelope.message, envelope.term
        match message:
            case RequestVote(pre=False):
                self._look()
                saved = self._recovered.hard_state
                assert (saved.term, saved.voted_for) == (term, envelope.sender) or saved.term > term, (
                    f"{envelope.sender} campaigns in term {term}, its disk has {saved}"
                )
            case RequestVoteReply(pre=False, granted=True):
                self._look()
                saved = self._recovered.hard_state
                assert (saved.term, saved.voted_for) == (term, envelope.to) or saved.term > term, (
                    f"{envelope.sender} votes for {envelope.to} in term {term}, its disk has {saved}"
                )
            case AppendReply(success=True, match_index=index) if index > 0:
                self._acknowledged += 1
                if self._acknowledged % SAMPLE == 0:
                    self._look()
                    self._has(envelope, index)
            case InstallSnapshotReply(done=True, last_index=index):
                self._look()
                self._has(envelope, index)
            case _:
                pass

    def _has(self, envelope: Envelope, index: Index) -> None:
        last = max(self._recovered.last_index, self._state)
        assert last >= index, f"{envelope.sender} acknowledges entry {index}, its disk has those up to {last}"
        term = self._recovered.hard_state.term
        # A snapshot's entries are committed: no older leader can take back what `done` says of them.
        assert term >= envelope.term or isinstance(envelope.message, InstallSnapshotReply), (
            f"{envelope.sender} speaks in term {envelope.term}, its disk has {term}"
        )

    def check_removal(self, names: Sequence[str]) -> None:
        """What goes may not be what the rest needs: the state is durable up to where the log begins."""
        if not any(name.startswith("wal-") for name in names):
            return
        files = {name: data for name, data in self._disk.kept.items() if name not in names}
        try:
            recovered = recover(files)
        except StorageError as error:
            raise AssertionError(f"after the removal of {names} the log is broken: {error}") from None
        state = state_index(files)
        assert state >= recovered.base_index, (
            f"{names} go, the log then begins after {recovered.base_index}, the durable state ends at {state}"
        )

    def _look(self) -> None:
        self.judged += 1
        if self._version != self._disk.version:
            files = self._disk.kept
            self._recovered, self._state = recover(files), state_index(files)
            self._version = self._disk.version
