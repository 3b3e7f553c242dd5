"""gRPC's standard health service and reflection, for load balancers, probes and grpcurl.

A replica is SERVING while it knows a leader (it can then answer, or say who can), and
NOT_SERVING before, after a fault, while its state is being repaired, and once it has been told to stop.
"""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shardkv import shardkv_pb2
from shardkv.raft.replica import Replica
from shardkv.shardctrler import shardctrler_pb2

KV = shardkv_pb2.DESCRIPTOR.services_by_name["KV"].full_name
CONTROLLER = shardctrler_pb2.DESCRIPTOR.services_by_name["Controller"].full_name


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers from what the replica knows at that moment; nothing has to be kept up to date."""

    def __init__(self, replica: Replica, server: Any, service: str) -> None:
        self._replica = replica
        self._leaving = False
        health_pb2_grpc.add_HealthServicer_to_server(self, server)
        reflection.enable_server_reflection([service, health.SERVICE_NAME, reflection.SERVICE_NAME], server)

    def leaving(self) -> None:
        """From now on: not serving."""
        self._leaving = True

    def serving(self) -> bool:
        replica = self._replica
        able = not replica.node.stopped and not replica.state_lost
        return not self._leaving and able and replica.leader != 0

    async def Check(self, request: Any, context: Any) -> Any:  # the name is the protocol's
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if self.serving() else status.NOT_SERVING)
