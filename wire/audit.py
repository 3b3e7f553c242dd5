"""Where listeners tell what they let in and what they turned away. The log itself is the server's: `shardkv/server/audit.py`."""

from __future__ import annotations

from typing import Protocol


class Audit(Protocol):
    def note(
        self,
        kind: str,
        *,
        who: str = "",
        address: str = "",
        door: str = "",
        what: str = "",
        allowed: bool,
        why: str = "",
    ) -> None:
        """`kind` is one of a few, fixed in the code; all other texts may come from a stranger. Never waits."""
        return  # what `NoAudit` inherits


class NoAudit(Audit):
    """Keeps nothing: for tests, and for a process without a log."""
