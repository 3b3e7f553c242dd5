"""`make chaos`: a real cluster under load, killed, stopped, cut and rearranged; then its history is judged.

Real processes, real disks, real sockets. Between processes stand the proxies of
`proxy.py`. The workload and the judge are the simulator's. The report fits a page;
the exit status is 1 if anything was lost, doubled or stale, or if the cluster does
not come back when the faults stop.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from bench.live import free_port_base
from shardkv.client import AsyncShardClerk
from shardkv.observe.overview import ask_status, look
from shardkv.process.local_cluster import Cluster, Process
from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.client import AdminRefused, BadQuery, ControllerClient, ControllerUnavailable
from shardkv.wire.dialer import TcpDialer
from tests.chaos.proxy import Cuts, Proxy, holds, socket_inode
from tests.check.linearizability import NotLinearizable
from tests.sim.workload import Workload

CLIENTS = "clients"
GROUPS = (1, 2, 3)
SETTLE_SECONDS = 120.0
FLIPPED_BYTES = 16


class Chaos:
    """One run. Draws are repeatable from `seed`; what the machine makes of them is not."""

    def __init__(self, seconds: float, seed: int) -> None:
        self.seconds, self.rng = seconds, Random(seed)
        self.counts: Counter[str] = Counter()
        self.directory = Path(tempfile.mkdtemp(prefix="shardkv-chaos-"))
        self.cluster = Cluster(self.directory, shards=8)
        base = free_port_base(80)
        self.cluster.plan(3, len(GROUPS), 3, base)
        for process in self.cluster.processes:
            host, _, port = process.address.rpartition(":")
            process.listen = f"{host}:{int(port) + 40}"
        self.controllers = self.cluster.addresses("controller", 0)
        self.cuts = Cuts()
        self._proxies = [
            Proxy(process.address, process.address, process.listen, self.cuts, self._who)
            for process in self.cluster.processes
        ]
        self._busy: set[str] = set()  # processes that are down or stopped: not hit again meanwhile
        self._damaged: dict[int, Process] = {}  # of each group, the replica whose tables are being repaired
        self._tasks: set[asyncio.Task[None]] = set()
        self._dialer = TcpDialer(self.cluster.cluster)
        self.controller = ControllerClient(self.controllers, self._dialer, Random(seed))

    def _who(self, local_port: int, remote_port: int) -> str:
        inode = socket_inode(local_port, remote_port)
        for process in self.cluster.processes:
            if process.pid and inode and holds(process.pid, inode):
                return process.address
        return CLIENTS

    # ---- the run

    async def run(self) -> int:
        try:
            for proxy in self._proxies:
                await proxy.open()
            self.cluster.start_all()
            await self._join(1)
            await self._join(2)
            await self._settle()
            return await self._story()
        finally:
            await self._dialer.close()
            for proxy in self._proxies:
                await proxy.close()
            self.cluster.stop_all()
            shutil.rmtree(self.directory)

    async def _story(self) -> int:
        work = Workload(self.rng.getrandbits(32), keys=40)
        clerks = [AsyncShardClerk(self.controllers, timeout=timeout) for timeout in (5.0, 60.0, 60.0)]
        for clerk in clerks:
            work.start(clerk, 6)
        began = time.monotonic()
        while (passed := time.monotonic() - began) < self.seconds:
            await self._fault()
            if not int(passed) % 5:
                self._progress(passed, len(work.history))
            await asyncio.sleep(self.rng.uniform(0, 2.0))
        print("\nthe faults stop", flush=True)
        async with asyncio.timeout(SETTLE_SECONDS):
            await asyncio.gather(*self._tasks)
        self._check_all_run()
        healed = time.monotonic()
        await self._settle()
        await work.stop()
        await work.read_all(clerks[1])
        recovered = time.monotonic() - healed
        for clerk in clerks:
            await clerk.close()
        return self._report(work, recovered)

    def _report(self, work: Workload, recovered: float) -> int:
        answered = sorted(op.returned for op in work.history if op.returned < float("inf"))
        print(
            f"chaos: {self.seconds:.0f} s, {len(work.history):,} operations ({work.unknown} with unknown outcome)"
        )
        for name, number in self.counts.most_common():
            print(f"{number:>8}  {name}")
        longest = max(op.returned - op.called for op in work.history if op.returned < float("inf"))
        print(f"{longest:8.2f}  s: the longest that one operation took")
        print(f"{max(b - a for a, b in pairwise(answered)):8.2f}  s: the longest in which nobody got an answer")
        print(f"{recovered:8.2f}  s: until all shards served and all calls ended, once the faults had stopped")
        try:
            judged = work.judge()
        except NotLinearizable as error:
            kept = Path("chaos-history.pickle")
            kept.write_bytes(pickle.dumps(work.history))
            print(f"NOT LINEARIZABLE; the history is in {kept}\n{error}")
            return 1
        print(f"verdict: linearizable ({judged:,} operations judged); nothing lost, nothing doubled")
        return 0

    def _progress(self, passed: float, operations: int) -> None:
        bar = "#" * int(30 * passed / self.seconds)
        line = f"[{bar:<30}] {passed:.0f}/{self.seconds:.0f} s, {operations:,} operations, {dict(self.counts)}"
        print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)

    async def _settle(self) -> None:
        """Wait until every shard serves. Raises TimeoutError if the cluster does not come back."""
        async with asyncio.timeout(SETTLE_SECONDS):
            while True:
                with contextlib.suppress(ControllerUnavailable):
                    overview = await look(self.controller, self._dialer, self.controllers, 5.0)
                    serving, total = overview.settled()
                    if total and serving == total:
                        return
                await asyncio.sleep(0.2)

    # ---- faults

    async def _fault(self) -> None:
        kind = self.rng.choices(
            [self._kill, self._kill_group, self._stop, self._cut, self._change, self._damage],
            [10, 1, 4, 6, 7, 3],
        )[0]
        await kind()

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _free(self) -> list[Process]:
        return [p for p in self.cluster.processes if p.address not in self._busy]

    async def _kill(self) -> None:
        if free := self._free():
            self._down(self.rng.choice(free))

    async def _kill_group(self) -> None:
        gid = self.rng.choice([0, *GROUPS])
        for process in self._free():
            if process.gid == gid:
                self._down(process)

    def _down(self, process: Process) -> None:
        self.counts["SIGKILL"] += 1
        self._busy.add(process.address)
        self.cluster.kill(process)
        self._begin(self._up_again(process))

    async def _up_again(self, process: Process) -> None:
        await asyncio.sleep(self.rng.choice([0.0, 0.5, 3.0]))
        self.cluster.start(process)
        self._busy.discard(process.address)

    async def _stop(self) -> None:
        if free := self._free():
            process = self.rng.choice(free)
            self.counts["SIGSTOP"] += 1
            self._busy.add(process.address)
            os.kill(process.pid, signal.SIGSTOP)
            self._begin(self._continue(process))

    async def _continue(self, process: Process) -> None:
        await asyncio.sleep(self.rng.choice([0.3, 1.5, 4.0]))
        os.kill(process.pid, signal.SIGCONT)
        self._busy.discard(process.address)

    async def _damage(self) -> None:
        """Bytes of one replica's files flip; at most one replica of a group has a damaged state at a time."""
        whole = [p for p in self._free() if p.gid and p.gid not in self._damaged]
        if whole:
            process = self.rng.choice(whole)
            self._damaged[process.gid] = process
            self._busy.add(process.address)
            self._begin(self._flip_and_wait(process))

    async def _flip_and_wait(self, process: Process) -> None:
        """Stopped in order, so that it has tables; started on the damage; then its peers have to repair it."""
        before = (await self._damage_of(process)).get("repaired", 0)
        await asyncio.to_thread(self.cluster.stop, [process])
        tables = sorted((Path(process.data) / "rocks").rglob("*.sst"), key=lambda table: table.stat().st_size)
        if tables:
            size = tables[-1].stat().st_size
            _flip(tables[-1], self.rng.randrange(max(1, size - FLIPPED_BYTES)))
            self.counts["bytes flipped in a replica's table"] += 1
        self.cluster.start(process)
        self._busy.discard(process.address)  # to be killed while it is repaired, as any other
        while tables:
            damage = await self._damage_of(process)
            if damage.get("repaired", 0) > before and not damage["state_lost"]:
                break
            await asyncio.sleep(0.5)
        del self._damaged[process.gid]

    async def _damage_of(self, process: Process) -> dict[str, Any]:
        """What a replica says of damage in its state, once it answers."""
        while True:
            status = await ask_status(self._dialer, process.listen, "kv.status")
            if status is not None:
                return status.get("damage") or {}
            await asyncio.sleep(0.2)

    async def _cut(self) -> None:
        """One process or two from the rest; with the clients on one of the sides; sometimes one way only."""
        names = [process.address for process in self.cluster.processes]
        side = set(self.rng.sample(names, self.rng.choice([1, 1, 2])))
        if self.rng.random() < 0.5:
            side.add(CLIENTS)
        rest = {*names, CLIENTS} - side
        out, into = {(a, b) for a in side for b in rest}, {(b, a) for a in side for b in rest}
        kind = self.rng.choice(["cut", "cut", "cut out", "cut in"])
        self.counts["network cut"] += 1
        pairs = {"cut": out | into, "cut out": out, "cut in": into}[kind]
        self._begin(self.cuts.cut(pairs, self.rng.choice([0.5, 2.0, 5.0])))

    def _check_all_run(self) -> None:
        """All run, and nothing is cut: every fault has ended, and this is what they left."""
        assert not self._busy
        assert not self._damaged, f"damage that was not found or not repaired: {self._damaged}"
        for process in self.cluster.processes:
            assert process.running, f"{process.address} died by itself: {self.cluster.last_words(process)}"

    # ---- admins

    async def _join(self, gid: int) -> None:
        addresses = self.cluster.addresses("group", gid)
        join = pb.AdminRequest(join=pb.Join(groups=[pb.Group(gid=gid, addresses=addresses)]))
        await self.controller.admin(join, 30.0)

    async def _change(self) -> None:
        self._begin(self._admin())

    async def _admin(self) -> None:
        rng = self.rng
        try:
            config = await self.controller.query(None, 10.0)
            shard = rng.choice(list(config.by_id.values()))
            absent = [gid for gid in GROUPS if gid not in config.groups]
            kind = rng.choice(["join", "leave", "move", "move", "split", "merge"])
            match kind:
                case "join" if absent:
                    await self._join(rng.choice(absent))
                case "leave" if len(config.groups) > 1:
                    leave = pb.Leave(gids=[rng.choice(sorted(config.groups))])
                    await self.controller.admin(pb.AdminRequest(leave=leave), 10.0)
                case "split":
                    split = pb.SplitShard(shard=shard.id, key=shard.start + bytes([rng.randrange(40, 120)]))
                    await self.controller.admin(pb.AdminRequest(split=split), 10.0)
                case "merge":
                    await self.controller.admin(pb.AdminRequest(merge=pb.MergeShard(shard=shard.id)), 10.0)
                case _:
                    kind = "move"
                    move = pb.MoveShard(shard=shard.id, gid=rng.choice(sorted(config.groups)))
                    await self.controller.admin(pb.AdminRequest(move=move), 10.0)
            self.counts[f"configuration change: {kind}"] += 1
        except (AdminRefused, BadQuery, ControllerUnavailable):
            self.counts["change refused or unavailable"] += 1


def _flip(path: Path, offset: int) -> None:
    """These bytes of a file change at rest, behind its owner's back."""
    with path.open("r+b") as file:
        file.seek(offset)
        data = file.read(FLIPPED_BYTES)
        file.seek(offset)
        file.write(bytes(byte ^ 0x55 for byte in data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)

    async def run() -> int:
        return await Chaos(options.seconds, options.seed).run()

    sys.exit(asyncio.run(run()))


if __name__ == "__main__":
    main()
