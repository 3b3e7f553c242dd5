"""Who is in a group changes on real processes: replaced, learning, promoted, and left alone."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.live import SHARDKV, Appenders, LiveCluster, attempt, free_port_base
from shardkv.client import ShardClerk, ShardKVError

pytestmark = pytest.mark.timeout(180)


def test_a_dead_replica_is_replaced_with_one_command_under_load(tmp_path: Path) -> None:
    """Its disk is gone. Writes go on; the newcomer counts: afterwards an old member may die as well."""
    with LiveCluster(groups=1, controllers=1, replicas=3) as live, live.clerk() as clerk:
        cluster = live.cluster()
        appenders = Appenders(clerk).start()
        leader = live.leader(1)
        dead, other = [p for p in cluster.processes if p.role == "group" and p.address != leader.address]
        cluster.kill(dead)
        shutil.rmtree(dead.data)
        address = f"127.0.0.1:{free_port_base()}"
        command = [*SHARDKV, "serve", "group", "--gid", "1", "--id", "4", "--join", address]
        command += ["--data", str(tmp_path / "new"), "--controllers", ",".join(live.controllers)]
        command += ["--secret-file", str(live.secret_file)]
        early = attempt(live, "admin", "member", "replace", "1", str(dead.index + 1), f"4={address}")
        assert early.returncode == 1 and "nothing answers" in early.stderr
        newcomer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            until_it_accepts(address)
            done = attempt(live, "admin", "member", "replace", "1", str(dead.index + 1), f"4={address}")
            assert done.returncode == 0, done.stderr
            again = attempt(live, "admin", "member", "replace", "1", str(dead.index + 1), f"4={address}")
            assert again.returncode == 0, "what is done may be asked for again"
            said = live.json("admin", "member", "list", "1")
            assert {row["replica"] for row in said} == {1, 2, 3, 4} - {dead.index + 1}
            assert all(row["member"] == "voter" for row in said)
            gap = appenders.longest_gap
            cluster.kill(other)  # the newcomer and the leader are a majority
            clerk.put("after", "two of three, one of them new")
            refused = attempt(live, "admin", "member", "remove", "1", "4")
            assert refused.returncode == 1 and "could not go on" in refused.stderr
            voters = live.json("admin", "member", "list", "1")
            voter = leader.index + 1
            slip = attempt(live, "admin", "member", "replace", "1", "4", f"{voter}={leader.address}")
            assert slip.returncode == 1 and f"replica {voter} votes in group 1 already" in slip.stderr, slip
            assert live.json("admin", "member", "list", "1") == voters, "nobody was taken out"
            unknown = attempt(live, "admin", "member", "replace", "1", "9", "10=127.0.0.1:1")
            assert unknown.returncode == 1 and "no replica 9" in unknown.stderr
            assert appenders.stop() > 0
            appenders.verify()
            assert gap < 1.0, f"{gap:.2f} s without an append while a follower was replaced"
        finally:
            newcomer.terminate()
            newcomer.wait(30)


@contextmanager
def joining(live: LiveCluster, directory: Path, replica: int, gid: int = 1) -> Iterator[str]:
    """A new replica's process, which waits to be let in; its address."""
    address = f"127.0.0.1:{free_port_base()}"
    command = [*SHARDKV, "serve", "group", "--gid", str(gid), "--id", str(replica), "--join", address]
    command += ["--data", str(directory / f"replica-{replica}"), "--controllers", ",".join(live.controllers)]
    command += ["--secret-file", str(live.directory / "secret")]
    newcomer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until_it_accepts(address)
        yield address
    finally:
        newcomer.terminate()
        newcomer.wait(30)


def test_a_learner_is_let_in_and_promoted(tmp_path: Path) -> None:
    with LiveCluster(groups=1, controllers=1, replicas=3) as live, joining(live, tmp_path, 4) as address:
        added = attempt(live, "admin", "member", "add", "1", f"4={address}", "--learner")
        assert added.returncode == 0 and f"the learners 4 at {address}" in added.stdout, added.stderr
        kinds = {row["replica"]: row["member"] for row in live.json("admin", "member", "list", "1")}
        assert kinds == {1: "voter", 2: "voter", 3: "voter", 4: "learner"}
        unknown = attempt(live, "admin", "member", "promote", "1", "9")
        assert unknown.returncode == 1 and "no replica 9" in unknown.stderr
        assert attempt(live, "admin", "member", "promote", "1", "4").returncode == 0
        kinds = {row["replica"]: row["member"] for row in live.json("admin", "member", "list", "1")}
        assert set(kinds.values()) == {"voter"} and 4 in kinds
        assert attempt(live, "admin", "member", "remove", "1", "4").returncode == 0


def test_a_group_that_lost_its_quorum_goes_on_with_the_replica_that_is_left(tmp_path: Path) -> None:
    with LiveCluster(groups=1, controllers=1, replicas=3, shards=2) as live, live.clerk() as clerk:
        for n in range(100):
            clerk.put(f"k{n}", str(n))
        cluster = live.cluster()
        survivor, *others = [p for p in cluster.processes if p.role == "group"]
        running = attempt(live, "recover", survivor.data, "--writes-may-be-lost")
        assert running.returncode == 1 and "in use" in running.stderr
        until_applied_everywhere(live)
        for process in others:  # for good
            cluster.kill(process)
            shutil.rmtree(process.data)
        with ShardClerk(live.controllers, timeout=1.0) as impatient, pytest.raises(ShardKVError):
            impatient.put("k0", "nobody commits it")
        cluster.stop([survivor])
        refused = attempt(live, "recover", survivor.data)
        assert refused.returncode in (1, 2) and "--" in refused.stderr, "not by accident"
        done = attempt(live, "recover", survivor.data, "--writes-may-be-lost", "--address", survivor.address)
        assert done.returncode == 0 and "Never start" in done.stdout, done.stderr
        cluster.start(survivor)
        assert [clerk.get(f"k{n}") for n in range(1, 100)] == [str(n).encode() for n in range(1, 100)]
        clerk.put("k0", "alone")
        with joining(live, tmp_path, 4) as four, joining(live, tmp_path, 5) as five:
            for newcomer in (f"4={four}", f"5={five}"):
                added = attempt(live, "admin", "member", "add", "1", newcomer)
                assert added.returncode == 0, added.stderr
            cluster.kill(survivor)
            assert clerk.get("k0") == b"alone", "the two new ones are a quorum"


def until_applied_everywhere(live: LiveCluster) -> None:
    deadline = time.monotonic() + 30
    while True:
        applied = {
            said["applied_index"] for said in live.json("admin", "status")["groups"]["1"].values() if said
        }
        if len(applied) == 1:
            return
        assert time.monotonic() < deadline, applied


def until_it_accepts(address: str) -> None:
    """Wait until somebody listens at `address`."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nobody listens at {address}"
            time.sleep(0.05)
