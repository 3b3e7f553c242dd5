"""admin join, leave, move, split, merge, rebalance, query, status, transfer-leader."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import click
from rich.filesize import decimal
from rich.markup import escape as markup
from rich.progress import Progress

from shardkv.cli.common import (
    INTERRUPTED,
    MOST,
    UNREACHABLE,
    Failed,
    Seconds,
    handled,
    output_option,
    timeout_option,
)
from shardkv.cli.lazy import LazyGroup
from shardkv.cli.options import controllers_option
from shardkv.cli.output import console, escaped, json_bytes, print_json, print_table, say, text
from shardkv.cli.session import Session, with_session
from shardkv.observe.overview import (
    Overview,
    ask_status,
    held_up,
    moves,
    notes,
    problems,
    role_of,
    wait_settled,
    what_waits,
)
from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.shard_map import Config
from shardkv.wire.address import split_addresses
from shardkv.wire.calls import Code, Unreachable, parse

wait_option = click.option("--wait", is_flag=True, help="Return when every shard serves.")
wait_timeout_option = click.option(
    "--wait-timeout", type=Seconds(), default=600.0, show_default=True, help="Seconds for --wait."
)

cut_option = click.option(
    "--force", is_flag=True, help="Also a shard that is on its way to a group that does not answer."
)
TELL_SECONDS = 10.0  # between two lines about what --wait waits for
NAMED = 3  # reasons why shards do not serve, in one error


# Each of these is a file of its own, which `admin join` need not import.
ELSEWHERE = {
    "access": "users:access",
    "check": "check:check",
    "damage": "damage:damage",
    "member": "members:member",
    "quota": "quotas:quota",
    "user": "users:user",
}


@click.group(cls=LazyGroup, lazy={name: f"shardkv.cli.{where}" for name, where in ELSEWHERE.items()})
def admin() -> None:
    """Change and look at the shard map."""


def _change(
    request: pb.AdminRequest | None,  # None: nothing is to be done but to wait
    controllers: str | None,
    timeout: float,
    output: str,
    wait: bool,
    wait_timeout: float,
    cuts: int = 0,  # a shard that must not be behind a move to a group that is down
) -> None:
    made: list[int] = []

    async def run(session: Session) -> None:
        if cuts:
            await _check_moved(session, cuts, timeout)
        if request is None:
            num = (await session.controller.query(None, timeout)).num
        else:
            num = await session.controller.admin(request, timeout)
        made.append(num)
        served, why = None, ""
        if wait:
            served = await _wait(session, wait_timeout, output)
            if not served:
                why = await _why_not(session, timeout, wait_timeout)
        if output == "json":
            print_json(
                {"ok": served is not False, "num": num, **({} if served is None else {"served": served})}
            )
        else:
            click.echo(f"configuration {num}" + (", every shard serves" if served else ""))
        if served is False:
            raise Failed(f"configuration {num} is made, but {why}", UNREACHABLE)

    try:
        with_session(controllers, run)
    except KeyboardInterrupt:
        if not made:
            raise
        text = f"configuration {made[0]} is made, and its moves go on; `shardkv admin status` shows how far they are"
        raise Failed(text, INTERRUPTED, "Interrupted") from None


async def _why_not(session: Session, timeout: float, wait_timeout: float) -> str:
    """Why `--wait` does not say that every shard serves."""
    if not (await session.controller.query(None, timeout)).groups:
        return "nobody serves: no group is in it. Let one join: `shardkv admin join`"
    waits = what_waits(await session.overview(timeout))[:NAMED]
    return f"not every shard serves after {wait_timeout:g} s; `shardkv admin status` shows which" + (
        f": {'; '.join(waits)}" if waits else ""
    )


async def _check_moved(session: Session, shard: int, timeout: float) -> None:
    """Refuse to cut a shard that is behind a move to a group that is down. Raises Failed.

    Whoever serves it meanwhile knows it under its old name, and clients would ask under the new ones: its keys
    would wait until that group answers, and the move could not be taken back any more.
    """
    config = await session.controller.query(None, timeout)
    known = config.by_id.get(shard)
    group = config.groups.get(known.gid) if known is not None else None
    if group is None:
        return  # the controllers refuse it, or nobody serves it
    said = await asyncio.gather(*(ask_status(session.dialer, where, "kv.status") for where in group.addresses))
    if any(status and status["role"] == "leader" for status in said):
        return
    why = held_up(await session.overview(timeout)).get(shard)
    if why is not None:
        raise Failed(f"{why}. Or cut it all the same (--force): its keys wait until the move has ended")


async def _wait(session: Session, wait_timeout: float, output: str) -> bool:
    """Wait, and show what for: a bar on a terminal, else a line on stderr now and then."""
    seen: list[Overview] = []

    async def look() -> Overview:
        seen[:] = [await session.overview()]
        return seen[0]

    if output == "json" or not console().is_terminal:
        told = time.monotonic()

        def tell(serving: int, total: int) -> None:
            nonlocal told
            if serving < total and time.monotonic() - told >= TELL_SECONDS:
                told = time.monotonic()
                why = "; ".join(what_waits(seen[0])[:NAMED]) or "shards are being moved"
                say(f"waiting: {serving} of {total} shards serve: {why}", err=True)

        return await wait_settled(look, wait_timeout, tell)
    with Progress(console=console(), transient=True) as bar:
        task = bar.add_task("shards serving", total=None)

        def draw(serving: int, total: int) -> None:
            why = escaped("; ".join(what_waits(seen[0])[:1]))
            bar.update(
                task, completed=serving, total=total, description=markup(f"shards serving {why}".strip())
            )

        return await wait_settled(look, wait_timeout, draw)


def _changing(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that all changes take."""
    for option in (controllers_option, timeout_option, output_option, wait_option, wait_timeout_option):
        command = option(command)
    return command


