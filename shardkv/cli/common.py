"""What all commands share: where the cluster is, how results and errors look, exit statuses.

0 done    1 refused or failed    2 usage    3 not reachable, or timed out
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from client.blocking import background_loop
from client.errors import DeadlineExceeded, ShardKVError, Unavailable
from shardctrler.query import AdminRefused, BadQuery, ControllerUnavailable
from shardkv.process import split_addresses

T = TypeVar("T")
REFUSED, UNREACHABLE = 1, 3
DEFAULT_DATA = "data"
MANIFEST = "cluster.json"

console = Console()


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
        except (ControllerUnavailable, Unavailable, DeadlineExceeded) as error:
            fail(f"{error}. Is the cluster up? `shardkv admin status` shows what answers", UNREACHABLE)
        except AdminRefused as error:
            fail(f"refused ({error.kind}): {error}", REFUSED)
        except (BadQuery, ShardKVError) as error:
            fail(f"{type(error).__name__}: {error}", REFUSED)
        except KeyboardInterrupt:
            sys.exit(130)
        raise AssertionError("fail() does not return")

    return run


def find_controllers(given: str | None) -> tuple[str, ...]:
    """From the option, the environment, or ./data/cluster.json. Raises Failed."""
    if given:
        try:
            return split_addresses(given)
        except ValueError as error:
            raise click.UsageError(f"--controllers: {error}") from None
    manifest = Path(DEFAULT_DATA) / MANIFEST
    if manifest.exists():
        return tuple(json.loads(manifest.read_text())["controllers"])
    raise click.UsageError(
        "no cluster named: give --controllers host:port,…, set SHARDKV_CONTROLLERS, "
        f"or stand where {manifest} is"
    )


controllers_option = click.option(
    "--controllers",
    envvar="SHARDKV_CONTROLLERS",
    metavar="HOST:PORT,…",
    help="Controller replicas; the default is ./data/cluster.json.",
)
output_option = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", help="For people, or for scripts."
)
timeout_option = click.option("--timeout", default=10.0, show_default=True, help="Seconds.")


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """On the loop that the blocking clerks use: one for the whole command."""
    return asyncio.run_coroutine_threadsafe(work, background_loop()).result()


def print_json(value: object) -> None:
    click.echo(json.dumps(value))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    console.print(table)


def text(data: bytes) -> str:
    """Bytes for a terminal: UTF-8 where they are that, escapes where not."""
    return data.decode("utf-8", errors="backslashreplace")


def json_bytes(data: bytes) -> object:
    """Bytes for JSON: a string where they are UTF-8, else {"base64": …}."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}
