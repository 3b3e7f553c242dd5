"""The client library: `ShardClerk` and its async twin, and what they raise."""

from client.blocking import ShardClerk
from client.clerk import AsyncShardClerk
from client.errors import (
    BadRequest,
    BatchError,
    BeingRestored,
    Busy,
    ClerkClosed,
    DeadlineExceeded,
    ForkedClerk,
    KeyTooLarge,
    OutcomeUnknown,
    OutOfSpace,
    PermissionDenied,
    SessionExpired,
    ShardKVError,
    Unavailable,
    ValueTooLarge,
)
from raft.gate import Login, Operator
from raft.tls import BadCertificate, Tls

__all__ = [
    "AsyncShardClerk",
    "BadCertificate",
    "BadRequest",
    "BatchError",
    "BeingRestored",
    "Busy",
    "ClerkClosed",
    "DeadlineExceeded",
    "ForkedClerk",
    "KeyTooLarge",
    "Login",
    "Operator",
    "OutOfSpace",
    "OutcomeUnknown",
    "PermissionDenied",
    "SessionExpired",
    "ShardClerk",
    "ShardKVError",
    "Tls",
    "Unavailable",
    "ValueTooLarge",
]
