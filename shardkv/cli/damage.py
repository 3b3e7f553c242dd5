"""admin damage: what was found damaged in the state of each replica, and whether it is repaired."""

from __future__ import annotations

from typing import Any

import click

from shardkv.cli.common import handled, output_option, timeout_option
from shardkv.cli.options import controllers_option
from shardkv.cli.output import print_json, say
from shardkv.cli.session import Session, with_session
from shardkv.observe.notes import repair_line, when


@click.command()
@controllers_option
@timeout_option
@output_option
@handled
def damage(controllers: str | None, timeout: float, output: str) -> None:
    """List the damage that replicas found in their own state, present and past.

    A replica that finds damage stops serving, and is repaired from the others by itself. Exit status 0,
    whatever was found; replicas that do not answer are not listed.
    """

    async def run(session: Session) -> list[dict[str, Any]]:
        overview = await session.overview(timeout)
        found = []
        for name, replicas in [
            ("controller", overview.controllers),
            *((f"group {gid}", group) for gid, group in sorted(overview.groups.items())),
        ]:
            for address, said in replicas.items():
                if said and said.get("damage"):
                    found.append({"process": name, "address": address, **said["damage"]})
        return found

    found = with_session(controllers, run)
    if output == "json":
        print_json(found)
        return
    if not found:
        click.echo("no replica that answers has found damage in its state")
        return
    for one in found:
        say(f"{one['process']}: {one['address']}")
        for position, item in enumerate(one["history"]):
            is_last = position == len(one["history"]) - 1
            state = repair_line(one) if is_last and one["state_lost"] else _repaired(item)
            # Lines, and no table: the cells are long, and a table breaks them in the middle of words.
            say(f"  {when(item['found_ms'])}  {item['file']}: {item['why']}")
            say(f"      {state}")
    for one in found:
        if one["suspect_disk"]:
            say(f"! {one['process']}: {one['address']}: the disk itself is suspect, replace it")


def _repaired(item: dict[str, Any]) -> str:
    if not item["repaired_ms"]:
        return "by a later repair"
    source = f" from replica {item['repaired_from']}" if item["repaired_from"] else ""
    return f"repaired{source} at {when(item['repaired_ms'])}"
