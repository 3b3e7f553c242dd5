"""What backing up and restoring raise."""

from __future__ import annotations


class BackupError(Exception):
    """A backup cannot be made or used; the text says why, and names the object if there is one."""


class Damaged(BackupError):
    """An object is not what was put there."""


class Missing(Damaged):
    """There is no such object."""
