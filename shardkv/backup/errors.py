"""What backing up and restoring raise."""

from __future__ import annotations


class BackupError(Exception):
    """A backup cannot be made or used; the text says why, and names the object if there is one."""


class Damaged(BackupError):
    """An object is not what was put there."""


class Missing(Damaged):
    """There is no such object."""


def first_error(failed: ExceptionGroup[Exception]) -> Exception:
    """The error for which the other tasks of a group were cancelled."""
    error: Exception = failed
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
