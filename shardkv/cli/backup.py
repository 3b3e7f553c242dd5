"""backup create, list, verify, delete, archive; restore."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import TypeVar

import click
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from shardkv.backup import catalog
from shardkv.backup.archive import Archiver
from shardkv.backup.create import Backup, BackupProgress
from shardkv.backup.keys import make_key_file, read_key_file
from shardkv.backup.manifest import Manifest, moment
from shardkv.backup.open import open_store
from shardkv.backup.restore import Restore
from shardkv.backup.sealed import SealedStore
from shardkv.backup.store import Store
from shardkv.cli.common import Seconds, handled, output_option
from shardkv.cli.options import controllers_option, run_async
from shardkv.cli.output import console, print_json, print_table, say
from shardkv.cli.session import Session, with_session

T = TypeVar("T")
MEGABYTE = 1_000_000
NICE = 10  # on a machine that also serves, a backup gives way
TOLD_SECONDS = 10.0  # between two lines about the progress

url_argument = click.argument("url", metavar="URL")
rate_option = click.option(
    "--rate", type=click.FloatRange(min=0), default=0.0, help="At most so many MB a second."
)


def _store_options(command: Callable[..., T]) -> Callable[..., T]:
    """Where backups are: `_store` opens what these say."""
    command = click.option(
        "--key-file",
        envvar="SHARDKV_BACKUP_KEY_FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        help="File with the key that encrypts all that is at URL (`shardkv backup key` makes one).",
    )(command)
    command = click.option(
        "--region",
        envvar="AWS_REGION",
        default="",
        help="Of an S3 bucket; credentials are AWS_ACCESS_KEY_ID, ….",
    )(command)
    return click.option(
        "--endpoint",
        envvar="AWS_ENDPOINT_URL",
        default="",
        help="http(s)://… of an S3 server that is not Amazon's.",
    )(command)


def _store(url: str, endpoint: str, region: str, key_file: Path | None, create: bool = False) -> Store:
    """`create`: for commands that write there. Raises BackupError."""
    store = open_store(url, endpoint, region, create)
    return store if key_file is None else SealedStore(store, read_key_file(key_file))


@click.group()
def backup() -> None:
    """Back a cluster up to file:///directory or s3://bucket/prefix."""


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        console=console(),
        transient=True,
        disable=not console().is_terminal,
    )


def _facts(manifest: Manifest, store: Store) -> dict[str, object]:
    return {
        "id": manifest.id,
        "cluster": manifest.cluster,
        "moment": moment(manifest.time_ms),
        "config_num": manifest.config_num,
        "shards": manifest.shards,
        "groups": len(manifest.groups),
        "pairs": sum(part.pairs for part in manifest.groups.values()),
        "bytes": manifest.size,
        "chunks": len(manifest.digests()),
        "key": store.key_id or None,
    }


@backup.command()
@url_argument
@rate_option
@_store_options
@controllers_option
@output_option
@handled
def create(
    url: str,
    rate: float,
    endpoint: str,
    region: str,
    key_file: Path | None,
    controllers: str | None,
    output: str,
) -> None:
    """Back up all shards, as they are at one moment. What is at URL already is not written again."""
    store = _store(url, endpoint, region, key_file, create=True)
    os.nice(NICE)
    done, warnings = BackupProgress(), list[str]()

    async def run(session: Session) -> Manifest:
        nonlocal done, warnings
        with _bar() as bar:
            task = bar.add_task("read", total=None)

            def show(progress: BackupProgress) -> None:
                bar.update(task, completed=progress.read)

            rng = Random(random.SystemRandom().random())
            work = Backup(session.controller, session.dialer, store, rng, rate * MEGABYTE, show, _note)
            telling = asyncio.create_task(_tell_progress(work))
            try:
                manifest = await work.create()
            finally:
                telling.cancel()
            done, warnings = work.progress, work.warnings
            return manifest

    manifest = with_session(controllers, run)
    if output == "json":
        facts = _facts(manifest, store)
        facts.update(new_chunks=done.written, written_bytes=done.stored, warnings=warnings)
        facts["replicas"] = {str(gid): part.replicas for gid, part in manifest.groups.items()}
        print_json({"ok": True, **facts})
        return
    say(
        f"backup {manifest.id} shows {moment(manifest.time_ms)}: {decimal(manifest.size)} of "
        f"{len(manifest.groups)} groups under configuration {manifest.config_num}; "
        f"{done.written} chunks are new ({decimal(done.stored)} compressed), {done.known} were there"
    )
    for warning in warnings:
        say(f"! {warning}")


def _note(line: str) -> None:
    click.echo(f"backup: {line}", err=True)


async def _tell_progress(work: Backup) -> None:
    """Where no bar is shown: a line now and then, so that nobody takes a long backup for one that hangs."""
    while not console().is_terminal:
        await asyncio.sleep(TOLD_SECONDS)
        done = work.progress
        _note(f"{decimal(done.read)} read so far, {done.written} chunks stored, {done.known} were there")


@backup.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@output_option
@handled
def key(file: Path, output: str) -> None:
    """Make a key in FILE for --key-file. Keep a copy elsewhere: what it encrypts cannot be read without it."""
    made = make_key_file(file)
    if output == "json":
        print_json({"ok": True, "key": made.id})
    else:
        click.echo(f"{file} has key {made.id}. Keep a copy in a safe place: without it no backup can be read")


