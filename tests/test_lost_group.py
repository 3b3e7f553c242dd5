"""All disks of a group are lost, and its number is used again: on real processes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from bench.live import LiveCluster, attempt
from shardkv.client import ShardKVError
from shardkv.process.local_cluster import Process

pytestmark = pytest.mark.timeout(180)
KEYS = [bytes([n]).decode() + "/key" for n in range(0x21, 0x7E, 7)]


def wipe(cluster: LiveCluster, gid: int) -> list[Process]:
    """Stop a group, empty its directories, and start it again."""
    plan = cluster.cluster()
    replicas = [process for process in plan.processes if process.gid == gid and process.role == "group"]
    plan.stop(replicas)
    for process in replicas:
        shutil.rmtree(process.data)
        plan.start(process)
    return replicas


def problems_with(cluster: LiveCluster, text: str) -> list[str]:
    """Wait until `status` names such a problem."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found: list[str] = cluster.json("admin", "status")["problems"]
        if any(text in line for line in found):
            return found
        time.sleep(0.2)
    raise AssertionError(f"{text!r} is not in {found}")


def test_a_lost_group_serves_nothing_and_its_number_can_be_used_again(tmp_path: Path) -> None:
    archive = f"file://{tmp_path}"
    with LiveCluster(groups=2, replicas=1, controllers=1, shards=4) as cluster:
        with cluster.clerk() as clerk:
            for key in KEYS:
                clerk.put(key, key.upper())
        assert "configuration 2: " in cluster.up()
        config = cluster.json("admin", "query")
        first = config["incarnations"]
        assert len(set(first.values())) == 2 and config["joined"] == {"1": 2, "2": 2}
        assert attempt(cluster, "backup", "archive", archive, "--once").returncode == 0

        # In good order: its shards go to group 2, its disks are wiped, and it joins again.
        cluster.run("admin", "leave", "1", "--wait")
        (replica,) = wipe(cluster, 1)
        cluster.run("admin", "join", "1", replica.address, "--wait")
        second = cluster.json("admin", "query")["incarnations"]
        assert second["1"] != first["1"] and second["2"] == first["2"]
        with cluster.clerk() as clerk:
            assert {key: clerk.get(key) for key in KEYS} == {key: key.upper().encode() for key in KEYS}
        assert not cluster.json("admin", "status")["problems"]
        assert attempt(cluster, "backup", "archive", archive, "--once").returncode == 0
        filed = {path.name for path in tmp_path.glob("archive/*/*")}
        assert filed == {f"1-{first['1']}", f"1-{second['1']}", f"2-{first['2']}"}

        # And now without leaving: what it had is lost.
        lost = {shard["id"] for shard in cluster.json("admin", "query")["shards"] if shard["gid"] == 1}
        assert lost
        wipe(cluster, 1)
        found = problems_with(cluster, "hold another incarnation")
        assert any(second["1"] in line and "group 1: " in line for line in found)
        answered = 0
        with cluster.clerk(timeout=1.0) as clerk:
            for key in KEYS:
                try:
                    assert clerk.get(key) == key.upper().encode(), "never absent"
                    answered += 1
                except ShardKVError:
                    with pytest.raises(ShardKVError):
                        clerk.put(key, "new")
        assert 0 < answered < len(KEYS)
        table = attempt(cluster, "admin", "status")
        assert "! group 1: its replicas hold another incarnation" in table.stdout
        refused = attempt(cluster, "admin", "join", "1", replica.address)
        assert refused.returncode == 1 and "has joined already" in refused.stderr
        archived = attempt(cluster, "backup", "archive", archive, "--once")
        assert "group 1 is not archived now" in archived.stderr, archived.stderr
        cluster.run("admin", "leave", "1")
        found = problems_with(cluster, "is another group now")
        assert {line.split()[1] for line in found if "is stuck" in line} == {str(shard) for shard in lost}
