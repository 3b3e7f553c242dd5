"""admin quota set, list, remove: how much a user, or a part of the keys, may ask for."""

from __future__ import annotations

import os
from typing import Any

import click

from shardkv.cli.common import Utf8, handled, output_option, timeout_option
from shardkv.cli.options import controllers_option
from shardkv.cli.output import print_json, print_table, say
from shardkv.cli.session import Session, with_session
from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.quotas import MAX_CONNECTIONS, MAX_RATE

user_option = click.option("--for-user", "name", type=Utf8(), help="Of this user.")
prefix_option = click.option("--prefix", help="Of all keys that begin so, whoever asks.")


@click.group()
def quota() -> None:
    """How much users, or parts of the keys, may ask for. Every process counts by itself."""


def _whose(name: str | None, prefix: str | None) -> pb.Quota:
    """Raises UsageError."""
    if (name is None) == (prefix is None):
        raise click.UsageError("a quota is for a user (--for-user) or a --prefix")
    return pb.Quota(user=name) if name is not None else pb.Quota(prefix=os.fsencode(prefix or ""))


def _ask(request: pb.AdminRequest, controllers: str | None, timeout: float, output: str, text: str) -> None:
    async def run(session: Session) -> None:
        await session.controller.admin(request, timeout)

    with_session(controllers, run)
    if output == "json":
        print_json({"ok": True})
    else:
        say(text)


@quota.command("set")
@user_option
@prefix_option
@click.option("--operations", type=click.IntRange(1, MAX_RATE), default=None, help="A second.")
@click.option(
    "--bytes",
    "size",
    type=click.IntRange(1, MAX_RATE),
    default=None,
    help="A second: of requests and, for a user, of answers.",
)
@click.option(
    "--connections", type=click.IntRange(1, MAX_CONNECTIONS), default=None, help="At once; of a user alone."
)
@controllers_option
@timeout_option
@output_option
@handled
def set_quota(
    name: str | None,
    prefix: str | None,
    operations: int | None,
    size: int | None,
    connections: int | None,
    controllers: str | None,
    timeout: float,
    output: str,
) -> None:
    """Give a user or a prefix a quota, in place of an older one. What is not given has no bound."""
    asked = _whose(name, prefix)
    if operations is None and size is None and connections is None:
        raise click.UsageError("give a bound: --operations, --bytes or --connections")
    asked.operations, asked.bytes, asked.connections = operations or 0, size or 0, connections or 0
    _ask(pb.AdminRequest(set_quota=asked), controllers, timeout, output, "the quota is set")


@quota.command()
@user_option
@prefix_option
@controllers_option
@timeout_option
@output_option
@handled
def remove(name: str | None, prefix: str | None, controllers: str | None, timeout: float, output: str) -> None:
    """Lift the quota of a user or a prefix."""
    request = pb.AdminRequest(remove_quota=_whose(name, prefix))
    _ask(request, controllers, timeout, output, "the quota is removed")


@quota.command("list")
@controllers_option
@timeout_option
@output_option
@handled
def list_quotas(controllers: str | None, timeout: float, output: str) -> None:
    """All quotas."""

    async def run(session: Session) -> dict[str, Any]:
        return await session.controller.users(timeout)

    found = with_session(controllers, run).get("quotas", [])
    if output == "json":
        print_json({"quotas": found})
        return
    print_table(
        ("whose", "operations/s", "bytes/s", "connections"),
        [
            (
                f"user {each['user']}" if each["user"] else f"prefix {each['prefix']}",
                *(
                    f"{each[bound]:,}" if each[bound] else "-"
                    for bound in ("operations", "bytes", "connections")
                ),
            )
            for each in found
        ],
    )
