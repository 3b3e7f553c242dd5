"""incr, put-if-absent, count, delete-range: counters, and what concerns many keys at once."""

from __future__ import annotations

import sys

import click

from shardkv.cli.common import REFUSED, Failed, handled, output_option, timeout_option
from shardkv.cli.data import argument, clerk_of
from shardkv.cli.options import controllers_option
from shardkv.cli.output import print_json


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("key")
@click.argument("by", default=1, type=int)
@controllers_option
@timeout_option
@output_option
@handled
def incr(key: str, by: int, controllers: str | None, timeout: float, output: str) -> None:
    """Add BY (1 unless given, perhaps negative) to the decimal integer that KEY has, and print the new number.

    An absent key counts as 0.
    """
    with clerk_of(controllers, timeout) as clerk:
        number = clerk.incr(argument(key), by)
    if output == "json":
        print_json({"ok": True, "value": number})
    else:
        click.echo(number)


@click.command("put-if-absent")
@click.argument("key")
@click.argument("value")
@controllers_option
@timeout_option
@output_option
@handled
def put_if_absent(key: str, value: str, controllers: str | None, timeout: float, output: str) -> None:
    """Set KEY to VALUE if it is absent; exit 1 if it is there."""
    with clerk_of(controllers, timeout) as clerk:
        was_set = clerk.put_if_absent(argument(key), argument(value))
    if output == "json":
        print_json({"ok": was_set, "set": was_set})
    if not was_set:
        if output == "json":
            sys.exit(REFUSED)
        raise Failed(f"{key}: not set, the key is there")


@click.command()
@click.argument("start", default="")
@click.argument("end", default="")
@click.option("--prefix", help="Only keys that begin so.")
@controllers_option
@timeout_option
@output_option
@handled
def count(
    start: str, end: str, prefix: str | None, controllers: str | None, timeout: float, output: str
) -> None:
    """Count the keys with START <= key < END.

    Up to 4,096 keys of a shard are counted at one moment, the next ones a moment later.
    """
    if prefix is not None and (start or end):
        raise click.UsageError("--prefix says where to start and end; give no START or END with it")
    with clerk_of(controllers, timeout) as clerk:
        found = clerk.count(argument(start), argument(end), prefix=None if prefix is None else argument(prefix))
    if output == "json":
        print_json({"count": found})
    else:
        click.echo(found)


@click.command("delete-range")
@click.argument("start")
@click.argument("end")
@controllers_option
@timeout_option
@output_option
@handled
def delete_range(start: str, end: str, controllers: str | None, timeout: float, output: str) -> None:
    """Remove the keys with START <= key < END, and print how many there were. An empty '' is an open end.

    Up to 1,000 keys of a shard are removed at one moment, the next ones a moment later.
    """
    with clerk_of(controllers, timeout) as clerk:
        deleted = clerk.delete_range(argument(start), argument(end))
    if output == "json":
        print_json({"ok": True, "deleted": deleted})
    else:
        click.echo(deleted)
