"""Thousands of hostile connections at real processes, and what the others notice: `python -m bench.hostile`.

    silent     connects and says nothing           slow      a byte a second of what should be a hello or a handshake
    half       half a TLS handshake                huge      a hello that claims to be 4 GiB long
    garbage    4 KiB of chance

Each is opened again whenever the server ends it, at all replicas of a group. Beside them one clerk puts in a closed loop, and
new clerks come in. Then mail of term 2^64 - 1 is sent, by a user, by a user who claims to be a process, and by a
process. Ends by itself after some two minutes; its figures are in docs/security.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from bench.live import SHARDKV, LiveCluster, attempt
from shardkv.client import AsyncShardClerk, Tls
from shardkv.process.local_cluster import Process
from shardkv.raft.codec import encode_mail
from shardkv.raft.protocol.messages import Envelope, RequestVote
from shardkv.wire.address import split_address
from shardkv.wire.auth import Node
from shardkv.wire.dialer import Connection
from shardkv.wire.framing import HELLO, POST, RECORD
from shardkv.wire.hello import stranger
from shardkv.wire.node_name import Member
from shardkv.wire.secrets import Secrets
from shardkv.wire.tls_files import contexts

KINDS = ("silent", "half", "slow", "huge", "garbage")
CONNECTS_AT_ONCE = 100
TERM = 2**64 - 1


# ---- the hostile side, in processes of its own


async def attack(kind: str, addresses: list[str], connections: int) -> None:
    places = asyncio.Semaphore(CONNECTS_AT_ONCE)

    async def one(number: int) -> None:
        host, port = split_address(addresses[number % len(addresses)])
        while True:
            with contextlib.suppress(OSError):
                async with places:
                    reader, writer = await asyncio.open_connection(host, port)
                try:
                    await misbehave(kind, reader, writer)
                finally:
                    writer.transport.abort()
            await asyncio.sleep(random.uniform(1.0, 3.0))

    await asyncio.gather(*(one(number) for number in range(connections)))


async def misbehave(kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    match kind:
        case "half":
            writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100))
        case "huge":
            writer.write(stranger()[:4] + b"\xff" * (HELLO.size - 4) + bytes(64 << 10))
        case "garbage":
            writer.write(random.randbytes(4096))
        case "slow":
            for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100):
                writer.write(bytes([byte]))
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        if not await reader.read(1):
                            return
    while await reader.read(4096):
        pass


@contextlib.contextmanager
def attackers(kind: str, addresses: list[str], connections: int) -> Iterator[None]:
    """Two processes, for one has too few descriptors."""
    command = [sys.executable, "-m", "bench.hostile", "--attack", kind, "--at", ",".join(addresses)]
    at_work = [subprocess.Popen([*command, "--connections", str(connections // 2)]) for _ in range(2)]
    try:
        yield
    finally:
        for process in at_work:
            process.kill()
            process.wait()


# ---- the others


async def others(live: LiveCluster, tls: Tls | None, seconds: float) -> tuple[float, float, float]:
    """(p50 and p99 of a put in a closed loop, the slowest of the new clerks), in ms."""
    times, entries = list[float](), list[float]()

    async def closed_loop() -> None:
        async with AsyncShardClerk(live.controllers, tls=tls, timeout=20.0) as clerk:
            await clerk.put("k", b"v")
            end = time.perf_counter() + seconds
            while (began := time.perf_counter()) < end:
                await clerk.put("k", b"v")
                times.append(time.perf_counter() - began)

    async def newcomers() -> None:
        for _ in range(6):
            await asyncio.sleep(seconds / 7)
            began = time.perf_counter()
            async with AsyncShardClerk(live.controllers, tls=tls, timeout=20.0) as clerk:
                await clerk.put("new", b"v")
            entries.append(time.perf_counter() - began)

    await asyncio.gather(closed_loop(), newcomers())
    return median(times) * 1000, sorted(times)[len(times) * 99 // 100] * 1000, max(entries) * 1000


def memory(process: Process) -> float:
    return int(Path(f"/proc/{process.pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


def terms(live: LiveCluster, environment: dict[str, str]) -> list[int]:
    """Of all replicas of group 1, which all have to answer."""
    status = json.loads(attempt(live, "admin", "status", "-o", "json", **environment).stdout)
    replicas = status["groups"]["1"]
    assert all(said is not None for said in replicas.values()), f"a replica is down: {replicas}"
    return [int(said["term"]) for said in replicas.values()]


def mail_of_a_term_too_far(cluster: str, group: list[Process], node: Tls | None, user: Tls | None) -> None:
    """To the first replica, as from the second: by strangers with a certificate, and as a process with each of them."""
    mail = encode_mail(cluster, 1, group[1].address, [Envelope(2, 1, TERM, RequestVote(False, 9, 5, True))])
    record = RECORD.pack(POST, 0, len(b"raft"), len(mail)) + b"raft" + mail
    host, port = split_address(group[0].address)
    for tls in (user, node):
        plain = socket.create_connection((host, port), timeout=10)
        connection = tls.client().wrap_socket(plain, server_hostname=host) if tls is not None else plain
        with connection, contextlib.suppress(OSError):
            connection.sendall(stranger(cluster) + record * 100)
            time.sleep(0.5)  # the server may look at it before the connection is gone

    async def as_a_process(tls: Tls | None) -> None:
        who = Node(Member(cluster, 1, 2), Secrets())
        one = Connection(group[0].address, lambda: cluster, lambda: None, contexts(tls), who)
        for _ in range(100):
            one.post("raft", mail)
        await asyncio.sleep(1.0)
        await one.close()

    for tls in (user, node):
        asyncio.run(as_a_process(tls))


def trial(name: str, live: LiveCluster, connections: int, node: Tls | None, user: Tls | None) -> None:
    group = [process for process in live.cluster().processes if process.role == "group"]
    addresses = [process.address for process in group]
    names = ("SHARDKV_TLS_CERT", "SHARDKV_TLS_KEY", "SHARDKV_TLS_CA")
    files = (user.cert, user.key, user.ca) if user is not None else ()
    environment = dict(zip(names, map(str, files), strict=False))
    before, quiet = terms(live, environment), asyncio.run(others(live, user, 6.0))
    print(f"{name}: {connections} hostile connections at {len(group)} replicas; terms {before}")
    row = "{:8} p50 {:6.1f} ms  p99 {:6.1f} ms  a new clerk at most {:6.0f} ms  {:4.0f} MB"
    print(row.format("nobody", *quiet, max(map(memory, group))), flush=True)
    for kind in KINDS:
        with attackers(kind, addresses, connections):
            time.sleep(5)  # until they are at their number
            print(row.format(kind, *asyncio.run(others(live, user, 6.0)), max(map(memory, group))), flush=True)
    mail_of_a_term_too_far(live.cluster().cluster, group, node, user)
    after = terms(live, environment)
    print(f"after mail of term 2^64 - 1: terms {after}\n", flush=True)
    assert max(after) < 1000, after


def certify(directory: Path, name: str, *options: str) -> Tls:
    subprocess.run(
        [*SHARDKV, "certs", str(directory), "--name", name, *options], check=True, capture_output=True
    )
    return Tls(directory / f"{name}.pem", directory / f"{name}.key", directory / "ca.pem")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=2_000)
    parser.add_argument("--attack", choices=KINDS, help="Be the hostile side, at the addresses --at.")
    parser.add_argument("--at", default="")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what it has started ends with it
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if arguments.attack:
        asyncio.run(attack(arguments.attack, arguments.at.split(","), arguments.connections))
        return
    with LiveCluster(groups=1, replicas=3, controllers=1, shards=1) as live:
        trial("without TLS", live, arguments.connections, None, None)
    with tempfile.TemporaryDirectory() as directory:
        node, user = certify(Path(directory), "node"), certify(Path(directory), "user", "--client")
        files = {"tls_cert": node.cert, "tls_key": node.key, "tls_ca": node.ca}
        with LiveCluster(groups=1, replicas=3, controllers=1, shards=1, **files) as live:
            trial("TLS", live, arguments.connections, node, user)


if __name__ == "__main__":
    main()
