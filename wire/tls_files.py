"""The TLS files of a running process: read again when they change, and watched for their end.

A renewed certificate, CA or revocation list is used for connections that begin from then on, without a
restart. Files that cannot be used (half written, a key of another certificate) change nothing: what was
loaded last stays in use, and the status and the audit log say so. Files are looked at every few seconds,
and at once on SIGHUP; on a thread, for their file system may hang.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shardkv.wire.audit import Audit, NoAudit
from shardkv.wire.tls import BadCertificate, Tls

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
WARN_SECONDS = 30 * 86_400.0
WARN_EVERY_SECONDS = 86_400.0

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Loaded:
    server: ssl.SSLContext
    browsers: ssl.SSLContext
    client: ssl.SSLContext
    certificate_hash: bytes  # of ours
    expires_at: float  # of the first certificate that ends, ours or a CA's; seconds of the wall clock
    revoked_until: float | None  # when the revocation list is to be replaced, where that can be told


class TlsFiles:
    """The contexts of `Tls` for the next connection. Looks at the files only in `look` and `watch`."""

    def __init__(self, tls: Tls, audit: Audit | None = None) -> None:
        """Raises BadCertificate."""
        self.tls = tls
        self.audit: Audit = audit or NoAudit()
        self._stamp = _stamp(tls)
        self._loaded = _load(tls)
        self.certificate_hashes: tuple[bytes, ...] = (self._loaded.certificate_hash,)
        self._crl = _content(tls.crl)
        self._woken = asyncio.Event()
        self._warned_at = -WARN_EVERY_SECONDS
        self.on_revocations: Callable[[], None] = lambda: None  # the revocation list has changed
        self.reloads = 0
        self.problem = ""  # why the files on the disk are not in use

    def server(self) -> ssl.SSLContext:
        return self._loaded.server

    def browsers(self) -> ssl.SSLContext:
        return self._loaded.browsers

    def client(self) -> ssl.SSLContext:
        return self._loaded.client

    def status(self) -> dict[str, object]:
        loaded = self._loaded
        return {
            "expires_at": loaded.expires_at,
            "expires_in_seconds": loaded.expires_at - time.time(),
            "revocations_until": loaded.revoked_until,
            "reloads": self.reloads,
            "problem": self.problem,
        }

    async def watch(self) -> None:
        """For as long as this process runs."""
        while True:
            await self.look()
            self._warn()
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._woken.wait()
            except TimeoutError:
                continue
            self._woken.clear()
            self._stamp = ()  # told to read them: also if they look the same

    def wake(self) -> None:
        """Have `watch` read the files now."""
        self._woken.set()

    async def look(self) -> None:
        """Load the files if they have changed since they were last looked at."""
        stamp = await asyncio.to_thread(_stamp, self.tls)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            loaded, crl = await asyncio.to_thread(lambda: (_load(self.tls), _content(self.tls.crl)))
        except BadCertificate as error:
            self.problem = str(error)
            log.error("the TLS files have changed and cannot be used: %s; the old ones stay in use", error)
            self._note(False, self.problem)
            return
        # A connection that has begun may still show the certificate before.
        self.certificate_hashes = (loaded.certificate_hash, self._loaded.certificate_hash)
        self._loaded, self.problem = loaded, ""
        self.reloads += 1
        log.info("read the TLS files again; the certificate is valid until %s", _day(loaded.expires_at))
        self._note(True, "")
        if crl != self._crl:
            self._crl = crl
            self.on_revocations()

    def _note(self, allowed: bool, why: str) -> None:
        self.audit.note("certificate", door="main", what="read the TLS files", allowed=allowed, why=why)

    def _warn(self) -> None:
        left, now = self._loaded.expires_at - time.time(), time.monotonic()
        if left < WARN_SECONDS and now - self._warned_at >= WARN_EVERY_SECONDS:
            self._warned_at = now
            log.warning("the TLS certificate or its CA expires on %s", _day(self._loaded.expires_at))


def contexts(tls: Tls | TlsFiles | None) -> Callable[[], ssl.SSLContext] | None:
    """The context of the next connection to be dialled. Raises BadCertificate."""
    if tls is None:
        return None
    if isinstance(tls, TlsFiles):
        return tls.client
    context = tls.client()
    return lambda: context


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(moment))


def _stamp(tls: Tls) -> Stamp:
    """What tells that a file was changed; of one that is not there, zeros."""

    def of(path: Path) -> tuple[int, int, int]:
        try:
            found = path.stat()
        except OSError:
            return 0, 0, 0
        return found.st_mtime_ns, found.st_size, found.st_ino

    return tuple(of(path) for path in (tls.cert, tls.key, tls.ca, tls.crl) if path is not None)


def _content(path: Path | None) -> bytes:
    """Raises BadCertificate."""
    try:
        return path.read_bytes() if path is not None else b""
    except OSError as error:
        raise BadCertificate(f"revocation list {path}: {error}") from None


def _load(tls: Tls) -> _Loaded:
    """Raises BadCertificate."""
    client = tls.client()
    ends = [
        tls.expires_at(),
        *(ssl.cert_time_to_seconds(str(each["notAfter"])) for each in client.get_ca_certs()),
    ]
    until = _revoked_until(_content(tls.crl))
    return _Loaded(tls.server(), tls.browsers(), client, tls.certificate_hash(), min(ends), until)


def _revoked_until(pem: bytes) -> float | None:
    if not pem:
        return None
    try:
        from cryptography import x509
    except ImportError:  # the standard library checks revocation lists, and tells nothing of them
        return None
    try:
        until = x509.load_pem_x509_crl(pem).next_update_utc
    except ValueError as error:
        raise BadCertificate(f"revocation list: {error}") from None
    return until.timestamp() if until is not None else None
