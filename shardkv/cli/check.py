"""admin check: are all replicas of every group the same, as they serve?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import click
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from shardkv.cli.common import MOST, UNREACHABLE, Failed, handled, output_option, timeout_option
from shardkv.cli.options import controllers_option
from shardkv.cli.output import console, json_bytes, print_json, print_table, say
from shardkv.cli.session import Session, with_session
from shardkv.observe.compare import (
    CONTROLLERS,
    PATIENCE_SECONDS,
    Difference,
    GroupCheck,
    NotBegun,
    check_controllers,
    check_group,
)
from shardkv.state.digests import Digest


@click.command()
@click.argument("gids", nargs=-1, type=click.IntRange(0, MOST), metavar="[GID…]")
@click.option(
    "--patience",
    type=click.FloatRange(min=1),
    default=PATIENCE_SECONDS,
    show_default=True,
    help="Seconds for a replica that says nothing new.",
)
@controllers_option
@timeout_option
@output_option
@handled
def check(gids: tuple[int, ...], patience: float, controllers: str | None, timeout: float, output: str) -> None:
    """Compare the replicas of every group and of the controller (0), or of those named, while they serve.

    Exit status 0: all replicas answered and are the same. 1: some differ, or one was not compared.
    3: a group has no leader that answers.
    """

    async def run(session: Session) -> tuple[list[GroupCheck], dict[int, str]]:
        config = await session.controller.query(None, timeout)
        unknown = sorted(set(gids) - {CONTROLLERS} - set(config.groups))
        if unknown:
            raise Failed(f"there is no group {unknown[0]}; `shardkv admin query` lists the groups")
        found: list[GroupCheck] = []
        failed: dict[int, str] = {}
        columns = (TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console(), transient=True, disable=not console().is_terminal) as bar:

            async def one(gid: int, addresses: Sequence[str]) -> None:
                read: dict[str, int] = {}
                task = bar.add_task(f"group {gid}", total=None)

                def show(address: str, pairs: int) -> None:
                    read[address] = pairs
                    bar.update(task, description=f"group {gid}: {sum(read.values()):,} pairs read")

                try:
                    found.append(await check_group(session.dialer, gid, addresses, patience, show))
                except NotBegun as error:
                    failed[gid] = str(error)

            async def controllers() -> None:
                try:
                    found.append(await check_controllers(session.dialer, session.addresses, patience))
                except NotBegun as error:
                    failed[CONTROLLERS] = str(error)

            wanted = [(gid, group) for gid, group in sorted(config.groups.items()) if not gids or gid in gids]
            works = [one(gid, group.addresses) for gid, group in wanted]
            if not gids or CONTROLLERS in gids:
                works.append(controllers())
            await asyncio.gather(*works)
        return sorted(found, key=lambda group: group.gid), failed

    found, failed = with_session(controllers, run)
    agree = all(group.agrees for group in found)
    if output == "json":
        groups = [_group_json(group) for group in found]
        print_json({"ok": agree and not failed, "groups": groups, "not_reachable": failed})
    else:
        rows = [(_name(group.gid), *row) for group in found for row in _rows(group)]
        print_table(("group", "replica", "index", "keys", "digest", "verdict"), rows)
        for group in found:
            for difference in group.differences():
                say(f"! {_sentence(group, difference)}")
    if not agree:
        names = ", ".join(_name(group.gid) for group in found if not group.agrees)
        raise Failed(f"not all replicas of {names} are known to be the same")
    if failed:
        raise Failed(
            "; ".join(f"{_name(gid)} could not be asked: {why}" for gid, why in failed.items()), UNREACHABLE
        )


def _name(gid: int) -> str:
    return f"group {gid}" if gid != CONTROLLERS else "the controller"


def _rows(group: GroupCheck) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    differences = list(group.differences())
    for address, said in sorted(group.said.items()):
        if said.why_not:
            rows.append((address, group.begun.index, "-", "-", f"NOT COMPARED: {said.why_not}"))
        else:
            rows.append(
                (
                    address,
                    group.begun.index,
                    f"{said.keys:,}" if group.gid != CONTROLLERS else "-",
                    _short(group, address),
                    _verdict(group, address, differences),
                )
            )
    return rows


def _short(group: GroupCheck, address: str) -> str:
    """The first bytes of the digest of all of a replica's digests."""
    return group.said[address].whole.hex()[:16]


def _verdict(group: GroupCheck, address: str, differences: Sequence[Difference]) -> str:
    if any(address in difference.odd for difference in differences):
        return "DIFFERS from the others"
    if any(not difference.odd for difference in differences):
        return "DIFFERS: no majority"
    if len(group.begun.members) == 1:
        return "alone: nothing to compare with"
    compared = len(group.said) - len(group.not_compared)
    return "agrees" if compared > 1 else "no other answered"


def _told(digest: Digest) -> str:
    return f"{digest.pairs:,} pairs, {digest.value.hex()}"


def _sentence(group: GroupCheck, difference: Difference) -> str:
    digests = "; ".join(f"{address}: {_told(digest)}" for address, digest in sorted(difference.digests.items()))
    if group.gid == CONTROLLERS:
        digests = "; ".join(f"{at}: {digest.value.hex()}" for at, digest in sorted(difference.digests.items()))
        start = f"the controller: the replicas differ ({digests})"
    else:
        start = f"group {group.gid}, {difference.where}: the replicas differ ({digests})"
    if not difference.odd:
        return f"{start}. No majority agrees, so nothing tells which one is right: see docs/operations.md"
    odd = ", ".join(difference.odd)
    return f"{start}. The majority agrees against {odd}: `shardkv admin member replace` it (docs/operations.md)"


def _group_json(group: GroupCheck) -> dict[str, object]:
    differences = list(group.differences())
    return {
        "gid": group.gid,
        "index": group.begun.index,
        "agrees": group.agrees,
        "replicas": {
            address: {"not_compared": said.why_not}
            if said.why_not
            else {
                "keys": said.keys,
                "digest": said.whole.hex(),
                "verdict": _verdict(group, address, differences),
            }
            for address, said in sorted(group.said.items())
        },
        "differences": [
            {
                "shard": None if difference.part is None else difference.part.shard,
                "start": None if difference.part is None else json_bytes(difference.part.start),
                "end": None if difference.part is None else json_bytes(difference.part.end),
                "odd": list(difference.odd),
                "replicas": {
                    address: {"pairs": digest.pairs, "digest": digest.value.hex()}
                    for address, digest in sorted(difference.digests.items())
                },
            }
            for difference in differences
        ],
    }
