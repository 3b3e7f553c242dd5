"""A range-sharded, Raft-replicated, linearizable key-value service: `ShardClerk` for applications, and the servers.

`from shardkv import ShardClerk` is all that an application needs. The client's names are loaded when somebody asks for
one, so that a server or a command does not load a client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardkv.client import (
        AsyncShardClerk,
        BadCertificate,
        BadRequest,
        BatchError,
        BeingRestored,
        Busy,
        ClerkClosed,
        CounterOverflow,
        DeadlineExceeded,
        ForkedClerk,
        KeyTooLarge,
        Login,
        NotANumber,
        Operator,
        OutcomeUnknown,
        OutOfSpace,
        PartlyDeleted,
        PermissionDenied,
        SessionExpired,
        ShardClerk,
        ShardKVError,
        Tls,
        Unavailable,
        ValueTooLarge,
    )

    __version__: str

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
    "__version__",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("shardkv")
    if name in __all__:
        return getattr(import_module("shardkv.client"), name)
    raise AttributeError(f"module 'shardkv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
