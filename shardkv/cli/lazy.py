"""A group of commands that imports each command when somebody uses the command.

`shardkv get` must not pay for the server, the backups and the load generator: importing all of
them costs several times the CPU of the call itself. Only `--help` of the group imports all.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, cast

import click


class LazyGroup(click.Group):
    """`lazy` tells where each command is: name → "module:attribute"."""

    def __init__(self, *arguments: Any, lazy: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lazy = dict(lazy or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        module, attribute = self._lazy[cmd_name].split(":")
        return cast(click.Command, getattr(importlib.import_module(module), attribute))
