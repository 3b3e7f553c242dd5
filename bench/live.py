"""A real cluster to run stories on: real processes, real disks, the real command."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable

from shardkv.client import ShardClerk, ShardKVError
from shardkv.process.local_cluster import Process
from shardkv.process.ports import free_port_base
from shardkv.testing import SHARDKV, ThrowawayCluster
from shardkv.wire.address import split_address

__all__ = ["SHARDKV", "Appenders", "LiveCluster", "attempt", "free_port_base", "in_background"]


class LiveCluster(ThrowawayCluster):
    """Like a cluster of production: three replicas of everything, with their data on disk."""

    def __init__(self, groups: int = 2, shards: int = 8, **options: object) -> None:
        production: dict[str, object] = {"replicas": 3, "controllers": 3, "ephemeral": False}
        super().__init__(groups, **{**production, "shards": shards, **options})  # type: ignore[arg-type]

    def json(self, *arguments: str):  # type: ignore[no-untyped-def]
        return json.loads(self.run(*arguments, "-o", "json"))

    def start_group(self, gid: int) -> list[str]:
        """Start a new group's processes, which `admin join` may let in. Returns their addresses."""
        cluster = self.cluster()
        cluster.plan(3, gid, 3, split_address(cluster.processes[0].address)[1])
        for process in cluster.processes:
            if process.role == "group" and process.gid == gid:
                cluster.start(process)
        return cluster.addresses("group", gid)

    def leader(self, gid: int) -> Process:
        """The process that leads group `gid` (0: the controller)."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            status = self.json("admin", "status")
            replicas = status["groups"].get(str(gid), {}) if gid else status["controllers"]
            for address, said in replicas.items():
                if said and said["role"] == "leader":
                    return next(p for p in self.cluster().processes if p.address == address)
            time.sleep(0.1)
        raise AssertionError(f"group {gid} has no leader")


def attempt(
    cluster: LiveCluster | None, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command against a cluster, if it needs one, however it ends; from where no cluster.json is found."""
    where = {} if cluster is None else cluster.environment
    return subprocess.run(
        [*SHARDKV, *arguments],
        env=os.environ | where | environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


class Appenders:
    """Threads that append numbered tokens, each thread in order, and remember what was acknowledged."""

    def __init__(self, clerk: ShardClerk, threads: int = 4, keys: int = 8) -> None:
        self._clerk, self._keys = clerk, keys
        self._stop = threading.Event()
        self.acknowledged: list[list[tuple[bytes, bytes]]] = [[] for _ in range(threads)]
        self.errors: list[ShardKVError] = []
        self.longest_gap = 0.0
        self._threads = [threading.Thread(target=self._append, args=(n,)) for n in range(threads)]

    def start(self) -> Appenders:
        for thread in self._threads:
            thread.start()
        return self

    def key(self, number: int) -> bytes:
        """Keys that lie in different shards."""
        return bytes([0x21 + number * 90 // self._keys]) + b"/appended"

    def _append(self, number: int) -> None:
        turn, last = 0, time.monotonic()
        while not self._stop.is_set():
            turn += 1
            key, token = self.key((turn + number) % self._keys), b"%d.%d;" % (number, turn)
            try:
                self._clerk.append(key, token)
            except ShardKVError as error:
                self.errors.append(error)
                return
            now = time.monotonic()
            self.longest_gap, last = max(self.longest_gap, now - last), now
            self.acknowledged[number].append((key, token))

    def stop(self) -> int:
        """Returns how many appends were acknowledged. Raises the first error of any thread."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        return sum(len(own) for own in self.acknowledged)

    def verify(self) -> None:
        """Every acknowledged append is there once, each thread's in its order, and nothing else is."""
        expected: dict[bytes, int] = {}
        for own in self.acknowledged:
            for key, _ in own:
                expected[key] = expected.get(key, 0) + 1
        for key, count in expected.items():
            tokens = (self._clerk.get(key) or b"").split(b";")[:-1]
            assert len(tokens) == count, f"{key!r}: {count} appends acknowledged, {len(tokens)} there"
            for number, own in enumerate(self.acknowledged):
                mine = [token for token in tokens if token.startswith(b"%d." % number)]
                assert mine == [token[:-1] for at, token in own if at == key], (
                    f"{key!r}: thread {number}'s order"
                )


def in_background(work: Callable[[], object]) -> Callable[[], None]:
    """Run `work` on a thread; calling the result waits for it and raises what it raised."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def wait() -> None:
        thread.join()
        if failures:
            raise failures[0]

    return wait
