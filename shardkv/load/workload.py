"""What a load consists of: which operations in which shares, on which keys.

The core workloads A to F are those of YCSB (Cooper et al. 2010), with its request
distributions: Zipf's law with popular keys scattered, and for D "latest", by which
what was inserted last is read most.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from random import Random

READ, UPDATE, INSERT, SCAN, MODIFY, INCR, NEW, BACK, COUNT, ERASE = range(10)
KINDS = (
    *("read", "update", "insert", "scan", "read-modify-write"),
    *("incr", "put-if-absent", "reverse-scan", "count", "delete-range"),
)


def shares(**named: float) -> tuple[float, ...]:
    """Shares of KINDS, from those that are not 0."""
    by_kind = {name.replace("_", "-"): share for name, share in named.items()}
    return tuple(by_kind.get(kind, 0.0) for kind in KINDS)


# The shares, and the distribution that YCSB gives the workload.
WORKLOADS: dict[str, tuple[tuple[float, ...], str]] = {
    "a": (shares(read=0.5, update=0.5), "zipfian"),
    "b": (shares(read=0.95, update=0.05), "zipfian"),
    "c": (shares(read=1.0), "zipfian"),
    "d": (shares(read=0.95, insert=0.05), "latest"),
    "e": (shares(scan=0.95, insert=0.05), "zipfian"),
    "f": (shares(read=0.5, read_modify_write=0.5), "zipfian"),
    "put": (shares(update=1.0), "uniform"),
    "get": (shares(read=1.0), "uniform"),
    "incr": (shares(incr=1.0), "zipfian"),
}
DISTRIBUTIONS = ("uniform", "zipfian", "latest")
ZIPF = 0.99
SCAN_LENGTH = 100  # a scan takes 1 to so many pairs, as in YCSB
POOL_BYTES = 1 << 20
KEPT_KEYS = 200_000  # so many are made beforehand: making one costs a tenth of what a put does


def parse_mix(text: str) -> tuple[float, ...]:
    """Shares of KINDS that add up to 1, from `read=0.5,update=0.3,scan=0.2`. Raises ValueError."""
    shares = [0.0] * len(KINDS)
    for part in text.split(","):
        name, equals, share = part.partition("=")
        if name.strip() not in KINDS or not equals:
            raise ValueError(f"{part!r} is not one of {', '.join(KINDS)} with =SHARE")
        shares[KINDS.index(name.strip())] = float(share)
    total = sum(shares)
    if min(shares) < 0 or not math.isfinite(total) or total <= 0:
        raise ValueError("shares are positive numbers")
    return tuple(share / total for share in shares)


def bench_key(number: int) -> bytes:
    """Key `number`: spread over the printable characters, as the first pre-split divides them."""
    mixed = number * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    first, second = divmod(mixed % (95 * 95), 95)
    return b"%c%c/bench/%012d" % (0x20 + first, 0x20 + second, number)


def counter_of(key: bytes) -> bytes:
    """The counter beside a key: what the other operations write is no number."""
    return key + b"/n"


def few_after(key: bytes) -> tuple[bytes, bytes]:
    """The range of a key and of what shares its first characters with it, so of few keys."""
    stem = key[:-5]
    return stem, stem + b"\xff"


@dataclass(frozen=True)
class Workload:
    """What every worker is told; each draws from it by its own seed."""

    mix: tuple[float, ...]
    distribution: str
    keys: int
    value_bytes: int

    @property
    def reads(self) -> bool:
        """Whether it needs the keys to be there."""
        return any(self.mix[kind] for kind in (READ, SCAN, MODIFY, BACK, COUNT, ERASE))


class Source:
    """Draws operations and their keys for one of `workers` workers."""

    def __init__(self, workload: Workload, worker: int, workers: int, rng: Random) -> None:
        self._rng, self._keys = rng, workload.keys
        self._shares = list(accumulate(workload.mix))
        self._only = workload.mix.index(1.0) if 1.0 in workload.mix else None
        # New keys of different workers must differ.
        self._inserted, self._worker, self._workers = 0, worker, workers
        self._value_bytes = workload.value_bytes
        few = workload.keys <= KEPT_KEYS
        self._made = [bench_key(number) for number in range(workload.keys)] if few else None
        self._pool = rng.randbytes(POOL_BYTES + workload.value_bytes)
        self._zipf: list[float] = []
        if workload.distribution != "uniform":
            self._zipf = list(accumulate(1 / math.pow(rank, ZIPF) for rank in range(1, workload.keys + 1)))
        self.draw_key: Callable[[], bytes] = {
            "uniform": self._uniform,
            "zipfian": self._scattered,
            "latest": self._latest,
        }[workload.distribution]

    def draw_kind(self) -> int:  # hot: runs per operation
        if self._only is not None:
            return self._only
        return bisect_left(self._shares, self._rng.random() * self._shares[-1])

    def new_key(self) -> bytes:
        number = self._keys + self._inserted * self._workers + self._worker
        self._inserted += 1
        return bench_key(number)

    def value(self) -> bytes:  # hot: runs per operation
        """Random bytes, seldom the same twice: nothing that the disk could save by compressing it."""
        start = int(self._rng.random() * POOL_BYTES)
        return self._pool[start : start + self._value_bytes]

    def scan_length(self) -> int:
        return self._rng.randint(1, SCAN_LENGTH)

    def _key(self, number: int) -> bytes:  # hot: runs per operation
        return self._made[number] if self._made is not None else bench_key(number)

    def _uniform(self) -> bytes:  # hot: runs per operation
        return self._key(int(self._rng.random() * self._keys))

    def _rank(self) -> int:
        return bisect_left(self._zipf, self._rng.random() * self._zipf[-1])

    def _scattered(self) -> bytes:
        return self._key(self._rank() * 0x9E3779B1 % self._keys)

    def _latest(self) -> bytes:
        """The newest key with rank 0, and so on backwards, over what this worker has inserted and all that was loaded."""
        rank = self._rank()
        if rank < self._inserted:
            return bench_key(self._keys + (self._inserted - 1 - rank) * self._workers + self._worker)
        return bench_key((self._keys - 1 - (rank - self._inserted)) % self._keys)
