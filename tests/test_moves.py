"""Moves that cannot go on, and maps that nobody serves: no key is without an owner for longer than it must be."""

from __future__ import annotations

import json

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