@admin.command()
@click.argument("groups", nargs=-1, required=True, metavar="GID ADDR,ADDR,… [GID ADDR,…]…")
@click.option(
    "--if-new", is_flag=True, help="Groups that are in already are no mistake: for scripts that run again."
)
@_changing
@handled
def join(groups: tuple[str, ...], if_new: bool, **options: Any) -> None:
    """Let one or more groups in; they take their even share of the shards."""
    if len(groups) % 2:
        raise click.UsageError("give each group its number and its addresses")
    request = pb.AdminRequest(join=pb.Join())
    there = _groups_now(options["controllers"], options["timeout"]) if if_new else set()
    for gid, addresses in zip(groups[::2], groups[1::2], strict=True):
        if not gid.isascii() or not gid.isdecimal() or not 0 < int(gid) <= MOST:
            raise click.UsageError(f"{gid!r} is no group's number: give GID ADDR,ADDR,… with GID from 1")
        try:
            where = split_addresses(addresses)
        except ValueError as error:
            raise click.UsageError(f"group {gid}: {error}") from None
        if int(gid) not in there:
            request.join.groups.add(gid=int(gid), addresses=where)
    _change(request if request.join.groups else None, **options)


def _groups_now(controllers: str | None, timeout: float) -> set[int]:
    async def run(session: Session) -> set[int]:
        return set((await session.controller.query(None, timeout)).groups)

    return with_session(controllers, run)


@admin.command()
@click.argument("gids", nargs=-1, required=True, type=click.IntRange(1, MOST))
@click.option(
    "--force", is_flag=True, help="Let the last group go as well: nobody serves until another one joins."
)
@_changing
@handled
def leave(gids: tuple[int, ...], force: bool, **options: Any) -> None:
    """Let groups go; what they have moves to those that stay."""
    _change(pb.AdminRequest(leave=pb.Leave(gids=gids, force=force)), **options)


@admin.command()
@click.argument("shard", type=click.IntRange(0, MOST))
@click.argument("gid", type=click.IntRange(0, MOST))
@_changing
@handled
def move(shard: int, gid: int, **options: Any) -> None:
    """Move one shard to a group."""
    _change(pb.AdminRequest(move=pb.MoveShard(shard=shard, gid=gid)), **options)


@admin.command()
@click.argument("shard", type=click.IntRange(0, MOST))
@click.argument("key")
@cut_option
@_changing
@handled
def split(shard: int, key: str, force: bool, **options: Any) -> None:
    """Make two shards of one: the second begins at KEY."""
    request = pb.AdminRequest(split=pb.SplitShard(shard=shard, key=os.fsencode(key)))
    _change(request, cuts=0 if force else shard, **options)


@admin.command()
@click.argument("shard", type=click.IntRange(0, MOST))
@cut_option
@_changing
@handled
def merge(shard: int, force: bool, **options: Any) -> None:
    """Join a shard with its right neighbour; both must be on one group."""
    _change(pb.AdminRequest(merge=pb.MergeShard(shard=shard)), cuts=0 if force else shard, **options)


@admin.command()
@_changing
@handled
def rebalance(**options: Any) -> None:
    """Level the groups' shard counts with the fewest moves."""
    _change(pb.AdminRequest(rebalance=pb.Rebalance()), **options)


def config_json(config: Config) -> dict[str, object]:
    return {
        "num": config.num,
        "shards": [
            {
                "id": shard.id,
                "start": json_bytes(shard.start),
                "end": json_bytes(shard.end),
                "gid": shard.gid,
                "epoch": shard.epoch,
            }
            for shard in config.shards()
        ],
        "groups": {str(gid): list(group.addresses) for gid, group in sorted(config.groups.items())},
        # Who claimed the group's place, and in which configuration it joined.
        "incarnations": {
            str(gid): f"{config.claims[gid]:016x}" for gid in sorted(config.groups) if gid in config.claims
        },
        "joined": {str(gid): group.joined for gid, group in sorted(config.groups.items())},
    }


