"""The throwaway cluster that users' tests get, as users' tests use it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shardkv.testing import ClusterFailed, ThrowawayCluster

USERS_TESTS = """
def test_writes(shardkv_clerk):
    shardkv_clerk.put("user/1", "Ada")
    assert shardkv_clerk.get("user/1") == b"Ada"

def test_starts_on_an_empty_key_space(shardkv_clerk):
    assert list(shardkv_clerk.scan()) == []

async def use(cluster):
    async with cluster.async_clerk() as clerk:
        await clerk.put("k", "v")
        return await clerk.get("k")

def test_asyncio(shardkv_cluster):
    import asyncio
    assert asyncio.run(use(shardkv_cluster)) == b"v"
    shardkv_cluster.clear()
    with shardkv_cluster.clerk() as clerk:
        assert clerk.get("k") is None
"""


def test_users_tests_run_on_the_fixtures(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(USERS_TESTS)
    # By its module and not by its entry point: that holds in a checkout that was not installed since.
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:shardkv",
            "-p",
            "shardkv.testing",
            "-p",
            "no:cacheprovider",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 passed" in run.stdout


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing() -> None:
    cluster = ThrowawayCluster(shards=0)
    with pytest.raises(ClusterFailed, match="--shards"), cluster:
        pass
    assert not cluster.directory.exists()


def test_a_port_that_needs_privileges_is_refused(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "shardkv.cli.main", "up", "--port", "80", "--data", str(tmp_path / "data")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 2
    assert "80" in run.stderr
    assert not (tmp_path / "data").exists()
