"""A whole cluster in one thread on virtual time: production code but for the interfaces.

Controllers, groups and clerks are the classes that run in production, wired as
`shardkv/process/run.py` wires them; disk and network are numbers, and everything is
drawn from one seed. `tests/sim/invariants.py` looks inside at every step.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random

from shardkv.client import AsyncShardClerk
from shardkv.observe.compare import GroupCheck, check_group
from shardkv.observe.overview import Overview, look
from shardkv.process import wiring
from shardkv.process.identity import Identity, claim
from shardkv.process.wiring import Interfaces, open_server
from shardkv.raft.codec import read_mail
from shardkv.raft.errors import DamagedState
from shardkv.raft.interfaces import Directory
from shardkv.raft.node import NodeOptions
from shardkv.raft.protocol.messages import Envelope
from shardkv.raft.protocol.ready import Options
from shardkv.raft.protocol.space import Room
from shardkv.raft.repair import note_damage
from shardkv.raft.replica import Replica, ReplicaOptions
from shardkv.raft.sessions import DEFAULT_TTL_MS
from shardkv.raft.snapshot import StreamOptions
from shardkv.raft.state_file import StateFile
from shardkv.server.giver import Pace
from shardkv.server.group import GroupServer
from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.client import ControllerClient
from shardkv.shardctrler.machine import ControllerMachine
from shardkv.shardctrler.server import ControllerServer
from shardkv.shardctrler.shard_map import Config
from shardkv.state import layout
from shardkv.state.machine import ShardMachine
from shardkv.state.row import State
from shardkv.storage.memory import MemoryEngine
from shardkv.wire.calls import Code, Unreachable
from tests.sim import loop
from tests.sim.disk import SimDisk
from tests.sim.invariants import Invariants
from tests.sim.loop import Host, world_time
from tests.sim.network import SimDialer, SimNetwork, SimTransport, Weather
from tests.sim.promises import Promises

CONTROLLER = 0
CLUSTER = "sim"
START_MS = 1_700_000_000_000
FREE_BYTES = {Room.PLENTY: 10_000_000, Room.LOW: 999, Room.FULL: 0}  # of the disk of a replica
RESTART_SECONDS = (0.05, 1.5)  # until a supervisor starts a process again that died by itself


@dataclass
class Process:
    """One replica's place in the world; `server` is None while it is down."""

    gid: int
    replica: int
    address: str
    peers: dict[int, str]
    disk: SimDisk
    server: ControllerServer | GroupServer | None = None
    host: Host | None = None  # this run of it
    transport: SimTransport = field(init=False)
    promises: Promises = field(init=False)
    joining: bool = False  # it takes the place of one whose disk is gone, and knows nobody yet
    room: Room = Room.PLENTY  # on its disk
    skew_ms: int = 0  # how wrong its wall clock is
    rate: float = 1.0  # how fast its clocks run

    @property
    def rsm(self) -> Replica:
        assert self.server is not None
        return self.server.replica

    @property
    def group(self) -> GroupServer:
        assert isinstance(self.server, GroupServer)
        return self.server

    @property
    def controller(self) -> ControllerServer:
        assert isinstance(self.server, ControllerServer)
        return self.server


@dataclass
class Settings:
    controllers: int = 3
    replicas: int = 3
    shards: int = 4
    weather: Weather = field(default_factory=Weather)
    core: Options = field(default_factory=Options)
    compact_bytes: int = 1 << 20
    segment_bytes: int = 1 << 16
    chunk_bytes: int = 4096  # of a snapshot
    pace: Pace = field(default_factory=Pace)  # of a move
    drift: float = 0.0  # clocks run up to this much fast or slow
    session_ttl_ms: int = DEFAULT_TTL_MS
    process_death: float = 0.0  # chance that a death leaves the page cache; else power is lost as well
    hanging_disks: bool = False  # syncs that do not return are among the faults
    flipped_bits: bool = False  # bits of state files that flip at rest are, too


