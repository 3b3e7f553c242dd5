"""Proofs that both ends of a stream know one secret, of which nothing is sent. Pure.

The scheme is SCRAM-SHA-256 (RFC 5802, RFC 7677) with the server's proof first:

    client key = HMAC(secret, "shardkv client key")    stored key = SHA-256(client key)
    server key = HMAC(secret, "shardkv server key")
    the end that was dialled:  HMAC(server key, transcript)
    the end that dialled:      client key XOR HMAC(stored key, transcript)

Whoever checks a login needs only the `Verifier`, the stored key and the server key. The verifier alone
cannot log in. But whoever has the verifier *and* has recorded one login of that user can compute the
client key, and whoever has the server key can pose as a server to that user. So verifiers travel and
lie where only processes of the cluster read them, and need TLS on a network where others listen.

SCRAM derives its keys from a password by a slow function. The secrets
here are 256 random bits, which nobody can guess however fast the function is, so one HMAC is enough.

The transcript (`handshake.py`) has both nonces and says who both ends are and what the dialling end
sees at the other end. So a proof is worth nothing on another stream, and a relay changes the transcript.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

PROOF_BYTES = KEY_BYTES = 32
KEY_ID_BYTES = 8


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


@dataclass(frozen=True, slots=True, repr=False)
class Verifier:
    """What a server keeps of a secret."""

    stored_key: bytes
    server_key: bytes

    @classmethod
    def of(cls, secret: str) -> Verifier:
        key = secret.encode()
        return cls(hashlib.sha256(_client_key(key)).digest(), _hmac(key, b"shardkv server key"))

    def encode(self) -> bytes:
        return self.stored_key + self.server_key

    @classmethod
    def decode(cls, data: bytes) -> Verifier:
        """Raises ValueError."""
        if len(data) != 2 * KEY_BYTES:
            raise ValueError(f"a verifier of {len(data)} bytes")
        return cls(data[:KEY_BYTES], data[KEY_BYTES:])

    def knows(self, secret: str) -> bool:
        """Whether this is the verifier of `secret`: for logins that do send it (gRPC, browsers)."""
        return hmac.compare_digest(Verifier.of(secret).encode(), self.encode())

    def server_proof(self, transcript: bytes) -> bytes:
        return _hmac(self.server_key, transcript)

    def accepts(self, transcript: bytes, proof: bytes) -> bool:
        """Whether `proof` is that of the end that dialled."""
        if len(proof) != PROOF_BYTES:
            return False
        client_key = _xor(proof, _hmac(self.stored_key, transcript))
        return hmac.compare_digest(hashlib.sha256(client_key).digest(), self.stored_key)


def client_proof(secret: str, transcript: bytes) -> bytes:
    """Of the end that dials. It is sent only after the other end's proof was right."""
    client_key = _client_key(secret.encode())
    return _xor(client_key, _hmac(hashlib.sha256(client_key).digest(), transcript))


def is_server_proof(secret: str, transcript: bytes, proof: bytes) -> bool:
    return hmac.compare_digest(Verifier.of(secret).server_proof(transcript), proof)


def key_id(secret: str) -> bytes:
    """Names one of several secrets, and tells nothing of it."""
    return _hmac(secret.encode(), b"shardkv key id")[:KEY_ID_BYTES]


def _client_key(secret: bytes) -> bytes:
    return _hmac(secret, b"shardkv client key")


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))
