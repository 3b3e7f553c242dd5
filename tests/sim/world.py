"""A whole cluster in one thread on virtual time: production code but for the doors.

Controllers, groups and clerks are the classes that run in production, wired as
`shardkv/process.py` wires them; disk and network are numbers, and everything is
drawn from one seed. State Machine Safety and the ownership invariants are checked
as entries are applied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random

from client import AsyncShardClerk
from raft.node import NodeOptions
from raft.quorum import Membership
from raft.ready import Options
from raft.rsm import ReplicaOptions, ReplicatedMachine, open_replica
from raft.snapshot import StreamOptions
from raft.types import Entry
from shardctrler import shardctrler_pb2 as pb
from shardctrler.machine import ControllerMachine
from shardctrler.query import ControllerClient
from shardctrler.server import ControllerServer
from shardctrler.shard_map import Config
from shardkv.cli.overview import Overview, look
from shardkv.engine import MemoryEngine
from shardkv.frames import Limits
from shardkv.machine import ShardMachine
from shardkv.server import GroupServer
from tests.sim import loop
from tests.sim.disk import SimDisk
from tests.sim.network import SimDialer, SimNetwork, SimTransport, Weather

CONTROLLER = 0
START_MS = 1_700_000_000_000


@dataclass
class Process:
    """One replica's place in the world; `server` is None while it is down."""

    gid: int
    replica: int
    address: str
    peers: dict[int, str]
    disk: SimDisk
    server: ControllerServer | GroupServer | None = None
    skew_ms: int = 0

    @property
    def rsm(self) -> ReplicatedMachine:
        assert self.server is not None
        return self.server.replica


@dataclass
class Settings:
    controllers: int = 3
    replicas: int = 3
    shards: int = 4
    weather: Weather = field(default_factory=Weather)
    core: Options = field(default_factory=Options)
    compact_bytes: int = 1 << 20
    segment_bytes: int = 1 << 16


