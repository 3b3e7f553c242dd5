"""What a caller is told when a server refuses one operation: an error for each status, and what to do about it."""

from __future__ import annotations

from shardkv.client.errors import (
    BadRequest,
    BeingRestored,
    CounterOverflow,
    KeyTooLarge,
    NotANumber,
    OutOfSpace,
    PermissionDenied,
    SessionExpired,
    ShardKVError,
    ValueTooLarge,
)
from shardkv.wire.frames import Status


def error_of(status: int) -> ShardKVError:
    match status:
        case Status.SESSION_EXPIRED:
            return SessionExpired(
                "the write is too old to be retried safely, and may have been done: read the key before you write it again"
            )
        case Status.VALUE_TOO_LARGE:
            return ValueTooLarge(
                "the value after this write would be larger than a value may be: use several keys"
            )
        case Status.BAD_OPERATION:
            return BadRequest(
                "the server cannot read the operation: do the client and the servers have the same version?"
            )
        case Status.NOT_A_NUMBER:
            return NotANumber("the key's value is not a decimal integer of 64 bits")
        case Status.OVERFLOW:
            return CounterOverflow("the counter would leave the range of 64-bit integers")
        case Status.KEY_SIZE:
            return KeyTooLarge("the key is empty, or longer than a key may be on this server")
        case Status.VALUE_SIZE:
            return ValueTooLarge("the value is larger than a value may be on this server")
        case Status.DENIED:
            return PermissionDenied(
                "this user may not touch that key: an admin can change the user's role or prefixes (`shardkv admin user set`)"
            )
        case Status.NO_ROOM:
            return OutOfSpace(
                "the disks of this group are nearly full: only deletes work until there is space (`shardkv admin status` names the disks)"
            )
        case Status.RESTORING:
            return BeingRestored(
                "a restore is writing this shard: try again when the restore has ended (`shardkv admin status` shows it)"
            )
        case _:
            return BadRequest(
                f"the server answered with status {status}, which this client does not know: use a newer client"
            )
