"""put, get, append, delete, cas, scan."""

from __future__ import annotations

import os
import sys

import click

from shardkv.cli.common import REFUSED, Failed, handled, output_option, timeout_option
from shardkv.cli.options import controllers_option, find_controllers, find_login, find_tls
from shardkv.cli.output import json_bytes, print_json, print_table, text
from shardkv.client import ShardClerk
from shardkv.client.ranges import bounds


def clerk_of(controllers: str | None, timeout: float) -> ShardClerk:
    return ShardClerk(find_controllers(controllers), timeout=timeout, tls=find_tls(), login=find_login())


def _done(output: str, **facts: object) -> None:
    if output == "json":
        print_json({"ok": True, **facts})


def argument(value: str) -> bytes:
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
    with clerk_of(controllers, timeout) as clerk:
        clerk.put(argument(key), argument(value))
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
    with clerk_of(controllers, timeout) as clerk:
        value = clerk.get(argument(key), consistency=consistency)  # type: ignore[call-overload]
    if output == "json":
        print_json(
            {
                "key": json_bytes(argument(key)),
                "found": value is not None,
                "value": None if value is None else json_bytes(value),
            }
        )
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
    with clerk_of(controllers, timeout) as clerk:
        clerk.append(argument(key), argument(value))
    _done(output)


@click.command()
@click.argument("key", required=False)
@click.option("--prefix", help="Remove all keys that begin so, and print how many there were.")
@controllers_option
@timeout_option
@output_option
@handled
def delete(key: str | None, prefix: str | None, controllers: str | None, timeout: float, output: str) -> None:
    """Remove KEY; exit 1 if it was absent."""
    if (key is None) == (prefix is None) or prefix == "":
        raise click.UsageError("give a KEY or a --prefix that is not empty")
    with clerk_of(controllers, timeout) as clerk:
        if prefix is not None:
            deleted = clerk.delete_prefix(argument(prefix))
        else:
            existed = clerk.delete(argument(key or ""))
    if prefix is not None:
        if output == "json":
            print_json({"ok": True, "deleted": deleted})
        else:
            click.echo(deleted)
        return
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
    with clerk_of(controllers, timeout) as clerk:
        swapped = clerk.cas(argument(key), None if absent else argument(old), argument(new))
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
@click.option("--reverse", is_flag=True, help="From the largest key down.")
@click.option("--keys-only", is_flag=True, help="Keys without their values.")
@controllers_option
@timeout_option
@output_option
@handled
def scan(
    start: str,
    end: str,
    prefix: str | None,
    limit: int | None,
    reverse: bool,
    keys_only: bool,
    controllers: str | None,
    timeout: float,
    output: str,
) -> None:
    """Print the pairs with START <= key < END, in key order."""
    if prefix is not None and (start or end):
        raise click.UsageError("--prefix says where to start and end; give no START or END with it")
    among = bounds(argument(start), argument(end), None if prefix is None else argument(prefix))
    with clerk_of(controllers, timeout) as clerk:
        if keys_only:
            keys = clerk.scan(*among, limit, reverse=reverse, keys_only=True)
            if output == "json":
                print_json([json_bytes(key) for key in keys])
            else:
                for key in keys:
                    click.echo(text(key))
            return
        pairs = clerk.scan(*among, limit, reverse=reverse)
        if output == "json":
            print_json([{"key": json_bytes(key), "value": json_bytes(value)} for key, value in pairs])
        elif sys.stdout.isatty():
            print_table(("key", "value"), [(text(key), text(value)) for key, value in pairs])
        else:
            for key, value in pairs:
                click.echo(f"{text(key)}\t{text(value)}")
