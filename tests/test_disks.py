"""Lost and exchanged disks on real processes: refused by name, brought back with one command, nothing lost."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from bench.live import Appenders, LiveCluster, attempt
from tests.test_members import joining
from tests.test_processes import serve

pytestmark = pytest.mark.timeout(180)


def until_named(live: LiveCluster, what: str) -> None:
    deadline = time.monotonic() + 30
    while not any(what in problem for problem in live.json("admin", "status")["problems"]):
        assert time.monotonic() < deadline, live.json("admin", "status")["problems"]
        time.sleep(0.2)


def test_a_wiped_directory_is_refused_named_and_replaced_under_its_number(tmp_path: Path) -> None:
    with LiveCluster(groups=1, controllers=1, replicas=3) as live, live.clerk() as clerk:
        cluster = live.cluster()
        appenders = Appenders(clerk).start()
        leader = live.leader(1)
        lost, other = [p for p in cluster.processes if p.role == "group" and p.address != leader.address]
        number = lost.index + 1
        cluster.kill(lost)
        for path in Path(lost.data).iterdir():  # an empty directory, as after a mount that failed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        cluster.start(lost)
        until_named(live, "takes no part: its disk is")
        added = attempt(live, "admin", "member", "add", "1", f"{number}={lost.address}")
        assert added.returncode == 1 and "member replace" in added.stderr
        command = ("admin", "member", "replace", "1", str(number), f"{number}={lost.address}")
        done = attempt(live, *command)
        assert done.returncode == 0 and "nothing to change" not in done.stdout, done.stderr
        again = attempt(live, *command)
        assert again.returncode == 0 and "nothing to change" in again.stdout, again.stderr
        assert not [p for p in live.json("admin", "status")["problems"] if "disk" in p]
        cluster.kill(other)  # the new disk and the leader are a majority
        clerk.put("after", "two of three, one on a new disk")
        assert appenders.stop() > 0
        appenders.verify()


def test_a_restart_with_a_shorter_list_is_refused_with_both_lists() -> None:
    with LiveCluster(groups=1, controllers=1, replicas=3) as live, live.clerk() as clerk:
        clerk.put("k", "v")
        cluster = live.cluster()
        first = next(p for p in cluster.processes if p.role == "group")
        cluster.kill(first)
        command = cluster.command(first)
        at = command.index("--peers") + 1
        whole = command[at].split(",")
        command[at] = ",".join(whole[:1])
        refused = serve(command)
        assert refused.returncode == 1 and "admin member" in refused.stderr
        assert f"the members 1 at {whole[0]}, and" in refused.stderr
        assert ", ".join(f"{n} at {address}" for n, address in enumerate(whole, 1)) in refused.stderr
        cluster.start(first)
        assert clerk.get("k") == b"v"


def test_another_replica_at_the_address_is_not_let_in(tmp_path: Path) -> None:
    with LiveCluster(groups=1, controllers=1, replicas=3) as live, joining(live, tmp_path, 4) as address:
        wrong = attempt(live, "admin", "member", "replace", "1", "3", f"3={address}")
        assert wrong.returncode == 1 and f"at {address} is replica 4 of group 1, not 3" in wrong.stderr


def test_up_does_not_start_a_replica_whose_directory_is_empty() -> None:
    with LiveCluster(groups=1, controllers=1, replicas=3) as live, live.clerk() as clerk:
        clerk.put("k", "v")
        cluster = live.cluster()
        lost = next(p for p in cluster.processes if p.role == "group")
        cluster.stop(cluster.processes)
        shutil.rmtree(lost.data)
        up = attempt(
            live, "up", "--data", str(live.directory), "--detach", *["--groups", "1", "--controllers", "1"]
        )
        assert up.returncode == 0 and f"{lost.address} is not started" in up.stderr, up.stderr
        assert "3 of 4 processes started" in up.stdout and "member replace 1 1 1=" in up.stderr
        assert clerk.get("k") == b"v"
