"""Which group serves a key: a cached shard map, kept up to date by asking for what changed.

The map is only a hint: groups decide, when they apply. A group that does not serve
a shard says who may; that overrides the map for the shard until the map changes, or nobody answers there.

A group whose replicas are all silent says nothing, and may not have what the map gives it: until it has, the
group before it serves on. The configuration that moved the shard names that one, and it is asked instead.
"""

from __future__ import annotations

import asyncio

from shardkv.shardctrler.client import ControllerClient
from shardkv.shardctrler.shard_map import Change, Config, Gid, Group, Shard, ShardId

REFRESH_SECONDS = 0.02  # at most one question about changes in this time
LOOK_BACK_SECONDS = 0.5  # at most one look at who had a silent group's shards before it in this time
MAX_EPOCHS = 64  # looked up in one such look, and remembered
STALE_SECONDS = 30.0  # a clerk in use asks so often though nobody refused it: controllers may move, one by one


class Router:
    """The clerk's view of the map. `map_changed` is called after every news."""

    def __init__(self, controller: ControllerClient) -> None:
        self._controller = controller
        self.config: Config | None = None
        self._addresses: dict[Gid, tuple[str, ...]] = {}  # also of groups that have left
        self._overrides: dict[ShardId, Gid] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._looking_back: asyncio.Task[None] | None = None
        self._moved_by: dict[int, Change] = {}  # by configuration: those that moved shards of silent groups
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

    def lookup_below(self, end: bytes) -> tuple[Shard, Gid]:
        """The shard of the keys right below `end`, and the group to ask; an empty end is open."""
        assert self.config is not None
        shard = self.config.lookup_below(end)
        return shard, self._overrides.get(shard.id, shard.gid)

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

    def look_back(self, gid: Gid, shards: set[ShardId]) -> None:
        """No replica of `gid` answers for these shards: find out who had them before, unless that is being done."""
        if self._looking_back is None or self._looking_back.done():
            self._looking_back = asyncio.get_running_loop().create_task(self._look_back(gid, shards))

    async def _look_back(self, gid: Gid, shards: set[ShardId]) -> None:
        assert self.config is not None
        config = self.config
        moved = [config.by_id[shard] for shard in sorted(shards) if shard in config.by_id]
        moved = [shard for shard in moved if shard.gid == gid and shard.epoch]
        try:
            for epoch in sorted({shard.epoch for shard in moved} - self._moved_by.keys())[:MAX_EPOCHS]:
                for change in await self._controller.changes(epoch - 1, 0.0, 2.0, limit=1):
                    if len(self._moved_by) >= MAX_EPOCHS:
                        self._moved_by.clear()
                    self._moved_by[change.num] = change
        except Exception as error:  # as for news: operations say so when their time is up
            self.error = error
        for shard in moved:
            source = _source(self._moved_by.get(shard.epoch), shard)
            if source is not None and source.gid != gid and config.by_id.get(shard.id) == shard:
                addresses = self._addresses.get(source.gid, source.addresses)
                if addresses and shard.id not in self._overrides:
                    self._addresses.setdefault(source.gid, addresses)
                    self._overrides[shard.id] = source.gid
        await asyncio.sleep(LOOK_BACK_SECONDS)

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
        for task in (self._refreshing, self._looking_back):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


def _source(change: Change | None, shard: Shard) -> Group | None:
    """Who had the shard before that configuration moved it; it may have been split since."""
    for move in change.moves if change is not None else ():
        if move.contains(shard.start):
            return move.source
    return None
