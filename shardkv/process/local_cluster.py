"""A cluster of processes on this machine: plan it, start what is down, wait until it serves, stop it.

DIR/cluster.json names every process; it is the plan and the record, and is replaced
whole whenever a process starts. Each process has a directory of its own, with its
log file, so that any one can be killed and started again by itself.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shardkv.process.identity import IDENTITY
from shardkv.process.secret_file import MANIFEST, SECRET, fresh_secret, write_secrets
from shardkv.raft.private import FILE, make_directory
from shardkv.wire.address import split_address
from shardkv.wire.bounded_json import parse_json

STOP_SECONDS = 10.0


class ClusterError(Exception):
    """The cluster cannot be started or stopped as asked; the text says why in one line."""


@dataclass
class Process:
    """One replica: what it is, where it listens, its process id while it runs (else 0)."""

    role: str  # "controller" or "group"
    gid: int
    index: int
    address: str
    pid: int
    data: str
    listen: str = ""  # where it binds, if not at `address`: something stands before it
    metrics: str = ""  # where it answers Prometheus, if it does
    web: str = ""  # where it shows the page to browsers, if it does
    has_data: bool = False  # its directory was seen with an identity in it: an empty one is a lost one

    @property
    def is_lost(self) -> bool:
        """Whether its directory had a replica's data, and is empty or not mounted now."""
        return self.has_data and not (Path(self.data) / IDENTITY).exists()

    @property
    def running(self) -> bool:
        """Whether our process is there; a pid that another program got since does not count."""
        if self.pid <= 0:
            return False
        if self.pid in _children:
            # Of our own child the kernel tells: for a moment after it began, its command line
            # below is still empty, and it would be taken for another program.
            return _children[self.pid].poll() is None
        try:
            command = Path(f"/proc/{self.pid}/cmdline").read_bytes()
            stat = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        state, threads = stat[0], int(stat[17])
        if state == "Z":
            # The first thread is dead, and has no command line any more; while another one is still
            # at it (in a sync, most likely), the process's files and its port are not free yet.
            return threads > 1
        return self.data.encode() in command.split(b"\0")

    @property
    def listens(self) -> bool:
        """Whether something takes connections at its address: it does so once its data is open."""
        try:
            socket.create_connection(split_address(self.listen or self.address), 1.0).close()
        except OSError:
            return False
        return True


