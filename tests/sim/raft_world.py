"""A Raft group in virtual time: production node, WAL and codec; simulated disk and network.

The state machine is a list of what was applied. After every turn of a replica the
properties of Figure 3 are checked across the group.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from random import Random
from typing import Any

from shardkv.raft.errors import RaftError
from shardkv.raft.incarnations import KnownDisks
from shardkv.raft.interfaces import Directory
from shardkv.raft.machine import unstamp
from shardkv.raft.node import NodeOptions
from shardkv.raft.protocol.core import Raft
from shardkv.raft.protocol.messages import Envelope
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.ready import Options
from shardkv.raft.protocol.roles import Leader
from shardkv.raft.protocol.types import Entry, Kind, SnapshotMeta
from shardkv.raft.repair import open_or_repair
from shardkv.raft.replica import Replica, ReplicaOptions
from shardkv.raft.state_file import InMemoryMachine, StateFile
from tests.sim.disk import SimDisk
from tests.sim.loop import Host
from tests.sim.network import SimNetwork, SimTransport, Weather
from tests.sim.promises import Promises


class ListMachine(InMemoryMachine):
    """Appends every command to a list, and answers with its length."""

    def __init__(self, directory: Directory, world: RaftWorld) -> None:
        super().__init__(directory)
        self.world = world
        self.values: list[str] = []
        self.membership = b""
        self.clock_ms = 0  # it keeps no time, and nothing of it expires

    def apply(self, entries: Sequence[Entry]) -> list[bytes]:
        replies = []
        for entry in entries:
            assert entry.index == self._applied.index + 1, "a gap or a repetition"
            if entry.kind is Kind.COMMAND:
                self.values.append(unstamp(entry)[1].decode())
            if entry.kind is Kind.MEMBERSHIP:
                self.membership = entry.data
            self.world.applied(entry)
            self._applied = SnapshotMeta(entry.index, entry.term)
            replies.append(str(len(self.values)).encode())
        return replies

    def dump(self) -> bytes:
        return json.dumps([self.values, self.membership.decode()]).encode()

    def load(self, data: bytes) -> None:
        self.values, membership = json.loads(data)
        self.membership = membership.encode()


class RaftWorld:
    """`count` replicas with ids from 1. Every fault and every draw comes from `seed`."""

    def __init__(
        self,
        count: int,
        seed: int = 0,
        core: Options | None = None,
        compact_bytes: int = 1 << 20,
        weather: Weather | None = None,
        process_death: float = 0.0,
    ) -> None:
        self.rng = Random(seed)
        self.network = SimNetwork(self.rng, weather)
        self.network.on_mail = self._sent
        self.mail: list[Envelope] = []
        self.process_death = process_death  # chance that a death leaves the page cache
        self.ids = list(range(1, count + 1))
        self.first = tuple(self.ids)  # who began the group; others join it
        self.disks = {node: SimDisk(self.rng) for node in self.ids}
        self.incarnations = {node: self.rng.getrandbits(64) for node in self.ids}
        self.promises = {node: Promises(disk) for node, disk in self.disks.items()}
        self.hosts: dict[int, Host] = {}
        self.replicas: dict[int, Replica] = {}
        self.restarts: dict[asyncio.Task[None], None] = {}
        self.options = ReplicaOptions(
            node=NodeOptions(core=core or Options()), compact_bytes=compact_bytes, segment_bytes=4096
        )
        self.leaders: dict[int, int] = {}  # term -> who led it
        self.commits: dict[
            int, tuple[int, int]
        ] = {}  # index -> (the entry's term, that of the leader that committed)
        self.committed: dict[int, tuple[int, bytes]] = {}  # index -> (term, data), as first applied

    def _sent(self, source: str, target: str, mail: Sequence[Envelope]) -> None:
        self.mail.extend(mail)
        for envelope in mail:
            self.promises[envelope.sender].check(envelope)

    # ---- life and death

    async def start(self, nodes: Iterable[int] | None = None) -> None:
        for node in self.ids if nodes is None else nodes:
            directory = self.disks[node].open()

            def make(directory: Directory = directory) -> ListMachine:
                machine = ListMachine(directory, self)
                machine.recover()
                return machine

            peers = {other: f"n{other}" for other in self.ids if other != node}
            host = self.hosts[node] = Host(f"n{node}")
            transport = SimTransport(self.network, "c", 1, host, peers, self.incarnations[node])
            first = Membership.of({n: f"n{n}" for n in self.first} if node in self.first else {})
            replica = await open_or_repair(
                node,
                first,
                directory,
                transport,
                StateFile(directory, make),
                Random(self.rng.random()),
                lambda: int(asyncio.get_running_loop().time() * 1000),
                self.options,
                KnownDisks(node, self.incarnations[node], first),
            )
            replica.on_turn.append(partial(self.check, replica))
            self.replicas[node] = replica

            def on_post(
                method: str, payload: bytes, node: int = node, transport: SimTransport = transport
            ) -> None:
                self.replicas[node].node.receive(transport.unpack(payload))

            transport.on_unreachable = replica.node.unreachable
            self.network.listen(host, on_post=on_post, on_break=transport.broke)

    async def add(self, node: int) -> None:
        """Start a replica that does not belong to the group yet."""
        self.ids.append(node)
        self.disks[node] = SimDisk(self.rng)
        self.incarnations[node] = self.rng.getrandbits(64)
        self.promises[node] = Promises(self.disks[node])
        await self.start([node])

    async def wipe(self, *nodes: int) -> None:
        """Their disks are lost; they start again on empty ones, as if nothing had been."""
        await self.crash([node for node in nodes if node in self.replicas])
        for node in nodes:
            self.disks[node].wipe()
            self.incarnations[node] = self.rng.getrandbits(64)
        await self.start(nodes)

    async def crash(self, nodes: Iterable[int]) -> None:
        for node in nodes:
            await self._end(node).stop()

    def _end(self, node: int) -> Replica:
        """It dies, perhaps with the power: it has no effect any more; what is left of it is to be stopped."""
        self.network.hang_up(f"n{node}")
        self.hosts[node].alive = False
        self.disks[node].crash(power=self.rng.random() >= self.process_death)
        return self.replicas.pop(node)

    def kill(self, node: int, restart_seconds: float) -> None:
        """Crash it at this very moment, from wherever, and start it again a little later."""
        if node in self.replicas:
            dead = self._end(node)

            async def again() -> None:
                await dead.stop()
                await asyncio.sleep(restart_seconds)
                if node not in self.replicas:
                    await self.start([node])

            task = asyncio.get_running_loop().create_task(again(), context=self.network.context)
            self.restarts[task] = None
            task.add_done_callback(self.restarts.pop)

    async def restart(self, *nodes: int) -> None:
        await self.crash(nodes)
        await self.start(nodes)

    def isolate(self, *nodes: int) -> None:
        for node in nodes:
            self.network.isolate(f"n{node}", [f"n{other}" for other in self.ids])

    def partition(self, *sides: Sequence[int]) -> None:
        self.network.partition(*[[f"n{node}" for node in side] for side in sides])

    # ---- looking

    def core(self, node: int) -> Raft:
        return self.replicas[node].core

    def values(self, node: int) -> list[str]:
        return self.machine(node).values

    def machine(self, node: int) -> ListMachine:
        machine = self.replicas[node].machine
        assert isinstance(machine, ListMachine)
        return machine

    def leaders_now(self, among: Iterable[int] | None = None) -> list[int]:
        nodes = self.replicas if among is None else among
        return [node for node in nodes if node in self.replicas and self.core(node).is_leader]

    async def until(self, condition: Callable[[], object], timeout: float = 30.0) -> None:
        async with asyncio.timeout(timeout):
            while not condition():
                await asyncio.sleep(0.005)

    async def leader(self, among: Iterable[int] | None = None, timeout: float = 30.0) -> int:
        """Wait for a leader that has committed in its own term."""
        nodes = None if among is None else list(among)  # None: whoever runs then, started meanwhile or not

        def has_committed(core: Raft) -> bool:
            return isinstance(core.role, Leader) and core.commit_index >= core.role.term_start

        def ready() -> list[int]:
            return [node for node in self.leaders_now(nodes) if has_committed(self.core(node))]

        await self.until(ready, timeout)
        return max(ready(), key=lambda node: self.core(node).term)

    async def propose(self, value: str, among: Iterable[int] | None = None, timeout: float = 60.0) -> int:
        """Have `value` committed through whoever leads, trying again when refused for sure.

        An outcome that is not known is not tried again. Returns the leader that did it.
        """
        async with asyncio.timeout(timeout):
            while True:
                node = await self.leader(among)
                try:
                    await self.replicas[node].propose(value.encode())
                    return node
                except RaftError:
                    await asyncio.sleep(0.01)

    async def converge(self, nodes: Iterable[int] | None = None, timeout: float = 60.0) -> None:
        """Wait until the replicas have applied the same entries, all there are."""
        live = list(self.replicas if nodes is None else nodes)

        def same() -> bool:
            indexes = {self.core(n).handed_index for n in live}
            return len(indexes) == 1 and indexes == {self.core(n).log.last_index for n in live}

        await self.until(same, timeout)
        assert len({tuple(self.values(node)) for node in live}) == 1, "replicas differ"

    # ---- Figure 3

    def applied(self, entry: Entry) -> None:
        """State Machine Safety: nobody applies another entry at the same index."""
        first = self.committed.setdefault(entry.index, (entry.term, entry.data))
        assert first == (entry.term, entry.data), f"two entries were committed at index {entry.index}"

    def check(self, replica: Replica) -> None:
        core = replica.core
        core.check()
        assert not replica.node.refusals.by_sender, "the border refused what a sound peer sent"
        if core.is_leader:  # Election Safety
            leader = self.leaders.setdefault(core.term, core.id)
            assert leader == core.id, f"{leader} and {core.id} both led term {core.term}"
            for index, (term, committed_in) in self.commits.items():  # Leader Completeness
                if committed_in < core.term and index > core.log.base_index:
                    assert core.log.term_at(index) == term, f"the leader lacks committed entry {index}"
            for index in range(max(core.log.base_index, len(self.commits)) + 1, core.commit_index + 1):
                self.commits.setdefault(index, (core.log.term_at(index) or 0, core.term))
        for other in self.replicas.values():  # Log Matching, at the ends
            shared = min(core.log.last_index, other.core.log.last_index)
            while shared > max(core.log.base_index, other.core.log.base_index):
                if core.log.term_at(shared) == other.core.log.term_at(shared):
                    ours = core.log.slice(shared, shared + 1, 1)
                    assert ours == other.core.log.slice(shared, shared + 1, 1), "logs match in name only"
                    break
                shared -= 1


Story = Callable[[RaftWorld], Awaitable[None]]


def in_world(count: int, **options: Any) -> Callable[[Story], Callable[[], None]]:
    """Turn an async story about a `RaftWorld` into a test."""

    def decorate(story: Story) -> Callable[[], None]:
        def test() -> None:
            from tests.sim.loop import run

            async def main() -> None:
                world = RaftWorld(count, **options)
                await world.start()
                try:
                    await story(world)
                finally:
                    await world.crash(list(world.replicas))
                for replica in world.replicas.values():
                    assert replica.node.fault is None

            run(main())

        test.__name__, test.__doc__ = story.__name__, story.__doc__
        return test

    return decorate
