"""Mutual TLS on every connection: who has a certificate of the cluster's CA is let in, and nobody else."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest

from bench.live import SHARDKV, LiveCluster, free_port_base
from shardkv import shardkv_pb2 as pb
from shardkv import shardkv_pb2_grpc as kv_grpc
from shardkv.client import BadCertificate, ShardClerk, Tls, Unavailable
from shardkv.wire.hello import stranger


def certify(directory: Path, name: str, *hosts: str, options: Sequence[str] = ()) -> Tls:
    arguments = [*options, *(part for host in hosts for part in ("--host", host))]
    subprocess.run(
        [*SHARDKV, "certs", str(directory), "--name", name, *arguments], check=True, capture_output=True
    )
    return Tls(directory / f"{name}.pem", directory / f"{name}.key", directory / "ca.pem")


def flags(tls: Tls) -> list[str]:
    return ["--tls-cert", str(tls.cert), "--tls-key", str(tls.key), "--tls-ca", str(tls.ca)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return certify(tmp_path_factory.mktemp("ca"), "node")


@pytest.fixture(scope="module")
def live(node: Tls) -> Iterator[LiveCluster]:
    options = {"tls_cert": node.cert, "tls_key": node.key, "tls_ca": node.ca}
    with LiveCluster(groups=2, replicas=3, controllers=1, shards=4, **options) as cluster:
        yield cluster


def shardkv(live: LiveCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    where = os.environ | {"SHARDKV_CONTROLLERS": ",".join(live.controllers)}
    return subprocess.run(
        [*SHARDKV, *arguments],
        env=where,
        cwd=live.directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_clerks_and_commands_with_a_certificate_are_served(live: LiveCluster, node: Tls) -> None:
    app = certify(node.ca.parent, "app", options=["--client"])
    with ShardClerk(live.controllers, tls=app) as clerk:
        for number in range(200):
            clerk.put(f"{number:03d}", b"x" * 3000)
        assert len(list(clerk.scan())) >= 200
        assert clerk.get("007") == b"x" * 3000
    assert shardkv(live, "get", "007", *flags(app)).stdout.strip() == "x" * 3000
    moved = shardkv(live, "admin", "leave", "2", "--wait", *flags(app))
    assert moved.returncode == 0, moved.stderr
    assert shardkv(live, "bench", "--clients", "50", "--ops", "500", *flags(app)).returncode == 0


def test_who_shows_no_certificate_or_another_ca_s_is_refused(
    live: LiveCluster, node: Tls, tmp_path: Path
) -> None:
    for outsider in (None, certify(tmp_path, "outsider")):
        with ShardClerk(live.controllers, timeout=1.0, tls=outsider) as clerk, pytest.raises(Unavailable):
            clerk.get("007")
    assert shardkv(live, "get", "007", "--timeout", "1").returncode == 3
    anonymous = ssl.create_default_context(cafile=str(node.ca))
    for process in live.cluster().processes:
        assert answer_to_hello(process.address, anonymous) == b""
        anonymous_no_more = ssl.create_default_context(cafile=str(node.ca))
        anonymous_no_more.load_cert_chain(node.cert, node.key)
        assert answer_to_hello(process.address, anonymous_no_more)[3] == 0, "welcome"


def answer_to_hello(address: str, context: ssl.SSLContext) -> bytes:
    """What the server says to a hello within TLS; nothing if it ends the connection."""
    host, _, port = address.rpartition(":")
    try:
        with (
            socket.create_connection((host, int(port)), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            connection.sendall(stranger())
            return connection.recv(1000)
    except OSError:
        return b""


def test_a_server_whose_certificate_is_for_another_host_is_not_believed(node: Tls, tmp_path: Path) -> None:
    port = free_port_base(1)
    elsewhere = certify(node.ca.parent, "elsewhere", "db.example", options=["--group", "0"])
    serve = ["serve", "controller", "--id", "1", "--peers", f"127.0.0.1:{port}", "--data", str(tmp_path)]
    server = subprocess.Popen([*SHARDKV, *serve, *flags(elsewhere)], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        assert "with TLS" in server.stderr.readline()
        with (
            ShardClerk([f"127.0.0.1:{port}"], timeout=1.0, tls=node) as clerk,
            pytest.raises(Unavailable, match=r"127\.0\.0\.1"),
        ):
            clerk.get("k")
    finally:
        server.terminate()
        server.communicate(timeout=20)


def test_grpc_is_spoken_over_tls_on_the_same_port(live: LiveCluster, node: Tls) -> None:
    credentials = grpc.ssl_channel_credentials(
        node.ca.read_bytes(), private_key=node.key.read_bytes(), certificate_chain=node.cert.read_bytes()
    )
    answers = []
    for process in live.cluster().processes:
        if process.role == "group":
            with grpc.secure_channel(process.address, credentials) as channel:
                try:
                    answers.append(kv_grpc.KVStub(channel).Get(pb.GetRequest(key=b"absent"), timeout=10).found)
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:  # the other group's key
                        raise
    assert answers == [False] * 3, "one group serves the key, and any of its replicas answers"


def test_files_that_are_not_what_they_should_be_are_named_in_one_line(node: Tls, tmp_path: Path) -> None:
    with pytest.raises(BadCertificate, match=r"node\.key"):
        Tls(node.key, node.key, node.ca).client()
    with pytest.raises(BadCertificate, match=r"nothing\.pem"):
        Tls(node.cert, node.key, tmp_path / "nothing.pem").server()
    port = free_port_base(1)
    wrong = Tls(node.cert, certify(tmp_path, "other").key, node.ca)
    serve = ["serve", "controller", "--id", "1", "--peers", f"127.0.0.1:{port}", "--data", str(tmp_path / "d")]
    done = subprocess.run(
        [*SHARDKV, *serve, *flags(wrong)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("shardkv: certificate ")
    done = subprocess.run(
        [*SHARDKV, *serve, *flags(node)[:2]], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2 and "--tls-key, --tls-ca" in done.stderr


def test_a_server_open_to_the_network_without_tls_says_so_loudly(tmp_path: Path) -> None:
    port = free_port_base(1)
    serve = ["serve", "controller", "--id", "1", "--peers", f"127.0.0.1:{port}", "--data", str(tmp_path)]
    server = subprocess.Popen(
        [*SHARDKV, *serve, "--listen", f"0.0.0.0:{port}"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        assert "WARNING" in (line := server.stderr.readline()) and "WITHOUT TLS" in line
        told = next(line for line in server.stderr if "access control is off" in line)
        assert "WARNING" in told and f"whoever reaches 0.0.0.0:{port}" in told
    finally:
        server.terminate()
        server.communicate(timeout=20)


def test_a_key_is_readable_by_its_owner_alone(node: Tls) -> None:
    for key in node.ca.parent.glob("*.key"):
        assert key.stat().st_mode & 0o077 == 0, key
