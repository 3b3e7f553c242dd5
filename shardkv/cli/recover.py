"""recover: one replica goes on alone, after its group has lost its quorum for good."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from random import Random

import click

from shardkv.cli.common import Failed, handled, output_option
from shardkv.cli.output import print_json, say
from shardkv.process.identity import IDENTITY, read_identity
from shardkv.process.stores import store_of
from shardkv.raft.damage import DamageBook
from shardkv.raft.disk import RealDirectory
from shardkv.raft.errors import StorageError
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.recover import make_alone
from shardkv.raft.replica import membership_of
from shardkv.wire.address import split_addresses


@click.command()
@click.argument("data", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--address", default="", help="host:port where the replica listens, if the group never changed.")
@click.option(
    "--writes-may-be-lost",
    is_flag=True,
    required=True,
    help="To be given: what only the lost replicas had is gone.",
)
@output_option
@handled
def recover(data: Path, address: str, writes_may_be_lost: bool, output: str) -> None:
    """Make the stopped replica in DATA the only voter of its group.

    The last resort, when a majority of a group is gone for good and there is no backup. Take the
    survivor whose log is longest (`applied` in its last `admin status`), and make sure that the
    others never start again on their old data. Afterwards start it as before, and let new
    replicas in with `admin member add`.
    """
    if not writes_may_be_lost:
        raise click.UsageError("--writes-may-be-lost has to be given")
    try:
        where = split_addresses(address)[0] if address else ""
    except ValueError as error:
        raise click.UsageError(f"--address: {error}") from None
    try:
        said = asyncio.run(_recover(data, where))
    except (StorageError, OSError) as error:
        raise Failed(str(error)) from None
    if output == "json":
        print_json({"ok": True, "done": said})
    else:
        say(said)


async def _recover(data: Path, address: str) -> str:
    directory = RealDirectory(data)
    try:
        identity = read_identity(directory, str(data))
        if identity is None:
            raise Failed(f"{data} is no replica's data: it has no {IDENTITY}")
        if DamageBook.load(directory).present is not None:
            raise Failed(f"{data}: the state is damaged: make a replica alone whose state is whole")
        machine = store_of(directory, identity.gid, identity.engine == "memory").open()
        try:
            known = membership_of(machine, Membership.of(identity.first))
            rng = Random(random.SystemRandom().getrandbits(128))
            index, before = await make_alone(
                directory, rng, identity.replica, identity.incarnation, address, machine.applied, known
            )
        except ValueError as error:
            raise Failed(f"{error}: give --address") from None
        finally:
            machine.close()
    finally:
        directory.close()
    others = ", ".join(str(node) for node in before.everyone() if node != identity.replica)
    return (
        f"replica {identity.replica} of group {identity.gid} is its only voter from entry {index} on. "
        f"Never start {f'replicas {others}' if others else 'the others'} again on their old data"
    )
