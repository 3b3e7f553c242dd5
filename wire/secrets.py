"""The secrets by which processes of one cluster know each other, while one may take another's place.

The first is the one that this process proves itself by; all of them are accepted of others. To renew
a secret, the new one is added everywhere as the second, then made the first, and then the old one
is removed: at no moment does anybody use a secret that another process does not accept yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from shardkv.wire.proof import Verifier, key_id

MAX_SECRETS = 4


class Secrets:
    """Empty: this process cannot show that it belongs to the cluster, unless it has a certificate."""

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        self.on_change: list[Callable[[], None]] = []
        self._set(secrets)

    def _set(self, secrets: Sequence[str]) -> None:
        assert len(secrets) <= MAX_SECRETS and "" not in secrets, "whoever reads the file checks it"
        self._secrets = tuple(secrets)
        self._verifiers = {key_id(secret): Verifier.of(secret) for secret in secrets}

    def replace(self, secrets: Sequence[str]) -> None:
        """From now on these are accepted, and no others."""
        if tuple(secrets) != self._secrets:
            self._set(secrets)
            for notice in self.on_change:
                notice()

    def __bool__(self) -> bool:
        return bool(self._secrets)

    def __iter__(self) -> Iterator[str]:
        return iter(self._secrets)

    @property
    def first(self) -> str:
        """By which this process proves itself; empty if it has none."""
        return self._secrets[0] if self._secrets else ""

    def verifier(self, id: bytes) -> Verifier | None:
        return self._verifiers.get(id)

    def accepts(self, id: bytes) -> bool:
        return id in self._verifiers

    @property
    def ids(self) -> list[str]:
        """Names of the secrets, in order: for the status. They tell nothing of the secrets."""
        return [key_id(secret).hex() for secret in self._secrets]
