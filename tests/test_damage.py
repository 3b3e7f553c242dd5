"""Flipped bytes in the files of real processes: the replica stops, says which file, and is repaired without a hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from bench.live import Appenders, LiveCluster
from shardkv.client import ShardClerk
from shardkv.process.local_cluster import Process
from tests import bad_sectors
from tests.bad_sectors import BadSectors

pytestmark = pytest.mark.timeout(300)

VALUE_BYTES = 1_000_000
COUNT = 75  # more than the 64 MiB after which a log is compacted: only a snapshot brings the state back


def value_of(n: int) -> bytes:
    return b"%06d" % n * (VALUE_BYTES // 6)


def fill(clerk: ShardClerk) -> None:
    for n in range(COUNT):
        clerk.put(f"large/{n:06}", value_of(n))


def verify(clerk: ShardClerk) -> None:
    for n in range(COUNT):
        assert clerk.get(f"large/{n:06}") == value_of(n), n


def of_group(live: LiveCluster, gid: int, index: int) -> Process:
    return next(p for p in live.cluster().processes if p.role == "group" and (p.gid, p.index) == (gid, index))


def flip(path: Path, offset: int, count: int = 16) -> None:
    """These bytes of a file change at rest, behind the process's back."""
    with path.open("r+b") as file:
        file.seek(offset)
        data = file.read(count)
        file.seek(offset)
        file.write(bytes(byte ^ 0x55 for byte in data))


def largest_table(process: Process) -> Path:
    tables = list((Path(process.data) / "rocks").rglob("*.sst"))
    return max(tables, key=lambda path: path.stat().st_size)


def stop(live: LiveCluster, *processes: Process) -> None:
    cluster = live.cluster()
    cluster.stop([p for p in cluster.processes if p.address in {stopped.address for stopped in processes}])


def damage_of(live: LiveCluster, process: Process) -> dict[str, Any]:
    status = live.json("admin", "status")
    replicas = status["groups"].get(str(process.gid), {}) if process.gid else status["controllers"]
    said = replicas.get(process.address)
    return (said or {}).get("damage") or {}


def until_compacted(process: Process) -> None:
    """Its log no longer begins with the first entry: nothing but a snapshot brings its state back."""
    deadline = time.monotonic() + 60
    while (Path(process.data) / "wal-0000000000000001.log").exists():
        assert time.monotonic() < deadline, "the log was not compacted"
        time.sleep(0.1)


def until_repaired(live: LiveCluster, *processes: Process) -> None:
    deadline = time.monotonic() + 120
    while True:
        found = [damage_of(live, process) for process in processes]
        if all(damage.get("repaired") and not damage["state_lost"] for damage in found):
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_a_table_damaged_at_rest_is_repaired_under_load_and_nothing_is_lost() -> None:
    with LiveCluster(groups=1, controllers=1, replicas=3, shards=2) as live, live.clerk() as clerk:
        fill(clerk)
        victim = of_group(live, 1, 2)
        until_compacted(victim)
        stop(live, victim)
        table = largest_table(victim)
        for part in range(1, 20):
            flip(table, part * table.stat().st_size // 20)
        appenders = Appenders(clerk).start()
        live.up()
        # Whatever reads the table finds it: here a comparison of the replicas.
        deadline = time.monotonic() + 120
        while not damage_of(live, victim):
            live.run("admin", "check", check=False)
            assert time.monotonic() < deadline, "16 flipped bytes were not found"
        until_repaired(live, victim)
        damage = damage_of(live, victim)
        assert table.name in damage["history"][0]["file"], damage
        assert damage["history"][0]["repaired_from"] in (1, 2, 3)
        assert appenders.stop() > 0
        appenders.verify()
        verify(clerk)
        said = live.run("admin", "status")
        assert f"{table.name} was found damaged" in said and "repaired from replica" in said, said
        assert table.name in live.run("admin", "damage")
        listed = live.json("admin", "damage")
        assert [one["address"] for one in listed] == [victim.address] and listed[0]["repaired"] == 1
        assert not (Path(victim.data) / "rocks.damaged").exists()
        live.run("admin", "check")  # exit 0: all replicas are the same
        stop(live, victim)
        live.up()
        until_repaired(live, victim)  # once it answers again
        assert damage_of(live, victim)["found"] == 1, "the repair lasts"


def test_a_table_damaged_while_its_replica_leads_and_two_of_three_damaged_at_once() -> None:
    with LiveCluster(groups=1, controllers=1, replicas=3, shards=2) as live, live.clerk() as clerk:
        fill(clerk)
        leader = live.leader(1)
        whole = next(p for p in live.cluster().processes if p.role == "group" and p.address != leader.address)
        victims = [p for p in live.cluster().processes if p.role == "group" and p.address != whole.address]
        stop(live, *victims)
        for victim in victims:
            table = largest_table(victim)
            for part in range(1, 20):
                flip(table, part * table.stat().st_size // 20)
        live.up()
        appenders = Appenders(clerk).start()
        deadline = time.monotonic() + 120
        while not all(damage_of(live, victim) for victim in victims):
            live.run("admin", "check", check=False)
            assert time.monotonic() < deadline, "the damage was not found"
        until_repaired(live, *victims)
        assert appenders.stop() > 0
        appenders.verify()
        verify(clerk)
        live.run("admin", "check")


def test_one_flipped_bit_in_a_controller_s_state_is_repaired_and_a_bad_sector_of_a_database(
    tmp_path: Path,
) -> None:
    with LiveCluster(groups=1, controllers=3, replicas=1, shards=2) as live, live.clerk() as clerk:
        clerk.put("kept", "by the log")
        victim = next(p for p in live.cluster().processes if p.role == "controller" and p.index == 1)
        stop(live, victim)
        state = Path(victim.data) / "state"
        if not state.exists():  # a controller's log is short: it has yet to be flushed
            state.write_bytes(b"SKVSTATE" + bytes(60))
        else:
            flip(state, 26, 1)
        live.up()
        until_repaired(live, victim)
        assert damage_of(live, victim)["history"][0]["file"] == "state"
        assert "controller" in live.run("admin", "damage")
        if not bad_sectors.can_be_made:
            return
        bad, alone = BadSectors(tmp_path), of_group(live, 1, 0)
        try:
            stop(live, alone)
            bad.lose(Path(alone.data) / "rocks" / "db-1" / "SUMS", 0.0)
            live.up()
            until_repaired(live, alone)  # from its own log, which was never compacted
            assert "the disk cannot read it" in damage_of(live, alone)["history"][0]["why"]
            assert clerk.get("kept") == b"by the log"
        finally:
            stop(live, alone)
            bad.close()
