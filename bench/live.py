"""A real cluster to run stories on: real processes, real disks, the real command."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from client import ShardClerk, ShardKVError
from shardkv.cluster import Cluster, Process

SHARDKV = [sys.executable, "-m", "shardkv.cli.main"]


def free_port_base(count: int = 40) -> int:
    """The first of `count` ports on loopback that nobody listens on, below the ephemeral range."""
    base = 10_000 + (os.getpid() * 101) % 15_000
    while not all(_free(port) for port in range(base, base + count)):
        base = 10_000 + (base + count - 10_000) % 20_000
    return base


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class LiveCluster:
    """Started in a scratch directory, stopped and removed when the block ends."""

    def __init__(self, groups: int = 2, shards: int = 8, **options: object) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="shardkv-"))
        self._options = ["--groups", str(groups), "--shards", str(shards), "--port", str(free_port_base())]
        for name, value in options.items():
            self._options += [f"--{name.replace('_', '-')}", str(value)]

    def __enter__(self) -> LiveCluster:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for log in sorted(self.directory.glob("*/log")):
                print(f"--- {log.parent.name}\n{log.read_text(errors='replace')[-1500:]}", file=sys.stderr)
        self.cluster().stop_all()
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.directory)

    def up(self) -> str:
        """Start what is down; returns when every shard serves."""
        return self.run("up", "--data", str(self.directory), "--detach", *self._options)

    def cluster(self) -> Cluster:
        return Cluster.load(self.directory)

    @property
    def controllers(self) -> list[str]:
        return self.cluster().addresses("controller", 0)

    def run(self, *arguments: str, check: bool = True) -> str:
        """The command's standard output. Raises CalledProcessError when it fails."""
        environment = os.environ | (
            {} if arguments[0] == "up" else {"SHARDKV_CONTROLLERS": ",".join(self.controllers)}
        )
        done = subprocess.run(
            [*SHARDKV, *arguments], env=environment, capture_output=True, text=True, timeout=700, check=False
        )
        if check and done.returncode:
            raise AssertionError(
                f"shardkv {' '.join(arguments)}: exit {done.returncode}: {done.stderr}{done.stdout}"
            )
        return done.stdout

    def json(self, *arguments: str):  # type: ignore[no-untyped-def]
        return json.loads(self.run(*arguments, "-o", "json"))

    def clerk(self, timeout: float = 30.0) -> ShardClerk:
        return ShardClerk(self.controllers, timeout=timeout)

    def start_group(self, gid: int) -> list[str]:
        """Start a new group's processes, which `admin join` may let in. Returns their addresses."""
        cluster = self.cluster()
        cluster.plan(3, gid, 3, int(cluster.processes[0].address.rpartition(":")[2]))
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
    where = {} if cluster is None else {"SHARDKV_CONTROLLERS": ",".join(cluster.controllers)}
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


def in_background(work: Callable[[], None]) -> Callable[[], None]:
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
