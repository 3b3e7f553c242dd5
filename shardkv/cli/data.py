"""put, get, append, delete, cas, scan."""

from __future__ import annotations

import os
import sys

import click

from shardkv.cli.common import REFUSED, Failed, handled, output_option, timeout_option
from shardkv.cli.options import controllers_option, find_controllers, find_login, find_tls
from shardkv.cli.output import json_bytes, print_json, print_table, text
from shardkv.client import ShardClerk


def _clerk(controllers: str | None, timeout: float) -> ShardClerk:
    return ShardClerk(find_controllers(controllers), timeout=timeout, tls=find_tls(), login=find_login())


def _done(output: str, **facts: object) -> None:
    if output == "json":
        print_json({"ok": True, **facts})


def _argument(value: str) -> bytes:
    return os.fsencode(value)  # the bytes that were typed, UTF-8 or not


@click.command()
@click.argument("key")
@click.argument("value")
@controllers_option
@timeout_option
@output_option
@handled
def put(key: str, value: str, controllers: str | None, timeout: float, output: str) -> None:
    """Set KEY to VALUE."""
    with _clerk(controllers, timeout) as clerk:
        clerk.put(_argument(key), _argument(value))
    _done(output)


@click.command()
@click.argument("key")
@click.option("--consistency", type=click.Choice(["leader", "any", "stale"]), default="leader")
@controllers_option
@timeout_option
@output_option
@handled
def get(key: str, consistency: str, controllers: str | None, timeout: float, output: str) -> None:
    """Print the value of KEY; exit 1 if it is absent."""
    with _clerk(controllers, timeout) as clerk:
        value = clerk.get(_argument(key), consistency=consistency)  # type: ignore[arg-type]
    if output == "json":
        print_json({"key": key, "found": value is not None, "value": value and json_bytes(value)})
    if value is None:
        if output == "json":
            sys.exit(REFUSED)
        raise Failed(f"{key}: no such key")
    if output != "json":
        sys.stdout.buffer.write(value)
        if sys.stdout.isatty():
            click.echo()


@click.command()
@click.argument("key")
@click.argument("value")
@controllers_option
@timeout_option
@output_option
@handled
def append(key: str, value: str, controllers: str | None, timeout: float, output: str) -> None:
    """Add VALUE to the end of what KEY has."""
    with _clerk(controllers, timeout) as clerk:
        clerk.append(_argument(key), _argument(value))
    _done(output)


@click.command()
@click.argument("key")
@controllers_option
@timeout_option
@output_option
@handled
def delete(key: str, controllers: str | None, timeout: float, output: str) -> None:
    """Remove KEY; exit 1 if it was absent."""
    with _clerk(controllers, timeout) as clerk:
        existed = clerk.delete(_argument(key))
    if output == "json":
        print_json({"ok": existed, "existed": existed})
    if not existed:
        if output == "json":
            sys.exit(REFUSED)
        raise Failed(f"{key}: no such key")


@click.command()
@click.argument("key")
@click.argument("old")
@click.argument("new")
@click.option("--absent", is_flag=True, help="Expect KEY to be absent; OLD is ignored.")
@controllers_option
@timeout_option
@output_option
@handled
def cas(
    key: str, old: str, new: str, absent: bool, controllers: str | None, timeout: float, output: str
) -> None:
    """Set KEY to NEW if it has OLD; exit 1 if it has something else."""
    with _clerk(controllers, timeout) as clerk:
        swapped = clerk.cas(_argument(key), None if absent else _argument(old), _argument(new))
    if output == "json":
        print_json({"ok": swapped, "swapped": swapped})
    if not swapped:
        if output == "json":
            sys.exit(REFUSED)
        raise Failed(f"{key}: not swapped, the value was another")


@click.command()
@click.argument("start", default="")
@click.argument("end", default="")
@click.option("--prefix", help="Only keys that begin so.")
@click.option("--limit", type=click.IntRange(min=0), help="At most so many pairs.")
@controllers_option
@timeout_option
@output_option
@handled
def scan(
    start: str,
    end: str,
    prefix: str | None,
    limit: int | None,
    controllers: str | None,
    timeout: float,
    output: str,
) -> None:
    """Print the pairs with START <= key < END, in key order."""
    first, last = _argument(start), _argument(end)
    if prefix is not None:
        if start or end:
            raise click.UsageError("--prefix says where to start and end; give no START or END with it")
        first = _argument(prefix)
        last = next_prefix(first)
    with _clerk(controllers, timeout) as clerk:
        pairs = clerk.scan(first, last, limit)
        if output == "json":
            print_json([{"key": json_bytes(key), "value": json_bytes(value)} for key, value in pairs])
        elif sys.stdout.isatty():
            print_table(("key", "value"), [(text(key), text(value)) for key, value in pairs])
        else:
            for key, value in pairs:
                click.echo(f"{text(key)}\t{text(value)}")


def next_prefix(prefix: bytes) -> bytes:
    """The first key after all that begin with `prefix`; empty where there is none."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else b""
