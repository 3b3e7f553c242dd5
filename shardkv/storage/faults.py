"""What an error of RocksDB means, and who hears of it.

    DamagedState   a file of the database is damaged, missing, or on a bad sector: peers can repair this replica
    OSError        the disk under the database fails a write or a sync, or is full

rocksdict raises plain Exception with RocksDB's text; the text is all there is to go by.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from rocksdict import DbClosedError

from shardkv.raft.errors import DamagedState, StorageError
from shardkv.raft.unreadable import NUMBERS

log = logging.getLogger(__name__)

IN_FILE = re.compile(r"(?: in |: )(/[^\n:]*?(?:\.sst|MANIFEST-\d+|CURRENT|IDENTITY))\b")
OF_DAMAGE = ("Corruption", "Not implemented", "Invalid argument", "Not found")
# How RocksDB (env/io_posix.cc, env/fs_posix.cc) names what it did to the file: these are the ways to read.
READING = re.compile(
    r"[Ww]hile (pread|reading|mmap read|prefetching|stat|open a file for random read|"
    r"opening a file for sequentially read|opening file for sequentially read)"
)
UNREADABLE = tuple(os.strerror(number) for number in sorted(NUMBERS))


def fault_of(error: Exception, directory: Path) -> Exception:
    """The typed error for one that RocksDB raised; others stay as they are, for they are bugs of ours.

    A table that is missing is damage as well: the disk works, and peers have what is gone. So is one
    that the disk cannot read (`raft.unreadable`).
    """
    if type(error) is not Exception or isinstance(error, DbClosedError):
        return error
    text = str(error)
    cannot_read = READING.search(text) is not None and any(why in text for why in UNREADABLE)
    if cannot_read or text.startswith(OF_DAMAGE) or "No such file or directory" in text:
        named = IN_FILE.search(text)
        log.error("RocksDB: %s", text)  # for whoever looks closer; people are told what it means
        return DamagedState(named[1] if named else str(directory), meaning_of(text))
    full = "No space left on device" in text
    return OSError(errno.ENOSPC if full else errno.EIO, f"RocksDB: {text}")


def meaning_of(text: str) -> str:
    """RocksDB's text for damage in plain words: what is wrong, and where, without its internals."""
    at = re.search(r"\boffset (\d+)", text)
    where = f" at byte {at[1]}" if at else ""
    if "checksum mismatch" in text:
        return f"a block{where} does not match its checksum"
    if any(why in text for why in UNREADABLE):
        return f"the disk cannot read it{where}: {text.rpartition(': ')[2]}"
    if "No such file or directory" in text:
        return "the file is missing"
    plain = text.partition(": ")[2] if text.startswith(OF_DAMAGE) else text
    return IN_FILE.sub("", plain).strip() or text


class Faults:
    """The first fault of an engine, and the owner who hears of each. Methods may be called on any thread."""

    def __init__(self) -> None:
        self.first: BaseException | None = None
        self._hear: Callable[[BaseException], None] | None = None

    @property
    def hear(self) -> Callable[[BaseException], None] | None:
        return self._hear

    @hear.setter
    def hear(self, hear: Callable[[BaseException], None] | None) -> None:
        self._hear = hear
        if self.first is not None and hear is not None:
            hear(self.first)

    def typed(self, error: Exception, where: Path) -> Exception:
        """Tell the owner of a fault; returns the typed error to raise in place of RocksDB's."""
        fault = fault_of(error, where)
        if isinstance(fault, StorageError | OSError):
            if self.first is None:
                self.first = fault
                log.error("the database failed: %s", fault)
            if self._hear is not None:
                self._hear(fault)
        return fault
