"""The entry point: all commands under `shardkv`."""

from __future__ import annotations

import click

from shardkv.cli.admin import admin, status
from shardkv.cli.backup import backup, restore
from shardkv.cli.bench import bench
from shardkv.cli.certs import certs
from shardkv.cli.check import check
from shardkv.cli.damage import damage
from shardkv.cli.data import append, cas, delete, get, put, scan
from shardkv.cli.health import health
from shardkv.cli.members import member
from shardkv.cli.recover import recover
from shardkv.cli.serve import serve
from shardkv.cli.top import top
from shardkv.cli.up import down, up
from shardkv.cli.users import access, user


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="shardkv")
def main() -> None:
    """A range-sharded, Raft-replicated key-value service.

    Exit status: 0 done, 1 refused or failed, 2 usage, 3 not reachable or timed out.
    """


for group in (member, user, access, check, damage):
    admin.add_command(group)
for command in (
    up,
    down,
    serve,
    put,
    get,
    append,
    delete,
    cas,
    scan,
    admin,
    backup,
    restore,
    recover,
    bench,
    certs,
    health,
    status,
    top,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
