"""How it holds up as it grows: `python -m bench.scale [millions|restart|ycsb|groups|map|idle|spread]…`.

millions  5 million keys in one group: load rate from begin to end, memory, the longest gap in service
restart   SIGKILL of a whole group with 1 million keys in it: how long until it serves again
ycsb      the core workloads A to F over 2 and over 4 groups
groups    CPU seconds for 100,000 operations with 1 group and with 4
map       1,000 groups and 100,000 shards: the controller's and the clerk's code, without the groups
idle      what a cluster costs that nobody uses
spread    gets from the leader and from any replica, where each replica has a small machine (a cgroup; root)
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.live import LiveCluster, free_port_base
from bench.map_scale import measure_map
from shardkv.client import ShardClerk
from shardkv.load.workload import bench_key
from shardkv.process.local_cluster import Process

TICKS = os.sysconf("SC_CLK_TCK")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def rss_megabytes(process: Process) -> float:
    """Memory that the process holds now."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Probe:
    """A caller of its own beside a load: the longest time that one put or get of it took."""

    def __init__(self, clerk: ShardClerk, keys: int) -> None:
        self._clerk, self._keys = clerk, keys
        self._stop = threading.Event()
        self.longest = 0.0
        self.at = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        rng, began = random.Random(1), time.monotonic()
        while not self._stop.is_set():
            key = bench_key(rng.randrange(self._keys))
            for call in (
                lambda key=key: self._clerk.put(b"~" + key, b"probe"),
                lambda key=key: self._clerk.get(key),
            ):
                start = time.monotonic()
                call()
                took = time.monotonic() - start
                if took > self.longest:
                    self.longest, self.at = took, start - began
            time.sleep(0.005)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def millions(keys: int = 5_000_000) -> None:
    """Every key is put once, by 1,000 callers; one more caller beside them tells of stalls."""
    with LiveCluster(groups=1, controllers=1) as live, live.clerk() as clerk:
        live.json("bench", "--ops", "1000")  # connections and first files
        probe = Probe(clerk, 1000)
        parts, rates = 20, []
        peaks: dict[int, float] = {}
        for part in range(parts):
            first, count = max(1, keys // parts * part), str(keys // parts)
            figures = live.json(
                "bench", "--mix", "insert=1", "--keys", str(first), "--ops", count, "--clients", "1000"
            )
            rates.append(figures["ops_per_s"])
            for process in live.cluster().processes:
                if process.role == "group":
                    peaks[process.index] = max(peaks.get(process.index, 0.0), rss_megabytes(process))
            say(
                f"{keys // parts * (part + 1):>9,} keys, {rates[-1]:8,.0f} puts/s, p99 {figures['p99_ms']:.0f} ms, "
                f"max {figures['max_ms']:.0f} ms, RSS {_rounded(peaks)} MB"
            )
        probe.stop()
        quarter = parts // 4
        start, end = sum(rates[:quarter]) / quarter, sum(rates[-quarter:]) / quarter
        say(f"puts/s in the first quarter {start:,.0f}, in the last {end:,.0f}: {end / start:.0%}")
        say(f"highest RSS of the replicas: {_rounded(peaks)} MB")
        say(f"a caller beside it waited {probe.longest * 1000:.0f} ms at most (after {probe.at:.0f} s)")


def _rounded(values: dict[Any, float]) -> dict[Any, int]:
    return {key: round(value) for key, value in values.items()}


def restart(keys: int = 1_000_000, rounds: int = 3) -> None:
    with LiveCluster(groups=1, controllers=1) as live, live.clerk(timeout=120) as clerk:
        live.json("bench", "--keys", str(keys), "--load", "--ops", "1")
        say(f"{keys:,} keys of 256 B are in")
        for _ in range(rounds):
            live.json("bench", "--keys", str(keys), "--no-load", "--ops", "20000")  # a log to replay
            cluster = live.cluster()
            group = [process for process in cluster.processes if process.role == "group"]
            for process in group:
                os.kill(process.pid, 9)
            for process in group:
                cluster.kill(process)
            began = time.monotonic()
            for process in group:
                cluster.start(process)
            clerk.put(b"after", b"restart")
            assert clerk.get(bench_key(keys - 1)) is not None
            logs = sum(path.stat().st_size for path in Path(group[0].data).glob("wal-*")) / 1e6
            say(
                f"SIGKILL of all three: serves again after {time.monotonic() - began:.2f} s (log files {logs:.0f} MB)"
            )


def ycsb(operations: int = 40_000, keys: int = 50_000) -> None:
    print(f"{'groups':>6} {'workload':8} {'ops/s':>9} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8}")
    for groups in (2, 4):
        with LiveCluster(groups=groups) as live:
            common = ("--keys", str(keys), "--value-size", "1024", "--clients", "256")
            live.json("bench", *common, "--load", "--ops", "1")
            for workload in "abcdef":
                count = operations // 8 if workload == "e" else operations
                found = live.json("bench", *common, "--no-load", "--workload", workload, "--ops", str(count))
                print(
                    f"{groups:>6} {workload:8} {found['ops_per_s']:9,.0f} {found['p50_ms']:8.2f} "
                    f"{found['p99_ms']:8.2f} {found['max_ms']:8.1f}",
                    flush=True,
                )


def groups(operations: int = 300_000) -> None:
    """The same load on 1 and on 4 groups, alternately: CPU seconds of servers and client for 100,000 operations."""
    used: dict[int, list[float]] = {1: [], 4: []}
    for _ in range(2):
        for count in used:
            with LiveCluster(groups=count) as live:
                live.json("bench", "--clients", "1000", "--ops", "20000")
                before = {p.pid: cpu_seconds(p.pid) for p in live.cluster().processes}
                children = os.times()
                live.json(
                    "bench",
                    "--clients",
                    "1000",
                    "--workload",
                    "a",
                    "--value-size",
                    "1024",
                    "--ops",
                    str(operations),
                )
                after = os.times()
                seconds = sum(cpu_seconds(pid) - was for pid, was in before.items())
                seconds += after.children_user + after.children_system
                seconds -= children.children_user + children.children_system
                used[count].append(seconds / operations * 100_000)
                say(
                    f"{count} group(s): {used[count][-1]:.2f} CPU s for 100,000 operations (YCSB A, 1 KB, loading included)"
                )
    say(f"4 groups take {min(used[4]) / min(used[1]):.2f} x the CPU of 1")


def idle(seconds: float = 30.0) -> None:
    with LiveCluster(groups=2) as live:
        live.json("bench", "--ops", "1000")
        time.sleep(5)
        processes = live.cluster().processes
        before = [cpu_seconds(process.pid) for process in processes]
        time.sleep(seconds)
        used = [cpu_seconds(p.pid) - was for p, was in zip(processes, before, strict=True)]
        memory = [rss_megabytes(process) for process in processes]
        say(
            f"{len(processes)} idle processes: {sum(used) / seconds:.1%} of one core in all, {max(memory):.0f} MB the largest"
        )


def spread(share: float = 0.08) -> None:
    """Each replica of a group may use `share` of a core, as if it had a small machine of its own."""
    try:
        with LiveCluster(groups=1, controllers=1, metrics_port=free_port_base() + 20) as live:
            live.json("bench", "--keys", "20000", "--load", "--ops", "1")
            group = [process for process in live.cluster().processes if process.role == "group"]
            with contextlib.ExitStack() as limits:
                for process in group:
                    limits.enter_context(_limited(process.pid, share))
                for consistency in ("leader", "any", "leader", "any"):
                    before = [_reads_answered(process) for process in group]
                    found = live.json(
                        "bench",
                        "--keys",
                        "20000",
                        "--no-load",
                        "--workload",
                        "get",
                        "--clients",
                        "256",
                        "--consistency",
                        consistency,
                        "--seconds",
                        "5",
                        "--warm-up",
                        "1",
                    )
                    frames = [_reads_answered(p) - was for p, was in zip(group, before, strict=True)]
                    say(
                        f"{share} of a core a replica, gets from {consistency:6}: {found['ops_per_s']:8,.0f} a second, "
                        f"p99 {found['p99_ms']:.0f} ms; frames answered by each replica: {frames}"
                    )
    except OSError as error:
        say(f"spread needs a cgroup of the cpu controller to limit the replicas: {error}")


def _reads_answered(process: Process) -> int:
    text = urllib.request.urlopen(f"http://{process.metrics}/metrics", timeout=30).read().decode()
    found = re.search(r'^shardkv_call_seconds_count\{method="kv.read"\} (\S+)$', text, re.MULTILINE)
    return int(float(found.group(1))) if found else 0


@contextlib.contextmanager
def _limited(pid: int, share: float) -> Iterator[None]:
    """The process may use `share` of a core while the block runs. Raises OSError where that cannot be had."""
    first = Path("/sys/fs/cgroup/cpu")  # version 1; else version 2
    group = (first if first.is_dir() else Path("/sys/fs/cgroup")) / f"shardkv-bench-{pid}"
    group.mkdir()
    try:
        if first.is_dir():
            (group / "cpu.cfs_period_us").write_text("20000")
            (group / "cpu.cfs_quota_us").write_text(str(int(20_000 * share)))
        else:
            (group / "cpu.max").write_text(f"{int(20_000 * share)} 20000")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        with contextlib.suppress(OSError):  # it is gone, if the process is
            (group.parent / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def main() -> None:
    stories: dict[str, Callable[[], None]] = {
        "millions": millions,
        "restart": restart,
        "ycsb": ycsb,
        "groups": groups,
        "map": measure_map,
        "idle": idle,
        "spread": spread,
    }
    for name in sys.argv[1:] or list(stories):
        say(f"== {name}")
        stories[name]()


if __name__ == "__main__":
    main()
