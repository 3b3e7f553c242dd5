"""The audit log: who was let in and who was not, and what was changed, one JSON object a line.

    time     ISO 8601, UTC
    kind     connection, tls, login, denied, busy, admin, read-all, certificate; left-out
    who      the user's or the certificate's name, as far as it is known
    address  where the connection comes from
    door     main (streams and gRPC), stream, grpc, page, metrics
    what     the method, for admin requests with what they ask for
    allowed  true or false
    why      why not
    left_out how many lines of this kind were left out before this one

All that a stranger chose is ASCII in here, with control characters escaped, and cut to `MAX_TEXT`
characters. No token, no hash of one and no value is ever in it.

Of each kind so many lines a second are written, and the rest counted; a flood of one kind so
hides no other. The file lies in the data directory, readable by its owner alone, and is
rotated by size, so that all of it is bounded. A thread writes it: its disk may hang.
A line that cannot be written is counted and told of in the next one: the replica goes on.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.protobuf.text_format import MessageToString

from shardkv.shardctrler import shardctrler_pb2 as ctl

log = logging.getLogger(__name__)

AUDIT_FILE = "audit.log"
MAX_FILE_BYTES = 8 << 20
KEPT_FILES = 4  # besides the one that is written
MAX_WAITING = 10_000
MAX_TEXT = 256
A_SECOND, BURST = 20, 200  # of one kind
TOLD_SECONDS = 10.0  # how soon the count of what was left out is written, where no line follows


class AuditLog:
    """See `wire.audit.Audit`. Ended by `close`."""

    def __init__(self, path: Path | None, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """`path` None: to standard error. Raises OSError where the file cannot be opened."""
        self._path, self._max_file_bytes = path, max_file_bytes
        self._descriptor = _open(path) if path is not None else -1
        self._size = os.fstat(self._descriptor).st_size if path is not None else 0
        self._lines: queue.Queue[tuple[float, dict[str, Any]] | None] = queue.Queue(MAX_WAITING)
        self._lock = threading.Lock()
        self._left_out: Counter[str] = Counter()
        self._tokens: dict[str, tuple[float, float]] = {}  # of each kind: how many, when that was counted
        self.written = 0
        self._failed = False
        self._thread = threading.Thread(target=self._write_forever, name="audit", daemon=True)
        self._thread.start()

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
        """Never waits."""
        kind = kind if allowed or kind != "login" else "login refused"
        now = time.monotonic()
        tokens, counted_at = self._tokens.get(kind, (float(BURST), now))
        tokens = min(BURST, tokens + (now - counted_at) * A_SECOND)
        taken = tokens >= 1
        self._tokens[kind] = (tokens - taken, now)
        if not taken:
            with self._lock:
                self._left_out[kind] += 1
            return
        line = {"kind": kind, "who": who, "address": address, "door": door, "what": what, "allowed": allowed}
        if why:
            line["why"] = why
        self._enqueue(line)

    def _enqueue(self, line: dict[str, Any]) -> None:
        try:
            self._lines.put_nowait((time.time(), line))
        except queue.Full:  # the disk hangs
            with self._lock:
                self._left_out[line["kind"]] += 1

    def close(self) -> None:
        """Writes what waits, unless the disk hangs."""
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(2.0)

    # ---- on the thread

    def _write_forever(self) -> None:
        told_at = time.monotonic()
        while True:
            try:
                found = self._lines.get(timeout=1.0)
            except queue.Empty:
                found = ()  # type: ignore[assignment]
            if found:
                moment, line = found
                with self._lock:
                    left_out = self._left_out.pop(line["kind"], 0)
                if left_out:
                    line["left_out"] = left_out
                self._write(moment, line)
            if found is None or time.monotonic() - told_at >= TOLD_SECONDS:
                told_at = time.monotonic()
                with self._lock:
                    rest, self._left_out = self._left_out, Counter()
                for kind, count in rest.items():
                    self._write(time.time(), {"kind": "left-out", "what": kind, "left_out": count})
            if found is None:
                if self._descriptor >= 0:
                    os.close(self._descriptor)
                return

    def _write(self, moment: float, line: dict[str, Any]) -> None:
        fields = {"time": datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")} | {
            name: printable(value) if isinstance(value, str) else value for name, value in line.items()
        }
        data = (json.dumps(fields) + "\n").encode("ascii")
        try:
            if self._path is None:
                sys.stderr.write(data.decode("ascii"))
                sys.stderr.flush()
            else:
                if self._size and self._size + len(data) > self._max_file_bytes:
                    self._rotate(self._path)
                self._size += os.write(self._descriptor, data)
            self.written += 1
            self._failed = False
        except (OSError, ValueError) as error:
            with self._lock:
                self._left_out[line["kind"]] += 1 + line.get("left_out", 0)
            if not self._failed:
                log.error("the audit log cannot be written, and the replica goes on without: %s", error)
            self._failed = True

    def _rotate(self, path: Path) -> None:
        """Raises OSError."""
        for number in range(KEPT_FILES - 1, 0, -1):
            older = path.with_name(f"{path.name}.{number}")
            if older.exists():
                older.rename(path.with_name(f"{path.name}.{number + 1}"))
        path.rename(path.with_name(f"{path.name}.1"))
        fresh = _open(path)
        os.close(self._descriptor)
        self._descriptor, self._size = fresh, 0


def _open(path: Path) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.fchmod(descriptor, 0o600)
    return descriptor


def printable(text: str) -> str:
    """Short, and without characters that a terminal or a reader of lines would take for commands."""
    cut = text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut)


# ---- what is asked for

AS_COMMANDS = {"remove_user": "user remove", "set_quota": "quota set", "remove_quota": "quota remove"}
CHANGES = frozenset(["ctl.admin", "raft.members", "kv.transfer"])


def describe(method: str, payload: bytes) -> str:
    """A call for the audit log: an admin request with what it asks for, another one by its method."""
    if method == "ctl.admin":
        try:
            return describe_admin(ctl.AdminRequest.FromString(payload))
        except DecodeError:
            return "ctl.admin: malformed"
    if method in CHANGES:
        return f"{method} {payload[:MAX_TEXT].decode(errors='backslashreplace')}"
    return method


def describe_admin(request: ctl.AdminRequest) -> str:
    """An admin request: `set_user name=app role=read-write …`. What checks a token is left out."""
    name = request.WhichOneof("op")
    if name is None:
        return "ctl.admin: no operation"
    message = getattr(request, name)
    if name == "access_control":
        return f"access {'enable' if message.enabled else 'disable'}"
    if name == "set_user":
        shown = ctl.SetUser()
        shown.CopyFrom(message)
        shown.ClearField("verifier")
        token = " with a new token" if message.verifier else ""
        return f"user {'add' if message.create else 'set'}: {_text(shown)}{token}"
    return f"{AS_COMMANDS.get(name, name)}: {_text(message)}"


def _text(message: Message) -> str:
    return MessageToString(message, as_one_line=True)[:MAX_TEXT]
