"""What all commands share: how a failure is told, and exit statuses.

0 done    1 refused or failed    2 usage    3 not reachable, or timed out    130 interrupted

A failure is one line on stderr. With `-o json`, stdout has one document in any case: what the command
found, or {"ok": false, "error": {"kind", "message", "status"}}.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import click

from shardkv.cli.output import escaped, print_json, printed_json
from shardkv.process.secret_file import BadSecretFile
from shardkv.wire.tls import BadCertificate

T = TypeVar("T")
REFUSED, USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130
KINDS = {REFUSED: "Refused", UNREACHABLE: "Unreachable"}
MOST = (1 << 63) - 1  # of a group's, a shard's, a replica's number
TRACEBACK = "SHARDKV_TRACEBACK"  # in the environment: show where a bug is


class Failed(click.ClickException):
    """A command failed: one line for people, the exit status, and what kind of failure it is for programs."""

    def __init__(self, text: str, status: int = REFUSED, kind: str = "") -> None:
        super().__init__(text)
        self.exit_code = status  # type: ignore[misc]
        self.kind = kind or KINDS[status]

    @property
    def status(self) -> int:
        return self.exit_code


def asks_json(arguments: Sequence[str]) -> bool:
    """Whether a command line says -o json: asked also where the rest of it is wrong."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return any(
        (option, value) in (("-o", "json"), ("--output", "json")) or option in ("-ojson", "--output=json")
        for option, value in pairs
    )


def tell_failure(text: str, status: int, kind: str, as_json: bool) -> None:
    """The line, and the document where the command has printed none."""
    # Lines stay lines; what came from elsewhere must not move the cursor of whoever reads.
    click.echo("shardkv: " + "\n".join(map(escaped, text.split("\n"))), err=True)
    if as_json and not printed_json():
        print_json({"ok": False, "error": {"kind": kind, "message": text, "status": status}})


def handled(command: Callable[..., T]) -> Callable[..., T]:
    """Make errors that users can cause Failed: one line and the right exit status (`cli/main.py` tells them)."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> T:
        try:
            return command(*arguments, **options)
        except click.ClickException:
            raise
        except Exception as error:
            told = _explain(error)
            if told is None:
                raise
            text, status = told
            kind = getattr(error, "kind", "") or type(error).__name__
            raise Failed(text, status, kind) from error

    return run


def _explain(error: Exception) -> tuple[str, int] | None:
    """One line and the exit status for an error that a user can cause; None for any other."""
    # Imported here, since most commands end well and the rest can wait.
    from shardkv.backup.errors import BackupError
    from shardkv.client.errors import DeadlineExceeded, ShardKVError, Unavailable
    from shardkv.process.local_cluster import ClusterError
    from shardkv.shardctrler.client import AccessDenied, AdminRefused, BadQuery, ControllerUnavailable

    match error:
        case ControllerUnavailable() | Unavailable() | DeadlineExceeded():
            return f"{error}. Is the cluster up? `shardkv admin status` shows what answers", UNREACHABLE
        case AccessDenied():
            return f"PermissionDenied: {error}", REFUSED
        case AdminRefused():
            return f"refused ({error.kind}): {error}", REFUSED
        case BackupError() | ClusterError():
            return str(error), REFUSED
        case BadQuery() | ShardKVError() | BadCertificate() | BadSecretFile():
            return f"{type(error).__name__}: {error}", REFUSED
        case BrokenPipeError():
            return None  # whoever read our output has gone: click ends us without a word
        case OSError() if error.filename is not None:
            where = os.fsdecode(error.filename)
            return f"{where}: {error.strerror}: check the path, and that this user may use it", REFUSED
    return None


class Utf8(click.ParamType):  # type: ignore[type-arg]
    """Text that can be sent as such: a name."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text or not text.isprintable():
            self.fail("give a name of printable characters (UTF-8)", param, ctx)
        return text


class Seconds(click.ParamType):  # type: ignore[type-arg]
    """A time that ends: a finite number above 0, or from 0 on. `what`: other numbers of that kind."""

    name = "seconds"

    def __init__(self, what: str = "number of seconds", may_be_zero: bool = False) -> None:
        self._what, self._may_be_zero = what, may_be_zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            self.fail(f"{value!r} is no {self._what}", param, ctx)
        if not (0 < seconds < math.inf or (self._may_be_zero and seconds == 0)):
            least = "from 0 on" if self._may_be_zero else "above 0"
            self.fail(f"{value} is no {self._what} {least}", param, ctx)
        return min(seconds, float(1 << 31))  # what timers take


output_option = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", help="For people, or for scripts."
)
timeout_option = click.option("--timeout", type=Seconds(), default=10.0, show_default=True, help="Seconds.")