@dataclass
class Cluster:
    directory: Path
    cluster: str = ""
    shards: int = 8
    ephemeral: bool = False
    tls: dict[str, str] = field(default_factory=dict)  # cert, key and ca to the files' paths; empty: none
    processes: list[Process] = field(default_factory=list)

    # ---- the manifest

    @classmethod
    def load(cls, directory: Path) -> Cluster:
        """Raises ClusterError where there is none."""
        path = directory / MANIFEST
        try:
            found = parse_json(path.read_text())
        except FileNotFoundError:
            raise ClusterError(f"{path} is not there: no cluster was started in {directory}") from None
        except ValueError as error:
            raise ClusterError(f"{path} is damaged: {error}") from None
        try:
            made = cls(
                directory,
                found["cluster"],
                found["shards"],
                found["ephemeral"],
                found.get("tls", {}),
                [Process(**process) for process in found["processes"]],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ClusterError(f"{path} is damaged: {type(error).__name__}: {error}") from None
        if not _like(made, cls(directory)) or not all(
            _like(each, Process("", 0, 0, "", 0, "")) and _is_address(each.address) for each in made.processes
        ):
            raise ClusterError(f"{path} is damaged: a field has a value of another type")
        return made

    def save(self) -> None:
        path = self.directory / MANIFEST
        for process in self.processes:
            process.has_data |= (Path(process.data) / IDENTITY).exists()
        manifest = {
            "controllers": self.addresses("controller", 0),
            "groups": {str(gid): self.addresses("group", gid) for gid in self.gids()},
            "processes": [asdict(process) for process in self.processes],
            "cluster": self.cluster,
            "shards": self.shards,
            "ephemeral": self.ephemeral,
            "tls": self.tls,
        }
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", opener=_private) as file:
            file.write(json.dumps(manifest, indent=1) + "\n")
        temporary.rename(path)

    @property
    def secret_file(self) -> Path:
        """By what is in it the cluster's processes know each other."""
        return (self.directory / SECRET).resolve()

    def make_secret(self) -> None:
        """Make the secret, unless it is there. Processes that run without one would not know those that have it."""
        if not self.secret_file.exists() and not any(process.running for process in self.processes):
            write_secrets(self.secret_file, [fresh_secret()])

    def addresses(self, role: str, gid: int) -> list[str]:
        return [process.address for process in self.processes if (process.role, process.gid) == (role, gid)]

    def gids(self) -> list[int]:
        return sorted({process.gid for process in self.processes if process.role == "group"})

    # ---- planning

    def plan(self, controllers: int, groups: int, replicas: int, port: int) -> None:
        """Add the processes that are not there yet; those that are keep their address and data."""
        if not self.cluster:
            self.cluster = secrets.token_hex(8)
        wanted = [("controller", 0, n) for n in range(controllers)]
        wanted += [("group", gid, n) for gid in range(1, groups + 1) for n in range(replicas)]
        known = {(process.role, process.gid) for process in self.processes}
        used = {process.address for process in self.processes}
        for role, gid, index in wanted:
            if (role, gid) in known:
                continue  # a running Raft group keeps its size
            while f"127.0.0.1:{port}" in used:
                port += 1
            address = f"127.0.0.1:{port}"
            used.add(address)
            name = f"controller-{index}" if role == "controller" else f"group-{gid}-{index}"
            data = str((self.directory / name).resolve())
            self.processes.append(Process(role, gid, index, address, 0, data))

    def plan_metrics(self, port: int) -> None:
        """Give each process that has none a port for Prometheus, from `port` on; it holds from its next start."""
        used = {process.metrics for process in self.processes}
        for process in self.processes:
            if not process.metrics:
                while f"127.0.0.1:{port}" in used:
                    port += 1
                process.metrics = f"127.0.0.1:{port}"
                used.add(process.metrics)

    def plan_web(self, port: int) -> None:
        """Give each controller that has none a port for the page, from `port` on; it holds from its next start."""
        used = {process.web for process in self.processes}
        for process in self.processes:
            if process.role == "controller" and not process.web:
                while f"127.0.0.1:{port}" in used:
                    port += 1
                process.web = f"127.0.0.1:{port}"
                used.add(process.web)

    # ---- life

    def command(self, process: Process) -> list[str]:
        """What starts `process`; a person may type the same."""
        peers = ",".join(self.addresses(process.role, process.gid))
        options = ["--id", str(process.index + 1), "--peers", peers, "--data", process.data]
        options += ["--cluster", self.cluster]
        if process.role == "controller":
            options += ["--shards", str(self.shards)]
        else:
            options += ["--gid", str(process.gid), "--controllers", ",".join(self.addresses("controller", 0))]
        if process.listen:
            options += ["--listen", process.listen]
        if self.secret_file.exists():
            options += ["--secret-file", str(self.secret_file)]
        for name, path in self.tls.items():
            options += [f"--tls-{name}", path]
        if process.metrics:
            options += ["--metrics", process.metrics]
        if process.web:
            options += ["--web", process.web]
        if self.ephemeral:
            options.append("--ephemeral")
        return [sys.executable, "-m", "shardkv.cli.main", "serve", process.role, *options]

    def start(self, process: Process) -> None:
        """Start one process that is down. Raises ClusterError if its port is taken."""
        check_free([process.listen or process.address])
        data = Path(process.data)
        make_directory(data)
        with open(data / "log", "ab", opener=_private) as output:
            child = subprocess.Popen(
                self.command(process),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is ours to handle, in order
            )
        process.pid = child.pid
        _children[child.pid] = child
        self.save()

    def start_all(self) -> list[Process]:
        """Start what is down and has its data; returns what was started."""
        down = [process for process in self.processes if not process.running and not process.is_lost]
        for process in down:
            self.start(process)
        return down

    def kill(self, process: Process) -> None:
        """SIGKILL, and wait until it is gone."""
        _signal(process, signal.SIGKILL)
        _wait_gone([process], STOP_SECONDS)

    def stop_all(self) -> int:
        """Stop every process; returns how many ran."""
        return self.stop(self.processes)

    def stop(self, processes: list[Process]) -> int:
        """SIGTERM, then SIGKILL to those that stay; returns how many ran."""
        running = [process for process in processes if process.running]
        for process in running:
            _signal(process, signal.SIGTERM)
        for process in _wait_gone(running, STOP_SECONDS):
            self.kill(process)
        for process in processes:
            process.pid = 0
        self.save()
        return len(running)

    def last_words(self, process: Process) -> str:
        """The last line of a process's log: why it ended, most likely."""
        lines = (Path(process.data) / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def check_free(addresses: Iterable[str]) -> None:
    """Whether nobody listens at these addresses; empty ones are none. Raises ClusterError."""
    for address in filter(None, addresses):
        host, port = split_address(address)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                raise ClusterError(
                    f"port {port} is in use by another program: stop that, or give another --port or --data"
                ) from None


def _like(made: Cluster | Process, sample: Cluster | Process) -> bool:
    """Whether each field has the type that it has in `sample`."""
    return all(
        type(value) is type(getattr(sample, name)) for name, value in vars(made).items() if name != "directory"
    )


def _is_address(text: str) -> bool:
    try:
        split_address(text)
    except ValueError:
        return False
    return True


_children: dict[int, subprocess.Popen[bytes]] = {}


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, FILE)


def _signal(process: Process, number: int) -> None:
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        pass  # it ended by itself meanwhile


def _wait_gone(processes: list[Process], seconds: float) -> list[Process]:
    """Wait until they have ended; returns those that have not."""
    deadline = time.monotonic() + seconds
    left = processes
    while left and time.monotonic() < deadline:
        left = [process for process in left if process.running]
        time.sleep(0.01)
    return left


@contextmanager
def interrupted_by_signals() -> Iterator[Callable[[], bool]]:
    """SIGINT, SIGTERM and SIGHUP set a flag instead of ending us; the flag is what is yielded."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
