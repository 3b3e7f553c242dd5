"""Which shards move so that counts are level: the fewest possible, and always the same ones. Pure.

With s shards and g groups, s mod g groups have one more than the rest. The larger
targets go to the groups that have most already; so a group gives only what is above
its target, takes only what is below it, and no shard moves twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shardkv.shardctrler.shard_map import Gid, ShardId


def plan(owners: Mapping[ShardId, Gid], live: Iterable[Gid]) -> dict[ShardId, Gid]:
    """New owners of the shards that must move, for counts level to within one.

    `owners` maps every shard to its group; a group that is not in `live` gives up
    all it has. Without a live group there is nothing to plan. O(n log n).
    """
    gids = sorted(live)
    if not gids:
        return {}
    held: dict[Gid, list[ShardId]] = {gid: [] for gid in gids}
    homeless: list[ShardId] = []
    for shard in sorted(owners):
        held.get(owners[shard], homeless).append(shard)
    least, extra = divmod(len(owners), len(gids))
    by_size = sorted(gids, key=lambda gid: (-len(held[gid]), gid))
    target = {gid: least + (rank < extra) for rank, gid in enumerate(by_size)}
    for gid in gids:
        homeless += held[gid][target[gid] :]
    moves: dict[ShardId, Gid] = {}
    homeless.sort(reverse=True)
    for gid in gids:
        for _ in range(target[gid] - len(held[gid])):
            moves[homeless.pop()] = gid
    assert not homeless, "every shard found a place"
    return moves
