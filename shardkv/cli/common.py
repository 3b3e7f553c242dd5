"""What all commands share: how a failure is told, and exit statuses.

0 done    1 refused or failed    2 usage    3 not reachable, or timed out
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from shardkv.process.secret_file import BadSecretFile
from shardkv.wire.tls import BadCertificate

T = TypeVar("T")
REFUSED, UNREACHABLE = 1, 3


class Failed(Exception):
    """A command failed: one line for people, and the exit status."""

    def __init__(self, text: str, status: int = REFUSED) -> None:
        super().__init__(text)
        self.status = status


def fail(text: str, status: int) -> None:
    click.echo(f"shardkv: {text}", err=True)
    sys.exit(status)


def handled(command: Callable[..., T]) -> Callable[..., T]:
    """Errors that users can cause end in one line and the right exit status."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> T:
        try:
            return command(*arguments, **options)
        except Failed as error:
            fail(str(error), error.status)
        except KeyboardInterrupt:
            sys.exit(130)
        except click.exceptions.Exit:
            raise
        except Exception as error:
            told = _explain(error)
            if told is None:  # a bug of ours, or click's own: those say themselves what they are
                raise
            fail(*told)
        raise AssertionError("fail() does not return")

    return run


def _explain(error: Exception) -> tuple[str, int] | None:
    """One line and the exit status for an error that a user can cause; None for any other."""
    # Imported here, since most commands end well and the rest can wait.
    from shardkv.backup.errors import BackupError
    from shardkv.client.errors import DeadlineExceeded, ShardKVError, Unavailable
    from shardkv.shardctrler.client import AccessDenied, AdminRefused, BadQuery, ControllerUnavailable

    match error:
        case ControllerUnavailable() | Unavailable() | DeadlineExceeded():
            return f"{error}. Is the cluster up? `shardkv admin status` shows what answers", UNREACHABLE
        case AccessDenied():
            return f"PermissionDenied: {error}", REFUSED
        case AdminRefused():
            return f"refused ({error.kind}): {error}", REFUSED
        case BackupError():
            return str(error), REFUSED
        case BadQuery() | ShardKVError() | BadCertificate() | BadSecretFile():
            return f"{type(error).__name__}: {error}", REFUSED
    return None


output_option = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", help="For people, or for scripts."
)
timeout_option = click.option("--timeout", default=10.0, show_default=True, help="Seconds.")
