"""A cluster on hosts of their own: network namespaces with addresses and cables, which are pulled.

Three hosts run a controller and a replica of each of two groups, as three machines would; a
fourth is a client's. They speak mutual TLS, each with a certificate for its own address.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from bench.live import SHARDKV

HOSTS = 3
CONTROLLER, WEB = 7400, 7500

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces take root and `ip`"
    ),
]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Hosts:
    """Namespaces `skv<pid>-1` … on one switch, which is in a namespace of its own; nothing of ours is in the first."""

    def __init__(self, count: int) -> None:
        self.names = [f"skv{os.getpid()}-{n}" for n in range(1, count + 1)]
        self.switch = f"skv{os.getpid()}-sw"
        self.addresses = [f"10.77.0.{n}" for n in range(1, count + 1)]

    def __enter__(self) -> Hosts:
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "br0", "up")
        for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True), 1):
            ip("netns", "add", name)
            ip(
                "-n",
                name,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                f"port{number}",
                "netns",
                self.switch,
            )
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
            ip("-n", self.switch, "link", "set", f"port{number}", "master", "br0")
            ip("-n", self.switch, "link", "set", f"port{number}", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in [*self.names, self.switch]:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def unplug(self, host: int) -> None:
        ip("-n", self.switch, "link", "set", f"port{host + 1}", "down")

    def plug_in(self, host: int) -> None:
        ip("-n", self.switch, "link", "set", f"port{host + 1}", "up")

    def on(self, host: int, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[host], *command]


class Cluster:
    def __init__(self, hosts: Hosts, directory: Path) -> None:
        self._hosts, self._directory = hosts, directory
        self._processes: list[subprocess.Popen[bytes]] = []
        self.controllers = ",".join(f"{address}:{CONTROLLER}" for address in hosts.addresses[:HOSTS])
        self._tls: list[list[str]] = []
        for number, address in enumerate(hosts.addresses):
            name = f"host-{number}"
            more = ["--client"] if number >= HOSTS else ["--cluster", "hosts"]
            command = [*SHARDKV, "certs", str(directory), "--name", name, "--host", address, *more]
            subprocess.run(command, check=True, capture_output=True)
            files = {"cert": f"{name}.pem", "key": f"{name}.key", "ca": "ca.pem"}
            self._tls.append(
                [part for kind, file in files.items() for part in (f"--tls-{kind}", str(directory / file))]
            )

    def group(self, gid: int) -> str:
        return ",".join(f"{address}:{CONTROLLER + gid}" for address in self._hosts.addresses[:HOSTS])

    def start(self) -> None:
        for host in range(HOSTS):
            self._serve(host, "controller", "--peers", self.controllers)
            for gid in (1, 2):
                self._serve(
                    host,
                    "group",
                    "--gid",
                    str(gid),
                    "--peers",
                    self.group(gid),
                    "--controllers",
                    self.controllers,
                )

    def _serve(self, host: int, role: str, *options: str) -> None:
        name = f"{role}-{len(self._processes)}"
        command = [
            *SHARDKV,
            "serve",
            role,
            "--id",
            str(host + 1),
            *options,
            *self._tls[host],
            "--cluster",
            "hosts",
        ]
        command += ["--data", str(self._directory / name / "data")]
        (self._directory / name).mkdir()
        with (self._directory / name / "log").open("wb") as log:
            self._processes.append(subprocess.Popen(self._hosts.on(host, *command), stdout=log, stderr=log))

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(30)

    def command(self, *arguments: str) -> list[str]:
        """One of our commands, on the client's host."""
        return self._hosts.on(HOSTS, *SHARDKV, *arguments, *self._tls[HOSTS], "--controllers", self.controllers)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=90, check=False, cwd="/"
        )

    def done(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def status(self) -> dict[str, Any]:
        return json.loads(self.done("admin", "status", "-o", "json"))

    def leader_host(self, gid: int) -> int:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            for address, said in self.status()["groups"][str(gid)].items():
                if said and said["role"] == "leader":
                    return self._hosts.addresses.index(address.partition(":")[0])
        raise AssertionError(f"group {gid} has no leader")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts(HOSTS + 1) as made:
        yield made


def test_a_cluster_on_three_hosts_serves_while_each_of_them_is_unplugged_in_turn(
    hosts: Hosts, tmp_path: Path
) -> None:
    cluster = Cluster(hosts, tmp_path)
    try:
        cluster.start()
        joined = cluster.run(
            "admin", "join", "1", cluster.group(1), "2", cluster.group(2), "--wait", "--timeout", "60"
        )
        assert joined.returncode == 0, joined.stderr
        cluster.done("put", "!first", "1")
        cluster.done("put", "zlast", "2")
        load = subprocess.Popen(
            cluster.command(
                *["bench", "--workload", "put", "--clients", "20", "--ops", "1000000", "--seconds", "30"],
                *["--rate", "300", "--timeout", "30", "-o", "json"],
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        seen = {cluster.leader_host(1)}
        for _ in range(HOSTS):
            host = cluster.leader_host(1)  # the one that hurts
            seen.add(host)
            hosts.unplug(host)
            assert cluster.done("get", "!first").strip() == "1"
            assert cluster.done("get", "zlast").strip() == "2"
            cluster.done("put", f"without-{host}", "written")
            assert cluster.leader_host(1) != host
            hosts.plug_in(host)
            until_all_are_level(cluster)
        out, error = load.communicate(timeout=90)
        assert load.returncode == 0, error.decode()
        figures = json.loads(out)
        assert figures["errors"] == 0 and figures["ops"] > 5000, figures
        assert len(seen) >= 2
        # Without two of three hosts nobody answers, and nobody lies.
        for host in (0, 1):
            hosts.unplug(host)
        cut_off = cluster.run("get", "!first", "--timeout", "3")
        assert cut_off.returncode == 3, cut_off.stdout
        for host in (0, 1):
            hosts.plug_in(host)
        assert cluster.done("get", "!first", "--timeout", "60").strip() == "1"
    finally:
        cluster.stop()


def until_all_are_level(cluster: Cluster) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        status = cluster.status()
        groups = [list(replicas.values()) for replicas in status["groups"].values()]
        if all(said for replicas in groups for said in replicas) and all(
            max(said["applied_index"] for said in replicas) - min(said["applied_index"] for said in replicas)
            < 500
            for replicas in groups
        ):
            return
    raise AssertionError(f"not level: {status}")
