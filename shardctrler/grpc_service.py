"""The controller's unary gRPC service, for grpcurl and other languages."""

from __future__ import annotations

from typing import Any

import grpc

from shardkv.raft.errors import NotLeader, RaftError
from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler import shardctrler_pb2_grpc as pb_grpc
from shardkv.shardctrler.server import ControllerServer


class ControllerService(pb_grpc.ControllerServicer):
    def __init__(self, server: ControllerServer) -> None:
        self._server = server

    async def Admin(self, request: pb.AdminRequest, context: Any) -> pb.AdminReply:
        return pb.AdminReply.FromString(await self._answered(context, self._server.admin(request)))

    async def Query(self, request: pb.QueryRequest, context: Any) -> pb.Config:
        config = await self._answered(context, self._server.query(request))
        if config is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no configuration {request.num} yet")
        return config

    async def _answered(self, context: Any, work: Any) -> Any:
        try:
            return await work
        except NotLeader:
            leader = self._server.replica.leader_address
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"not the leader; try {leader or 'another'}"
            )
        except RaftError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
