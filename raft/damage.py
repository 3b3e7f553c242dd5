"""What was found damaged in a replica's own state: noted in its data directory before anything else is done.

    damaged    sealed (`sealed.py`), JSON: how often damage was found and repaired, and the last `Damage`s

The next start goes by the newest of them. While that is not repaired, the damaged files are set
aside, and the replica begins with an empty state machine (`repair.py`). The others are kept for
people: `shardkv admin damage` shows them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shardkv.raft.errors import DamagedState
from shardkv.raft.interfaces import Directory
from shardkv.raft.protocol.types import NodeId
from shardkv.raft.sealed import seal, unseal
from shardkv.raft.unreadable import as_damage
from shardkv.wire.bounded_json import parse_json

DAMAGE_FILE = "damaged"
MAGIC = b"SKVDAMGD"
FORMAT_VERSION = 1
HISTORY = 16  # Damages that are kept
OFTEN = 3  # so many of them within OFTEN_MS, and the disk itself is suspect
OFTEN_MS = 60 * 60 * 1000
PAUSE_SECONDS = 10.0  # before a start on a suspect disk, doubled each time
MAX_PAUSE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Damage:
    """One file that failed its checksum."""

    file: str
    why: str
    found_ms: int
    set_aside: bool = False  # the damaged state is out of the way: what is there now was made since
    repaired_ms: int = 0
    repaired_from: NodeId = 0  # the leader that sent the snapshot; 0: our own log, or not known any more


@dataclass
class DamageBook:
    """The file's contents. `load` it; every change is on disk when the call returns. Raises OSError."""

    directory: Directory
    history: list[Damage] = field(default_factory=list)  # the oldest first
    found: int = 0
    repaired: int = 0

    @classmethod
    def load(cls, directory: Directory) -> DamageBook:
        """Raises DamagedState where the file itself is damaged: what it said about the state is not known."""
        book = cls(directory)
        if DAMAGE_FILE in directory.names():
            with as_damage(DAMAGE_FILE):
                packed = directory.read(DAMAGE_FILE)
            try:
                fields = parse_json(unseal(MAGIC, FORMAT_VERSION, packed))
                book.history = [Damage(**damage) for damage in fields["history"]]
                book.found, book.repaired = fields["found"], fields["repaired"]
            except (ValueError, KeyError, TypeError) as error:
                raise DamagedState(DAMAGE_FILE, str(error)) from None
        return book

    @property
    def present(self) -> Damage | None:
        """The damage that is not repaired yet."""
        last = self.history[-1] if self.history else None
        return last if last is not None and not last.repaired_ms else None

    def recent(self, now_ms: int) -> int:
        """How often damage was found of late."""
        return sum(damage.found_ms > now_ms - OFTEN_MS for damage in self.history)

    def pause_seconds(self, now_ms: int) -> float:
        """How long to wait before the next start: a disk that damages files again and again is asked less."""
        often = self.recent(now_ms) - OFTEN
        return 0.0 if often < 0 else min(PAUSE_SECONDS * 2**often, MAX_PAUSE_SECONDS)

    def told(self, now_ms: int) -> dict[str, Any]:
        """For status and metrics."""
        return {
            "now_ms": now_ms,
            "found": self.found,
            "repaired": self.repaired,
            "suspect_disk": self.recent(now_ms) >= OFTEN,
            "history": [asdict(damage) for damage in self.history],
        }

    async def note_found(self, error: DamagedState, now_ms: int) -> None:
        """From now on no start trusts the state that is there."""
        self.history = [*self.history, Damage(error.file, error.why, now_ms)][-HISTORY:]
        self.found += 1
        await self._keep()

    async def note_set_aside(self) -> None:
        self.history[-1] = replace(self.history[-1], set_aside=True)
        await self._keep()

    async def note_repaired(self, now_ms: int, source: NodeId) -> None:
        """The state is whole again, from a snapshot of `source` or out of our own log."""
        self.history = [
            damage if damage.repaired_ms else replace(damage, repaired_ms=now_ms, repaired_from=source)
            for damage in self.history
        ]
        self.repaired += 1
        await self._keep()

    async def _keep(self) -> None:
        fields = {"found": self.found, "repaired": self.repaired, "history": [asdict(d) for d in self.history]}
        contents = json.dumps(fields).encode()
        await self.directory.replace(DAMAGE_FILE, seal(MAGIC, FORMAT_VERSION, contents))
