"""Where things are in the engine's key space. Pure.

m…                  the group's own state: incarnation, configuration number, clock, membership, rows, cursors
d<key>              data, in the order of the keys: a split moves nothing
s<shard><session>   exactly-once records
j<shard><position>  items changed while the shard is being lent, each at its last change: the copy's journal
i<shard><item>      where in the journal an item is
"""

from __future__ import annotations

CONFIG_NUM = b"mconfig"
CLOCK = b"mclock"
MEMBERSHIP = b"mmembers"
ADDRESSES = b"maddresses"
INCARNATION = b"mincarnation"
JOINS = b"mjoins"
ROW = b"mrow"
SWEPT = b"mswept"  # where the next look for expired records begins
ALL_RECORDS = (b"s", b"t")


def data_key(key: bytes) -> bytes:
    return b"d" + key


def data_range(start: bytes, end: bytes) -> tuple[bytes, bytes]:
    """The engine's range for the keys in [start, end); an empty end is open."""
    return b"d" + start, b"d" + end if end else b"e"


def row_key(shard: int) -> bytes:
    return ROW + shard.to_bytes(8, "big")


def record_key(shard: int, session: bytes) -> bytes:
    return b"s" + shard.to_bytes(8, "big") + session


def record_of(item: bytes) -> tuple[int, bytes]:
    """The shard and the session of a record's key."""
    return int.from_bytes(item[1:9], "big"), item[9:]


def record_range(shard: int) -> tuple[bytes, bytes]:
    return b"s" + shard.to_bytes(8, "big"), b"s" + (shard + 1).to_bytes(8, "big")


def belongs(item: bytes, shard: int, start: bytes, end: bytes) -> bool:
    """Whether an engine key is part of what moves with the shard: its data and its records."""
    return any(low <= item < high for low, high in (data_range(start, end), record_range(shard)))


def journal_key(shard: int, position: int) -> bytes:
    return b"j" + shard.to_bytes(8, "big") + position.to_bytes(8, "big")


def journal_position(key: bytes) -> int:
    return int.from_bytes(key[9:], "big")


def place_key(shard: int, item: bytes) -> bytes:
    return b"i" + shard.to_bytes(8, "big") + item


def place_range(shard: int) -> tuple[bytes, bytes]:
    return b"i" + shard.to_bytes(8, "big"), b"i" + (shard + 1).to_bytes(8, "big")


def journal_range(shard: int, start: int = 0) -> tuple[bytes, bytes]:
    return journal_key(shard, start), b"j" + (shard + 1).to_bytes(8, "big")
