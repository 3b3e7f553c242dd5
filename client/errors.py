"""What a clerk raises.

ShardKVError
├── KeyTooLarge          the key is empty or longer than the limit
├── ValueTooLarge        the value, or what an append would make of it, is larger than the limit
├── NotANumber           an incr of a key whose value is no decimal integer
├── CounterOverflow      an incr would take the counter out of the 64-bit integers
├── Busy                 too much is queued in this clerk, or a quota is used up: come back in `retry_after` seconds
├── OutOfSpace           the group's disks are nearly full; deletes still work
├── BeingRestored        a restore writes the key's shard
├── PermissionDenied     the servers do not know the caller, or its role does not allow the operation
├── Unavailable          nobody could be reached in time; the operation was not sent
├── DeadlineExceeded     the time was up
│   └── OutcomeUnknown   the write may have been done: it was sent, and nobody said what became of it
│       ├── SessionExpired   … and a retry came too late to tell
│       └── PartlyDeleted    a delete_range ended before its range did: `deleted` keys are gone, from `rest` on is left
├── BadRequest           a server refused the operation: asking again will not help
├── BatchError           not all writes of a batch were done: `outcomes` tells of each
├── ClerkClosed          the clerk is closed
└── ForkedClerk          the process was forked: make a new clerk in the child

OutcomeUnknown means that the write was done or was not done. Any other error means that the operation was not
done, and will not be. Where an error came after an attempt that nobody answered, it is the `__cause__`
of an OutcomeUnknown. docs/client.md tells what a timeout and a cancelled call mean. DeadlineExceeded is a TimeoutError too, and Unavailable
a ConnectionError, for code that catches those of Python.
"""

from __future__ import annotations

from collections.abc import Sequence


class ShardKVError(Exception):
    """Any failure of a clerk's call."""


class KeyTooLarge(ShardKVError):
    """The key is empty or longer than the limit. Nothing was done."""


class ValueTooLarge(ShardKVError):
    """The value is beyond the limit. Nothing was done."""


class NotANumber(ShardKVError):
    """The key's value is no decimal integer of 64 bits, so it cannot be counted up. Nothing was done."""


class CounterOverflow(ShardKVError):
    """The counter, or the step, would leave the 64-bit integers. Nothing was done."""


class Busy(ShardKVError):
    """The clerk's queue is full, or the quota of the user or of the key's prefix is used up. Nothing was done."""

    def __init__(self, text: str, retry_after: float = 0.0) -> None:
        """`retry_after`: the seconds after which the servers take the next operation; 0 where they did not say."""
        super().__init__(text)
        self.retry_after = retry_after


class OutOfSpace(ShardKVError):
    """The disks of the key's group are nearly full: it is read-only but for deletes. Nothing was done."""


class BeingRestored(ShardKVError):
    """A restore writes the key's shard, which answers nobody until the restore has ended. Nothing was done."""


class PermissionDenied(ShardKVError):
    """The servers do not know the caller, or its role does not allow the operation. Nothing was done."""


class Unavailable(ShardKVError, ConnectionError):
    """Nobody could be reached within the time. The operation was not sent; the text says what was tried."""


class DeadlineExceeded(ShardKVError, TimeoutError):
    """The time was up. The operation was not done, unless this is an OutcomeUnknown."""


class OutcomeUnknown(DeadlineExceeded):
    """The write was sent, and no answer tells what became of it: it was done, or it was not, or it still will be.

    A later write of the same clerk to the same key takes effect after it, if it takes effect at all.
    """


class SessionExpired(OutcomeUnknown):
    """A write was tried again too late to tell whether it had been done. It was not done again."""


class PartlyDeleted(OutcomeUnknown):
    """A delete_range ended before its range did. Its `__cause__` is the error that ended it.

    What lies below `rest` is deleted, `deleted` keys; the page that begins at `rest` may be deleted or not, as
    the cause says; what lies above is as it was. Call again for the rest.
    """

    def __init__(self, deleted: int, rest: bytes, cause: ShardKVError) -> None:
        super().__init__(f"{deleted} keys are deleted, and what begins at {rest!r} may not be: {cause}")
        self.deleted, self.rest = deleted, rest


class BadRequest(ShardKVError):
    """A server refused the operation; asking again will not help. Nothing was done."""


class BatchError(ShardKVError):
    """Some writes of a batch were not done, or may not have been done."""

    def __init__(self, outcomes: Sequence[bool | int | ShardKVError | None]) -> None:
        """`outcomes`: for each write, in order, what its call would have returned or raised."""
        self.outcomes = tuple(outcomes)
        errors = [outcome for outcome in outcomes if isinstance(outcome, ShardKVError)]
        unknown = sum(isinstance(error, OutcomeUnknown) for error in errors)
        super().__init__(
            f"of {len(outcomes)} writes {len(outcomes) - len(errors)} were done, {len(errors) - unknown} were not,"
            f" {unknown} may have been; the first error: {type(errors[0]).__name__}: {errors[0]}"
        )


class ClerkClosed(ShardKVError):
    """The clerk is closed. The operation was not done."""


class ForkedClerk(ShardKVError):
    """A clerk does not survive fork(): its connections and threads stay with the parent."""


def in_doubt(error: ShardKVError) -> OutcomeUnknown:
    """The same error for a write that an earlier attempt may have done."""
    if isinstance(error, OutcomeUnknown):
        return error
    unknown = OutcomeUnknown(f"{error}; an earlier attempt was not answered, and may have been done")
    unknown.__cause__ = error
    return unknown
