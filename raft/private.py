"""Files that nobody but their owner can read, whatever the umask is: directories 0700, files 0600.

A process sets its umask first (`keep_private`), so that files which a library makes for it are private as well.
A directory that an older version or another program left open is tightened when it is opened.

Limits: a directory of another user is not ours to change, and neither is one with the sticky bit (`/tmp`):
both are told in the log and stay as they are.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

DIRECTORY, FILE = 0o700, 0o600
OTHERS, WORLD = 0o077, 0o007


def keep_private() -> None:
    """From now on, what this process makes is its owner's alone."""
    os.umask(OTHERS)


def make_directory(path: Path) -> None:
    """Make a directory, and those above it that are missing, for their owner alone. One that is there stays as it is."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for each in reversed(missing):
        each.mkdir(DIRECTORY, exist_ok=True)


def tighten(top: Path, deep: bool = True) -> int:
    """Take a directory, and all below it where `deep`, away from other users; says so in one line of the log.

    Returns how many files and directories others could use.
    """
    count, kept = 0, ""
    for path in _tree(top) if deep else [top]:
        try:
            found = _tighten_one(path)
        except FileNotFoundError:
            continue  # it went meanwhile
        except OSError as error:
            kept = kept or f"{path}: {error.strerror}"
            continue
        count += found
    if count:
        log.warning(
            "other users of this machine could read %s: %d files and directories are private to their owner now",
            top,
            count,
        )
    if kept:
        log.warning(
            "other users of this machine may read files in %s, and their permissions cannot be changed: %s",
            top,
            kept,
        )
    return count


def warn_if_open(path: Path) -> None:
    """A line in the log where others can read a file that is secret, and that we were given: it stays as it is."""
    try:
        is_open = bool(path.stat().st_mode & WORLD)  # a group may be meant: that is how containers get secrets
    except OSError:
        return  # who reads it says so
    if is_open:
        log.warning("other users of this machine can read or change %s, which is secret: run chmod 600", path)


def _tree(top: Path) -> Iterator[Path]:
    yield top
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            yield Path(directory, name)


def _tighten_one(path: Path) -> bool:
    """Whether it had to be. Raises OSError."""
    found = path.lstat()
    is_directory = stat.S_ISDIR(found.st_mode)
    if not (is_directory or stat.S_ISREG(found.st_mode)) or not found.st_mode & OTHERS:
        return False
    if found.st_uid != os.geteuid():
        raise PermissionError(1, "it belongs to another user")
    if found.st_mode & stat.S_ISVTX:
        raise PermissionError(1, "many users share it (sticky bit)")
    # By a descriptor: a name may be another file's by now, and must not lead elsewhere.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, DIRECTORY if is_directory else FILE)
    finally:
        os.close(descriptor)
    return True
