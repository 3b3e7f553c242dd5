"""Small formats for files that are written whole: every byte, the header's too, is inside the checksum.

    magic 8 bytes · version u32 · length u64 · CRC32C u32 of all the others · the contents

A checksum that leaves the header out is worth little: one flipped bit in the index of a state
file once made a follower claim entries that it did not have.
"""

from __future__ import annotations

import struct

import google_crc32c

HEADER = struct.Struct("<8sIQ")
CHECKSUM = struct.Struct("<I")
MAX_VERSION = 1000  # no format of ours has a later one: such a number is damage


class OtherVersion(ValueError):
    """The file is whole, as far as one can tell, and of a version that this program does not read."""

    def __init__(self, found: int, reads: int) -> None:
        super().__init__(f"format version {found}, this program reads {reads}")
        self.found = found


def seal(magic: bytes, version: int, *parts: bytes) -> bytes:
    """The file that holds `parts`, one after the other."""
    header = HEADER.pack(magic, version, sum(len(part) for part in parts))
    return b"".join((header, CHECKSUM.pack(_checksum(header, *parts)), *parts))


def unseal(magic: bytes, version: int, data: bytes) -> bytes:
    """What `seal` was given. Raises OtherVersion; ValueError for damage."""
    start = HEADER.size + CHECKSUM.size
    if len(data) < start:
        raise ValueError("cut short")
    found_magic, found_version, length = HEADER.unpack_from(data)
    (expected,) = CHECKSUM.unpack_from(data, HEADER.size)
    contents = data[start:]
    # With the version that we write: damage to the version alone is damage, not another version.
    if _checksum(HEADER.pack(magic, version, length), contents) != expected or length != len(contents):
        if found_magic == magic and found_version != version and 0 < found_version < MAX_VERSION:
            raise OtherVersion(found_version, version)
        raise ValueError("does not match its checksum")
    if found_magic != magic or found_version != version:
        raise ValueError("the header does not match its checksum")
    return contents


def _checksum(header: bytes, *parts: bytes) -> int:
    crc = google_crc32c.value(header)
    for part in parts:
        crc = google_crc32c.extend(crc, part)
    return int(crc)
