"""Enforces quotas at one replica: counts what users and prefixes ask for, and says when to come back.

A user's frame is refused whole, before anybody looks into it. Of a frame with keys of prefixes that have quotas,
only those operations are refused (their kinds are overwritten, `frames.busy_kind`). Operations of one key share
their fate within a frame, so that no write overtakes another. What is refused is not counted. Where no
quota is set, a frame costs a look at that.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from shardkv.shardctrler.accounts import Accounts, Role
from shardkv.shardctrler.quotas import Quota
from shardkv.wire import frames
from shardkv.wire.audit import Audit
from shardkv.wire.calls import busy_text
from shardkv.wire.token_bucket import TokenBucket

BURST_SECONDS = 1.0  # of its rate may be saved


class Limit:
    """The buckets of one quota."""

    def __init__(self, quota: Quota, now: float) -> None:
        self.quota = quota
        self._operations = _bucket(quota.operations, now)
        self._bytes = _bucket(quota.bytes, now)

    def wait(self, now: float) -> float:
        """Seconds until the next operation may come; 0: now."""
        return max((bucket.wait(now) for bucket in (self._operations, self._bytes) if bucket), default=0.0)

    def take(self, operations: int, size: int, now: float) -> None:
        if self._operations is not None and operations:
            self._operations.take(operations, now)
        if self._bytes is not None:
            self._bytes.take(size, now)


def _bucket(rate: int, now: float) -> TokenBucket | None:
    return TokenBucket(rate, rate * BURST_SECONDS, now) if rate else None


class Enforcer:
    def __init__(
        self,
        accounts: Callable[[], Accounts | None],
        audit: Audit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._accounts, self._audit, self._clock = accounts, audit, clock
        self._seen: Accounts | None = None
        self._users: dict[str, Limit] = {}
        self._prefixes: dict[bytes, Limit] = {}
        self._any_prefix: tuple[bytes, ...] = ()
        self.refused: Counter[str] = Counter()
        """Operations that were refused, by whose quota it was: `user`, `prefix`."""

    def _refresh(self) -> None:
        """Buckets whose quota has not changed go on as they are."""
        accounts = self._accounts()
        if accounts is self._seen or accounts is None:  # unknown for a moment: the last ones stay
            return
        self._seen, now = accounts, self._clock()
        users = {
            name: quota
            for name, quota in accounts.quotas.users.items()
            if name in accounts.users and accounts.users[name].role is not Role.ADMIN
        }
        self._users = {name: _kept(self._users.get(name), quota, now) for name, quota in users.items()}
        self._prefixes = {
            prefix: _kept(self._prefixes.get(prefix), quota, now)
            for prefix, quota in accounts.quotas.prefixes.items()
        }
        self._any_prefix = tuple(self._prefixes)

    @property
    def of_prefixes(self) -> bool:
        """Whether any prefix has a quota."""
        self._refresh()
        return bool(self._any_prefix)

    def connections(self, user: str) -> int:
        """How many connections `user` may have here at once; 0: no bound."""
        self._refresh()
        limit = self._users.get(user)
        return limit.quota.connections if limit is not None else 0

    def frame(self, user: str, address: str, method: str, payload: bytes) -> str:  # hot: runs per frame
        """Count a frame of `user`; if it is refused, the answer's text."""
        self._refresh()
        limit = self._users.get(user) if self._users else None
        if limit is None:
            return ""
        now, operations = self._clock(), frames.count_operations(payload)
        wait = limit.wait(now)
        if not wait:
            limit.take(operations, len(payload), now)
            return ""
        why = f"{user} has used up what it may ask for"
        self._note("user", operations, user, address, method, why)
        return busy_text(why, wait)

    def answered(self, user: str, size: int) -> None:  # hot: runs per frame
        """An answer of so many bytes goes to `user`."""
        if self._users and (limit := self._users.get(user)) is not None:
            limit.take(0, size, self._clock())

    def marked(self, user: str, address: str, method: str, payload: bytes) -> bytes:  # hot: runs per frame
        """The frame, with the operations marked that a prefix's quota refuses. It has to be well-formed."""
        if not self.of_prefixes:
            return payload
        now, any_prefix = self._clock(), self._any_prefix
        waits = {prefix: limit.wait(now) for prefix, limit in self._prefixes.items()}
        taken: dict[bytes, tuple[int, int]] = {}
        refused = 0

        def mark(kind: int, key: bytes, value: bytes) -> int:
            nonlocal refused
            if not key.startswith(any_prefix) or kind >= frames.FIRST_BUSY:
                return kind
            own = [prefix for prefix in waits if key.startswith(prefix)]
            wait = max(waits[prefix] for prefix in own)
            if wait:
                refused += 1
                return frames.busy_kind(wait)
            for prefix in own:
                count, size = taken.get(prefix, (0, 0))
                taken[prefix] = count + 1, size + len(key) + len(value)
            return kind

        marked = frames.mark(payload, mark)
        for prefix, (count, size) in taken.items():
            self._prefixes[prefix].take(count, size, now)
        if refused:
            self._note(
                "prefix", refused, user, address, method, "a prefix has used up what may be asked for it"
            )
        return marked

    def unary(self, user: str, address: str, method: str, key: bytes, size: int) -> float:
        """Count one operation by gRPC. Seconds until it may come again if it is refused, else 0."""
        self._refresh()
        if not self._users and not self._prefixes:
            return 0.0
        now = self._clock()
        of_prefixes = [limit for prefix, limit in self._prefixes.items() if key.startswith(prefix)]
        of_user = self._users.get(user)
        for kind, limits in (("user", [of_user] if of_user is not None else []), ("prefix", of_prefixes)):
            wait = max((limit.wait(now) for limit in limits), default=0.0)
            if wait:
                self._note(kind, 1, user, address, method, f"the {kind}'s quota is used up")
                return wait
        for limit in [*of_prefixes, *([of_user] if of_user is not None else [])]:
            limit.take(1, size, now)
        return 0.0

    def _note(self, kind: str, count: int, user: str, address: str, method: str, why: str) -> None:
        self.refused[kind] += count
        self._audit.note("busy", who=user, address=address, door="main", what=method, allowed=False, why=why)


def _kept(limit: Limit | None, quota: Quota, now: float) -> Limit:
    return limit if limit is not None and limit.quota == quota else Limit(quota, now)
