"""How far the copy of a shard has come: through the records, then the data, then the journal of changes. Pure."""

from __future__ import annotations

from dataclasses import dataclass

RECORDS, DATA, JOURNAL = 0, 1, 2  # phases of a copy


@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """Where the next chunk begins."""

    phase: int = RECORDS
    key: bytes = b""
    position: int = 0


START = Cursor()
