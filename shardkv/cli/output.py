"""How results look: tables for people, JSON for programs."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console


PLAIN_COLUMNS = 140  # where the output is no terminal


@cache
def console() -> Console:
    """Where tables and progress go. Imported when first used: `get` and `health` need no tables."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PLAIN_COLUMNS)


def print_json(value: object) -> None:
    click.echo(json.dumps(value))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    console().print(table)


def text(data: bytes) -> str:
    """Bytes for a terminal: UTF-8 where they are that, escapes where not."""
    return data.decode("utf-8", errors="backslashreplace")


def json_bytes(data: bytes) -> object:
    """Bytes for JSON: a string where they are UTF-8, else {"base64": …}."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}
