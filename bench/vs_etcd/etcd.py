"""A real etcd cluster of three nodes on loopback, and the Go client that loads it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

from bench.live import free_port_base
from shardkv.wire.address import split_address

GO_CODE = Path("/usr/share/gocode")  # where Debian's -dev packages put Go sources
PACKAGES = ("etcd-server", "golang-go", "golang-etcd-server-dev")
START_SECONDS = 30.0


class Missing(Exception):
    """Something that is needed is not installed; the text says what and how to get it."""


def require() -> str:
    """What etcd says of its version. Raises Missing."""
    missing = [program for program in ("etcd", "go") if shutil.which(program) is None]
    if not (GO_CODE / "src/go.etcd.io/etcd/clientv3").is_dir():
        missing.append("etcd's Go client")
    if missing:
        raise Missing(f"missing: {', '.join(missing)}. On Debian: apt-get install {' '.join(PACKAGES)}")
    said = subprocess.run(["etcd", "--version"], capture_output=True, text=True, check=True).stdout
    return said.splitlines()[0]


def build_client(directory: Path) -> Path:
    """Compile load.go with the client of the installed etcd's version."""
    program = directory / "etcd-load"
    environment = {"GO111MODULE": "off", "GOPATH": str(GO_CODE), "PATH": "/usr/bin:/bin:/usr/local/bin"}
    environment |= {"HOME": str(directory), "GOCACHE": str(directory / "go-cache")}
    source = Path(__file__).with_name("load.go")
    subprocess.run(["go", "build", "-o", str(program), str(source)], env=environment, check=True)
    return program


class EtcdCluster:
    """Three nodes with default settings, each with its own data directory; removed when the block ends."""

    def __init__(self, client: Path) -> None:
        self._client = client
        self.directory = Path(tempfile.mkdtemp(prefix="etcd-"))
        base = free_port_base(6)
        self._clients = [f"http://127.0.0.1:{base + 2 * n}" for n in range(3)]
        self._peers = [f"http://127.0.0.1:{base + 2 * n + 1}" for n in range(3)]
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> EtcdCluster:
        cluster = ",".join(f"n{n}={peer}" for n, peer in enumerate(self._peers))
        for n in range(3):
            command = ["etcd", "--name", f"n{n}", "--data-dir", str(self.directory / f"n{n}")]
            command += ["--listen-client-urls", self._clients[n], "--advertise-client-urls", self._clients[n]]
            command += ["--listen-peer-urls", self._peers[n], "--initial-advertise-peer-urls", self._peers[n]]
            command += ["--initial-cluster", cluster, "--initial-cluster-state", "new"]
            with (self.directory / f"log{n}").open("wb") as log:
                self._processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        deadline = time.monotonic() + START_SECONDS
        while not all(_listens(address) for address in self._clients):
            assert time.monotonic() < deadline, f"etcd did not start: see {self.directory}"
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        shutil.rmtree(self.directory)

    def load(self, kind: str, callers: int, connections: int, **options: object) -> dict[str, float]:
        command = [str(self._client), "-endpoints", ",".join(a.removeprefix("http://") for a in self._clients)]
        command += ["-kind", kind, "-callers", str(callers), "-connections", str(connections)]
        for name, value in options.items():
            command += [f"-{name.replace('_', '-')}", str(value)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"
        figures: dict[str, float] = json.loads(done.stdout)
        return figures


def _listens(address: str) -> bool:
    host, port = split_address(address.removeprefix("http://"))
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0
