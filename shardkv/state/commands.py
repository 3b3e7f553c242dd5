"""What a group's log holds besides no-ops: client frames, and the steps of configurations and hand-overs.

command  kind u8; a client frame: largest value u32 (the leader's limit, so that all
         replicas judge an append alike), the frame; a check: its id (16 bytes); the
         others: a protobuf message
"""

from __future__ import annotations

import struct

from shardkv import shardkv_pb2 as pb

FRAME, LEARN, INSTALL, CLOSE, RELEASE, BEGIN, CLAIMED, CHECK = 1, 2, 3, 4, 5, 6, 7, 8
ABANDON, THAW, GIVE_UP, TAKE_BACK = 9, 10, 11, 12
RESTORE, RESTORE_CHUNK, INHERIT = 13, 14, 15
KEEP, ENDED = 16, 17
FRAME_HEADER = struct.Struct("<BI")


def frame(frame_bytes: bytes, max_value_bytes: int) -> bytes:
    return FRAME_HEADER.pack(FRAME, max_value_bytes) + frame_bytes


def begin(incarnation: int) -> bytes:
    return bytes([BEGIN]) + pb.Begin(incarnation=incarnation).SerializeToString()


def claimed(incarnation: int, joined: int, others: int = 0) -> bytes:
    message = pb.Claimed(incarnation=incarnation, joined=joined, others=others)
    return bytes([CLAIMED]) + message.SerializeToString()


def learn(changes: list[bytes]) -> bytes:
    return bytes([LEARN]) + pb.Learn(changes=changes).SerializeToString()


def install(message: pb.Install) -> bytes:
    return bytes([INSTALL]) + message.SerializeToString()


def close(shard: int, epoch: int, attempt: int = 0) -> bytes:
    return bytes([CLOSE]) + pb.Step(shard=shard, epoch=epoch, attempt=attempt).SerializeToString()


def abandon(shard: int, epoch: int, attempt: int) -> bytes:
    return bytes([ABANDON]) + pb.Step(shard=shard, epoch=epoch, attempt=attempt).SerializeToString()


def thaw(shard: int, epoch: int, attempt: int) -> bytes:
    return bytes([THAW]) + pb.Step(shard=shard, epoch=epoch, attempt=attempt).SerializeToString()


def give_up(shard: int, epoch: int) -> bytes:
    return bytes([GIVE_UP]) + pb.Step(shard=shard, epoch=epoch).SerializeToString()


def take_back(shard: int, epoch: int) -> bytes:
    return bytes([TAKE_BACK]) + pb.Step(shard=shard, epoch=epoch).SerializeToString()


def ended(shard: int, epoch: int) -> bytes:
    """The taker lets go of a hand-over that the giver, as it says, has taken back."""
    return bytes([ENDED]) + pb.Step(shard=shard, epoch=epoch).SerializeToString()


def keep(shard: int, epoch: int) -> bytes:
    """The giver takes back what it has not closed: nobody has to be asked."""
    return bytes([KEEP]) + pb.Step(shard=shard, epoch=epoch).SerializeToString()


def release(shard: int, epoch: int) -> bytes:
    return bytes([RELEASE]) + pb.Step(shard=shard, epoch=epoch).SerializeToString()


def inherit(shard: int, start: bytes) -> bytes:
    message = pb.Inherit(shard=shard)
    setattr(message, "from", start)
    return bytes([INHERIT]) + message.SerializeToString()


def restore(encoded: bytes) -> bytes:
    """A step of a restore: an encoded RestoreStep."""
    return bytes([RESTORE]) + encoded


def restore_chunk(encoded: bytes) -> bytes:
    """A piece of a restore: an encoded RestoreChunk, as it came."""
    return bytes([RESTORE_CHUNK]) + encoded


def check(id: bytes) -> bytes:
    """Changes nothing: every replica notes what it holds after this entry (`checking.py`)."""
    return bytes([CHECK]) + id