class World:
    def __init__(self, seed: int = 0, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.rng = Random(seed)
        self.network = SimNetwork(self.rng, self.settings.weather)
        self.processes: dict[str, Process] = {}
        self.clerks: list[AsyncShardClerk] = []
        self._applied: dict[tuple[int, int], tuple[int, bytes]] = {}
        self.replica_options = ReplicaOptions(
            NodeOptions(core=self.settings.core, snapshots=StreamOptions(chunk_bytes=4096)),
            compact_bytes=self.settings.compact_bytes,
            segment_bytes=self.settings.segment_bytes,
        )
        self._dialer = SimDialer(self.network, "admin:1")
        for n in range(1, self.settings.controllers + 1):
            self._add(CONTROLLER, n, {m: f"ctl-{m}:1" for m in range(1, self.settings.controllers + 1)})
        self.controller = ControllerClient(self.controllers, self._dialer, Random(self.rng.random()))

    def _add(self, gid: int, replica: int, peers: dict[int, str]) -> Process:
        process = Process(gid, replica, peers[replica], peers, SimDisk(self.rng))
        process.skew_ms = self.rng.randrange(-2000, 2000)
        self.processes[process.address] = process
        return process

    @property
    def controllers(self) -> list[str]:
        return [process.address for process in self.of(CONTROLLER)]

    def of(self, gid: int) -> list[Process]:
        return [process for process in self.processes.values() if process.gid == gid]

    # ---- life and death

    async def start_group(self, gid: int) -> list[str]:
        """Start a new group's replicas; `join` lets it in. Returns its addresses."""
        peers = {n: f"g{gid}-{n}:1" for n in range(1, self.settings.replicas + 1)}
        for n in peers:
            await self.start(self._add(gid, n, peers))
        return list(peers.values())

    async def start(self, process: Process) -> None:
        if process.server is not None:
            return
        directory = process.disk.open()
        transport = SimTransport(
            self.network,
            "sim",
            process.gid,
            process.address,
            {n: a for n, a in process.peers.items() if n != process.replica},
        )

        def clock_ms() -> int:
            return START_MS + process.skew_ms + int(asyncio.get_running_loop().time() * 1000)

        machine: ControllerMachine | ShardMachine
        if process.gid == CONTROLLER:
            machine = ControllerMachine(directory)
            machine.recover()
        else:
            machine = ShardMachine(process.gid, MemoryEngine(directory))
        self._watch(process, machine)
        rng = Random(self.rng.random())
        replica = await open_replica(
            process.replica,
            Membership(frozenset(process.peers)),
            directory,
            transport,
            machine,
            rng,
            clock_ms,
            self.replica_options,
        )
        if process.gid == CONTROLLER:
            process.server = ControllerServer(replica, process.peers, "sim", self.settings.shards, clock_ms)
        else:
            dialer = SimDialer(self.network, process.address)
            client = ControllerClient(self.controllers, dialer, rng)
            process.server = GroupServer(replica, process.peers, client, dialer, rng, Limits(), clock_ms)
        self.network.listen(
            process.address,
            process.server.handle,
            lambda method, payload: replica.node.receive(transport.unpack(payload)),
        )

    def _watch(self, process: Process, machine: ControllerMachine | ShardMachine) -> None:
        """State Machine Safety: all replicas of a group apply the same entries, each once and in order."""
        apply = machine.apply

        def watched(entries: Sequence[Entry]) -> list[bytes]:
            for entry in entries:
                told = (entry.term, entry.data)
                first = self._applied.setdefault((process.gid, entry.index), told)
                assert first == told, f"group {process.gid} applied two entries at {entry.index}"
            assert entries[0].index == machine.applied.index + 1, "a gap or a repetition"
            replies = apply(entries)
            if isinstance(machine, ShardMachine):
                machine.check()
            return replies

        machine.apply = watched  # type: ignore[method-assign]

    async def crash(self, process: Process) -> None:
        if process.server is None:
            return
        self.network.hang_up(process.address)
        process.disk.crash()
        server, process.server = process.server, None
        await server.stop()

    async def restart(self, process: Process) -> None:
        await self.crash(process)
        await self.start(process)

    async def crash_all(self) -> None:
        for process in self.processes.values():
            await self.crash(process)

    async def start_all(self) -> None:
        for process in self.processes.values():
            await self.start(process)

    async def close(self) -> None:
        for clerk in self.clerks:
            await clerk.close()
        for process in self.processes.values():
            assert process.server is None or process.rsm.node.fault is None
        await self.crash_all()

    # ---- using it

    def clerk(self, timeout: float = 60.0) -> AsyncShardClerk:
        name = f"clerk-{len(self.clerks)}:1"
        clerk = AsyncShardClerk(
            self.controllers,
            timeout,
            dialer=SimDialer(self.network, name),
            rng=Random(self.rng.random()),
        )
        self.clerks.append(clerk)
        return clerk

    async def join(self, *gids: int, timeout: float = 60.0) -> int:
        request = pb.AdminRequest(join=pb.Join())
        for gid in gids:
            addresses = [process.address for process in self.of(gid)] or await self.start_group(gid)
            request.join.groups.add(gid=gid, addresses=addresses)
        return await self.controller.admin(request, timeout)

    async def leave(self, *gids: int, timeout: float = 60.0) -> int:
        return await self.controller.admin(pb.AdminRequest(leave=pb.Leave(gids=gids)), timeout)

    async def move(self, shard: int, gid: int, timeout: float = 60.0) -> int:
        return await self.controller.admin(pb.AdminRequest(move=pb.MoveShard(shard=shard, gid=gid)), timeout)

    async def split(self, shard: int, key: bytes, timeout: float = 60.0) -> int:
        return await self.controller.admin(pb.AdminRequest(split=pb.SplitShard(shard=shard, key=key)), timeout)

    async def merge(self, shard: int, timeout: float = 60.0) -> int:
        return await self.controller.admin(pb.AdminRequest(merge=pb.MergeShard(shard=shard)), timeout)

    async def config(self, num: int | None = None) -> Config:
        return await self.controller.query(num, 60.0)

    async def overview(self) -> Overview:
        return await look(self.controller, self._dialer, self.controllers, 60.0)

    async def settle(self, timeout: float = 60.0) -> None:
        """Wait until every shard serves under the latest configuration, and nothing is left to release."""
        async with asyncio.timeout(timeout):
            while True:
                overview = await self.overview()
                serving, total = overview.settled()
                if serving == total and not self.leftovers():
                    return
                await asyncio.sleep(0.05)

    def leftovers(self) -> list[str]:
        """Rows that are on their way, at leaders that are up."""
        return [
            f"{process.address}: {row}"
            for process in self.processes.values()
            if isinstance(process.server, GroupServer) and process.rsm.is_leader
            for row in process.server.machine.ownership.rows.values()
            if row.state.name in ("PULLING", "LENDING", "FROZEN") or row.queue
        ]

    async def leader(self, gid: int, timeout: float = 30.0) -> Process:
        async with asyncio.timeout(timeout):
            while True:
                leaders = [p for p in self.of(gid) if p.server is not None and p.rsm.is_leader]
                if leaders:
                    return max(leaders, key=lambda process: process.rsm.core.term)
                await asyncio.sleep(0.01)

    def compare_replicas(self) -> int:
        """Replicas that have applied the same entries hold the same bytes. Returns how many were compared."""
        states: dict[tuple[int, int], bytes] = {}
        compared = 0
        for process in self.processes.values():
            if isinstance(process.server, GroupServer):
                machine = process.server.machine
                at = (process.gid, machine.applied.index)
                assert isinstance(machine.engine, MemoryEngine)
                state = machine.engine.dump()
                assert states.setdefault(at, state) == state, f"{process.address} differs at entry {at[1]}"
                compared += 1
        return compared

    def group_bytes(self, gid: int) -> list[int]:
        """What each live replica of a group holds in its engine, keys and values."""
        return [
            sum(len(key) + len(value) for key, value in process.server.machine.engine.scan(b"d", b"e"))
            for process in self.of(gid)
            if isinstance(process.server, GroupServer)
        ]


def in_world(
    groups: Iterable[int] = (1, 2), seed: int = 0, limit: float = 5000.0, **settings: object
) -> Callable[[Callable[[World], Awaitable[None]]], Callable[[], None]]:
    """Turn an async story about a cluster with these groups joined into a test."""

    def decorate(story: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
        def test() -> None:
            async def main() -> None:
                world = World(seed, Settings(**settings))  # type: ignore[arg-type]
                await world.start_all()
                if groups:
                    await world.join(*groups)
                    await world.settle()
                try:
                    await story(world)
                finally:
                    await world.close()

            loop.run(main(), limit)

        test.__name__, test.__doc__ = story.__name__, story.__doc__
        return test

    return decorate
