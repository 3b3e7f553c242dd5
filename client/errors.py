"""What a clerk raises.

ShardKVError
├── KeyTooLarge          the key is empty or longer than the limit; nothing was sent
├── ValueTooLarge        the value, or what an append would make of it; nothing was done
├── Busy                 too much is queued in this clerk; nothing was sent
├── OutOfSpace           the group's disks are nearly full; nothing was done, and deletes still work
├── PermissionDenied     who we are may not do that; nothing was done
├── Unavailable          nobody could be reached in time; the operation was not done
├── DeadlineExceeded     the time was up; the operation was not done
│   └── OutcomeUnknown   … or it was: it was sent, and no answer came
├── SessionExpired       a retry came too late to be safe; it was not done again
├── BadRequest           a server refused it: what it says will not change by asking again
├── ClerkClosed          the clerk was closed
└── ForkedClerk          the process was forked: make a new clerk in the child
"""

from __future__ import annotations


class ShardKVError(Exception):
    """Any failure of a clerk's call."""


class KeyTooLarge(ShardKVError):
    """The key is empty or longer than the limit. Nothing was sent."""


class ValueTooLarge(ShardKVError):
    """The value is beyond the limit. Nothing was done."""


class Busy(ShardKVError):
    """The clerk's queue is full. Nothing was sent."""


class OutOfSpace(ShardKVError):
    """The disks of the key's group are nearly full: it is read-only but for deletes. Nothing was done."""


class PermissionDenied(ShardKVError):
    """The servers do not know us, or our role does not allow it. Nothing was done."""


class Unavailable(ShardKVError):
    """Nobody could be reached within the time. Nothing was done; the text says what was tried."""


class DeadlineExceeded(ShardKVError):
    """The time was up before the operation was done."""


class OutcomeUnknown(DeadlineExceeded):
    """The time was up, and a server may have carried the write out, or may still do so."""


class SessionExpired(ShardKVError):
    """A write was tried again too late to tell whether it had been done. It was not done again."""


class BadRequest(ShardKVError):
    """A server refused the call; asking again will not help."""


class ClerkClosed(ShardKVError):
    """The clerk is closed."""


class ForkedClerk(ShardKVError):
    """A clerk does not survive fork(): its connections and threads stay with the parent."""
