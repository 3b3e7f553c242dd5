"""serve controller, serve group: one process, as `up` starts it or a person does."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from shardkv.cli.common import MOST, Failed, handled, output_option
from shardkv.cli.options import find_tls, tls_options
from shardkv.process.options import ProcessOptions
from shardkv.process.run import CannotServe, run
from shardkv.process.secret_file import beside
from shardkv.wire.address import split_addresses
from shardkv.wire.frames import Limits


@click.group(context_settings={"auto_envvar_prefix": "SHARDKV"})
def serve() -> None:
    """Run one replica in the foreground, until SIGTERM.

    Each option may also stand in a TOML file (--config) or in the environment: --log-format of
    `serve group` as SHARDKV_GROUP_LOG_FORMAT.
    """


def _addresses(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    try:
        if not value and parameter.name == "peers":
            return ()  # a replica that joins has none
        return split_addresses(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _address(context: click.Context, parameter: click.Parameter, value: str) -> str:
    return _addresses(context, parameter, value)[0] if value else ""


def _replica_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        handled,
        output_option,
        click.option(
            "--id",
            "replica",
            type=click.IntRange(1, MOST),
            required=True,
            help="Which of --peers this is, from 1; with --join a number never used in the group before.",
        ),
        click.option(
            "--peers", callback=_addresses, default="", help="The group's first replicas, in order: host:port,…"
        ),
        click.option(
            "--join",
            "joins_as",
            callback=_address,
            default="",
            help="host:port of a new replica, instead of --peers: `admin member` lets it in.",
        ),
        click.option(
            "--data", type=click.Path(path_type=Path, file_okay=False), required=True, help="Its directory."
        ),
        click.option(
            "--listen", callback=_address, default="", help="host:port to bind, if not that in --peers."
        ),
        click.option("--ephemeral", is_flag=True, help="Keep the data in memory rather than in RocksDB."),
        click.option(
            "--reserve-mb",
            type=click.IntRange(1, 1 << 40),
            default=512,
            show_default=True,
            help="With less free on the disk, the group takes only deletes until there is more.",
        ),
        click.option("--metrics", callback=_address, default="", help="host:port to answer Prometheus at."),
        click.option(
            "--audit-log",
            "audit",
            type=click.Choice(["file", "stderr"]),
            default="file",
            show_default=True,
            help="Write who was let in and who was not to audit.log in the data directory, or to stderr.",
        ),
        click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True),
        click.option(
            "--log-level",
            type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]),
            default="INFO",
            show_default=True,
        ),
        click.option(
            "--config",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            is_eager=True,
            expose_value=False,
            callback=_read_config,
            help="A TOML file with these options by their names; the command line and SHARDKV_… come first.",
        ),
        click.option(
            "--secret-file",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="By what it has the cluster's processes know each other, where they have no certificates. "
            "The default is `secret` beside --data, where `shardkv up` puts it.",
        ),
        tls_options,
    ):
        command = option(command)
    return command


def _read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Make what the file says this command's defaults. A name that is no option of it is a mistake."""
    if path is None:
        return
    try:
        said = tomllib.loads(path.read_text())
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise click.BadParameter(f"{path} is not TOML: {error}") from None
    names = {option.lstrip("-"): each.name for each in context.command.params for option in each.opts}
    unknown = sorted(set(said) - set(names) | set(said) & {"config"})
    if unknown:
        raise click.BadParameter(f"{path}: no such option: {', '.join(unknown)}")
    by_name = {each.name: each for each in context.command.params}
    context.default_map = {
        str(names[name]): _config_value(path, name, by_name[names[name]], value) for name, value in said.items()
    }


def _config_value(path: Path, name: str, option: click.Parameter, value: Any) -> Any:
    """What an option takes, as the command line has it: text, or a list where an option may be given again."""
    is_flag = isinstance(option, click.Option) and option.is_flag
    if is_flag != isinstance(value, bool):
        raise click.BadParameter(
            f"{path}: {name} = {value!r}: give "
            + ("true or false" if is_flag else "a number or text, not true or false")
        )
    if is_flag:
        return value
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str | int) and not isinstance(each, bool) for each in values):
        raise click.BadParameter(f"{path}: {name} = {value!r}: give text, a whole number, or a list of those")
    if "\0" in "".join(map(str, values)):
        raise click.BadParameter(f"{path}: {name}: a zero byte stands in it")
    return [str(each) for each in values] if option.multiple else ",".join(map(str, values))


def _options(given: dict[str, Any], **more: Any) -> ProcessOptions:
    given.pop("output")  # a server that runs prints no document; one that cannot start, how every command fails
    reserve_mb = given.pop("reserve_mb")
    given["secret_file"] = given["secret_file"] or beside(given["data"])
    return ProcessOptions(**given, **more, reserve_bytes=reserve_mb << 20)


def _run(options: ProcessOptions) -> None:
    if bool(options.peers) == bool(options.joins_as):
        raise click.UsageError("give --peers, or --join for a replica that joins the group later")
    if options.peers and options.replica > len(options.peers):
        raise click.UsageError(f"--id {options.replica}, but --peers names {len(options.peers)}")
    try:
        run(replace(options, tls=find_tls()))
    except CannotServe as error:
        raise Failed(str(error), kind=error.kind) from None


@serve.command()
@_replica_options
@click.option("--cluster", default="shardkv", show_default=True, help="The cluster's id.")
@click.option("--shards", type=click.IntRange(1, 4096), default=8, show_default=True, help="First pre-split.")
@click.option("--web", callback=_address, default="", help="host:port of the page that shows the cluster.")
@click.option(
    "--web-host",
    "web_names",
    multiple=True,
    help="A host name under which browsers ask for the page, besides this machine's; may be given several times.",
)
@click.option(
    "--web-open",
    is_flag=True,
    help="With TLS, show the page to other machines also while access control is off.",
)
def controller(shards: int, **options: Any) -> None:
    """Run a replica of the shard controller."""
    _run(_options(options, initial_shards=shards))


@serve.command()
@_replica_options
@click.option("--cluster", default="", help="The cluster's id; by default the controllers are asked.")
@click.option("--gid", type=click.IntRange(1, MOST), required=True, help="The group's number.")
@click.option(
    "--controllers", callback=_addresses, required=True, envvar="SHARDKV_CONTROLLERS", help="host:port,…"
)
@click.option("--max-key-bytes", type=click.IntRange(1, 65535), default=4096, show_default=True)
@click.option("--max-value-bytes", type=click.IntRange(1, 16 << 20), default=1 << 20, show_default=True)
@click.option(
    "--scrub-rate",
    type=click.IntRange(0, 10_000),
    default=10,
    show_default=True,
    help="Read every table through, again and again, at so many MiB/s, to find damage; 0: never.",
)
def group(max_key_bytes: int, max_value_bytes: int, scrub_rate: int, **options: Any) -> None:
    """Run a replica of a group. `admin join` lets the group in."""
    frame_bytes = max(Limits().frame_bytes, 4 * max_value_bytes)
    limits = Limits(max_key_bytes, max_value_bytes, frame_bytes)
    _run(_options(options, limits=limits, scrub_bytes_per_second=scrub_rate << 20))
