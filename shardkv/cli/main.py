"""The entry point: all commands under `shardkv`."""

from __future__ import annotations

import click

from shardkv.cli.lazy import LazyGroup
from shardkv.raft.private import keep_private

COMMANDS = {
    "up": "up:up",
    "down": "up:down",
    "serve": "serve:serve",
    "put": "data:put",
    "get": "data:get",
    "append": "data:append",
    "delete": "data:delete",
    "cas": "data:cas",
    "scan": "data:scan",
    "incr": "ranges:incr",
    "put-if-absent": "ranges:put_if_absent",
    "count": "ranges:count",
    "delete-range": "ranges:delete_range",
    "admin": "admin:admin",
    "backup": "backup:backup",
    "restore": "backup:restore",
    "recover": "recover:recover",
    "bench": "bench:bench",
    "certs": "certs:certs",
    "health": "health:health",
    "status": "admin:status",
    "top": "top:top",
}


@click.group(
    cls=LazyGroup,
    lazy={name: f"shardkv.cli.{where}" for name, where in COMMANDS.items()},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="shardkv")
def main() -> None:
    """A range-sharded, Raft-replicated key-value service.

    Exit status: 0 done, 1 refused or failed, 2 usage, 3 not reachable or timed out.
    """
    keep_private()


if __name__ == "__main__":
    main()
