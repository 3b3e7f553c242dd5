"""admin user add, set, token, remove, list; admin access enable, disable: who may do what."""

from __future__ import annotations

import os
import secrets
from typing import Any

import click

from shardkv.cli.common import Failed, Utf8, handled, output_option, timeout_option
from shardkv.cli.options import controllers_option
from shardkv.cli.output import print_json, print_table, say
from shardkv.cli.session import Session, with_session
from shardkv.observe.overview import Overview
from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.accounts import Role
from shardkv.wire.proof import Verifier

role_choice = click.Choice([role.value for role in Role])
prefix_option = click.option(
    "--prefix", "prefixes", multiple=True, help="Only keys that begin so; may be given several times."
)


@click.group()
def user() -> None:
    """Users and what they may do."""


def _ask(request: pb.AdminRequest, controllers: str | None, timeout: float) -> None:
    async def run(session: Session) -> None:
        await session.controller.admin(request, timeout)

    with_session(controllers, run)


def _tell(output: str, text: str, **facts: object) -> None:
    if output == "json":
        print_json({"ok": True, **facts})
    else:
        say(text)


@user.command()
@click.argument("name", type=Utf8())
@click.option("--role", type=role_choice, required=True)
@prefix_option
@click.option("--certificate-only", is_flag=True, help="No token: known by the name in a certificate.")
@controllers_option
@timeout_option
@output_option
@handled
def add(
    name: str,
    role: str,
    prefixes: tuple[str, ...],
    certificate_only: bool,
    controllers: str | None,
    timeout: float,
    output: str,
) -> None:
    """Make a user NAME, and print its token: it is shown this once, and only what checks it is kept."""
    token = "" if certificate_only else secrets.token_urlsafe(32)
    change = pb.SetUser(name=name, create=True, role=role, prefixes=map(os.fsencode, prefixes))
    change.verifier = Verifier.of(token).encode() if token else b""
    _ask(pb.AdminRequest(set_user=change), controllers, timeout)
    _tell(output, token or f"{name} is known by certificate", **({"token": token} if token else {}))


@user.command("set")
@click.argument("name", type=Utf8())
@click.option("--role", type=role_choice)
@prefix_option
@click.option("--all-keys", is_flag=True, help="Without prefixes from now on.")
@controllers_option
@timeout_option
@output_option
@handled
def set_user(
    name: str,
    role: str | None,
    prefixes: tuple[str, ...],
    all_keys: bool,
    controllers: str | None,
    timeout: float,
    output: str,
) -> None:
    """Change the role or the prefixes of NAME; what is not given stays as it is."""
    if all_keys and prefixes:
        raise click.UsageError("--all-keys and --prefix contradict each other")
    change = pb.SetUser(
        name=name,
        role=role or "",
        set_prefixes=all_keys or bool(prefixes),
        prefixes=map(os.fsencode, prefixes),
    )
    _ask(pb.AdminRequest(set_user=change), controllers, timeout)
    _tell(output, f"{name} is changed")


@user.command()
@click.argument("name", type=Utf8())
@controllers_option
@timeout_option
@output_option
@handled
def token(name: str, controllers: str | None, timeout: float, output: str) -> None:
    """Give NAME a new token, and print it; the old one is worth nothing from now on."""
    fresh = secrets.token_urlsafe(32)
    change = pb.SetUser(name=name, verifier=Verifier.of(fresh).encode())
    _ask(pb.AdminRequest(set_user=change), controllers, timeout)
    _tell(output, fresh, token=fresh)


@user.command()
@click.argument("name", type=Utf8())
@controllers_option
@timeout_option
@output_option
@handled
def remove(name: str, controllers: str | None, timeout: float, output: str) -> None:
    """Remove the user NAME."""
    _ask(pb.AdminRequest(remove_user=pb.RemoveUser(name=name)), controllers, timeout)
    _tell(output, f"{name} is removed")


@user.command("list")
@controllers_option
@timeout_option
@output_option
@handled
def list_users(controllers: str | None, timeout: float, output: str) -> None:
    """The users, and whether access control is on."""

    async def run(session: Session) -> dict[str, Any]:
        return await session.controller.users(timeout)

    found = with_session(controllers, run)
    if output == "json":
        print_json(found)
        return
    click.echo(f"access control is {'on' if found['enabled'] else 'OFF: everybody may do everything'}")
    print_table(
        ("user", "role", "prefixes", "token"),
        [
            (each["name"], each["role"], " ".join(each["prefixes"]) or "-", "yes" if each["token"] else "no")
            for each in found["users"]
        ],
    )


@click.group()
def access() -> None:
    """Switch access control on or off."""


@access.command()
@click.option("--force", is_flag=True, help="Even if some process does not answer, or cannot be recognized.")
@controllers_option
@timeout_option
@output_option
@handled
def enable(force: bool, controllers: str | None, timeout: float, output: str) -> None:
    """Ask everybody who he is from now on. Takes an admin user (`admin user add`)."""

    async def run(session: Session) -> None:
        overview = await session.overview(timeout)
        if not force:
            _check_processes(overview)
        request = pb.AdminRequest(access_control=pb.SetAccessControl(enabled=True))
        await session.controller.admin(request, timeout)

    with_session(controllers, run)
    _tell(output, "access control is on")
    click.echo("renew the cluster's secret if others could read it: docs/security.md has the steps", err=True)


def _check_processes(overview: Overview) -> None:
    """Processes that cannot show that they belong to the cluster would be cut off from it. Raises Failed."""
    everybody = dict(overview.controllers)
    for replicas in overview.groups.values():
        everybody |= replicas
    for address, said in everybody.items():
        if said is None:
            raise Failed(f"{address} does not answer: it may be one that would be cut off; or use --force")
        if not said.get("knows_processes"):
            raise Failed(
                f"{address} could not show that it belongs to the cluster: start every server with "
                "--secret-file, or with TLS (`shardkv certs`)"
            )


@access.command()
@controllers_option
@timeout_option
@output_option
@handled
def disable(controllers: str | None, timeout: float, output: str) -> None:
    """Let everybody do everything again."""
    _ask(pb.AdminRequest(access_control=pb.SetAccessControl(enabled=False)), controllers, timeout)
    _tell(output, "access control is off")
