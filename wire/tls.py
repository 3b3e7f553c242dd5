"""Mutual TLS: who one is, and whom one believes. Both ends of every connection show a certificate.

A process has one certificate for both of its roles, in which a URI says which process it is for
(`node_name.py`) and the host by which others call it; a user's certificate has neither. The extended key
usage is checked, too: with `clientAuth` alone a certificate cannot be a server's. `shardkv certs` makes both.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardkv.wire.handshake import certificate_hash

_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


class BadCertificate(Exception):
    """The files are not there, not certificates, or do not belong together. The text names them."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files: our certificate, its key, the CA whose certificates we believe, and those that it revoked."""

    cert: Path
    key: Path
    ca: Path
    crl: Path | None = None

    def files(self) -> dict[str, str]:
        """Those that there are, by their names, as absolute paths."""
        named = {"cert": self.cert, "key": self.key, "ca": self.ca, "crl": self.crl}
        return {name: str(path.resolve()) for name, path in named.items() if path is not None}

    def server(self) -> ssl.SSLContext:
        """Raises BadCertificate."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.num_tickets = 0  # no session is resumed: each connection shows a certificate that is valid now
        context.set_alpn_protocols(["h2"])  # gRPC asks for it; our own streams do not
        return context

    def browsers(self) -> ssl.SSLContext:
        """For a page that people look at: they log in, and have no certificate. Raises BadCertificate."""
        return self._context(ssl.PROTOCOL_TLS_SERVER)

    def client(self) -> ssl.SSLContext:
        """Raises BadCertificate."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def shown(self) -> Mapping[str, Any]:
        """What our own certificate says, as a peer would see it. Raises BadCertificate."""
        try:
            # The standard library reads certificates of peers only, but for this.
            found: Mapping[str, Any] = ssl._ssl._test_decode_cert(str(self.cert))  # type: ignore[attr-defined]
        except (OSError, ssl.SSLError) as error:
            raise BadCertificate(f"certificate {self.cert}: {error}") from None
        return found

    def certificate_hash(self) -> bytes:
        """Of our own certificate, the first in its file. Raises BadCertificate."""
        try:
            text = self.cert.read_text()
            end = text.index(_END) + len(_END)
            return certificate_hash(ssl.PEM_cert_to_DER_cert(text[text.index(_BEGIN) : end]))
        except (OSError, ValueError) as error:
            raise BadCertificate(f"certificate {self.cert}: {error}") from None

    def expires_at(self) -> float:
        """The end of our own certificate, in seconds of the wall clock. Raises BadCertificate."""
        try:
            found = ssl._ssl._test_decode_cert(str(self.cert))  # type: ignore[attr-defined]
            return ssl.cert_time_to_seconds(found["notAfter"])
        except (OSError, ssl.SSLError, KeyError, ValueError) as error:
            raise BadCertificate(f"certificate {self.cert}: {error}") from None

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            raise BadCertificate(f"certificate {self.cert} with key {self.key}: {error}") from None
        try:
            context.load_verify_locations(self.ca)
        except (OSError, ssl.SSLError) as error:
            raise BadCertificate(f"CA {self.ca}: {error}") from None
        if self.crl is not None:
            try:
                context.load_verify_locations(self.crl)
            except (OSError, ssl.SSLError) as error:
                raise BadCertificate(f"revocation list {self.crl}: {error}") from None
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        return context
