"""JSON that comes from outside: bounded in size and depth, and what is wrong with it is always a ValueError. Pure.

`json.loads` follows any nesting until the interpreter's stack ends (RecursionError), and so does `json.dumps` on what was
read. Whoever reads a document with `parse_json` may write it again.
"""

from __future__ import annotations

import json
from typing import Any

MAX_BYTES = 64 << 20
MAX_DEPTH = 32  # of lists and objects in each other; ours have at most 6


def parse_json(data: bytes | str, most: int = MAX_BYTES) -> Any:
    """`most`: bytes, or characters. Raises ValueError."""
    if len(data) > most:
        raise ValueError(f"{len(data):,} bytes are more than the {most:,} that are read")
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    level = [found]
    for _ in range(MAX_DEPTH):
        level = [inner for each in level for inner in _inside(each) if isinstance(inner, list | dict)]
        if not level:
            return found
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _inside(each: Any) -> Any:
    if isinstance(each, dict):
        return each.values()
    return each if isinstance(each, list) else ()
