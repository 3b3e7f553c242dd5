"""What the whole cluster looks like: one question to each process, put together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from raft.answers import Code, parse
from raft.doors import Dialer, Unreachable
from shardctrler.query import ControllerClient
from shardctrler.shard_map import Config, Gid

STATUS_SECONDS = 1.0


@dataclass
class Overview:
    """The latest configuration, and what each replica said of itself (None: no answer)."""

    config: Config
    controllers: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    groups: dict[Gid, dict[str, dict[str, Any] | None]] = field(default_factory=dict)

    def leader(self, gid: Gid) -> dict[str, Any] | None:
        """What the group's leader said; the one with the highest term, if two claim it."""
        said = [status for status in self.groups.get(gid, {}).values() if status]
        leaders = [status for status in said if status["role"] == "leader"]
        return max(leaders, key=lambda status: status["term"], default=None)

    def settled(self) -> tuple[int, int]:
        """(shards that their owner serves under the latest configuration, shards)."""
        serving = 0
        for shard in self.config.by_id.values():
            leader = self.leader(shard.gid)
            row = leader and leader["shards"].get(str(shard.id))
            if leader and row and row["state"] == "SERVING" and row["epoch"] == shard.epoch:
                serving += leader["config_num"] >= self.config.num and not row["waiting"]
        return serving, len(self.config.by_id)


async def ask_status(dialer: Dialer, address: str, method: str) -> dict[str, Any] | None:
    try:
        code, body = parse(await dialer.call(address, method, b"", STATUS_SECONDS))
    except (Unreachable, ValueError):
        return None
    if code is not Code.OK:
        return None
    status: dict[str, Any] = json.loads(body)
    return status


async def look(
    controller: ControllerClient, dialer: Dialer, controllers: Sequence[str], timeout: float
) -> Overview:
    """Raises ControllerUnavailable."""
    overview = Overview(await controller.query(None, timeout))
    asked = [(None, address) for address in controllers]
    asked += [(group.gid, address) for group in overview.config.groups.values() for address in group.addresses]  # type: ignore[misc]
    answers = await asyncio.gather(
        *(ask_status(dialer, address, "kv.status" if gid else "ctl.status") for gid, address in asked)
    )
    for (gid, address), status in zip(asked, answers, strict=True):
        if gid is None:
            overview.controllers[address] = status
        else:
            overview.groups.setdefault(gid, {})[address] = status
    return overview


async def wait_settled(
    observe: Callable[[], Awaitable[Overview]], timeout: float, progress: Callable[[int, int], None]
) -> bool:
    """Wait until every shard serves under the latest configuration; whether that came to be in time."""
    deadline = asyncio.get_running_loop().time() + timeout
    while True:
        overview = await observe()
        serving, total = overview.settled()
        if not overview.config.groups:
            serving = total  # nobody is there to serve: nothing to wait for
        progress(serving, total)
        if serving == total:
            return True
        if asyncio.get_running_loop().time() >= deadline:
            return False
        await asyncio.sleep(0.1)
