"""The unary gRPC service, for grpcurl and other languages: one operation a call, at the right leader.

A call that comes to the wrong place fails with FAILED_PRECONDITION and says where
the right one is. With an `identity` a write may be tried again safely; without one
it is tried once, and nothing remembers it. A caller that keeps one identity for many writes
says with `acked_below` which of them it will not try again: what a server remembers
is written with every write.
"""

from __future__ import annotations

from typing import Any

import grpc

from shardkv import shardkv_pb2 as pb
from shardkv import shardkv_pb2_grpc as pb_grpc
from shardkv.raft.errors import NotLeader, RaftError
from shardkv.server.group import GroupServer
from shardkv.wire import frames, ranges
from shardkv.wire.frames import (
    APPEND,
    CAS_OP,
    DELETE,
    DELETE_RANGE,
    GET,
    INCR,
    PUT,
    RANGE,
    RANGE_BACK,
    MalformedFrame,
    SectionStatus,
    Status,
)

REFUSED = {
    Status.BAD_OPERATION: (grpc.StatusCode.INVALID_ARGUMENT, "the operation is malformed"),
    Status.VALUE_TOO_LARGE: (
        grpc.StatusCode.INVALID_ARGUMENT,
        "the value would be larger than this server takes",
    ),
    Status.NOT_A_NUMBER: (
        grpc.StatusCode.FAILED_PRECONDITION,
        "the key's value is no decimal integer of 64 bits",
    ),
    Status.OVERFLOW: (grpc.StatusCode.OUT_OF_RANGE, "the counter would leave the 64-bit integers"),
    Status.KEY_SIZE: (
        grpc.StatusCode.INVALID_ARGUMENT,
        "the key is empty, or longer than this server takes",
    ),
    Status.VALUE_SIZE: (grpc.StatusCode.INVALID_ARGUMENT, "the value is larger than this server takes"),
    Status.RESTORING: (
        grpc.StatusCode.UNAVAILABLE,
        "a restore writes this key's shard: ask when it has ended",
    ),
    Status.NO_ROOM: (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the disks of this group are nearly full: it takes only deletes until there is room",
    ),
}


class KVService(pb_grpc.KVServicer):
    def __init__(self, server: GroupServer) -> None:
        self._server = server

    async def Get(self, request: pb.GetRequest, context: Any) -> pb.GetReply:
        status, value = await self._read(context, GET, request.key, b"", request.stale)
        return pb.GetReply(found=status == Status.OK, value=value)

    async def Put(self, request: pb.PutRequest, context: Any) -> pb.PutReply:
        await self._write(context, PUT, request.key, request.value, request.identity)
        return pb.PutReply()

    async def Append(self, request: pb.AppendRequest, context: Any) -> pb.AppendReply:
        await self._write(context, APPEND, request.key, request.value, request.identity)
        return pb.AppendReply()

    async def Delete(self, request: pb.DeleteRequest, context: Any) -> pb.DeleteReply:
        status = await self._write(context, DELETE, request.key, b"", request.identity)
        return pb.DeleteReply(existed=status == Status.OK)

    async def Cas(self, request: pb.CasRequest, context: Any) -> pb.CasReply:
        expected = request.expected if request.HasField("expected") else None
        packed = frames.pack_cas(expected, request.value)
        status = await self._write(context, CAS_OP, request.key, packed, request.identity)
        return pb.CasReply(swapped=status == Status.OK)

    async def Incr(self, request: pb.IncrRequest, context: Any) -> pb.IncrReply:
        by = ranges.pack_by(request.by)
        _, value = await self._write_for_value(context, INCR, request.key, by, request.identity)
        return pb.IncrReply(value=int(value))

    async def DeleteRange(self, request: pb.DeleteRangeRequest, context: Any) -> pb.DeleteRangeReply:
        packed = ranges.pack_look(request.end, request.limit)
        _, tally = await self._write_for_value(context, DELETE_RANGE, request.start, packed, request.identity)
        finished, cursor, count = ranges.unpack_tally(tally)
        return pb.DeleteRangeReply(deleted=count, more=not finished, next=cursor)

    async def Count(self, request: pb.CountRequest, context: Any) -> pb.CountReply:
        packed = ranges.pack_look(request.end, 0, ranges.COUNT)
        _, tally = await self._read(context, RANGE, request.start, packed, False)
        finished, cursor, count = ranges.unpack_tally(tally)
        return pb.CountReply(count=count, more=not finished, next=cursor)

    async def Scan(self, request: pb.ScanRequest, context: Any) -> pb.ScanReply:
        flags = ranges.KEYS_ONLY if request.keys_only else 0
        if request.reverse:
            packed = ranges.pack_look(request.start, request.limit, flags)
            _, page = await self._read(context, RANGE_BACK, request.end, packed, False)
        else:
            packed = ranges.pack_look(request.end, request.limit, flags)
            _, page = await self._read(context, RANGE, request.start, packed, False)
        finished, cursor, pairs = frames.unpack_page(page)
        items = [pb.Item(key=key, value=value) for key, value in pairs]
        return pb.ScanReply(items=items, more=not finished, next=cursor)

    # ---- one operation as a frame

    async def _write(self, context: Any, kind: int, key: bytes, value: bytes, identity: pb.Identity) -> int:
        return (await self._write_for_value(context, kind, key, value, identity))[0]

    async def _write_for_value(
        self, context: Any, kind: int, key: bytes, value: bytes, identity: pb.Identity
    ) -> tuple[int, bytes]:
        session = identity.session or frames.NO_SESSION
        if len(session) != 16:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a session has 16 bytes")
        shard = await self._shard(context, key)
        section = frames.pack_section(
            shard, session, identity.acked_below, bytes([kind]), [identity.seq], [key], [value]
        )
        issued_ms = identity.issued_ms or self._server.now_ms()
        version = frames.version_for(bytes([kind]))
        frame = frames.pack_frame(frames.WRITE, 0, issued_ms, [section], version=version)
        return await self._result(context, self._server.write(frame))

    async def _read(self, context: Any, kind: int, key: bytes, value: bytes, stale: bool) -> tuple[int, bytes]:
        shard = await self._shard(context, key, is_end=kind == RANGE_BACK)
        section = frames.pack_section(shard, frames.NO_SESSION, 0, bytes([kind]), [], [key], [value])
        version = frames.version_for(bytes([kind]))
        frame = frames.pack_frame(frames.READ, 0, 0, [section], version=version)

        read = self._server.read_stale if stale else self._server.read
        return await self._result(context, read(frame))

    async def _shard(self, context: Any, key: bytes, is_end: bool = False) -> int:
        try:
            self._server.replica.check_serving()
        except RaftError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        ownership = self._server.machine.ownership
        row = ownership.find_below(key) if is_end else ownership.find(key)
        if row is None:
            gid = self._server.machine.gid
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"group {gid} does not serve this key")
        assert row is not None
        return row.shard

    async def _result(self, context: Any, work: Any) -> tuple[int, bytes]:
        try:
            _, replies = frames.unpack_reply(await work)
        except MalformedFrame as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except NotLeader:
            leader = self._server.replica.leader_address
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"not the leader; try {leader or 'another'}"
            )
        except RaftError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        reply = replies[0]
        if reply.status is not SectionStatus.OK:
            where = ",".join(reply.addresses)
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"moved to group {reply.gid} {where}".strip()
            )
        status = Status(reply.statuses[0])
        if status > Status.CAS_FAILED:
            await context.abort(*REFUSED.get(status, (grpc.StatusCode.FAILED_PRECONDITION, status.name)))
        return status, reply.values[0]
