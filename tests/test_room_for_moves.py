"""A shard that does not fit into the group it is moved to, on real file systems: it is served all the while."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from bench.live import LiveCluster
from shardkv.client import ShardClerk

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root"),
]
VALUE = os.urandom(100_000)
KEYS = [
    f"key-{n:04}" for n in range(1500)
]  # 150 MB, of which at least some 80 are in tables, where they are counted


class OneSmallGroup(LiveCluster):
    """Two groups of one replica; the second has a file system of its own of 96 MB."""

    def __init__(self) -> None:
        super().__init__(groups=2, replicas=1, controllers=1, shards=1)
        self.disk = self.directory / "group-2-0"
        self.disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "small", str(self.disk)], check=True)

    def remove(self) -> None:
        subprocess.run(["umount", "-l", str(self.disk)], check=True)
        super().remove()

    def state(self, gid: int) -> str:
        replica = next(iter(self.json("admin", "status")["groups"][str(gid)].values()))
        return str((replica or {"shards": {}})["shards"].get("1", {}).get("state", "ABSENT"))


def test_a_shard_that_does_not_fit_is_served_and_goes_when_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHARDKV_GROUP_RESERVE_MB", "40")
    with OneSmallGroup() as cluster, cluster.clerk() as clerk:
        if cluster.json("admin", "query")["shards"][0]["gid"] != 1:
            cluster.run("admin", "move", "1", "1", "--wait")
        fill(clerk)
        cluster.run("admin", "move", "1", "2")
        until(lambda: any("have no room" in line for line in cluster.json("admin", "status")["problems"]))
        longest = 0.0
        for n in range(100):
            began = time.monotonic()
            clerk.put(f"during-{n}", "x")
            assert clerk.get(KEYS[n]) == VALUE
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.02)
        assert longest < 2.0, f"{longest:.2f} s without service"
        assert (cluster.state(1), cluster.state(2)) == ("LENDING", "PULLING")
        cluster.run("admin", "move", "1", "1", "--wait")  # taken back: the group lets go of what it had
        assert (cluster.state(1), cluster.state(2)) == ("SERVING", "ABSENT")
        assert clerk.get("during-99") == b"x"
        subprocess.run(["mount", "-o", "remount,size=1g", str(cluster.disk)], check=True)
        cluster.run("admin", "move", "1", "2", "--wait")  # and now it fits
        assert clerk.get(KEYS[0]) == VALUE == clerk.get(KEYS[-1])
        assert clerk.get("during-99") == b"x"


def fill(clerk: ShardClerk) -> None:
    for begin in range(0, len(KEYS), 50):
        with clerk.batch() as batch:
            for key in KEYS[begin : begin + 50]:
                batch.put(key, VALUE)


def until(condition, seconds: float = 40.0) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.2)
