"""The client library: `ShardClerk` and its async twin, and what they raise.

Applications say `from shardkv import ShardClerk`. In a checkout, `from client import ShardClerk` gives the same class.
"""

import sys

from shardkv.client.blocking import ShardClerk
from shardkv.client.clerk import AsyncShardClerk
from shardkv.client.errors import (
    BadRequest,
    BatchError,
    BeingRestored,
    Busy,
    ClerkClosed,
    CounterOverflow,
    DeadlineExceeded,
    ForkedClerk,
    KeyTooLarge,
    NotANumber,
    OutcomeUnknown,
    OutOfSpace,
    PartlyDeleted,
    PermissionDenied,
    SessionExpired,
    ShardKVError,
    Unavailable,
    ValueTooLarge,
)
from shardkv.wire.auth import Login, Operator
from shardkv.wire.tls import BadCertificate, Tls

__all__ = [
    "AsyncShardClerk",
    "BadCertificate",
    "BadRequest",
    "BatchError",
    "BeingRestored",
    "Busy",
    "ClerkClosed",
    "CounterOverflow",
    "DeadlineExceeded",
    "ForkedClerk",
    "KeyTooLarge",
    "Login",
    "NotANumber",
    "Operator",
    "OutOfSpace",
    "OutcomeUnknown",
    "PartlyDeleted",
    "PermissionDenied",
    "SessionExpired",
    "ShardClerk",
    "ShardKVError",
    "Tls",
    "Unavailable",
    "ValueTooLarge",
]

if __name__ == "client":
    # The same modules under a checkout's own name for the package: loaded twice, each error would be two classes.
    for _whole, _module in list(sys.modules.items()):
        if _whole.startswith("shardkv.client."):
            sys.modules[_whole.removeprefix("shardkv.")] = globals()[_whole.rpartition(".")[2]] = _module
