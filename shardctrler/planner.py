"""What an admin request makes of the map: a `Change`, or a refusal that changes nothing. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardkv.shardctrler.rebalance import plan
from shardkv.shardctrler.shard_map import (
    NO_GROUP,
    Change,
    Config,
    Gid,
    Group,
    Merge,
    Move,
    Shard,
    ShardId,
    Split,
)
from shardkv.wire.address import split_address

MAX_SPLIT_KEY_BYTES = 4096


class Refused(Exception):
    """The request makes no sense for the current map. `kind` is for programs, the text for people."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def initialize(config: Config, count: int) -> Change | None:
    """Pre-split the key space into `count` ranges, once; None if that was done before.

    The ranges divide printable ASCII evenly, for that is what most keys begin with.
    """
    if config.num > 0:
        return None
    if not 1 <= count <= 4096:
        raise Refused("BadRequest", f"{count} is not between 1 and 4096 shards")
    low, span = 0x20, 0x5F  # the 95 printable characters, in two places: 9,025 steps
    starts = [b""]
    for step in range(1, count):
        first, second = divmod(step * span * span // count, span)
        starts.append(bytes([low + first, low + second]) if second else bytes([low + first]))
    ends = [*starts[1:], b""]
    shards = tuple(Shard(n, *bounds) for n, bounds in enumerate(zip(starts, ends, strict=True), 1))
    return Change(1, initial=shards)


def join(config: Config, groups: Sequence[Group]) -> Change:
    """New groups take their even share of the shards, and nobody else gains any."""
    if not groups:
        raise Refused("BadRequest", "join needs at least one group")
    used = {address: group.gid for group in config.groups.values() for address in group.addresses}
    gids: set[Gid] = set()
    for group in groups:
        if group.gid < 1:
            raise Refused("BadRequest", f"a group id is a positive number, not {group.gid}")
        if group.gid in config.groups or group.gid in gids:
            raise Refused("DuplicateGroup", f"group {group.gid} has joined already")
        gids.add(group.gid)
        _check_addresses(group, used)
    num = config.num + 1
    joined = tuple(replace(group, joined=num) for group in groups)
    live = config.groups | {group.gid: group for group in joined}
    return Change(num, joined=joined, moves=_level(config, live))


def readdress(config: Config, group: Group) -> Change | None:
    """The group's replicas are at other addresses now; None if the map says so already."""
    if group.gid not in config.groups:
        raise Refused("UnknownGroup", f"group {group.gid} is not in configuration {config.num}")
    now = config.groups[group.gid]
    if now.addresses == group.addresses:
        return None
    others = [each for each in config.groups.values() if each.gid != group.gid]
    _check_addresses(group, {address: each.gid for each in others for address in each.addresses})
    return Change(config.num + 1, readdressed=(replace(now, addresses=group.addresses),))


def _check_addresses(group: Group, used: dict[str, Gid]) -> None:
    """Refuse a group without addresses, with malformed or with others' ones; note its own in `used`."""
    if not group.addresses:
        raise Refused("BadRequest", f"group {group.gid} has no addresses")
    for address in group.addresses:
        try:
            split_address(address)
        except ValueError as error:
            raise Refused("BadRequest", str(error)) from None
        if address in used:
            raise Refused("BadRequest", f"{address} belongs to group {used[address]}")
        used[address] = group.gid


def leave(config: Config, gids: Sequence[Gid], force: bool = False) -> Change:
    """The groups' shards go to those that stay. If none stays, that takes `force`: the shards are unassigned."""
    if not gids:
        raise Refused("BadRequest", "leave needs at least one group")
    for gid in gids:
        if gid not in config.groups:
            raise Refused("UnknownGroup", f"group {gid} is not in configuration {config.num}")
    leaving = set(gids)
    live = {gid: group for gid, group in config.groups.items() if gid not in leaving}
    if not live and not force:
        raise Refused(
            "LastGroup",
            f"no group would stay to serve the {len(config.by_id)} shards: let another group join first, "
            "or force it (--force): then nobody serves until a group joins",
        )
    return Change(config.num + 1, left=tuple(sorted(leaving)), moves=_level(config, live))


def rebalance(config: Config) -> Change:
    return Change(config.num + 1, moves=_level(config, config.groups))


def move(config: Config, shard_id: ShardId, gid: Gid) -> Change:
    shard = _shard(config, shard_id)
    if gid not in config.groups:
        raise Refused("UnknownGroup", f"group {gid} is not in configuration {config.num}")
    if shard.gid == gid:
        raise Refused("AlreadyThere", f"shard {shard_id} is on group {gid} already")
    return Change(config.num + 1, moves=(_move(config, shard, config.groups[gid]),))


def split(config: Config, shard_id: ShardId, key: bytes, new_shard: ShardId) -> Change:
    shard = _shard(config, shard_id)
    if len(key) > MAX_SPLIT_KEY_BYTES:
        raise Refused("BadRequest", f"a split key has at most {MAX_SPLIT_KEY_BYTES} bytes")
    if not shard.contains(key) or key == shard.start:
        raise Refused(
            "KeyOutsideShard",
            f"{key!r} is not inside shard {shard_id}: give a key after the first key of the shard and before its end",
        )
    return Change(config.num + 1, split=Split(shard_id, key, new_shard, shard.holder))


def merge(config: Config, shard_id: ShardId) -> Change:
    shard = _shard(config, shard_id)
    right = config.right_neighbour(shard)
    if right is None:
        raise Refused("NoNeighbour", f"shard {shard_id} is the last: it has no right neighbour")
    if (right.gid, right.holder) != (shard.gid, shard.holder):
        raise Refused(
            "DifferentGroups",
            f"shard {shard_id} is on group {shard.gid}, its neighbour {right.id} on {right.gid}: "
            "move one of them first",
        )
    return Change(config.num + 1, merge=Merge(shard_id, right.id, shard.holder))


def _shard(config: Config, shard_id: ShardId) -> Shard:
    if shard_id not in config.by_id:
        raise Refused("UnknownShard", f"shard {shard_id} is not in configuration {config.num}")
    return config.by_id[shard_id]


def _level(config: Config, live: dict[Gid, Group]) -> tuple[Move, ...]:
    if not live:
        return tuple(_move(config, shard, None) for shard in config.shards() if shard.gid)
    owners = {shard.id: shard.holder or shard.gid for shard in config.by_id.values()}
    moves = plan(owners, live)
    for shard in config.by_id.values():
        if shard.gid == NO_GROUP and shard.id not in moves:
            moves[shard.id] = shard.holder  # its holder joined again: nothing to hand over
    return tuple(_move(config, config.by_id[shard], live[gid]) for shard, gid in sorted(moves.items()))


def _move(config: Config, shard: Shard, target: Group | None) -> Move:
    source = None
    if shard.holder:
        # A holder that has left keeps its addresses in the change that made it leave, and
        # the groups keep them with the shard; here it may be known by its number alone.
        source = config.groups.get(shard.holder, Group(shard.holder, ()))
    return Move(shard.id, shard.start, shard.end, source, target)
