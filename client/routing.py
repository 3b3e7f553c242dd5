"""Which group serves a key: a cached shard map, kept up to date by asking for what changed.

The map is only a hint: groups decide, when they apply. A group that does not serve
a shard says who may; that overrides the map for the shard until the map changes, or nobody answers there.
"""

from __future__ import annotations

import asyncio

from shardkv.shardctrler.client import ControllerClient
from shardkv.shardctrler.shard_map import Config, Gid, Shard, ShardId

REFRESH_SECONDS = 0.02  # at most one question about changes in this time
STALE_SECONDS = 30.0  # a clerk in use asks so often though nobody refused it: controllers may move, one by one


class Router:
    """The clerk's view of the map. `map_changed` is called after every news."""

    def __init__(self, controller: ControllerClient) -> None:
        self._controller = controller
        self.config: Config | None = None
        self._addresses: dict[Gid, tuple[str, ...]] = {}  # also of groups that have left
        self._overrides: dict[ShardId, Gid] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._asked_at = 0.0
        self.error: Exception | None = None  # why the map could not be refreshed last

    async def load(self, timeout: float) -> None:
        """Get the first map. Raises ControllerUnavailable."""
        await self._controller.changes(0, 0.0, timeout, limit=1)  # for the cluster's id and clock
        config = await self._controller.query(None, timeout)
        self._remember_addresses(config)
        self.config = config
        self._asked_at = asyncio.get_running_loop().time()

    def refresh_if_stale(self) -> None:
        """Ask for news if that was long ago; then also where the controllers are now."""
        now = asyncio.get_running_loop().time()
        if self.config is not None and now - self._asked_at > STALE_SECONDS:
            self._asked_at = now
            self.refresh()

    def lookup(self, key: bytes) -> tuple[Shard, Gid]:  # hot: runs per operation
        """The shard that holds `key`, and the group to ask (0: nobody serves it now)."""
        assert self.config is not None
        shard = self.config.lookup(key)
        if self._overrides:
            return shard, self._overrides.get(shard.id, shard.gid)
        return shard, shard.gid

    def addresses(self, gid: Gid) -> tuple[str, ...]:
        return self._addresses.get(gid, ())

    def refused(self, shard: ShardId, gid: Gid, hint: Gid, addresses: tuple[str, ...]) -> None:
        """Group `gid` does not serve `shard`, and thinks that `hint` may."""
        if hint and addresses:
            self._addresses.setdefault(hint, addresses)
            self._overrides[shard] = hint
        else:
            self._overrides.pop(shard, None)
        self.refresh()

    def forget(self, gid: Gid) -> None:
        """Follow no hint at this group any more: the group that gave the hint may serve the shard by now.

        If it does not, it gives the hint again. A group that has left the map tells nobody where its
        replicas are, so the addresses in a hint may be out of date for good.
        """
        self._overrides = {shard: hint for shard, hint in self._overrides.items() if hint != gid}

    def refresh(self) -> None:
        """Ask for news, unless that is being done."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())

    async def _refresh(self) -> None:
        assert self.config is not None
        try:
            while changes := await self._controller.changes(self.config.num, 0.0, 2.0):
                for change in changes:
                    if change.num == self.config.num + 1:
                        self.config.apply(change)
                self._remember_addresses(self.config)
                self._overrides.clear()
            self.error = None
        except Exception as error:  # operations wait and say so when their time is up
            self.error = error
        await asyncio.sleep(REFRESH_SECONDS)

    def _remember_addresses(self, config: Config) -> None:
        for group in config.groups.values():
            self._addresses[group.gid] = group.addresses

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
