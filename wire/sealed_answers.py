"""Answers that only processes of the cluster can read, for streams without TLS: sealed with the cluster's secret.

    sealed   0, id of the secret (8 bytes), nonce (12), AES-256-GCM of the answer
    key      HKDF-SHA256 of the secret, for this use alone

A message of protobuf never begins with 0, so that a plain answer is told from a sealed one. Whoever opens it with a
secret that both ends accept also knows that a process with that secret wrote it.
"""

from __future__ import annotations

import secrets as random_bytes
from collections.abc import Callable

from shardkv.wire.proof import KEY_ID_BYTES, key_id
from shardkv.wire.secrets import Secrets

NONCE_BYTES = 12
HEAD = b"\0"
_HEAD_BYTES = len(HEAD) + KEY_ID_BYTES

Sealing = Callable[[bytes], bytes]


def plainly(data: bytes) -> bytes:
    """Where the stream itself is encrypted, or no secret is there: as it is."""
    return data


def seal(secrets: Secrets, use: str, data: bytes) -> bytes:
    """Sealed with the first secret; as it is where there is none. `use` is a name that the other end gives, too."""
    if not secrets:
        return data
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # 20 ms, which few commands need

    head = HEAD + key_id(secrets.first)
    nonce = random_bytes.token_bytes(NONCE_BYTES)
    return head + nonce + AESGCM(_key(secrets.first, use)).encrypt(nonce, data, head)


def unseal(secrets: Secrets, use: str, data: bytes) -> bytes:
    """Opened with whichever secret it names. Raises ValueError for what is not sealed, or by nobody of the cluster."""
    if not secrets:
        return data
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if not data.startswith(HEAD):
        raise ValueError("an answer that is not sealed")
    head, nonce = data[:_HEAD_BYTES], data[_HEAD_BYTES : _HEAD_BYTES + NONCE_BYTES]
    secret = next((each for each in secrets if key_id(each) == head[len(HEAD) :]), None)
    if secret is None:
        raise ValueError("an answer that is sealed with a secret that is not known here")
    try:
        return AESGCM(_key(secret, use)).decrypt(nonce, data[_HEAD_BYTES + NONCE_BYTES :], head)
    except (InvalidTag, ValueError):
        raise ValueError("an answer that is sealed wrongly") from None


def _key(secret: str, use: str) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), 32, salt=None, info=b"shardkv sealed answer " + use.encode()).derive(secret.encode())
