"""bench: load from many callers, closed-loop or at a given rate; throughput, latencies, a live view, a plot."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

import click
from rich.live import Live
from rich.table import Table

from shardkv.cli.common import Failed, Seconds, handled, output_option
from shardkv.cli.options import controllers_option, find_controllers, find_login, find_tls
from shardkv.cli.output import console, print_json, print_table
from shardkv.load.driver import Plan
from shardkv.load.figures import INTERVAL_SECONDS, Figures, Interval
from shardkv.load.fleet import Job, WorkerFailed, run
from shardkv.load.plot import plot
from shardkv.load.workload import DISTRIBUTIONS, KINDS, READ, UPDATE, WORKLOADS, Workload, parse_mix

DEFAULT_OPS = 50_000
BAR = 40


class LiveView:
    """On a terminal: how far the load is, then the last half second and the ten before it."""

    def __init__(self, keys: int, shown: bool) -> None:
        self._keys, self._loaded = keys, 0
        self._figures = Figures()
        self._live = Live(console=console(), transient=True, auto_refresh=False) if shown else None

    def __enter__(self) -> LiveView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def loaded(self, count: int) -> None:
        self._loaded += count
        if self._live is not None:
            done = BAR * self._loaded // self._keys
            self._live.update(
                f"loading [{'#' * done}{' ' * (BAR - done)}] {self._loaded:,} of {self._keys:,} keys",
                refresh=True,
            )

    def interval(self, index: int, interval: Interval) -> None:
        if self._live is None:
            return
        self._figures.add(index, interval)
        table = Table(box=None, header_style="bold", pad_edge=False)
        for header in ("second", "ops/s", "p50 ms", "p99 ms", "max ms", "errors", ""):
            table.add_column(header, justify="right" if header else "left")
        shown = sorted(self._figures.intervals.items())[-11:]
        most = max(each.operations for _, each in shown) or 1
        for number, each in shown:
            whole = each.all()
            table.add_row(
                f"{number * INTERVAL_SECONDS:.1f}",
                f"{each.operations / INTERVAL_SECONDS:,.0f}",
                *(f"{whole.percentile(share) * 1000:.2f}" for share in (0.5, 0.99, 1.0)),
                str(each.errors),
                "#" * (BAR * each.operations // most),
            )
        self._live.update(table, refresh=True)


def _mix(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    try:
        return None if value is None else parse_mix(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _picture(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix not in (".png", ".svg"):
        raise click.BadParameter("a file name that ends in .png or .svg")
    return value


@click.command()
@click.option("--workload", type=click.Choice(sorted(WORKLOADS)), default="put", show_default=True)
@click.option(
    "--mix", callback=_mix, metavar="KIND=SHARE,…", help=f"Instead of --workload; kinds: {', '.join(KINDS)}."
)
@click.option("--read-ratio", type=click.FloatRange(0, 1), help="Reads among puts; instead of --workload.")
@click.option("--clients", type=click.IntRange(min=1), default=64, show_default=True, help="Callers at once.")
@click.option(
    "--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Share the callers."
)
@click.option("--blocking", is_flag=True, help="Callers are threads of the blocking clerk.")
@click.option("--ops", type=click.IntRange(min=1), help=f"Operations in all; {DEFAULT_OPS} without --seconds.")
@click.option("--seconds", type=Seconds(), help="Measure for so long.")
@click.option("--rate", type=Seconds("rate"), help="Open loop: operations due a second.")
@click.option(
    "--warm-up",
    type=Seconds(may_be_zero=True),
    default=0.0,
    show_default=True,
    help="Seconds before measuring begins.",
)
@click.option("--value-size", type=click.IntRange(min=0), default=256, show_default=True, help="Bytes.")
@click.option("--keys", type=click.IntRange(min=1), default=100_000, show_default=True)
@click.option(
    "--distribution", type=click.Choice(DISTRIBUTIONS), help="By default as YCSB has it; uniform for put, get."
)
@click.option(
    "--consistency", type=click.Choice(["leader", "any", "stale"]), default="leader", show_default=True
)
@click.option("--load/--no-load", default=None, help="Put every key first; by default if the workload reads.")
@click.option("--plot", "picture", callback=_picture, type=click.Path(path_type=Path), help="FILE.png or .svg.")
@click.option("--timeout", type=Seconds(), default=30.0, show_default=True, help="Seconds for one operation.")
@controllers_option
@output_option
@handled
def bench(
    workload: str,
    mix: tuple[float, ...] | None,
    read_ratio: float | None,
    clients: int,
    processes: int,
    blocking: bool,
    ops: int | None,
    seconds: float | None,
    rate: float | None,
    warm_up: float,
    value_size: int,
    keys: int,
    distribution: str | None,
    consistency: str,
    load: bool | None,
    picture: Path | None,
    timeout: float,
    controllers: str | None,
    output: str,
) -> None:
    """Load the cluster with CLIENTS callers and report throughput and latency.

    Closed loop by default: each caller waits for its answer. With --rate operations are due at
    even distances whatever the cluster does, and latency counts from when each was due.
    """
    if processes > clients:
        raise click.UsageError(f"{processes} processes for {clients} clients")
    shares, usual = WORKLOADS[workload]
    if read_ratio is not None:
        shares = tuple({READ: read_ratio, UPDATE: 1 - read_ratio}.get(kind, 0.0) for kind in range(len(KINDS)))
    shares = mix or shares
    load_shape = Workload(shares, distribution or usual, keys, value_size)
    job = Job(
        find_controllers(controllers),
        load_shape,
        Plan(
            clients,
            ops if ops is not None or seconds is not None else DEFAULT_OPS,
            seconds,
            rate,
            warm_up,
            consistency,  # type: ignore[arg-type]  # one of the choices above
        ),
        load if load is not None else load_shape.reads,
        blocking,
        timeout,
        processes,
        find_tls(),
        find_login(),
    )
    began = time.monotonic()
    with LiveView(keys, shown=output == "table" and console().is_terminal) as view:
        try:
            figures = run(job, view.loaded, view.interval)
        except WorkerFailed as error:
            raise Failed(f"the load could not be driven: {error}") from None
    name = workload if mix is None and read_ratio is None else _describe(shares)
    _print(figures, name, clients, output)
    if picture is not None:
        _plot(figures, f"{name}, {clients} callers, {value_size} B ({time.monotonic() - began:.0f} s)", picture)
    total = figures.total()
    if total.errors:
        raise Failed(f"{total.errors} operations failed; the first: {total.first_error}")


def _describe(shares: tuple[float, ...]) -> str:
    return ", ".join(f"{share:.0%} {KINDS[kind]}" for kind, share in enumerate(shares) if share)


def _print(figures: Figures, name: str, clients: int, output: str) -> None:
    if output == "json":
        print_json(figures.as_json())
        return
    total = figures.total()
    rows = [(name, str(clients), total.all())]
    rows += [
        ("  " + KINDS[kind], "", histogram) for kind, histogram in enumerate(total.by_kind) if histogram.count
    ]
    if len(rows) == 2:
        rows.pop()  # one kind is the whole
    print_table(
        ("workload", "clients", "ops/s", "p50 ms", "p99 ms", "p99.9 ms", "max ms"),
        [
            (
                label,
                callers,
                f"{histogram.count / figures.seconds:,.0f}",
                *(f"{histogram.percentile(share) * 1000:.2f}" for share in (0.5, 0.99, 0.999, 1.0)),
            )
            for label, callers, histogram in rows
        ],
    )
    shares = figures.shares()
    if len(shares) > 1:
        rate = total.operations / figures.seconds
        print_table(("group", "ops/s"), [(gid, f"{share * rate:,.0f}") for gid, share in shares.items()])


def _plot(figures: Figures, title: str, picture: Path) -> None:
    try:
        plot(figures, title, picture)
    except ImportError:
        raise Failed("--plot needs matplotlib: pip install 'shardkv[plot]'") from None
    click.echo(f"drawn: {picture}", err=True)
