"""The shard map's types to protobuf and back; the machine, the server and its clients meet here."""

from __future__ import annotations

from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.shard_map import Change, Config, Group, Merge, Move, Shard, Split


def group_to_pb(group: Group) -> pb.Group:
    return pb.Group(gid=group.gid, addresses=group.addresses, joined=group.joined)


def group_from_pb(group: pb.Group) -> Group:
    return Group(group.gid, tuple(group.addresses), group.joined)


def shard_to_pb(shard: Shard) -> pb.Shard:
    return pb.Shard(
        id=shard.id,
        start=shard.start,
        end=shard.end,
        gid=shard.gid,
        epoch=shard.epoch,
        holder=shard.holder,
    )


def shard_from_pb(shard: pb.Shard) -> Shard:
    return Shard(shard.id, shard.start, shard.end, shard.gid, shard.epoch, shard.holder)


def config_to_pb(config: Config) -> pb.Config:
    message = pb.Config(num=config.num, shards=[shard_to_pb(shard) for shard in config.shards()])
    for gid in sorted(config.groups):
        group = group_to_pb(config.groups[gid])
        group.incarnation = config.claims.get(gid, 0)
        message.groups.append(group)
    return message


def config_from_pb(message: pb.Config) -> Config:
    config = Config.of(
        message.num,
        [shard_from_pb(shard) for shard in message.shards],
        [group_from_pb(group) for group in message.groups],
    )
    config.claims = {group.gid: group.incarnation for group in message.groups if group.incarnation}
    return config


def change_to_pb(change: Change) -> pb.Change:
    message = pb.Change(
        num=change.num,
        joined=[group_to_pb(group) for group in change.joined],
        left=change.left,
        initial=[shard_to_pb(shard) for shard in change.initial],
        readdressed=[group_to_pb(group) for group in change.readdressed],
    )
    for move in change.moves:
        message.moves.add(
            shard=move.shard,
            to=move.target.gid if move.target else 0,
            start=move.start,
            end=move.end,
            source=group_to_pb(move.source) if move.source else None,
            target=group_to_pb(move.target) if move.target else None,
        )
    if change.split is not None:
        split = change.split
        message.split.CopyFrom(
            pb.Split(shard=split.shard, key=split.key, new_shard=split.new_shard, holder=split.holder)
        )
    if change.merge is not None:
        merge = change.merge
        message.merge.CopyFrom(pb.Merge(shard=merge.shard, right=merge.right, holder=merge.holder))
    return message


def change_from_pb(message: pb.Change) -> Change:
    split = message.split
    merge = message.merge
    return Change(
        num=message.num,
        joined=tuple(group_from_pb(group) for group in message.joined),
        left=tuple(message.left),
        moves=tuple(
            Move(
                move.shard,
                move.start,
                move.end,
                group_from_pb(move.source) if move.HasField("source") else None,
                group_from_pb(move.target) if move.HasField("target") else None,
            )
            for move in message.moves
        ),
        split=Split(split.shard, split.key, split.new_shard, split.holder)
        if message.HasField("split")
        else None,
        merge=Merge(merge.shard, merge.right, merge.holder) if message.HasField("merge") else None,
        initial=tuple(shard_from_pb(shard) for shard in message.initial),
        readdressed=tuple(group_from_pb(group) for group in message.readdressed),
    )