class World:
    def __init__(self, seed: int = 0, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.rng = Random(seed)
        self.network = SimNetwork(self.rng, self.settings.weather)
        self.network.note = self._arrived
        self.network.on_mail = self._sent
        self.processes: dict[str, Process] = {}
        self.clerks: list[AsyncShardClerk] = []
        self.clerk_hosts: dict[str, Host] = {}
        self.invariants = Invariants()
        self.printing: Callable[[str], None] | None = None  # told what happens, as readable lines
        self.deaths = 0  # processes that died by themselves: of their disks, or at a crash point
        self._next_replica = 100
        self._background: dict[asyncio.Task[None], None] = {}
        self._failures: list[BaseException] = []
        self._digest = hashlib.blake2b(digest_size=16)
        self.replica_options = ReplicaOptions(
            NodeOptions(core=self.settings.core, snapshots=StreamOptions(self.settings.chunk_bytes)),
            compact_bytes=self.settings.compact_bytes,
            segment_bytes=self.settings.segment_bytes,
        )
        self._dialer = SimDialer(self.network, "admin:1")
        for n in range(1, self.settings.controllers + 1):
            self._add(CONTROLLER, n, {m: f"ctl-{m}:1" for m in range(1, self.settings.controllers + 1)})
        self.controller = ControllerClient(self.controllers, self._dialer, Random(self.rng.random()))

    def _add(self, gid: int, replica: int, peers: dict[int, str]) -> Process:
        process = Process(gid, replica, peers[replica], peers, SimDisk(self.rng))
        process.promises = Promises(process.disk)
        process.skew_ms = self.rng.randrange(-2000, 2000)
        process.rate = 1.0 + self.settings.drift * self.rng.uniform(-1, 1)
        self.processes[process.address] = process
        return process

    @property
    def controllers(self) -> list[str]:
        return [process.address for process in self.of(CONTROLLER)]

    def of(self, gid: int) -> list[Process]:
        return [process for process in self.processes.values() if process.gid == gid]

    # ---- the trace

    def note(self, what: str) -> None:
        """Something happened: it is part of the trace, by which two runs are compared."""
        self._digest.update(f"{world_time():.9f} {what}".encode())
        if self.printing is not None:
            self.printing(f"{world_time():10.4f}  {what}")

    def _arrived(self, method: str, source: str, target: str, payload: bytes) -> None:
        self._digest.update(f"{world_time():.9f} {method} {source} {target}".encode())
        self._digest.update(payload)
        if self.printing is not None:
            self.printing(f"{world_time():10.4f}  {source} → {target}  {describe(method, payload)}")

    def _sent(self, source: str, target: str, mail: Sequence[Envelope]) -> None:
        for envelope in mail:
            process = self.processes.get(source)  # None: it is on its way to another address, and dead here
            if process is not None:
                process.promises.check(envelope)

    @property
    def trace_hash(self) -> str:
        """The same for two runs in which the same things happened at the same times."""
        return self._digest.hexdigest()

    def check_failures(self) -> None:
        """Raise what went wrong beside the story: an invariant broken inside a replica."""
        if self._failures:
            raise self._failures[0]
        for process in self.processes.values():
            if process.server is not None:
                self.invariants.check_bounds(process.rsm)

    # ---- life and death

    async def start_group(self, gid: int) -> list[str]:
        """Start a new group's replicas; `join` lets it in. Returns its addresses."""
        peers = {n: f"g{gid}-{n}:1" for n in range(1, self.settings.replicas + 1)}
        for n in peers:
            await self.start(self._add(gid, n, peers))
        return list(peers.values())

    async def start(self, process: Process) -> None:
        """Start it and wait until it serves, or has died again. Nothing, if it runs already."""
        while process.host is not None and process.server is None:
            await asyncio.sleep(0.01)  # it is being started already
        if process.host is not None:
            return
        host = process.host = Host(process.address, process.rate)
        process.disk.on_crash_point = lambda: self._die(process, host, "crash point")
        task = asyncio.get_running_loop().create_task(self._open(process, host), context=host.context)
        while not task.done() and host.alive:
            await asyncio.wait([task], timeout=0.01)
        if not host.alive:
            task.cancel()
            return
        try:
            server = task.result()
        except OSError:  # its disk is not well yet
            self._die(process, host, "disk fault at the start")
            return
        process.server = server
        node = server.replica.node
        transport = process.transport
        self.network.listen(
            host, server.handle, lambda _, mail: node.receive(transport.unpack(mail)), transport.broke
        )
        self.note(f"{process.address} starts")

    async def _open(self, process: Process, host: Host) -> ControllerServer | GroupServer:
        directory = process.disk.open()
        peers = {n: address for n, address in process.peers.items() if n != process.replica}
        rng = Random(self.rng.random())
        first = {} if process.joining else process.peers
        wanted = Identity(CLUSTER, process.gid, process.replica, "memory", rng.getrandbits(64), first)
        identity = await claim(directory, wanted, process.address)
        transport = process.transport = SimTransport(
            self.network, CLUSTER, process.gid, host, peers, identity.incarnation
        )

        def clock_ms() -> int:
            return START_MS + process.skew_ms + int(world_time() * 1000)

        def machine() -> ControllerMachine | ShardMachine:
            if process.gid == CONTROLLER:
                controller = ControllerMachine(directory, self.settings.session_ttl_ms)
                controller.recover()
                made: ControllerMachine | ShardMachine = controller
            else:
                made = ShardMachine(process.gid, MemoryEngine(directory), self.settings.session_ttl_ms)
            self.invariants.watch(process.gid, made)
            return made

        async def free_bytes() -> int:
            return FREE_BYTES[process.room]

        dialer = SimDialer(self.network, process.address, host)
        server, _ = await open_server(
            identity,
            identity.disks(first),
            Interfaces(directory, StateFile(directory, machine), transport, dialer, rng, clock_ms, free_bytes),
            wiring.Settings(
                self.controllers,
                self.settings.shards,
                FREE_BYTES[Room.LOW] + 1,
                pace=self.settings.pace,
                raft=self.replica_options,
            ),
        )
        replica = server.replica
        # Not what a dead process still turns over while it is put away: its group may be another one by then.
        replica.on_turn.append(lambda: self.invariants.turned(process.gid, replica) if host.alive else None)
        replica.node.on_fault = lambda error: self._faulted(process, host, directory, error)
        return server

    def set_room(self, process: Process, room: Room) -> None:
        """So much room its disk has from now on; its watch will see it."""
        self.note(f"{process.address}: room {room.name}")
        process.room = room

    def _faulted(self, process: Process, host: Host, directory: Directory, error: BaseException) -> None:
        """A replica stopped by itself: of its disk, as it must, or of a bug."""
        if isinstance(error, OSError):
            self._die(process, host, f"disk fault: {error}")
        elif isinstance(error, DamagedState):

            async def note() -> None:  # as the process does, before it starts again
                with contextlib.suppress(OSError):  # then the next start meets the damage itself
                    await note_damage(directory, error, START_MS + int(world_time() * 1000))
                self._die(process, host, f"damage: {error}")

            asyncio.get_running_loop().create_task(note(), context=host.context)
        else:
            self._failures.append(error)

    def kill(self, process: Process, power: bool | None = None) -> None:
        """SIGKILL, or loss of `power` of its machine (None: drawn): at once, wherever it was.

        Power may also be lost while the process is down: what it left in the page cache is gone then.
        """
        if power is None:
            power = self.rng.random() >= self.settings.process_death
        host, server = process.host, process.server
        if host is None:
            if power:
                process.disk.crash()
            return
        self.note(f"{process.address} {'loses power' if power else 'dies'}")
        host.alive = False
        process.host = process.server = None
        self.network.hang_up(process.address)
        process.disk.crash(power)
        if host.paused:
            host.resume()  # nothing that it does has an effect any more
        if server is not None:
            self._spawn(server.stop())

    def _die(self, process: Process, host: Host, why: str) -> None:
        """It died by itself; a supervisor will start it again, as often as it takes."""
        if process.host is not host:
            return
        self.note(f"{process.address}: {why}")
        self.deaths += 1
        self.kill(process)
        self._spawn(self._supervise(process))

    async def _supervise(self, process: Process) -> None:
        await asyncio.sleep(self.rng.uniform(*RESTART_SECONDS))
        await self.start(process)

    def _spawn(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            try:
                await work
            except BaseException as error:
                if not isinstance(error, asyncio.CancelledError):
                    self._failures.append(error)

        # A context of its own: the process that is the reason for it may be dying.
        task = asyncio.get_running_loop().create_task(run(), context=self.network.context)
        self._background[task] = None
        task.add_done_callback(lambda task: self._background.pop(task, None))

    async def replace_disk(self, process: Process, timeout: float) -> None:
        """Its disk is gone for good: another replica takes its place, as an operator would have it.

        At its address or, in a group, perhaps at another. (Controllers keep theirs: a clerk that
        asks nothing while all of them move would not find them, which is no bug.)

        A replica that lost its disk must not come back as if it had not: it has forgotten
        votes and entries that it promised to keep.
        """
        self.kill(process)
        process.disk.wipe()
        self.note(f"{process.address} has lost its disk")
        lost = process.replica
        process.replica = self._next_replica = self._next_replica + 1
        process.joining = True
        if process.gid != CONTROLLER and self.rng.random() < 0.5:
            del self.processes[process.address]
            process.address = f"g{process.gid}-{process.replica}:1"
            self.processes[process.address] = process
        await self.start(process)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while loop.time() < deadline:
            # Whoever leads says who the others are; without its answer nothing is known.
            leaders = [p for p in self.of(process.gid) if p.server is not None and p.rsm.is_leader]
            for leader in leaders:
                addresses = leader.rsm.core.membership.addresses.items()
                voters = {node: address for node, address in addresses if node != lost}
                voters[process.replica] = process.address
                payload = json.dumps({"voters": voters}).encode()
                with contextlib.suppress(Unreachable):
                    reply = await self._dialer.call(leader.address, "raft.members", payload, 5.0)
                    if reply[0] == Code.OK:
                        return
            await asyncio.sleep(0.1)
        raise TimeoutError(f"{process.address} did not get its place")

    async def lose_group(self, gid: int) -> None:
        """All disks of a group are gone at once, and it is started again on empty ones."""
        self.wipe_group(gid)
        for process in self.of(gid):
            await self.start(process)

    def wipe_group(self, gid: int) -> None:
        """All of its processes die, and their disks are empty: what starts there is a new group."""
        members = self.of(gid)
        peers = {process.replica: process.address for process in members}
        for process in members:
            self.kill(process)
            process.disk.wipe()
            process.peers, process.joining = peers, False
        self.note(f"group {gid} has lost all of its disks")
        self.invariants.forget(gid)

    def owes_nothing(self, gid: int) -> bool:
        """Whether the group has left in good order: nobody waits for it, and it waits for nobody."""
        controllers = [p.server.machine for p in self.of(CONTROLLER) if isinstance(p.server, ControllerServer)]
        newest = max((machine.config.num for machine in controllers), default=0)
        if newest < self.invariants.newest_config:
            return False  # none that runs knows the map of now: they have just started, or are being repaired
        groups: dict[int, list[ShardMachine]] = {p.gid: [] for p in self.processes.values() if p.gid}
        for process in self.processes.values():
            if isinstance(process.server, GroupServer) and process.rsm.is_leader:
                groups[process.gid].append(process.server.machine)
        if any(gid in machine.config.groups for machine in controllers) or not all(groups.values()):
            return False
        for other, machines in groups.items():
            for machine in machines:
                rows = machine.ownership.rows.values()
                peers = [peer.gid for row in rows for peer in (row.peer, *(p.peer for p in row.queue)) if peer]
                busy = any(row.state is not State.ABSENT or row.queue for row in rows)
                # One that has not learnt of a move yet will ask the group about it: also for what it gave up.
                behind = machine.ownership.joins[0] > 0 and machine.ownership.config_num < newest
                if gid in peers or behind or (other == gid and busy):
                    return False
        return newest > 0

    def start_soon(self, process: Process) -> None:
        self._spawn(self.start(process))

    async def crash(self, process: Process) -> None:
        self.kill(process)
        await asyncio.sleep(0)

    async def restart(self, process: Process) -> None:
        await self.crash(process)
        await self.start(process)

    async def crash_all(self) -> None:
        for process in self.processes.values():
            await self.crash(process)

    async def start_all(self) -> None:
        for process in list(self.processes.values()):  # an admin may add one meanwhile
            await self.start(process)

    async def close(self) -> None:
        for clerk in self.clerks:
            await clerk.close()
        self.check_failures()
        await self.crash_all()
        while self._background:
            await asyncio.sleep(0.01)
        self.check_failures()

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
        self.clerk_hosts[name] = Host(name, 1.0 + self.settings.drift * self.rng.uniform(-1, 1))
        return clerk

    def host_of(self, clerk: AsyncShardClerk) -> Host:
        """Where callers of this clerk run, if it is to have a clock of its own and may be paused."""
        return list(self.clerk_hosts.values())[self.clerks.index(clerk)]

    async def join(self, *gids: int, timeout: float = 60.0) -> int:
        request = pb.AdminRequest(join=pb.Join())
        for gid in gids:
            addresses = [process.address for process in self.of(gid)] or await self.start_group(gid)
            request.join.groups.add(gid=gid, addresses=addresses)
        return await self.controller.admin(request, timeout)

    async def leave(self, *gids: int, timeout: float = 60.0, force: bool = False) -> int:
        request = pb.AdminRequest(leave=pb.Leave(gids=gids, force=force))
        return await self.controller.admin(request, timeout)

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
        try:
            async with asyncio.timeout(timeout):
                while True:
                    overview = await self.overview()
                    serving, total = overview.settled()
                    if serving == total and not self.leftovers():
                        return
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError("\n".join(["it does not settle:", *self.leftovers(), *self.tell()])) from None

    def tell(self) -> list[str]:
        """A line for each replica: what a person asks first when nothing goes on."""
        lines = []
        for process in self.processes.values():
            if process.server is None:
                lines.append(f"{process.address}: down")
                continue
            core = process.rsm.core
            lines.append(
                f"{process.address}: {type(core.role).__name__} of term {core.term}, log to {core.log.last_index}, "
                f"committed {core.commit_index}, applied {process.rsm.machine.applied.index}, {core.membership}"
            )
        return lines

    def leftovers(self) -> list[str]:
        """Rows that are on their way, at leaders that are up."""
        return [
            f"{process.address}: {row}"
            for process in self.processes.values()
            if isinstance(process.server, GroupServer) and process.rsm.is_leader
            for row in process.server.machine.ownership.rows.values()
            if row.state.name in ("PULLING", "LENDING", "FROZEN") or row.queue or row.inherits
        ]

    async def leader(self, gid: int, timeout: float = 30.0) -> Process:
        async with asyncio.timeout(timeout):
            while True:
                leaders = [p for p in self.of(gid) if p.server is not None and p.rsm.is_leader]
                if leaders:
                    return max(leaders, key=lambda process: process.rsm.core.term)
                await asyncio.sleep(0.01)

    async def converge(self, timeout: float) -> None:
        """Wait until every replica of every group has applied all that its leader has."""
        async with asyncio.timeout(timeout):
            for gid in {process.gid for process in self.processes.values()}:
                while True:
                    leader = await self.leader(gid)
                    applied = {p.rsm.machine.applied.index for p in self.of(gid) if p.server is not None}
                    if applied == {leader.rsm.core.log.last_index} and all(p.server for p in self.of(gid)):
                        break
                    await asyncio.sleep(0.05)

    def check_leftovers(self) -> None:
        """Disks hold what is served and little else: no key of a shard that went, no endless log."""
        for process in self.processes.values():
            settings, server = self.settings, process.server
            log = sum(len(data) for name, data in process.disk.files.items() if name.startswith("wal-"))
            # 24 bytes or so around each entry, which may be as short as that.
            bound = 2 * 8 * settings.compact_bytes + 4 * settings.segment_bytes + 20_000
            assert log <= bound, f"{process.address} has {log} bytes of log"
            if isinstance(server, GroupServer):
                rows = [row for row in server.machine.ownership.rows.values() if row.serves]
                for key, _ in server.machine.engine.scan(b"", b"\xff"):
                    kept = key[:1] == b"m" or any(
                        layout.belongs(key, row.shard, row.start, row.end) for row in rows
                    )
                    assert kept, f"{process.address} still holds {key!r}"

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

    async def check(self, gid: int, patience: float = 30.0) -> GroupCheck:
        """As `admin check` does it, while everything goes on."""
        members = [process.address for process in self.of(gid)]
        return await check_group(self._dialer, gid, members, patience)

    async def check_groups(self) -> None:
        """All members of all groups answer, and their digests are equal."""
        for gid in sorted({process.gid for process in self.processes.values()} - {CONTROLLER}):
            found = await self.check(gid)
            assert found.agrees, f"group {gid}: {found.not_compared} {list(found.differences())}"

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


def describe(method: str, payload: bytes) -> str:
    """A message as a person reads it."""
    if method != "raft":
        return f"{method}, {len(payload)} bytes"
    _, _, envelopes = read_mail(payload)
    return "; ".join(f"term {each.term} {each.message}"[:300].replace("\n", " ") for each in envelopes)
