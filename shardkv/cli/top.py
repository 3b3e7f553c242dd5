"""top: the cluster live: who leads, who lags, how much is written where, and what is on its way."""

from __future__ import annotations

import asyncio
import time
from itertools import count
from typing import Any

import click
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shardkv.cli.common import Seconds, handled, output_option, timeout_option
from shardkv.cli.options import controllers_option
from shardkv.cli.output import console, print_json
from shardkv.cli.session import Session, with_session
from shardkv.observe.overview import Overview, problems, role_of
from shardkv.shardctrler.client import ControllerUnavailable

MEGABYTE = 1 << 20
LEFT = ("process", "address", "role")
Said = dict[str, Any] | None


class Screen:
    """Draws one overview after the other; rates are what changed between two."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[float, int]] = {}  # address to when, and operations until then
        self._since: dict[tuple[int, int, str], float] = {}  # shard, group and state to when it was first seen

    def draw(self, overview: Overview, now: float) -> Group:
        """`now` is a monotonic clock in seconds."""
        serving, total = overview.settled()
        title = f"configuration {overview.config.num}: {serving} of {total} shards serve"
        table = Table(box=None, header_style="bold", pad_edge=False)
        for header in (
            "process",
            "address",
            "role",
            "term",
            "applied",
            "behind",
            "log MB",
            "writes/s",
            "shards",
        ):
            table.add_column(header, overflow="fold", justify="left" if header in LEFT else "right")
        for address, said in overview.controllers.items():
            table.add_row("controller", address, *self._row(address, said, overview.controllers, now))
        for gid, replicas in sorted(overview.groups.items()):
            for address, said in replicas.items():
                table.add_row(f"group {gid}", address, *self._row(address, said, replicas, now))
        moves = self._moves(overview, now)
        bad = [Text(f"! {problem}", style="bold red") for problem in problems(overview)]
        return Group(Text(title), table, *(Text(line) for line in moves), *bad)

    def _row(self, address: str, said: Said, replicas: dict[str, Said], now: float) -> list[str]:
        if said is None:
            self._before.pop(address, None)
            return ["no answer", *["-"] * 5, ""]
        newest = max(other["commit_index"] for other in replicas.values() if other)
        return [
            role_of(said),
            str(said["term"]),
            str(said["applied_index"]),
            str(newest - said["applied_index"]),
            f"{said['log_bytes'] / MEGABYTE:.1f}" if "log_bytes" in said else "",
            self._rate(address, said, now),
            str(len(said["shards"])) if said["role"] == "leader" and "shards" in said else "",
        ]

    def _rate(self, address: str, said: dict[str, Any], now: float) -> str:
        if "operations" not in said:
            return ""
        before, self._before[address] = self._before.get(address), (now, said["operations"])
        if before is None or said["operations"] < before[1]:  # first seen, or restarted
            return ""
        return f"{(said['operations'] - before[1]) / max(now - before[0], 1e-3):,.0f}"

    def _moves(self, overview: Overview, now: float) -> list[str]:
        """What is on its way, and for how long it has been: a stuck move is seen by its age."""
        present = {
            (int(shard), gid, row["state"])
            for gid in overview.groups
            if (leader := overview.leader(gid))
            for shard, row in leader["shards"].items()
            if row["state"] != "SERVING"
        }
        self._since = {move: self._since.get(move, now) for move in present}
        return [
            f"shard {shard}: {state.lower()} at group {gid} for {now - since:.0f} s"
            for (shard, gid, state), since in sorted(self._since.items())
        ]


@click.command()
@click.option("--interval", type=Seconds(), default=1.0, show_default=True, help="Seconds.")
@click.option("--count", "most", type=click.IntRange(min=1), help="End after so many looks; else at Ctrl-C.")
@controllers_option
@timeout_option
@output_option
@handled
def top(interval: float, most: int | None, controllers: str | None, timeout: float, output: str) -> None:
    """Watch the cluster: roles, lag, load and moves, again and again.

    With -o json, each look is a document of its own on a line, as `admin status -o json` has it.
    """

    async def run(session: Session) -> None:
        screen = Screen()
        shown = (
            Live(console=console(), auto_refresh=False) if console().is_terminal and output != "json" else None
        )
        if shown is not None:
            shown.start()
        try:
            for look in count(1):
                if output == "json":
                    print_json((await session.overview(timeout)).as_json())
                    if look == most:
                        return
                    await asyncio.sleep(interval)
                    continue
                try:
                    drawn: Group | Text = screen.draw(await session.overview(timeout), time.monotonic())
                except ControllerUnavailable as error:
                    if look == 1:
                        raise
                    drawn = Text(str(error))  # it may come back: that is what one watches for
                if shown is not None:
                    shown.update(drawn, refresh=True)
                else:
                    console().print(drawn)
                if look == most:
                    return
                await asyncio.sleep(interval)
        finally:
            if shown is not None:
                shown.stop()

    with_session(controllers, run)
