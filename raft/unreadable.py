"""What the disk cannot give back: a sector that has gone bad, or metadata of the file system that has.

It is the commonest damage at rest of a real disk. The read fails, rather than to return other
bytes. Tried again it fails again, so a process that ends with this error would start and end for
ever. What is gone is therefore treated like bytes that fail their checksum: a file of the state is
damaged, and the other replicas have what was in it; a file of the log is refused by name and offset.

A write or a sync that fails, and a full disk, are no damage: nothing that was there is lost.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardkv.raft.errors import DamagedState

# EIO: a bad sector, also through a file system with checksums (btrfs, ZFS). ENODATA, EILSEQ: the medium or
# its checksum, from a direct read. EUCLEAN, EBADMSG: metadata of ext4 and XFS that is damaged.
NUMBERS = frozenset({errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EUCLEAN, errno.EBADMSG})
SECTOR_BYTES = 4096


class Unreadable(OSError):
    """The disk cannot read the file at this offset."""

    def __init__(self, error: OSError, file: str, offset: int) -> None:
        super().__init__(error.errno, f"the disk cannot read it at byte {offset}: {error.strerror}", file)
        self.offset = offset

    def __str__(self) -> str:
        return str(self.strerror)


def is_unreadable(error: OSError) -> bool:
    """Whether this error of a read tells of damage at rest."""
    return error.errno in NUMBERS


@contextmanager
def as_damage(file: str) -> Iterator[None]:
    """Around reads of a file of the state. Raises DamagedState where the disk cannot read it."""
    try:
        yield
    except OSError as error:
        if not is_unreadable(error):
            raise
        why = str(error) if isinstance(error, Unreadable) else f"the disk cannot read it: {error.strerror}"
        raise DamagedState(file, why) from None


def first_unreadable(path: Path) -> int:
    """The first offset, in whole sectors, that the disk cannot read; 0 where it cannot open the file."""
    offset = 0
    try:
        with path.open("rb", buffering=0) as file:
            while file.read(SECTOR_BYTES):
                offset += SECTOR_BYTES
    except OSError:
        pass
    return offset
