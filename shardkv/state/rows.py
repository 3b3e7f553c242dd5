"""Ownership rows to protobuf and back: what the engine stores, what migrations send."""

from __future__ import annotations

from shardkv import shardkv_pb2 as pb
from shardkv.shardctrler.shard_map import Group
from shardkv.state.cursor import Cursor
from shardkv.state.row import Event, Fence, Pending, Row, State


def peer_to_pb(peer: Group | None) -> pb.Peer | None:
    return None if peer is None else pb.Peer(gid=peer.gid, addresses=peer.addresses, joined=peer.joined)


def _peer(message: pb.Peer) -> Group:
    return Group(message.gid, tuple(message.addresses), message.joined)


def cursor_to_pb(cursor: Cursor) -> pb.Cursor:
    return pb.Cursor(phase=cursor.phase, key=cursor.key, position=cursor.position)


def cursor_from_pb(message: pb.Cursor) -> Cursor:
    return Cursor(message.phase, message.key, message.position)


def fence_to_pb(fence: Fence | None) -> pb.RestoreFence | None:
    if fence is None:
        return None
    return pb.RestoreFence(
        run=fence.run,
        name=fence.name,
        generation=fence.generation,
        beat=fence.beat,
        next=fence.next,
        later=fence.later,
        sealed=fence.sealed,
    )


def fence_from_pb(message: pb.RestoreFence) -> Fence:
    return Fence(
        message.run,
        message.name,
        message.generation,
        message.beat,
        message.next,
        tuple(message.later),
        message.sealed,
    )


def encode_row(row: Row) -> bytes:
    message = pb.ShardRow(
        shard=row.shard,
        state=row.state,
        epoch=row.epoch,
        start=row.start,
        end=row.end,
        peer=peer_to_pb(row.peer),
        served_epoch=row.served_epoch,
        journal=row.journal,
        cursor=cursor_to_pb(row.cursor),
        attempt=row.attempt,
        given_up=row.given_up,
        fence=fence_to_pb(row.fence),
        restored=row.restored,
        inherits=row.inherits,
        folds=row.folds,
        inherited=row.inherited,
        cut=row.cut,
    )
    for pending in row.queue:
        message.queue.add(
            kind=pending.event,
            epoch=pending.epoch,
            start=pending.start,
            end=pending.end,
            peer=peer_to_pb(pending.peer),
            other=pending.other,
            key=pending.key,
            cut=pending.cut,
        )
    return bytes(message.SerializeToString(deterministic=True))


def decode_row(data: bytes) -> Row:
    message = pb.ShardRow.FromString(data)
    queue = [
        Pending(
            Event(item.kind),
            item.epoch,
            item.start,
            item.end,
            _peer(item.peer) if item.HasField("peer") else None,
            item.other,
            item.key,
            item.cut,
        )
        for item in message.queue
    ]
    return Row(
        message.shard,
        State(message.state),
        message.epoch,
        message.start,
        message.end,
        _peer(message.peer) if message.HasField("peer") else None,
        message.served_epoch,
        message.journal,
        cursor_from_pb(message.cursor),
        queue,
        message.attempt,
        tuple(message.given_up),
        fence_from_pb(message.fence) if message.HasField("fence") else None,
        message.restored,
        message.inherits,
        message.folds,
        message.inherited,
        message.cut,
    )
