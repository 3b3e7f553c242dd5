"""The key that seals a backup's objects, and what a sealed object looks like.

    key file        one line: shardkv-backup-key-1:<64 hexadecimal digits>
    sealed object   magic "SKVB" | version u8 | key id, 8 bytes | nonce, 12 bytes | AES-256-GCM: ciphertext, tag

The operator's 32 random bytes encrypt nothing themselves. HKDF-SHA256 derives three keys from them: one seals,
one names chunks (a digest that is not keyed would tell whoever knows a content that it is there), and one is
the key's *id*, a fingerprint that stands in each object in clear and tells nothing of the key.

An object's name, with the header, is its associated data: an object that was put under another name is refused.
Every object has a random nonce of 96 bits, so one key should seal no more than 2^32 objects (some petabytes).

Limits: the names of objects, their sizes and times, and so how much changed between two backups, are visible to
whoever can read the store. Whoever can write to it may delete objects, or put an older one back under its own name.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path
from typing import Any

from shardkv.backup.errors import BackupError, Damaged

KEY_BYTES = 32
PREFIX = "shardkv-backup-key-1:"
KEY_LINE = re.compile(r"shardkv-backup-key-(\d+):([0-9a-f]+)")
MAX_FILE_BYTES = 4096
MAGIC, VERSION = b"SKVB", 1
ID_BYTES, NONCE_BYTES, TAG_BYTES = 8, 12, 16
HEADER_BYTES = len(MAGIC) + 1 + ID_BYTES
PACKAGE = "encrypted backups need the package cryptography: pip install 'shardkv[backup]'"


class WrongKey(BackupError):
    """The objects are sealed with another key than the one that was given, or with none, or none was given."""


class BackupKey:
    """Seals objects and opens them. Raises BackupError where the package cryptography is missing."""

    def __init__(self, secret: bytes) -> None:
        assert len(secret) == KEY_BYTES, "a key has 32 bytes"
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            raise BackupError(PACKAGE) from None
        self._cipher = AESGCM(_derived(secret, b"seal", 32))
        self._names = _derived(secret, b"names", 32)
        self.id = _derived(secret, b"id", ID_BYTES).hex()

    def digest(self, content: bytes) -> str:
        """What a chunk with that content is called: only who has the key can tell."""
        return hashlib.blake2b(content, digest_size=32, key=self._names).hexdigest()

    def seal(self, name: str, data: bytes) -> bytes:
        header = MAGIC + bytes([VERSION]) + bytes.fromhex(self.id)
        nonce = secrets.token_bytes(NONCE_BYTES)
        return header + nonce + self._cipher.encrypt(nonce, data, header + name.encode())

    def open(self, where: str, name: str, sealed: bytes) -> bytes:
        """`where`: the store, for errors. Raises WrongKey, Damaged."""
        from cryptography.exceptions import InvalidTag

        found = key_id_of(where, name, sealed)
        if found is None:
            raise WrongKey(f"{where}: {name} is not encrypted: leave --key-file away")
        if found != self.id:
            raise WrongKey(f"{where}: {name} is encrypted with key {found}; --key-file has key {self.id}")
        header, nonce = sealed[:HEADER_BYTES], sealed[HEADER_BYTES : HEADER_BYTES + NONCE_BYTES]
        try:
            return self._cipher.decrypt(nonce, sealed[HEADER_BYTES + NONCE_BYTES :], header + name.encode())
        except InvalidTag:
            raise Damaged(
                f"{where}: {name} is damaged, or is another object: it does not match its seal"
            ) from None


def key_id_of(where: str, name: str, data: bytes) -> str | None:
    """The id of the key that an object is sealed with; None for a plain one. Raises Damaged."""
    if not data.startswith(MAGIC):
        return None
    if len(data) < HEADER_BYTES + NONCE_BYTES + TAG_BYTES:
        raise Damaged(f"{where}: {name} is damaged: it is cut short")
    if data[len(MAGIC)] != VERSION:
        raise Damaged(
            f"{where}: {name} is sealed in version {data[len(MAGIC)]}, and this version of shardkv reads {VERSION} alone"
        )
    return data[len(MAGIC) + 1 : HEADER_BYTES].hex()


def refuse_sealed(where: str, name: str, data: bytes) -> bytes:
    """`data`, which is read as it is. Raises WrongKey for a sealed object."""
    found = key_id_of(where, name, data)
    if found is not None:
        raise WrongKey(f"{where}: {name} is encrypted with key {found}: give its --key-file")
    return data


def make_key_file(path: Path) -> BackupKey:
    """Make a new key in a new file, for its owner alone. Raises BackupError, also where the file is there."""
    secret = secrets.token_bytes(KEY_BYTES)
    key = BackupKey(secret)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise BackupError(f"{path} is there: whoever loses a key loses what it sealed") from None
    except OSError as error:
        raise BackupError(f"{path} is not made: {error.strerror}") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{PREFIX}{secret.hex()}\n")
        file.flush()
        os.fsync(file.fileno())
    return key


def read_key_file(path: Path) -> BackupKey:
    """Raises BackupError."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BackupError(f"{path}: {error}") from None
    found = KEY_LINE.fullmatch(text)
    if found is None:
        raise BackupError(f"{path} is not a backup key: `shardkv backup key FILE` makes one")
    if found[1] != "1":
        raise BackupError(
            f"{path} is a backup key of format {found[1]}, and this version of shardkv reads format 1 alone"
        )
    if len(found[2]) != 2 * KEY_BYTES:
        raise BackupError(f"{path} is not a backup key: it has {len(found[2])} digits, not {2 * KEY_BYTES}")
    return BackupKey(bytes.fromhex(found[2]))


def _derived(secret: bytes, purpose: bytes, size: int) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    derived: Any = HKDF(SHA256(), size, salt=None, info=b"shardkv backup 1 " + purpose).derive(secret)
    return bytes(derived)