@backup.command("list")
@url_argument
@_store_options
@output_option
@handled
def list_backups(url: str, endpoint: str, region: str, key_file: Path | None, output: str) -> None:
    """The backups at URL, the oldest first."""
    store = _store(url, endpoint, region, key_file)
    found = run_async(catalog.backups(store))
    if output == "json":
        print_json([_facts(manifest, store) for manifest in found])
        return
    print_table(
        ("backup", "moment", "groups", "pairs", "size"),
        [
            (
                facts["id"],
                facts["moment"],
                facts["groups"],
                f"{facts['pairs']:,}",
                decimal(manifest.size),
            )
            for manifest in found
            if (facts := _facts(manifest, store))
        ],
    )


@backup.command()
@url_argument
@click.argument("id", required=False, default="")
@_store_options
@output_option
@handled
def verify(url: str, id: str, endpoint: str, region: str, key_file: Path | None, output: str) -> None:
    """Read all of a backup, the newest by default, and compare it with its checksums, counts and digests."""
    store = _store(url, endpoint, region, key_file)

    async def run() -> Manifest:
        manifest = await catalog.find(store, id)
        total = sum(len(part.chunks) + len(part.log) for part in manifest.groups.values())
        with Progress(console=console(), transient=True, disable=not console().is_terminal) as bar:
            task = bar.add_task("chunks", total=total)
            await catalog.verify(store, manifest, lambda count: bar.update(task, completed=count))
        return manifest

    manifest = run_async(run())
    if output == "json":
        print_json({"ok": True, **_facts(manifest, store)})
    else:
        facts = _facts(manifest, store)
        say(
            f"backup {manifest.id} is whole: {len(manifest.digests())} chunks match their checksums, "
            f"and {facts['pairs']:,} pairs the counts and digests of their shards"
        )


@backup.command()
@url_argument
@click.argument("id")
@_store_options
@output_option
@handled
def delete(url: str, id: str, endpoint: str, region: str, key_file: Path | None, output: str) -> None:
    """Delete a backup, and the chunks and archived log that no other one needs."""
    gone = run_async(catalog.delete(_store(url, endpoint, region, key_file), id))
    chunks, segments = gone or (0, 0)
    if output == "json":
        print_json({"ok": True, "chunks": chunks, "segments": segments, "postponed": gone is None})
    elif gone is None:
        say(
            f"backup {id} is deleted. Another one is being made, or was cut off less than a day ago: "
            "what nobody needs goes with the next deletion"
        )
    else:
        click.echo(f"backup {id} is deleted, with {chunks} chunks and {segments} segments of the archive")


@backup.command()
@url_argument
@click.option("--interval", type=Seconds(), default=10.0, show_default=True, help="Seconds.")
@click.option("--once", is_flag=True, help="End after one round.")
@_store_options
@controllers_option
@output_option
@handled
def archive(
    url: str,
    interval: float,
    once: bool,
    endpoint: str,
    region: str,
    key_file: Path | None,
    controllers: str | None,
    output: str,
) -> None:
    """Archive the log of every group as it grows, until Ctrl-C: for `restore --at`."""
    store = _store(url, endpoint, region, key_file, create=True)

    async def run(session: Session) -> None:
        archiver = Archiver(session.controller, session.dialer, store)
        await archiver.begin()
        while True:
            for done in await archiver.round():
                if done.gap_after:
                    say(
                        f"group {done.gid}: entries after {done.gap_after} are lost to the archive; make a new backup",
                        err=True,
                    )
                if output == "json":  # a document for each group and round
                    facts = {"gid": done.gid, "entries": done.entries, "last": done.last}
                    print_json({"ok": True, **facts, "gap_after": done.gap_after or None})
                elif done.entries:
                    click.echo(f"group {done.gid}: {done.entries} entries, up to {done.last}")
            if once:
                return
            await asyncio.sleep(interval)

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # as Ctrl-C: what was put there is whole, and the next run goes on
    with_session(controllers, run)


def _moment(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        when = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no time like 2026-11-25T12:34:56Z") from None
    return int((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000)


@click.command()
@url_argument
@click.argument("id", required=False, default="")
@click.option("--at", callback=_moment, help="Time (ISO 8601; UTC unless it says): as the archived log has it.")
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where there is room for the data of all groups; the default is the directory for temporary files.",
)
@rate_option
@_store_options
@controllers_option
@output_option
@handled
def restore(
    url: str,
    id: str,
    at: int | None,
    scratch: Path | None,
    rate: float,
    endpoint: str,
    region: str,
    key_file: Path | None,
    controllers: str | None,
    output: str,
) -> None:
    """Put a backup, the newest by default, into an empty cluster of any shape.

    Clients are refused until all is in. Cut off, it may be given again, and begins from the beginning;
    or `shardkv admin abort-restore` deletes what it wrote and lets clients in.
    """
    store = _store(url, endpoint, region, key_file)

    async def run(session: Session, directory: Path) -> tuple[Manifest, int, int]:
        with _bar() as bar:
            loading, writing = bar.add_task("load", total=None), bar.add_task("write", total=None)
            work = Restore(
                store,
                directory,
                rate * MEGABYTE,
                lambda size: bar.advance(loading, size),
                lambda size: bar.advance(writing, size),
            )
            try:
                manifest = await work.choose(id, at)
                pieces = await work.revive(manifest, at)
                name = manifest.id if at is None else f"{manifest.id} at {moment(at)}"
                return manifest, *await work.write(session.controller, session.dialer, pieces, name)
            finally:
                work.close()

    with _scratch(scratch) as directory:
        manifest, keys, size = with_session(controllers, lambda session: run(session, directory))
    shown = moment(manifest.time_ms if at is None else at)
    if output == "json":
        print_json({"ok": True, "id": manifest.id, "moment": shown, "keys": keys, "bytes": size})
    else:
        say(f"restored {keys:,} keys ({decimal(size)}) as they were at {shown}, from backup {manifest.id}")


@contextmanager
def _scratch(parent: Path | None) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="shardkv-restore-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
