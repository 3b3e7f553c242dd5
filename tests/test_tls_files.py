"""TLS files that change while processes run: used without a restart, refused when broken, warned of before they end."""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from bench.live import LiveCluster
from shardkv.client import ShardClerk, ShardKVError, Tls
from shardkv.process.local_cluster import Process
from shardkv.wire.tls import BadCertificate
from shardkv.wire.tls_files import TlsFiles
from tests.test_tls import certify, flags


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "that did not come to be"
        time.sleep(0.05)


def authority(directory: Path) -> tuple[x509.Certificate, Any]:
    certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
    return certificate, serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None)


def signed_again(tls: Tls, days: float) -> bytes:
    """The same certificate, of the same key and CA, with another serial number and end."""
    ca, key = authority(tls.ca.parent)
    old = x509.load_pem_x509_certificate(tls.cert.read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(ca.subject)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=days))
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def write_revocations(path: Path, directory: Path, *serials: int) -> None:
    """Into place by rename, as tools do that renew files."""
    ca, key = authority(directory)
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateRevocationListBuilder().issuer_name(ca.subject).last_update(now)
    builder = builder.next_update(now + datetime.timedelta(days=7))
    for serial in serials:
        revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        builder = builder.add_revoked_certificate(revoked)
    fresh = path.with_suffix(".new")
    fresh.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    fresh.rename(path)


def serial_of(certificate: Path) -> int:
    return x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    tls = certify(tmp_path_factory.mktemp("ca"), "node")
    revocations = tls.ca.parent / "revoked.pem"
    write_revocations(revocations, tls.ca.parent)
    return Tls(tls.cert, tls.key, tls.ca, revocations)


@pytest.fixture(scope="module")
def live(node: Tls) -> Iterator[LiveCluster]:
    options = {"tls_cert": node.cert, "tls_key": node.key, "tls_ca": node.ca, "tls_crl": node.crl}
    with LiveCluster(groups=1, replicas=3, controllers=1, shards=2, metrics_port=33560, **options) as cluster:
        yield cluster


@pytest.fixture
def group(live: LiveCluster) -> Process:
    return next(process for process in live.cluster().processes if process.role == "group")


def shown_by(process: Process, tls: Tls) -> int:
    """The serial number of the certificate that the process shows to a new connection."""
    host, _, port = process.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        tls.client().wrap_socket(plain, server_hostname=host) as connection,
    ):
        der = connection.getpeercert(binary_form=True)
        assert der is not None
        return x509.load_der_x509_certificate(der).serial_number


def status_lines(live: LiveCluster, tls: Tls) -> str:
    return live.run("admin", "status", *flags(tls))


def metric(process: Process, name: str) -> float:
    text = urllib.request.urlopen(f"http://{process.metrics}/metrics", timeout=10).read().decode()
    return next(float(line.split()[1]) for line in text.splitlines() if line.split(" ")[0] == name)


def audit_of(process: Process, **fields: object) -> list[dict[str, Any]]:
    lines = (Path(process.data) / "audit.log").read_text().splitlines()
    return [line for line in map(json.loads, lines) if fields.items() <= line.items()]


def test_a_renewed_certificate_is_used_by_new_connections_without_a_restart(
    live: LiveCluster, node: Tls, group: Process
) -> None:
    processes = live.cluster().processes
    with ShardClerk(live.controllers, tls=node) as clerk:
        clerk.put("k", "before")
        before = shown_by(group, node)
        soon = signed_again(node, days=10)
        node.cert.write_bytes(soon)
        for process in processes:  # one is told, the others look by themselves
            if process is processes[0]:
                os.kill(process.pid, signal.SIGHUP)
        eventually(lambda: all(shown_by(process, node) == serial_of(node.cert) for process in processes))
        assert shown_by(group, node) != before
        assert clerk.get("k") == b"before"
        clerk.put("k", "after")
    assert all(process.running for process in live.cluster().processes), "SIGHUP ends nobody"
    assert "TLS certificate or its CA that expires in 10 days" in status_lines(live, node).replace(
        " 9 days", " 10 days"
    )
    left = metric(group, "shardkv_certificate_expiry_time_seconds") - time.time()
    assert 9 * 86_400 < left <= 10 * 86_400
    assert audit_of(group, kind="certificate", allowed=True)
    # Replicas of the group dial each other with it, too: after a restart of one they are three again.
    live.cluster().kill(group)
    live.up()
    with ShardClerk(live.controllers, tls=node) as clerk:
        assert clerk.get("k") == b"after"


def test_files_that_cannot_be_used_change_nothing_and_are_told(
    live: LiveCluster, node: Tls, group: Process
) -> None:
    good, serial = node.cert.read_bytes(), serial_of(node.cert)
    another = certify(node.ca.parent, "another")
    app = certify(node.ca.parent, "reader")
    reader = Tls(app.cert, app.key, app.ca, node.crl)
    node.cert.write_bytes(another.cert.read_bytes())  # of another key
    os.kill(group.pid, signal.SIGHUP)
    eventually(lambda: "cannot use its TLS files" in status_lines(live, reader))
    assert shown_by(group, reader) == serial
    assert metric(group, "shardkv_certificate_files_broken") == 1
    (refused,) = audit_of(group, kind="certificate", allowed=False)[-1:]
    assert "node.pem" in refused["why"]
    node.cert.write_bytes(good)
    os.kill(group.pid, signal.SIGHUP)
    eventually(lambda: metric(group, "shardkv_certificate_files_broken") == 0)


def test_a_revoked_certificate_is_of_no_use_at_once(live: LiveCluster, node: Tls, group: Process) -> None:
    app = certify(node.ca.parent, "app")
    assert node.crl is not None
    tls = Tls(app.cert, app.key, app.ca)
    with ShardClerk(live.controllers, timeout=5, tls=tls) as clerk:
        clerk.put("k", "mine")
        write_revocations(node.crl, node.ca.parent, serial_of(app.cert))
        for process in live.cluster().processes:
            os.kill(process.pid, signal.SIGHUP)

        def refused() -> bool:
            try:
                clerk.get("k")
            except ShardKVError:
                return True
            return False

        eventually(refused)  # on the streams that were open
    eventually(
        lambda: any(
            "revoked" in line["why"]
            for process in live.cluster().processes
            for line in audit_of(process, kind="tls", allowed=False)
        )
    )
    with ShardClerk(live.controllers, timeout=20, tls=node) as clerk:
        assert clerk.get("k") == b"mine", "others go on"


def test_a_session_is_not_resumed(node: Tls, group: Process) -> None:
    """So every connection shows a certificate that is valid, and not revoked, at that moment."""
    host, _, port = group.address.rpartition(":")
    context, session = node.client(), None
    for _ in range(2):
        with (
            socket.create_connection((host, int(port)), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=host, session=session) as connection,
        ):
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
            connection.recv(1000)  # tickets would come before this
            assert not connection.session_reused
            session = connection.session
            assert session is None or not session.has_ticket


@pytest.mark.quick
def test_a_list_that_is_none_is_refused_by_its_name(node: Tls, tmp_path: Path) -> None:
    wrong = tmp_path / "list.pem"
    wrong.write_text("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n")
    with pytest.raises(BadCertificate, match=r"list\.pem"):
        TlsFiles(Tls(node.cert, node.key, node.ca, wrong))
    with pytest.raises(BadCertificate, match=r"list\.gone"):
        TlsFiles(Tls(node.cert, node.key, node.ca, tmp_path / "list.gone"))
    assert isinstance(TlsFiles(node).server(), ssl.SSLContext)
