"""certs: a certificate authority for tests and trials, and certificates that it signed."""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path
from typing import Any

import click

from shardkv.cli.common import Failed, handled
from shardkv.options import NODE

DAYS = 365


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--host",
    "hosts",
    multiple=True,
    default=("127.0.0.1", "localhost"),
    show_default=True,
    help="Names of servers.",
)
@click.option("--client", is_flag=True, help="For a user of that NAME, not for a process of the cluster.")
@click.option("--name", default="node", show_default=True, help="NAME.pem and NAME.key are made.")
@handled
def certs(directory: Path, hosts: tuple[str, ...], client: bool, name: str) -> None:
    """Make DIRECTORY/ca.pem, unless it is there, and a certificate NAME for HOSTs that it signs.

    For tests and trials: the CA's key lies beside it. Use the files with --tls-cert, --tls-key and --tls-ca.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID
    except ImportError:
        raise Failed("certs needs the package cryptography: pip install 'shardkv[certs]'") from None

    now = datetime.datetime.now(datetime.UTC)

    def builder(subject: str, issuer: str, key: Any, organization: str = "") -> Any:
        names = [x509.NameAttribute(NameOID.COMMON_NAME, subject)]
        if organization:
            names.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name(names))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=DAYS))
        )

    def write(path: Path, data: bytes, mode: int) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)

    def write_key(path: Path, key: Any) -> None:
        plain = serialization.NoEncryption()
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        write(path, pem, 0o600)

    authority, authority_key = directory / "ca.pem", directory / "ca.key"
    directory.mkdir(parents=True, exist_ok=True)
    if authority.exists():
        ca_key: Any = serialization.load_pem_private_key(authority_key.read_bytes(), None)
    else:
        ca_key = ec.generate_private_key(ec.SECP256R1())
        ca = builder("shardkv test CA", "shardkv test CA", ca_key).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        write_key(authority_key, ca_key)
        signed = ca.sign(ca_key, hashes.SHA256())
        write(authority, signed.public_bytes(serialization.Encoding.PEM), 0o644)
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([_host(x509, host) for host in hosts])
    organization = "" if client else NODE
    certificate = builder(name, "shardkv test CA", key, organization).add_extension(names, critical=False)
    signed = certificate.sign(ca_key, hashes.SHA256())
    write_key(directory / f"{name}.key", key)
    write(directory / f"{name}.pem", signed.public_bytes(serialization.Encoding.PEM), 0o644)
    click.echo(f"--tls-cert {directory / name}.pem --tls-key {directory / name}.key --tls-ca {authority}")


def _host(x509: Any, host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
