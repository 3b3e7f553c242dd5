"""Lost and exchanged disks on real processes: refused by name, brought back with one command, nothing lost."""

from __future__ import annotations

import asyncio
import errno
import shutil
import time
from pathlib import Path

import pytest

from bench.live import Appenders, LiveCluster, attempt
from shardkv.process.identity import Identity, read_identity
from shardkv.process.options import ProcessOptions
from shardkv.process.run import note_when_room, noted
from shardkv.raft.damage import DamageBook
from shardkv.raft.disk import RealDirectory
from shardkv.raft.errors import DamagedState, WrongDirectory
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
        assert up.returncode == 1 and f"{lost.address} is not started" in up.stderr, up.stderr
        assert "3 of 4 processes started" in up.stdout and "member replace 1 1 1=" in up.stderr
        assert clerk.get("k") == b"v"
        # The directories of two replicas are mounted in each other's place: no quorum, and both say why.
        second, third = [p for p in cluster.processes if p.role == "group" and p.address != lost.address]
        stopped = live.cluster()
        stopped.stop(stopped.processes)
        for source, target in ((second.data, "x"), (third.data, second.data), ("x", third.data)):
            (live.directory / source).rename(live.directory / target)
        up = attempt(
            live, "up", "--data", str(live.directory), "--detach", *["--groups", "1", "--controllers", "1"]
        )
        assert up.returncode == 1 and "not every shard serves" in up.stderr, up.stderr
        # The first that ends is enough to give up: with the lost one it is two of three.
        named = [process for process in (second, third) if f"! group at {process.address} ended: " in up.stderr]
        assert named, up.stderr
        for process in named:
            other = third if process is second else second
            assert f"{process.data} belongs to replica {other.index + 1} of group 1" in up.stderr


def test_up_names_a_replica_that_ends_at_once_and_starts_the_others() -> None:
    with LiveCluster(groups=1, controllers=1, replicas=3) as live, live.clerk() as clerk:
        clerk.put("k", "v")
        cluster = live.cluster()
        hurt = next(p for p in cluster.processes if p.role == "group" and p.address != live.leader(1).address)
        cluster.kill(hurt)
        first = min(Path(hurt.data).glob("wal-*.log"))
        data = bytearray(first.read_bytes())
        data[100] ^= 1  # far before the tail
        first.write_bytes(data)
        up = attempt(
            live, "up", "--data", str(live.directory), "--detach", *["--groups", "1", "--controllers", "1"]
        )
        assert up.returncode == 1 and "first put and get" in up.stdout, up.stderr
        assert f"! group at {hurt.address} ended: " in up.stderr and "damaged at byte" in up.stderr
        assert "move its data directory away" in up.stderr
        assert clerk.get("k") == b"v"


def test_an_identity_that_is_empty_or_cut_is_refused_in_plain_words(tmp_path: Path) -> None:
    directory = RealDirectory(tmp_path)
    whole = Identity("c", 1, 1, "memory", 7, {1: "n1"}).encode()
    for data, why in (
        (b"", "empty"),
        (bytes(64), "empty"),
        (whole[:40], "cut short"),
        (b"\xff" * 9, "cut short"),
    ):
        (tmp_path / "identity.json").write_bytes(data)
        with pytest.raises(WrongDirectory, match=f"identity.json: damaged: the file is {why}"):
            read_identity(directory, str(tmp_path))
    directory.close()


def test_damage_that_a_full_disk_cannot_note_is_noted_before_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [True, True]  # for so many writes

    async def replace(self: RealDirectory, name: str, data: bytes) -> None:
        if full and full.pop():
            raise OSError(errno.ENOSPC, "no space left on device")
        await original(self, name, data)

    original = RealDirectory.replace
    monkeypatch.setattr(RealDirectory, "replace", replace)
    options = ProcessOptions(1, ("n1:1",), tmp_path, "c", 1, reserve_bytes=0)
    damage = DamagedState("000009.sst", "block checksum mismatch")
    directory = RealDirectory(tmp_path)
    assert asyncio.run(noted(directory, damage)) is None
    directory.close()
    assert note_when_room(options, damage) == 0.0 and not full
    directory = RealDirectory(tmp_path)
    present = DamageBook.load(directory).present
    directory.close()
    assert present is not None and present.file == "000009.sst", "the next start sets the state aside"
