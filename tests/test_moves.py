"""Moves that cannot go on, and maps that nobody serves: no key is without an owner for longer than it must be."""

from __future__ import annotations

import json
import os
import signal

import pytest

from bench.live import LiveCluster, attempt


@pytest.mark.timeout(180)
def test_the_last_group_leaves_only_by_force_and_then_nobody_serves() -> None:
    with LiveCluster(groups=2, controllers=1, replicas=1) as live:
        attempt(live, "put", "k", "v")
        before = live.json("admin", "query")
        both = attempt(live, "admin", "leave", "1", "2")
        assert both.returncode == 1 and "refused (LastGroup)" in both.stderr and "--force" in both.stderr
        assert live.json("admin", "query") == before, "refused, and nothing changed"
        assert attempt(live, "admin", "leave", "2", "--wait").returncode == 0
        last = attempt(live, "admin", "leave", "1", "--wait")
        assert last.returncode == 1 and "LastGroup" in last.stderr
        forced = attempt(live, "admin", "leave", "1", "--force", "--wait", "-o", "json")
        assert forced.returncode == 3 and "nobody serves" in forced.stderr
        assert json.loads(forced.stdout)["served"] is False
        status = attempt(live, "admin", "status")
        assert ": 0 of 8 shards serve" in status.stdout
        assert (
            "! nobody serves 8 of 8 shards" in status.stdout and "group 1 still has their data" in status.stdout
        )
        addresses = ",".join(live.cluster().addresses("group", 1))
        assert attempt(live, "admin", "join", "1", addresses, "--wait").returncode == 0
        assert attempt(live, "get", "k").stdout == "v"


@pytest.mark.timeout(180)
def test_a_shard_on_its_way_to_a_group_that_is_down_is_served_and_can_be_taken_back() -> None:
    """The operator is told what waits for what, and is kept from cutting the shard while that helps nobody."""
    with LiveCluster(groups=2, controllers=1, replicas=1) as live:
        attempt(live, "put", "!", "v")
        shards = live.json("admin", "query")["shards"]
        first, gid = shards[0]["id"], shards[0]["gid"]
        for process in live.cluster().processes:
            if process.role == "group" and process.gid == 3 - gid:
                os.kill(process.pid, signal.SIGKILL)
        moved = attempt(live, "admin", "move", f"{first}", f"{3 - gid}", "--wait", "--wait-timeout", "1")
        way_out = f"`shardkv admin move {first} {gid}`"
        assert moved.returncode == 3 and way_out in moved.stderr
        assert attempt(live, "get", "!").stdout == "v"
        assert way_out in attempt(live, "admin", "status").stdout
        for cut in (("split", f"{first}", "'5"), ("merge", f"{first}")):
            refused = attempt(live, "admin", *cut)
            assert refused.returncode == 1 and way_out in refused.stderr and "--force" in refused.stderr
        own = next(shard for shard in shards if shard["gid"] == gid and shard["id"] != first)
        assert attempt(live, "admin", "split", f"{own['id']}", own["start"] + "5").returncode == 0
        assert attempt(live, "admin", "move", f"{first}", f"{gid}").returncode == 0
        assert attempt(live, "admin", "split", f"{first}", "'5").returncode == 0
        assert attempt(live, "get", "!").stdout == "v"
