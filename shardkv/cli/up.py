"""up, down: a whole cluster on this machine."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from shardkv.cli.common import REFUSED, UNREACHABLE, Failed, handled, output_option
from shardkv.cli.options import DEFAULT_DATA, find_login, find_tls, tls_options, use_secret, use_tls
from shardkv.cli.output import print_json, print_table
from shardkv.cli.session import Session, with_session
from shardkv.client import ShardClerk, ShardKVError
from shardkv.observe.overview import Overview, problems, wait_settled
from shardkv.process.local_cluster import Cluster, ClusterError, Process, check_free, interrupted_by_signals
from shardkv.process.ports import free_port_base
from shardkv.process.secret_file import MANIFEST, SECRET
from shardkv.raft.private import make_directory, tighten
from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.client import AdminRefused, ControllerUnavailable
from shardkv.wire.address import split_address
from shardkv.wire.node_name import names_in

READY_SECONDS = 60.0
WATCH_SECONDS = 0.5
FIRST_VALUE = b"hello"
BEGIN_SECONDS = 10.0  # for a process to listen, or to say why it cannot


class Port(click.IntRange):
    """A port that needs no privilege, or 0."""

    def __init__(self) -> None:
        super().__init__(0, 65000)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        port: int = super().convert(value, param, ctx)
        if 0 < port < 1024:
            self.fail(f"{port} is neither 0 nor in the range 1024<=x<=65000.", param, ctx)
        return port


@click.command()
@click.option("--groups", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--replicas", type=click.IntRange(min=1), default=3, show_default=True, help="In each group.")
@click.option("--controllers", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--shards", type=click.IntRange(1, 4096), default=8, show_default=True, help="First pre-split.")
@click.option(
    "--data", default=DEFAULT_DATA, show_default=True, type=click.Path(path_type=Path, file_okay=False)
)
@click.option(
    "--port",
    type=Port(),
    default=7400,
    show_default=True,
    help="First of the ports; 0 picks free ones.",
)
@click.option(
    "--metrics-port", type=click.IntRange(1024, 65000), help="First of as many ports more, for Prometheus."
)
@click.option(
    "--web-port", type=click.IntRange(1024, 65000), help="First of the controllers' ports for browsers."
)
@click.option("--ephemeral", is_flag=True, help="Data in memory, gone when the cluster stops.")
@tls_options
@click.option("--detach", is_flag=True, help="Return once every shard serves; `shardkv down` stops it.")
@output_option
@handled
def up(
    groups: int,
    replicas: int,
    controllers: int,
    shards: int,
    data: Path,
    port: int,
    metrics_port: int | None,
    web_port: int | None,
    ephemeral: bool,
    detach: bool,
    output: str,
) -> None:
    """Start a cluster on this machine, or what is down of one, and wait until every shard serves.

    Exit status 1 as well where the cluster serves, and a replica of it ended or could not be started.
    """
    with interrupted_by_signals() as interrupted:
        cluster = _prepare(data, groups, replicas, controllers, shards, port, metrics_port, web_port, ephemeral)
        down = [process for process in cluster.processes if not process.running]
        try:
            started = cluster.start_all()
            if output != "json":
                click.echo(f"{len(started)} of {len(cluster.processes)} processes started, data in {data}")
            _tell_lost(cluster)
            overview = _wait_ready(cluster, started, interrupted)
            cluster.save()  # from here on it is known which directories have data
            if output != "json":
                _show(cluster, overview)
            try:
                took_ms = _first_operations(cluster)
            except ShardKVError as error:
                ended = [process for process in started if not process.running]
                raise Failed(
                    "\n! ".join([f"no first put and get: {error}", *_last_words(cluster, ended)])
                ) from None
        except (ClusterError, Failed, ControllerUnavailable) as error:
            cluster.stop(down)  # what ran before goes on
            raise Failed(str(error)) from None
        if output == "json":
            print_json(_as_json(cluster, overview, started, took_ms))
        else:
            click.echo(f"first put and get: {FIRST_VALUE.decode()!r} in {took_ms:.1f} ms")
        if detach:
            if not _all_stay(cluster, started) or _lost(cluster):
                sys.exit(REFUSED)
            return
        click.echo("Ctrl-C stops the cluster.", err=output == "json")
        _watch(cluster, interrupted)
        lost = _lost(cluster)
        click.echo(f"stopped {cluster.stop_all()} processes", err=output == "json")
        _forget_ephemeral(cluster)
        if lost:
            sys.exit(REFUSED)


@click.command()
@click.option(
    "--data", default=DEFAULT_DATA, show_default=True, type=click.Path(path_type=Path, file_okay=False)
)
@output_option
@handled
def down(data: Path, output: str) -> None:
    """Stop the cluster that `up` started in --data."""
    cluster = Cluster.load(data)
    stopped = cluster.stop_all()
    if output == "json":
        print_json({"ok": True, "stopped": stopped})
    else:
        click.echo(f"stopped {stopped} processes")
    _forget_ephemeral(cluster)


def _prepare(
    data: Path,
    groups: int,
    replicas: int,
    controllers: int,
    shards: int,
    port: int,
    metrics_port: int | None,
    web_port: int | None,
    ephemeral: bool,
) -> Cluster:
    """The cluster with what is new in it, saved. Nothing is written where it cannot start. Raises Failed, ClusterError."""
    if web_port is not None and find_spec("aiohttp") is None:
        raise Failed("--web-port needs the package aiohttp: pip install 'shardkv[web]'")
    if (data / MANIFEST).exists():
        cluster = Cluster.load(data)
        controllers, groups, replicas = _check_asked(
            cluster, controllers, groups, replicas, shards, port, ephemeral
        )
    else:
        tls = find_tls()
        files = tls.files() if tls is not None else {}
        cluster = Cluster(data, shards=shards, ephemeral=ephemeral, tls=files)
        if tls is not None:
            cluster.cluster = next((name.cluster for name in names_in(tls.shown())), "")
    there = len(cluster.processes)
    cluster.plan(controllers, groups, replicas, port or free_port_base(controllers + groups * replicas))
    if metrics_port is not None:
        cluster.plan_metrics(metrics_port)
    if web_port is not None:
        cluster.plan_web(web_port)
    check_free(
        address for each in cluster.processes[there:] for address in (each.address, each.metrics, each.web)
    )
    make_directory(data)
    for path in (data, data / MANIFEST, data / SECRET):  # each process sees to its own directory
        tighten(path, deep=False)
    cluster.make_secret()
    use_tls(cluster.tls)
    if cluster.secret_file.exists():
        use_secret(cluster.secret_file)
    cluster.save()
    return cluster


def _check_asked(
    cluster: Cluster, controllers: int, groups: int, replicas: int, shards: int, port: int, ephemeral: bool
) -> tuple[int, int, int]:
    """Controllers, groups and replicas to plan for: what is there, and groups that are asked for in addition.

    Options that were not given ask for nothing. Raises Failed for those that ask for another cluster.
    """
    context = click.get_current_context()

    def is_given(name: str) -> bool:
        return context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT

    sizes = {len(cluster.addresses("group", gid)) for gid in cluster.gids()}
    has_controllers, has_groups = len(cluster.addresses("controller", 0)), len(cluster.gids())
    first = split_address(cluster.processes[0].address)[1] if cluster.processes else port
    grows = is_given("groups") and groups > has_groups
    there: dict[str, tuple[object, object, bool]] = {
        "controllers": (controllers, has_controllers, controllers == has_controllers),
        "groups": (groups, has_groups, groups >= has_groups),
        "replicas": (replicas, " and ".join(map(str, sorted(sizes))), replicas in sizes or grows),
        "shards": (shards, cluster.shards, shards == cluster.shards),
        "port": (port, first, port in (0, first) or grows),
        "ephemeral": (ephemeral, cluster.ephemeral, ephemeral == cluster.ephemeral),
    }
    differs = [
        f"--{name} {asked}, and it has {has}"
        for name, (asked, has, is_same) in there.items()
        if is_given(name) and not is_same
    ]
    if differs:
        raise Failed(
            f"the cluster in {cluster.directory} differs from what you ask for: {'; '.join(differs)}. "
            "Leave these options out to start it as it is, or give another --data"
        )
    return has_controllers, max(groups, has_groups) if grows else has_groups, replicas


def _lost(cluster: Cluster) -> list[Process]:
    """Replicas that are not started, for their directory had data and is empty."""
    return [process for process in cluster.processes if process.is_lost and not process.running]


def _tell_lost(cluster: Cluster) -> None:
    """A replica on an empty directory has forgotten what it promised: it is not started as if it were new."""
    for process in _lost(cluster):
        number = process.index + 1
        replace = f"shardkv admin member replace {process.gid} {number} {number}={process.address}"
        click.echo(
            f"{process.role} at {process.address} is not started: {process.data} had its data and is empty "
            f"or not mounted. Mount it and `up` again; or, if it is lost, start the replica on the empty "
            f"directory with the command that it always had: {shlex.join(cluster.command(process))}; "
            f"then let it in: {replace}",
            err=True,
        )


def _wait_ready(cluster: Cluster, started: list[Process], interrupted: Callable[[], bool]) -> Overview:
    """Let the groups in that have not joined, and wait until every shard serves. Raises Failed."""

    def check_quorums(serving: int = 0, total: int = 1) -> None:
        """No waiting for a group half of whose replicas have ended: they say why. Raises Failed."""
        ended = [process for process in started if not process.running]
        for role, gid in {(process.role, process.gid) for process in ended} if serving < total else ():
            own = [process for process in cluster.processes if (process.role, process.gid) == (role, gid)]
            if 2 * sum(process.running for process in own) <= len(own):
                raise Failed("\n! ".join(["not every shard serves", *_last_words(cluster, ended)]))

    async def run(session: Session) -> Overview:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            if interrupted():
                raise Failed("interrupted while starting")
            check_quorums()
            try:
                config = await session.controller.query(None, 1.0)
                break
            except ControllerUnavailable:
                if time.monotonic() > deadline:
                    raise
        missing = [gid for gid in cluster.gids() if gid not in config.groups]
        # A cluster that ran before has the groups that its admins gave it.
        if missing and (not config.groups or max(missing) > max(config.groups)):
            request = pb.AdminRequest(join=pb.Join())
            for gid in missing:
                request.join.groups.add(gid=gid, addresses=cluster.addresses("group", gid))
            try:
                await session.controller.admin(request, READY_SECONDS)
            except AdminRefused as error:
                raise Failed(str(error)) from None
        if not await wait_settled(session.overview, deadline - time.monotonic(), check_quorums):
            named = problems(await session.overview()) or ["the logs are in the processes' directories"]
            named += _last_words(cluster, [process for process in started if not process.running])
            raise Failed("\n! ".join(["not every shard serves", *named]), UNREACHABLE)
        return await session.overview()

    return with_session(",".join(cluster.addresses("controller", 0)), run)


def _show(cluster: Cluster, overview: Overview) -> None:
    counts = overview.config.counts()
    rows: list[tuple[object, ...]] = [("controller", " ".join(cluster.addresses("controller", 0)), "")]
    for gid, group in sorted(overview.config.groups.items()):
        rows.append((f"group {gid}", " ".join(group.addresses), counts[gid]))
    print_table(("joined", "addresses", "shards"), rows)
    if pages := _pages(cluster):
        click.echo(f"to be looked at with a browser at {' '.join(pages)}")
    click.echo(
        f"configuration {overview.config.num}: all {len(overview.config.by_id)} shards are assigned and serve"
    )


def _as_json(cluster: Cluster, overview: Overview, started: list[Process], took_ms: float) -> dict[str, object]:
    counts = overview.config.counts()
    return {
        "ok": True,
        "data": str(cluster.directory),
        "started": len(started),
        "processes": len(cluster.processes),
        "controllers": cluster.addresses("controller", 0),
        "groups": {
            str(gid): {"addresses": list(group.addresses), "shards": counts[gid]}
            for gid, group in sorted(overview.config.groups.items())
        },
        "config_num": overview.config.num,
        "shards": len(overview.config.by_id),
        "web": _pages(cluster),
        "first_put_get_ms": round(took_ms, 3),
    }


def _pages(cluster: Cluster) -> list[str]:
    scheme = "https" if cluster.tls else "http"
    return [f"{scheme}://{process.web}/" for process in cluster.processes if process.web]


def _first_operations(cluster: Cluster) -> float:
    """Show that it works, on a key that is ours and is gone afterwards. Returns how long it took, in ms."""
    key = b"\x00shardkv/up"
    with ShardClerk(cluster.addresses("controller", 0), tls=find_tls(), login=find_login()) as clerk:
        began = time.perf_counter()
        clerk.put(key, FIRST_VALUE)
        value = clerk.get(key)
        took = (time.perf_counter() - began) * 1000
        if value != FIRST_VALUE:
            raise Failed(f"the first get answered {value!r}")
        clerk.delete(key)
    return took


def _all_stay(cluster: Cluster, started: list[Process]) -> bool:
    """Wait until each of these listens or has ended; name those that ended. The others go on."""
    deadline = time.monotonic() + BEGIN_SECONDS
    waiting = list(started)
    while waiting and time.monotonic() < deadline:  # one that reads a long log is still at it then
        waiting = [process for process in waiting if process.running and not process.listens]
        time.sleep(0.05)
    ended = [process for process in started if not process.running]
    for line in _last_words(cluster, ended):
        click.echo(f"! {line}", err=True)
    return not ended


def _last_words(cluster: Cluster, ended: list[Process]) -> list[str]:
    return [f"{process.role} at {process.address} ended: {cluster.last_words(process)}" for process in ended]


def _watch(cluster: Cluster, interrupted: Callable[[], bool]) -> None:
    """Stay until Ctrl-C; say which process ended, once, and let `up` elsewhere start it again."""
    said: set[int] = set()
    while not interrupted():
        time.sleep(WATCH_SECONDS)
        cluster.processes = Cluster.load(cluster.directory).processes
        for process in cluster.processes:
            if not process.running and process.pid and process.pid not in said:
                said.add(process.pid)
                click.echo(
                    f"{process.role} at {process.address} ended: {cluster.last_words(process)}; "
                    f"`shardkv up --data {cluster.directory} --detach` starts it again",
                    err=True,
                )
        sys.stdout.flush()


def _forget_ephemeral(cluster: Cluster) -> None:
    if cluster.ephemeral:
        for process in cluster.processes:
            shutil.rmtree(process.data, ignore_errors=True)
        (cluster.directory / MANIFEST).unlink()
        cluster.secret_file.unlink(missing_ok=True)