@admin.command()
@click.argument("num", required=False, type=click.IntRange(0, MOST))
@controllers_option
@timeout_option
@output_option
@handled
def query(num: int | None, controllers: str | None, timeout: float, output: str) -> None:
    """Show configuration NUM, or the latest."""

    async def run(session: Session) -> Config:
        return await session.controller.query(num, timeout)

    config = with_session(controllers, run)
    if output == "json":
        print_json(config_json(config))
        return
    click.echo(f"configuration {config.num}")
    print_table(
        ("shard", "from", "to", "group"),
        [
            (shard.id, text(shard.start) or "-", text(shard.end) or "-", shard.gid or "-")
            for shard in config.shards()
        ],
    )
    print_table(
        ("group", "addresses"),
        [(gid, " ".join(group.addresses)) for gid, group in sorted(config.groups.items())],
    )


@admin.command()
@controllers_option
@timeout_option
@output_option
@handled
def status(controllers: str | None, timeout: float, output: str) -> None:
    """Show every process, who leads, and which shards are on their way."""

    async def run(session: Session) -> Overview:
        return await session.overview(timeout)

    overview = with_session(controllers, run)
    serving, total = overview.settled()
    if output == "json":
        print_json(overview.as_json())
        return
    click.echo(f"configuration {overview.config.num}: {serving} of {total} shards serve")
    rows: list[tuple[object, ...]] = []
    for address, said in overview.controllers.items():
        rows.append(("controller", address, *_process(said, overview.controllers), "", ""))
    for gid, replicas in sorted(overview.groups.items()):
        for address, said in replicas.items():
            rows.append((f"group {gid}", address, *_process(said, replicas), _shards(said), _size(said)))
    print_table(("process", "address", "role", "term", "applied", "behind", "shards", "size"), rows)
    for line in moves(overview):
        say(line)
    for note in notes(overview):
        say(note)
    for problem in problems(overview):
        say(f"! {problem}")


def _process(said: dict[str, Any] | None, replicas: dict[str, dict[str, Any] | None]) -> tuple[object, ...]:
    """Role, term, applied index, and entries behind the newest that any of its group knows to be committed."""
    if said is None:
        return "no answer", "-", "-", "-"
    newest = max(other["commit_index"] for other in replicas.values() if other)
    return role_of(said), said["term"], said["applied_index"], newest - said["applied_index"]


def _size(said: dict[str, Any] | None) -> str:
    """About what a group's shards hold: its leader looks at them one after the other, once it is asked."""
    if said is None or said["role"] != "leader":
        return ""
    known = [row["bytes"] for row in said["shards"].values() if "bytes" in row]
    return decimal(sum(known)) if known else ""


def _shards(said: dict[str, Any] | None) -> str:
    if said is None or said["role"] != "leader":
        return ""
    by_state: dict[str, int] = {}
    for row in said["shards"].values():
        by_state[row["state"]] = by_state.get(row["state"], 0) + 1
    return ", ".join(f"{count} {state.lower()}" for state, count in sorted(by_state.items()))


@admin.command("abort-restore")
@controllers_option
@output_option
@handled
def abort_restore(controllers: str | None, output: str) -> None:
    """Delete what a restore that was cut off has written, and let clients use the shards again."""
    from shardkv.backup.run import abort

    shards = with_session(controllers, lambda session: abort(session.controller, session.dialer))
    if output == "json":
        print_json({"ok": True, "shards": shards})
    elif shards:
        click.echo(f"{shards} shards are empty, and open to clients")
    else:
        click.echo("no restore is under way")


@admin.command("transfer-leader")
@click.argument("gid", type=click.IntRange(1, MOST))
@click.argument("replica", type=click.IntRange(1, MOST), required=False)
@controllers_option
@timeout_option
@output_option
@handled
def transfer_leader(
    gid: int, replica: int | None, controllers: str | None, timeout: float, output: str
) -> None:
    """Hand the leadership of group GID to another REPLICA, the most caught-up if none is named."""

    async def run(session: Session) -> str:
        overview = await session.overview(timeout)
        leader = overview.leader(gid)
        if leader is None:
            raise Failed(f"group {gid} has no leader that answers", UNREACHABLE)
        try:
            answered = await session.dialer.call(
                leader["leader"], "kv.transfer", str(replica or 0).encode(), timeout
            )
        except Unreachable as error:
            raise Failed(str(error), UNREACHABLE) from None
        code, body = parse(answered)
        if code is not Code.OK:
            raise Failed(f"group {gid} refused: {body.decode(errors='replace') or code.name}")
        return str(leader["leader"])

    former = with_session(controllers, run)
    if output == "json":
        print_json({"ok": True, "former": former})
    else:
        click.echo(f"{former} hands the leadership of group {gid} over")
