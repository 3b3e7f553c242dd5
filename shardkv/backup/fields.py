"""Fields of a document that somebody else may have written: of the right type and size, or a ValueError. Pure."""

from __future__ import annotations

import re
from typing import Any

MOST = (1 << 63) - 1
MAX_TEXT = 1 << 20
DIGEST = re.compile("[0-9a-f]{64}")


def whole(value: Any) -> int:
    """A number from 0 to 2^63 - 1."""
    if type(value) is not int or not 0 <= value <= MOST:
        raise ValueError(f"{str(value)[:40]!r} is not a number from 0 to {MOST}")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError("a text is missing or too long")
    return value


def hexadecimal(value: Any, digits: int = 0) -> str:
    """`digits`: how many there are; 0 for any number of bytes."""
    found = text(value)
    bytes.fromhex(found)
    if digits and len(found) != digits:
        raise ValueError(f"{found[:40]!r} does not have {digits} hexadecimal digits")
    return found


def digests(value: Any) -> list[str]:
    """They are parts of names of objects: nothing but digits may be in them."""
    if not isinstance(value, list) or not all(
        isinstance(each, str) and DIGEST.fullmatch(each) for each in value
    ):
        raise ValueError("a chunk is not named by its digest")
    return value


def texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("a list is missing")
    return [text(each) for each in value]
