"""Which of the databases in a replica's directory is in use: the file CURRENT says, and one rename changes it.

    CURRENT   name of a directory, a space, CRC32C of the name as 8 hexadecimal digits, a line feed

A flipped bit must not name another directory, for those that are not named are removed.
"""

from __future__ import annotations

from pathlib import Path

import google_crc32c

from shardkv.raft.errors import DamagedState
from shardkv.raft.unreadable import as_damage
from shardkv.storage.tables import replace_durably

CURRENT = "CURRENT"


def write_current(directory: Path, name: str) -> None:
    """Make `name` the database in use, durably."""
    replace_durably(directory / CURRENT, _packed(name))


def read_current(directory: Path) -> str:
    """The database that CURRENT names; empty in a new directory. Raises DamagedState."""
    path = directory / CURRENT
    if not path.exists():
        if any(directory.glob("db-*/CURRENT")):
            raise DamagedState(str(path), "the file is missing, and there is a database")
        return ""
    with as_damage(str(path)):
        packed = path.read_bytes()
    name = packed.partition(b" ")[0].decode(errors="replace")
    if _packed(name) != packed:
        raise DamagedState(str(path), f"it holds {packed!r}, which does not match its checksum")
    if not (directory / name).is_dir():
        raise DamagedState(str(path), f"it names {name}, which is missing")
    return name


def _packed(name: str) -> bytes:
    return b"%s %08x\n" % (name.encode(), google_crc32c.value(name.encode()))
