"""Everything that can go wrong in a simulated cluster, drawn step by step from one seed.

Each seed has a subset of the kinds, each with a weight of its own: faults that are rare
together are common in some seed. Most last a while and overlap with what comes next.
Admins change the map all the while.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any

from shardkv.raft.errors import RaftError, StorageError
from shardkv.raft.protocol.roles import Leader
from shardkv.raft.protocol.space import Room
from shardkv.raft.state_file import STATE_FILE
from shardkv.shardctrler.client import AdminRefused, BadQuery, ControllerUnavailable
from tests.sim.network import Weather
from tests.sim.promises import read_state
from tests.sim.world import Process, World

DAY_MS = 24 * 3600 * 1000
YEAR_MS = 365 * DAY_MS
ADMINS = 3  # at work at the same time
ADMIN_SECONDS = 10.0
REPLACE_SECONDS = 90.0  # for a new replica to have taken its place, most of it after the faults


class Faults:
    def __init__(self, world: World, rng: Random) -> None:
        self.world, self.rng = world, rng
        self.counts: Counter[str] = Counter()
        self._undo: dict[asyncio.TimerHandle, Callable[[], object]] = {}
        self._admins: dict[asyncio.Task[None], None] = {}
        self._replacing: set[int] = set()  # groups that have a replica replaced
        self._damaged: dict[int, Process] = {}  # of each group at most one replica has a damaged state
        kinds = {
            self._crash: 4.0,
            self._crash_everything: 0.5,
            self._crash_group: 1.0,
            self._crash_points: 2.0,
            self._cut: 2.0,
            self._cut_one_way: 2.0,
            self._cut_leader_off: 2.0,
            self._slow_link: 1.0,
            self._pause: 3.0,
            self._clock_jump: 1.0,
            self._slow_disk: 1.0,
            self._failing_disk: 1.5,
            self._full_disk: 1.0,
            self._little_room: 1.5,
            self._transfer: 2.0,
            self._lose_disk: 1.5,
            self._lose_departed_group: 2.0,
        }
        if world.settings.hanging_disks:
            kinds[self._hanging_disk] = 1.0
        if world.settings.flipped_bits:
            kinds[self._flip_state] = 2.0
        drawn = {kind: weight * rng.choice([0, 0, 1, 1, 3]) for kind, weight in kinds.items()}
        self._kinds = {kind: weight for kind, weight in drawn.items() if weight}
        self._change_rate = rng.choice([0.1, 0.3, 0.6])

    async def step(self) -> None:
        """One more thing goes wrong, or one admin begins."""
        at_work = sum(not task.done() for task in self._admins)
        if at_work < ADMINS and (not self._kinds or self.rng.random() < self._change_rate):
            self._begin(self._change())
            return
        if self._kinds:
            kind = self.rng.choices(list(self._kinds), list(self._kinds.values()))[0]
            self.counts[kind.__name__.strip("_")] += 1
            kind()

    async def stop(self) -> None:
        """Mend everything. What is broken afterwards is a bug."""
        for timer, undo in list(self._undo.items()):
            timer.cancel()
            undo()
        self._undo.clear()
        self.world.network.heal()
        self.world.network.weather = Weather()
        self.world.note("the faults stop")
        await self.world.start_all()
        await asyncio.gather(*self._admins)

    # ---- inside

    def _for_a_while(self, most: float, undo: Callable[[], object]) -> None:
        def over() -> None:
            del self._undo[timer]
            undo()

        timer = asyncio.get_running_loop().call_later(self.rng.uniform(0.05, most), over)
        self._undo[timer] = undo

    def _processes(self) -> list[Process]:
        return list(self.world.processes.values())

    def _any(self) -> Process:
        return self.rng.choice(self._processes())

    def _leaders(self) -> list[Process]:
        return [p for p in self._processes() if p.server is not None and p.rsm.is_leader]

    def _leader_or_any(self) -> Process:
        """A leader half of the time: that is where most goes on."""
        leaders = self._leaders()
        return self.rng.choice(leaders) if leaders and self.rng.random() < 0.5 else self._any()

    def _names(self) -> list[str]:
        return [*self.world.processes, *self.world.clerk_hosts]

    # ---- processes

    def _crash(self) -> None:
        self._down(self._leader_or_any())

    def _down(self, process: Process, power: bool | None = None) -> None:
        self.world.kill(process, power)
        self._for_a_while(self.rng.choice([0.3, 3.0]), lambda: self.world.start_soon(process))

    def _crash_everything(self) -> None:
        """Each process dies in its own way, or the data centre loses its power."""
        power = self.rng.choice([None, True])
        for process in self._processes():
            self._down(process, power)

    def _crash_group(self) -> None:
        power = self.rng.choice([None, True])
        for process in self.world.of(self._any().gid):
            self._down(process, power)

    def _hanging_disk(self) -> None:
        """No sync returns for a while. Longer than anybody waits, sometimes."""
        faults = self._leader_or_any().disk.faults
        faults.hang = True
        self._for_a_while(self.rng.choice([1.0, 8.0]), lambda: setattr(faults, "hang", False))

    def _crash_points(self) -> None:
        """It dies at one of its next syncs, just before that counts or just after, several times."""
        faults = self._leader_or_any().disk.faults
        faults.crash = self.rng.choice([0.02, 0.2])
        self._for_a_while(3.0, lambda: setattr(faults, "crash", 0.0))

    def _pause(self) -> None:
        """SIGSTOP, and some time later SIGCONT."""
        hosts = [p.host for p in (self._leader_or_any(), self._any()) if p.host is not None]
        hosts += self.world.clerk_hosts.values()
        host = hosts[0] if self.rng.random() < 0.7 else self.rng.choice(hosts)
        if not host.paused:
            self.world.note(f"{host.name} is paused")
            host.pause()
            self._for_a_while(self.rng.choice([0.5, 2.5]), lambda: host.resume() if host.paused else None)

    def _clock_jump(self) -> None:
        """One wall clock is wrong, by anything from half a second to a year, for a while or for good."""
        process = self._any()
        was = process.skew_ms
        wrong = self.rng.choice([500, 5000, 60_000, 15 * 60_000, DAY_MS, YEAR_MS])
        process.skew_ms = self.rng.choice([-wrong, wrong])
        self.world.note(f"{process.address}: its clock is {process.skew_ms} ms wrong")
        if self.rng.random() < 0.5:
            self._for_a_while(3.0, lambda: setattr(process, "skew_ms", was))

    def _transfer(self) -> None:
        leaders = self._leaders()
        if leaders:
            replica = self.rng.choice(leaders).rsm
            to = self.rng.choice(sorted(replica.core.membership.voters))
            try:
                replica.node.transfer(to)
            except RaftError:
                pass  # it has stopped leading this very moment
            except ValueError:  # one that is being repaired cannot lead; of anybody else that is a bug
                role = replica.core.role
                assert isinstance(role, Leader) and role.progress[to].state_lost

    # ---- the network

    def _cut(self) -> None:
        names = self._names()
        self.rng.shuffle(names)
        side = self.rng.randrange(1, len(names))
        self._cut_between(names[:side], names[side:])

    def _cut_leader_off(self) -> None:
        """A leader, and some of the clerks, alone on one side: what it says there must not be stale."""
        alone = {self._leader_or_any().address}
        alone |= {name for name in self.world.clerk_hosts if self.rng.random() < 0.5}
        if self.rng.random() < 0.3:
            alone.add(self._any().address)
        self._cut_between(sorted(alone), [name for name in self._names() if name not in alone])

    def _cut_between(self, one: list[str], other: list[str]) -> None:
        network = self.world.network
        cut = {(a, b) for a in one for b in other} | {(a, b) for a in other for b in one}
        self.world.note(f"cut: {one} | {other}")
        network.cut |= cut
        self._for_a_while(3.0, lambda: network.cut.difference_update(cut))

    def _cut_one_way(self) -> None:
        network, source = self.world.network, self._leader_or_any().address
        others = [name for name in self._names() if name != source]
        targets = others if self.rng.random() < 0.3 else [self.rng.choice(others)]
        cut = {(source, target) for target in targets}
        if self.rng.random() < 0.5:
            cut = {(target, source) for source, target in cut}
        self.world.note(f"one-way cut: {sorted(cut)}")
        network.cut |= cut
        self._for_a_while(4.0, lambda: network.cut.difference_update(cut))

    def _slow_link(self) -> None:
        slow = self.world.network.slow
        pair = (self._any().address, self._any().address)
        slow[pair] = self.rng.choice([0.02, 0.2, 1.0])
        self._for_a_while(4.0, partial(slow.pop, pair, None))

    # ---- disks

    def _slow_disk(self) -> None:
        faults = self._leader_or_any().disk.faults
        faults.slow = self.rng.choice([0.2, 1.0])
        self._for_a_while(4.0, lambda: setattr(faults, "slow", 0.0))

    def _failing_disk(self) -> None:
        faults = self._leader_or_any().disk.faults
        faults.failing = True
        self._for_a_while(1.5, lambda: setattr(faults, "failing", False))

    def _full_disk(self) -> None:
        faults = self._leader_or_any().disk.faults
        faults.full = True
        self._for_a_while(1.5, lambda: setattr(faults, "full", False))

    def _little_room(self) -> None:
        """One or more replicas of a group have little room, or none, and later have it again."""
        members = self.world.of(self._any().gid)
        for process in self.rng.sample(members, self.rng.randrange(1, len(members) + 1)):
            self.world.set_room(process, self.rng.choice([Room.LOW, Room.FULL]))
            self._for_a_while(4.0, partial(self.world.set_room, process, Room.PLENTY))

    def _lose_disk(self) -> None:
        """For good. Another replica takes its place by a change of membership; one at a time in a group."""
        process = self._leader_or_any()
        if self._is_whole(process.gid):
            self._replacing.add(process.gid)
            self._begin(self._replace(process))

    def _lose_departed_group(self) -> None:
        """A group that has left and owes nothing loses all of its disks; its number will be used again."""
        gids = sorted({process.gid for process in self._processes()} - {0, *self._replacing})
        gone = [gid for gid in gids if self.world.owes_nothing(gid)]
        if gone:
            self.counts["departed groups wiped"] += 1
            gid = self.rng.choice(gone)
            self.world.wipe_group(gid)
            for process in self.world.of(gid):
                self._for_a_while(3.0, partial(self.world.start_soon, process))

    def _is_whole(self, gid: int) -> bool:
        """Whether a quorum stays whole if one more replica of the group loses its state."""
        process = self._damaged.get(gid)
        if process is not None and process.server is not None and not process.rsm.core.state_lost:
            with suppress(StorageError):
                read_state(process.disk.files)
                del self._damaged[gid]
        return len(self.world.of(gid)) >= 3 and gid not in self._replacing and gid not in self._damaged

    def _flip_state(self) -> None:
        """A bit of a state file flips at rest. Most often the process reads it soon; else a flush may replace it."""
        process = self._leader_or_any()
        files = process.disk.files
        if STATE_FILE in files and self._is_whole(process.gid):
            self._damaged[process.gid] = process
            position = self.rng.randrange(len(files[STATE_FILE]))
            self.world.note(f"{process.address}: a bit of byte {position} of its state file flips")
            process.disk.flip(STATE_FILE, position, 1 << self.rng.randrange(8))
            if self.rng.random() < 0.8:
                self._down(process)

    async def _replace(self, process: Process) -> None:
        await self.world.replace_disk(process, REPLACE_SECONDS)
        self._replacing.discard(process.gid)

    # ---- admins

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._admins[task] = None

    async def _change(self) -> None:
        world, rng = self.world, self.rng
        kind = rng.choice(["join", "leave", "move", "move", "split", "merge"])
        try:
            config = await world.controller.query(None, ADMIN_SECONDS)
            shard = rng.choice(list(config.by_id.values()))
            match kind:
                case "join":
                    await world.join(rng.choice([1, 2, 3, 4]), timeout=ADMIN_SECONDS)
                case "leave" if len(config.groups) > 1:
                    await world.leave(rng.choice(sorted(config.groups)), timeout=ADMIN_SECONDS, force=True)
                case "split":
                    key = shard.start + bytes([rng.randrange(40, 120)])
                    await world.split(shard.id, key, timeout=ADMIN_SECONDS)
                case "merge":
                    await world.merge(shard.id, timeout=ADMIN_SECONDS)
                case _ if config.groups:
                    await world.move(shard.id, rng.choice(sorted(config.groups)), timeout=ADMIN_SECONDS)
            self.counts[f"admin {kind}"] += 1
        except (AdminRefused, BadQuery, ControllerUnavailable):
            self.counts["admin in vain"] += 1  # no sense for this map, or faults kept it from being done
