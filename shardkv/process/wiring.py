"""One function that makes a server of its interfaces. A process gives it the real ones, the simulator its own.

What stands here runs under the simulator as it runs in production; what differs is handed in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from shardkv.process.identity import Identity
from shardkv.process.options import CONTROLLER_GROUP
from shardkv.raft import space_watch
from shardkv.raft.incarnations import KnownDisks
from shardkv.raft.interfaces import Directory, Transport
from shardkv.raft.protocol.types import NodeId
from shardkv.raft.repair import StateStore, open_or_repair
from shardkv.raft.replica import ReplicaOptions
from shardkv.server.giver import PACE, Pace
from shardkv.server.group import GroupServer
from shardkv.shardctrler.client import ControllerClient
from shardkv.shardctrler.server import ControllerServer
from shardkv.wire.calls import Dialer
from shardkv.wire.frames import Limits

Server = ControllerServer | GroupServer


class ReplicaTransport(Transport, Protocol):
    on_unreachable: Callable[[NodeId], None]


@dataclass(frozen=True, slots=True)
class Interfaces:
    """Through which one replica reaches the world."""

    directory: Directory
    store: StateStore
    transport: ReplicaTransport
    dialer: Dialer
    rng: Random
    clock_ms: Callable[[], int]  # the wall clock
    free_bytes: Callable[[], Awaitable[int]]  # on the disk


@dataclass(frozen=True, slots=True)
class Settings:
    """What a server is told that is no interface."""

    controllers: Sequence[str] = ()  # where a group finds them
    initial_shards: int = 0
    reserve_bytes: int = 0  # with less free on the disk the group takes no more in
    limits: Limits = field(default_factory=Limits)
    pace: Pace = PACE
    raft: ReplicaOptions = field(default_factory=ReplicaOptions)


async def open_server(
    identity: Identity, disks: KnownDisks, world: Interfaces, settings: Settings
) -> tuple[Server, asyncio.Task[None]]:
    """A running replica and its services, and the task that watches its disk's free space.

    Raises StorageError.
    """
    replica = await open_or_repair(
        identity.replica,
        disks.first,
        world.directory,
        world.transport,
        world.store,
        world.rng,
        world.clock_ms,
        settings.raft,
        disks,
    )
    world.transport.on_unreachable = replica.node.unreachable
    watch = space_watch.watch(replica, world.free_bytes, settings.reserve_bytes)
    watching = asyncio.get_running_loop().create_task(watch)
    if identity.gid == CONTROLLER_GROUP:
        return ControllerServer(replica, identity.cluster, settings.initial_shards), watching
    controller = ControllerClient(settings.controllers, world.dialer, world.rng)
    group = GroupServer(replica, controller, world.dialer, world.rng, settings.limits, settings.pace)
    return group, watching
