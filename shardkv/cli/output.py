"""How results look: tables for people, JSON for programs."""

from __future__ import annotations

import base64
import json
import sys
import unicodedata
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


_documents = 0  # printed by this command


def print_json(value: object) -> None:
    """One document on one line. Raises ValueError for a number that JSON does not have (nan)."""
    global _documents
    _documents += 1
    click.echo(json.dumps(value, allow_nan=False))


def printed_json() -> bool:
    """Whether this command has printed a document."""
    return _documents > 0


def begin_output() -> None:
    """A command begins: it has printed nothing. For a process that runs several, as tests do."""
    global _documents
    _documents = 0
    console.cache_clear()  # it holds on to the stdout of the command before


def escaped(text: str) -> str:
    """Text that cannot move a terminal's cursor, hide or reverse what stands beside it: such characters as escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else _escape(char) for char in text
    )


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode()


def say(line: str, err: bool = False) -> None:
    """A line whose parts come from elsewhere: from servers, or from keys."""
    click.echo(escaped(line), err=err)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Cells are shown as they are: nothing in them is markup, and control characters are shown as escapes."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*[Text(escaped(str(cell))) for cell in row])
    console().print(table, highlight=False)


def text(data: bytes) -> str:
    """Bytes for people: UTF-8 where they are that, escapes where not, and for control characters."""
    return escaped(data.decode("utf-8", errors="backslashreplace"))


def json_bytes(data: bytes) -> object:
    """Bytes for JSON: a string where they are UTF-8, else {"base64": …}."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}
