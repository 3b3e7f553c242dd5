"""Makes certificates: an authority for trials, and certificates for processes and users that it signs.

A process's certificate says in a URI which process it is for (`wire/node_name.py`) and may be used at both
ends of a connection. A user's has the user's name, and may only dial: its extended key usage is clientAuth.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shardkv.wire.node_name import NodeName

DAYS = 365
AUTHORITY = "shardkv test CA"


@dataclass(frozen=True)
class Authority:
    """A CA in a directory, with its key beside it: for trials. It is made where it is not there yet."""

    directory: Path

    @property
    def certificate(self) -> Path:
        return self.directory / "ca.pem"

    @property
    def _key(self) -> Path:
        return self.directory / "ca.key"

    def ensure(self) -> Any:
        """The key; made with the certificate, if there is none."""
        if self.certificate.exists():
            return serialization.load_pem_private_key(self._key.read_bytes(), None)
        self.directory.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        signed = _builder(AUTHORITY, key).add_extension(constraints, critical=True).sign(key, hashes.SHA256())
        _write_key(self._key, key)
        _write(self.certificate, signed.public_bytes(serialization.Encoding.PEM), 0o644)
        return key

    def for_process(self, name: NodeName, hosts: Sequence[str], to: Path) -> None:
        """TO.pem and TO.key, for those that are dialled under `hosts`."""
        names: list[Any] = [_host(host) for host in hosts]
        names.append(x509.UniformResourceIdentifier(name.uri))
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        self._sign(to, "node", usages, names)

    def for_user(self, user: str, to: Path) -> None:
        """TO.pem and TO.key, by which `user` is known."""
        self._sign(to, user, [ExtendedKeyUsageOID.CLIENT_AUTH], [])

    def _sign(self, to: Path, subject: str, usages: Sequence[Any], names: Sequence[Any]) -> None:
        authority = self.ensure()
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(subject, key).add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        signed = builder.sign(authority, hashes.SHA256())
        _write_key(to.with_name(to.name + ".key"), key)
        _write(to.with_name(to.name + ".pem"), signed.public_bytes(serialization.Encoding.PEM), 0o644)


def _builder(subject: str, key: Any) -> Any:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, AUTHORITY)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
    )


def _host(host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # also where the file was there, and whatever the umask is
        file.write(data)


def _write_key(path: Path, key: Any) -> None:
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    _write(path, pem, 0o600)
