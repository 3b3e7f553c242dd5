"""Keys and values as callers give them, checked before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from shardkv.client.errors import KeyTooLarge, ValueTooLarge
from shardkv.wire.address import split_address
from shardkv.wire.frames import Limits

Key = bytes | str
K = TypeVar("K", bytes, str, Key)
SHOWN_KEY_BYTES = 64


def quoted(key: bytes) -> str:
    """A key as errors name it: 'user/1', escaped where it is not printable, and cut where it is long."""
    if len(key) <= SHOWN_KEY_BYTES:
        return repr(key)[1:]
    return f"{repr(key[:SHOWN_KEY_BYTES])[1:]}… ({len(key)} bytes)"


def to_bytes(value: Key) -> bytes:
    """bytes as they are, str as UTF-8. Raises TypeError for anything else."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    raise TypeError(f"keys and values are bytes or str, not {type(value).__name__}")


def check_key(key: Key, limits: Limits) -> bytes:  # hot: runs per operation
    """Raises KeyTooLarge for an empty or overlong key, TypeError."""
    data = key if type(key) is bytes else to_bytes(key)
    if not 0 < len(data) <= limits.key_bytes:
        raise KeyTooLarge(f"key {quoted(data)} has {len(data)} bytes: a key has 1 to {limits.key_bytes}")
    return data


def check_value(value: Key, limits: Limits) -> bytes:  # hot: runs per operation
    """Raises ValueTooLarge, TypeError."""
    data = value if type(value) is bytes else to_bytes(value)
    if len(data) > limits.value_bytes:
        raise ValueTooLarge(f"the value has {len(data)} bytes: a value has at most {limits.value_bytes}")
    return data


def check_controllers(controllers: Sequence[str]) -> None:
    """Raises ValueError for what is no list of host:port."""
    if not controllers or isinstance(controllers, str | bytes):
        raise ValueError("controllers is a list of host:port")
    for address in controllers:
        split_address(address)
