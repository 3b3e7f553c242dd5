"""The acceptance run on real input: `python -m bench.acceptance [load|kill|gap]…`, or `make acceptance`.

load   Python's own standard library in, byte for byte out, while groups join and leave
kill   SIGKILL of every leader in turn, then of everything at once, under appends
gap    the longest pause of a shard that moves, with 2 MB and with 1 GB in it
"""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from rocksdict import AccessType, Options, Rdict

from bench.live import Appenders, LiveCluster, in_background
from shardkv.cli.options import run_async
from shardkv.client import ShardClerk
from shardkv.observe.overview import ask_status
from shardkv.wire.dialer import TcpDialer

MAX_VALUE = 1 << 20


def standard_library(most: int | None = None) -> dict[bytes, bytes]:
    """Every .py file of the running Python's standard library: path to content."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    found = {os.fsencode(str(path.relative_to(root))): path.read_bytes() for path in files[:most]}
    return {key: value for key, value in found.items() if len(value) <= MAX_VALUE}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def compare(clerk: ShardClerk, library: dict[bytes, bytes]) -> None:
    """By get and by one ordered scan, byte for byte."""
    with ThreadPoolExecutor(8) as pool:
        for key, value in zip(library, pool.map(clerk.get, library), strict=True):
            assert value == library[key], f"{key!r} differs"
    scanned = [pair for pair in clerk.scan() if pair[0] in library or not pair[0].endswith(b"/appended")]
    assert scanned == sorted(library.items()), "the scan differs"


def read_on(clerk: ShardClerk, library: dict[bytes, bytes], stop: threading.Event, count: list[int]) -> None:
    while not stop.is_set():
        for key, value in library.items():
            assert clerk.get(key) == value, f"{key!r} differs"
            count[0] += 1
            if stop.is_set():
                return


def load(files: int | None = None) -> None:
    """Point 2 and 4: real input, changes of the map under readers and appenders, deletion behind them."""
    library = standard_library(files)
    with LiveCluster(groups=2) as live, live.clerk() as clerk:
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda item: clerk.put(*item), library.items()))
        size = sum(map(len, library.values()))
        say(f"{len(library)} files, {size / 1e6:.1f} MB, put by 8 threads in {time.monotonic() - began:.1f} s")
        compare(clerk, library)
        say("read back, equal byte for byte")
        stop, reads = threading.Event(), [0]
        readers = [in_background(lambda: read_on(clerk, library, stop, reads)) for _ in range(2)]
        appenders = Appenders(clerk).start()
        try:
            change_the_map(live)
        finally:
            stop.set()
        for reader in readers:
            reader()
        appends = appenders.stop()
        say(
            f"meanwhile {reads[0]} reads and {appends} appends, no error, longest gap {appenders.longest_gap:.3f} s"
        )
        compare(clerk, library)
        appenders.verify()
        say("compared again by get and by scan: equal; every append is there once, in order")
        old_owner_is_empty(live)


def change_the_map(live: LiveCluster) -> None:
    addresses = live.start_group(3)
    for arguments in (("join", "3", ",".join(addresses)),):
        began = time.monotonic()
        live.run("admin", *arguments, "--wait")
        say(f"admin {arguments[0]} 3 --wait took {time.monotonic() - began:.1f} s")
    config = live.json("admin", "query")
    shard = next(shard for shard in config["shards"] if shard["gid"] == 1)
    live.run("admin", "move", str(shard["id"]), "2", "--wait")
    middle = next(
        shard
        for shard in config["shards"]
        if shard["start"] <= "m" and (not shard["end"] or shard["end"] > "m")
    )
    live.run("admin", "split", str(middle["id"]), "m", "--wait")
    began = time.monotonic()
    live.run("admin", "leave", "1", "--wait")
    say(f"admin move and split done, leave 1 --wait took {time.monotonic() - began:.1f} s")


def old_owner_is_empty(live: LiveCluster) -> None:
    """Group 1 left: its databases hold no key of the data, and its files no byte of it."""
    deadline = time.monotonic() + 60
    while True:
        cluster = live.cluster()
        statuses = live_shards(live, 1)
        if not statuses or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    sizes = {}
    for process in cluster.processes:
        if process.gid == 1:
            rocks = Path(process.data) / "rocks"
            while (held := _table_bytes(rocks)) > 1_000_000 and time.monotonic() < deadline:
                time.sleep(0.2)
            sizes[process.index] = held
    cluster.stop_all()
    for process in cluster.processes:
        if process.gid == 1:
            rocks = Path(process.data) / "rocks"
            current = rocks / (rocks / "CURRENT").read_text().split()[0]
            database = Rdict(str(current), Options(raw_mode=True), access_type=AccessType.read_only())
            left = sum(1 for key in database.keys(from_key=b"d") if key[:1] == b"d")
            database.close()
            assert left == 0, f"{current} still holds {left} keys"
    say(f"group 1's disks hold 0 keys; bytes in its tables: {sizes}")
    live.up()


def _table_bytes(rocks: Path) -> int:
    return sum(path.stat().st_size for path in rocks.glob("db-*/*.sst"))


def live_shards(live: LiveCluster, gid: int) -> list[str]:
    """Shards that any replica of a group (which may have left) still holds."""

    async def ask() -> list[str]:
        dialer = TcpDialer()
        try:
            said = [
                await ask_status(dialer, address, "kv.status")
                for address in live.cluster().addresses("group", gid)
            ]
        finally:
            await dialer.close()
        return [shard for status in said if status for shard in status["shards"]]

    return run_async(ask())


def kill(rounds: int = 1) -> None:
    """Point 3: SIGKILL of every leader, then of everything, and nothing acknowledged is lost or doubled."""
    with LiveCluster(groups=2) as live, live.clerk(timeout=60) as clerk:
        appenders = Appenders(clerk).start()
        try:
            for _ in range(rounds):
                for gid in (1, 2, 0):
                    time.sleep(1)
                    process = live.leader(gid)
                    live.cluster().kill(process)
                    say(
                        f"SIGKILL to the leader of {'group ' + str(gid) if gid else 'the controller'}, {process.address}"
                    )
                    time.sleep(3)
                    live.up()
                time.sleep(1)
                cluster = live.cluster()
                for process in cluster.processes:
                    os.kill(process.pid, 9)
                say("SIGKILL to all processes")
                for process in cluster.processes:
                    cluster.kill(process)
                live.up()
                time.sleep(1)
        finally:
            appends = appenders.stop()
        appenders.verify()
        say(
            f"{appends} appends acknowledged, each there once, in order; longest gap {appenders.longest_gap:.2f} s"
        )


def failover(rounds: int = 10) -> None:
    """How long the writes of a group stop when its leader is killed, and when it hands over as planned."""
    with LiveCluster(groups=1, controllers=1) as live, live.clerk(timeout=60) as clerk:
        for kind in ("SIGKILL", "transfer"):
            gaps = []
            for _ in range(rounds):
                process = live.leader(1)
                appenders = Appenders(clerk).start()
                time.sleep(1)
                if kind == "SIGKILL":
                    live.cluster().kill(process)
                else:
                    live.run("admin", "transfer-leader", "1")
                time.sleep(3)
                appenders.stop()
                gaps.append(appenders.longest_gap)
                live.up()
            told = f"median {median(gaps):.2f} s, longest {max(gaps):.2f} s"
            say(f"{kind} of the leader, {rounds} times: writes stopped for {told}")


def gap(megabytes: tuple[int, ...] = (2, 1000)) -> None:
    """Point 5: how long a shard that moves is not served, by its size."""
    for size in megabytes:
        with LiveCluster(groups=2, shards=2) as live, live.clerk() as clerk:
            _gap(live, clerk, size)


def _gap(live: LiveCluster, clerk: ShardClerk, megabytes: int) -> None:
    shard = live.json("admin", "query")["shards"][0]
    value = os.urandom(16_000)
    count = megabytes * 1_000_000 // len(value)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: clerk.put(b"!%08d" % n, value), range(count)))
    time.sleep(10)  # let flushes and compactions of the load come to rest: they are not what is measured
    gaps: list[float] = []
    stop = threading.Event()

    def steady_load() -> None:
        last, turn = time.monotonic(), 0
        while not stop.is_set():
            turn += 1
            clerk.put(b"!%08d" % (turn * 7919 % count), value)
            clerk.get(b"!%08d" % (turn * 104729 % count))
            now = time.monotonic()
            gaps.append(now - last)
            last = now
            time.sleep(0.005)

    waits = [in_background(steady_load) for _ in range(4)]
    time.sleep(5)
    before, quiet = len(gaps), max(gaps)
    gaps.clear()
    began = time.monotonic()
    live.run("admin", "move", str(shard["id"]), str(3 - shard["gid"]), "--wait")
    took = time.monotonic() - began
    during = len(gaps)
    time.sleep(2)
    stop.set()
    for wait in waits:
        wait()
    say(
        f"{megabytes} MB moved in {took:.1f} s, under {before / 5:.0f} put+get/s before and {during / took:.0f} meanwhile: "
        f"longest gap {max(gaps) * 1000:.0f} ms (in 5 s before the move {quiet * 1000:.0f} ms)"
    )


if __name__ == "__main__":
    stories: dict[str, Callable[[], None]] = {"load": load, "kill": kill, "failover": failover, "gap": gap}
    for name in sys.argv[1:] or list(stories):
        say(f"== {name}")
        stories[name]()
