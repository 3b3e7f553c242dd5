"""bench: closed-loop load from many callers of one clerk; throughput and latencies."""

from __future__ import annotations

import asyncio
import math
import random
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import accumulate

import click
import uvloop

from client import AsyncShardClerk, ShardKVError
from shardkv.cli.common import (
    Failed,
    controllers_option,
    find_controllers,
    handled,
    output_option,
    print_json,
    print_table,
)

# Shares of read, update, insert, scan, read-modify-write (YCSB core workloads, Cooper et al. 2010).
WORKLOADS = {
    "a": (0.5, 0.5, 0.0, 0.0, 0.0),
    "b": (0.95, 0.05, 0.0, 0.0, 0.0),
    "c": (1.0, 0.0, 0.0, 0.0, 0.0),
    "d": (0.95, 0.0, 0.05, 0.0, 0.0),
    "e": (0.0, 0.0, 0.05, 0.95, 0.0),
    "f": (0.5, 0.0, 0.0, 0.0, 0.5),
    "put": (0.0, 1.0, 0.0, 0.0, 0.0),
    "get": (1.0, 0.0, 0.0, 0.0, 0.0),
}
ZIPF = 0.99
SCAN_LENGTH = 50
LOAD_AT_ONCE = 500


@dataclass
class Report:
    """What was measured; latencies in seconds."""

    latencies: list[float] = field(default_factory=list)
    by_group: Counter[int] = field(default_factory=Counter)
    errors: int = 0
    first_error: str = ""
    seconds: float = 0.0

    def percentile(self, share: float) -> float:
        """In milliseconds, of the sorted latencies."""
        if not self.latencies:
            return 0.0
        return self.latencies[min(len(self.latencies) - 1, int(len(self.latencies) * share))] * 1000

    def as_json(self) -> dict[str, object]:
        rate = 1 / self.seconds if self.seconds else 0.0
        return {
            "ops_per_s": round(len(self.latencies) * rate, 1),
            "ops": len(self.latencies),
            "errors": self.errors,
            **({"first_error": self.first_error} if self.errors else {}),
            "p50_ms": round(self.percentile(0.5), 3),
            "p95_ms": round(self.percentile(0.95), 3),
            "p99_ms": round(self.percentile(0.99), 3),
            "max_ms": round(self.percentile(1.0), 3),
            "seconds": round(self.seconds, 3),
            "by_group": {
                str(gid): {"ops_per_s": round(count * rate, 1)} for gid, count in sorted(self.by_group.items())
            },
        }


def bench_key(number: int) -> bytes:
    """Key `number`: spread over the printable characters, as the first pre-split divides them."""
    mixed = number * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    first, second = divmod(mixed % (95 * 95), 95)
    return b"%c%c/bench/%012d" % (0x20 + first, 0x20 + second, number)


class Chooser:
    """Draws key numbers: uniformly, or by a Zipf law with popular keys scattered."""

    def __init__(self, keys: int, distribution: str, rng: random.Random) -> None:
        self.keys, self._rng = keys, rng
        self._cumulative: list[float] = []
        if distribution == "zipfian":
            self._cumulative = list(accumulate(1 / math.pow(rank, ZIPF) for rank in range(1, keys + 1)))

    def draw(self) -> int:
        if not self._cumulative:
            return self._rng.randrange(self.keys)
        rank = bisect_left(self._cumulative, self._rng.random() * self._cumulative[-1])
        return (rank * 0x9E3779B1) % self.keys


