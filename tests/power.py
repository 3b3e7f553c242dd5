"""What a loss of power leaves of real files: every write, rename and sync of this process is watched.

`Power` keeps beside the real files what a strict disk would hold. Bytes reach it with a sync of
their file, names with a sync of their directory, and nothing by itself. After a sync that failed,
what it should have written counts as clean and is lost, as with Linux's page cache (fsyncgate).
The real files are what a killed process leaves; `Power.lost` builds what a power loss leaves.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """The process dies here: nothing of it runs any more."""


class Power:
    """Watches everything below `root`, which counts as durable itself."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path) -> None:
        self.root = root.resolve()
        self.log: list[str] = []  # calls that change or sync something, with the names they are about
        self.fail: Callable[[str], BaseException | None] = lambda call: None
        self._bytes: dict[int, bytearray] = {}  # inode -> what a sync has made durable
        self._pending: dict[int, list[tuple[int, bytes | None]]] = {}  # (offset, data), or a new size
        self._names: dict[int, dict[str, int]] = {self._inode(root): {}}  # directory -> name -> inode
        self._kinds: dict[int, bool] = {self._inode(root): True}  # inode -> whether it is a directory
        for name in ("pwrite", "ftruncate", "fsync", "fdatasync", "rename", "unlink", "mkdir"):
            patch.setattr(os, name, self._watched(name, getattr(os, name)))

    # ---- looking

    def taken(self) -> list[str]:
        """The calls since the last look."""
        log, self.log = self.log, []
        return log

    def lost(self, into: Path) -> Path:
        """The files as they are once the power was out, rebuilt below `into`."""
        into.mkdir()
        self._build(self._inode(self.root), into)
        return into

    def _build(self, directory: int, into: Path) -> None:
        for name, inode in self._names.get(directory, {}).items():
            if self._kinds[inode]:
                (into / name).mkdir()
                self._build(inode, into / name)
            else:
                (into / name).write_bytes(self._bytes.get(inode, b""))

    # ---- watching

    @staticmethod
    def _inode(path: str | Path) -> int:
        return os.stat(path).st_ino

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *rest: Any, **more: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            if not Path(path).is_relative_to(self.root):
                return real(target, *rest, **more)
            shown = f"{name} {Path(path).relative_to(self.root)}"
            error = self.fail(shown)
            inode = os.fstat(target).st_ino if isinstance(target, int) else 0
            if error is not None:
                if isinstance(error, OSError):
                    self._pending.pop(inode, None)  # counted as clean, and not on the disk
                raise error
            self.log.append(shown)
            match name:
                case "pwrite":
                    self._pending.setdefault(inode, []).append((rest[1], bytes(rest[0])))
                case "ftruncate":
                    self._pending.setdefault(inode, []).append((rest[0], None))
                case "fsync" | "fdatasync":
                    self._sync(target, inode)
            return real(target, *rest, **more)

        return call

    def _sync(self, descriptor: int, inode: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            self._kinds[inode] = True
            names = self._names[inode] = {}
            for entry in os.scandir(path):
                names[entry.name] = entry.inode()
                self._kinds[entry.inode()] = entry.is_dir()
            return
        content = self._bytes.setdefault(inode, bytearray())
        for offset, data in self._pending.pop(inode, []):
            if data is None:
                del content[offset:]
            else:
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + len(data)] = data


def eio(*calls: str) -> Callable[[str], BaseException | None]:
    """Calls with these beginnings fail."""
    return lambda call: OSError(errno.EIO, "the disk failed") if call.startswith(calls) else None


def kill(*calls: str) -> Callable[[str], BaseException | None]:
    """The process dies before the first call that begins so."""
    return lambda call: Killed() if call.startswith(calls) else None
