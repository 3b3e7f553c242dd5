"""The entry point: all commands under `shardkv`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from shardkv.cli.common import INTERRUPTED, TRACEBACK, USAGE, Failed, asks_json, tell_failure
from shardkv.cli.lazy import LazyGroup
from shardkv.cli.output import begin_output
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


class Main(LazyGroup):
    """Every end of a command that is not a good one comes through here, and ends in one line without a traceback."""

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **more: Any
    ) -> Any:
        more["prog_name"] = "shardkv"  # also as `python -m`
        arguments = list(sys.argv[1:] if args is None else args)
        begin_output()
        if not standalone_mode:
            return super().main(arguments, standalone_mode=False, **more)
        as_json = asks_json(arguments)
        try:
            status = super().main(arguments, standalone_mode=False, **more)
        except click.exceptions.NoArgsIsHelpError as error:  # a group by itself
            error.show()
            status = USAGE
        except Failed as error:
            tell_failure(error.message, error.status, error.kind, as_json)
            status = error.status
        except click.ClickException as error:
            tell_failure(_usage(error), USAGE, "Usage", as_json)
            status = USAGE
        except (click.Abort, KeyboardInterrupt):
            tell_failure("interrupted", INTERRUPTED, "Interrupted", as_json)
            status = INTERRUPTED
        except Exception as error:
            if os.environ.get(TRACEBACK) or isinstance(error, ModuleNotFoundError):
                raise  # `__main__.py` says which extra brings a module
            text = f"this is a bug of shardkv: {type(error).__name__}: {error}. {TRACEBACK}=1 shows where: please report it"
            tell_failure(text, 1, "Bug", as_json)
            status = 1
        sys.exit(status if isinstance(status, int) else 0)


def _usage(error: click.ClickException) -> str:
    """What is wrong with a command line, and where its help is."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "shardkv"
    return f"{error.format_message().rstrip('.')}. See `{path} --help`"


@click.group(
    cls=Main,
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
