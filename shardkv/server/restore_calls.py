"""What a replica answers to `shardkv restore`: steps and chunks of a restore, through the group's log."""

from __future__ import annotations

import hashlib
import hmac

from shardkv import shardkv_pb2 as pb
from shardkv.raft.replica import Replica
from shardkv.state import commands, restoring
from shardkv.state.machine import ShardMachine
from shardkv.wire.frames import Limits


async def restore_step(replica: Replica, machine: ShardMachine, payload: bytes) -> bytes:
    """A RestoreStep to a RestoreReply. Raises DecodeError, RaftError."""
    step = pb.RestoreStep.FromString(payload)
    if step.kind == pb.RestoreStep.LOOK:
        await replica.read_barrier()
        return restoring.fenced(machine.ownership).SerializeToString()
    if not step.run or (not step.generation and step.kind == pb.RestoreStep.BEGIN):
        raise ValueError("a step of a restore names its run, and its generation to begin with")
    return await replica.propose(commands.restore(payload))


async def restore_chunk(replica: Replica, payload: bytes, limits: Limits) -> bytes:
    """A RestoreChunk to a RestoreReply. Raises DecodeError, ValueError, RaftError."""
    chunk = pb.RestoreChunk.FromString(payload)
    if len(payload) > limits.frame_bytes:
        raise ValueError(f"a chunk of {len(payload)} bytes; the limit is {limits.frame_bytes}")
    if not hmac.compare_digest(hashlib.sha256(chunk.page).digest(), chunk.digest):
        raise ValueError(f"chunk {chunk.number} of shard {chunk.shard} is not what its digest says")
    replica.check_room()
    return await replica.propose(commands.restore_chunk(payload))