class Bench:
    def __init__(
        self,
        clerk: AsyncShardClerk,
        mix: tuple[float, ...],
        value_size: int,
        chooser: Chooser,
        rng: random.Random,
    ) -> None:
        self._clerk, self._chooser, self._rng = clerk, chooser, rng
        self._value = rng.randbytes(value_size)
        self._cumulative = list(accumulate(mix))
        self._operations: list[Callable[[bytes], Awaitable[object]]] = [
            self._clerk.get,
            self._update,
            self._update,
            self._scan,
            self._read_modify_write,
        ]
        self._inserted = chooser.keys
        self.report = Report()

    async def load(self) -> None:
        """Put every key once, so that reads find something."""
        numbers = iter(range(self._chooser.keys))

        async def loader() -> None:
            for number in numbers:
                await self._clerk.put(bench_key(number), self._value, timeout=60)

        await asyncio.gather(*(loader() for _ in range(LOAD_AT_ONCE)))

    async def run(self, clients: int, operations: int) -> Report:
        left = iter(range(operations))
        began = time.perf_counter()
        await asyncio.gather(*(self._caller(left) for _ in range(clients)))
        self.report.seconds = time.perf_counter() - began
        self.report.latencies.sort()
        return self.report

    async def _caller(self, left: object) -> None:  # hot: runs per operation
        report, clock = self.report, time.perf_counter
        lookup = self._clerk._core._router.lookup
        for _ in left:  # type: ignore[attr-defined]
            choice = bisect_left(self._cumulative, self._rng.random())
            if choice == 2:
                key = bench_key(self._inserted)
                self._inserted += 1
            else:
                key = bench_key(self._chooser.draw())
            began = clock()
            try:
                await self._operations[choice](key)
            except ShardKVError as error:
                report.errors += 1
                report.first_error = report.first_error or f"{type(error).__name__}: {error}"
                continue
            report.latencies.append(clock() - began)
            report.by_group[lookup(key)[1]] += 1

    async def _update(self, key: bytes) -> None:
        await self._clerk.put(key, self._value)

    async def _scan(self, key: bytes) -> None:
        async for _ in self._clerk.scan(key, None, self._rng.randint(1, SCAN_LENGTH)):
            pass

    async def _read_modify_write(self, key: bytes) -> None:
        await self._clerk.get(key)
        await self._clerk.put(key, self._value)


@click.command()
@click.option("--workload", type=click.Choice(sorted(WORKLOADS)), default="put", show_default=True)
@click.option("--clients", type=click.IntRange(min=1), default=64, show_default=True, help="Callers at once.")
@click.option("--ops", type=click.IntRange(min=1), default=50_000, show_default=True)
@click.option("--value-size", type=click.IntRange(min=0), default=256, show_default=True, help="Bytes.")
@click.option("--keys", type=click.IntRange(min=1), default=100_000, show_default=True)
@click.option("--read-ratio", type=click.FloatRange(0, 1), help="Reads among puts; overrides --workload.")
@click.option("--distribution", type=click.Choice(["zipfian", "uniform"]), default="uniform", show_default=True)
@click.option("--load/--no-load", default=None, help="Put every key first; by default if the workload reads.")
@click.option("--timeout", default=30.0, show_default=True, help="Seconds for one operation.")
@controllers_option
@output_option
@handled
def bench(
    workload: str,
    clients: int,
    ops: int,
    value_size: int,
    keys: int,
    read_ratio: float | None,
    distribution: str,
    load: bool | None,
    timeout: float,
    controllers: str | None,
    output: str,
) -> None:
    """Load the cluster with CLIENTS closed-loop callers and report throughput and latency."""
    mix = WORKLOADS[workload] if read_ratio is None else (read_ratio, 1 - read_ratio, 0.0, 0.0, 0.0)
    addresses = find_controllers(controllers)

    async def run() -> Report:
        async with AsyncShardClerk(addresses, timeout=timeout) as clerk:
            rng = random.Random()
            measured = Bench(clerk, mix, value_size, Chooser(keys, distribution, rng), rng)
            await clerk.get(b"\x00")  # the map and the connections are no part of what is measured
            if load if load is not None else mix[1] < 1:
                await measured.load()
            return await measured.run(clients, ops)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(run())
    if output == "json":
        print_json(report.as_json())
    else:
        figures = report.as_json()
        print_table(
            ("workload", "clients", "ops/s", "p50 ms", "p99 ms", "max ms", "errors"),
            [
                (
                    workload if read_ratio is None else f"{read_ratio:.0%} reads",
                    clients,
                    *(figures[name] for name in ("ops_per_s", "p50_ms", "p99_ms", "max_ms", "errors")),
                )
            ],
        )
    if report.errors:
        raise Failed(f"{report.errors} operations failed; the first: {report.first_error}")
