"""What a cluster writes is its owner's alone, whatever the umask is, and what was left open is closed to others."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.live import LiveCluster, attempt
from shardkv.raft.private import tighten

pytestmark = pytest.mark.timeout(180)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def open_to_others(top: Path) -> list[str]:
    """What a user other than the owner could use. Sockets and links do not count."""
    found = []
    for path in [top, *top.rglob("*")]:
        mode = path.lstat().st_mode
        if (stat.S_ISDIR(mode) or stat.S_ISREG(mode)) and mode & 0o077:
            found.append(f"{path.relative_to(top)} {stat.filemode(mode)}")
    return found


def loosen(top: Path) -> None:
    for path in [top, *top.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_whatever_the_umask_nobody_else_reads_what_a_cluster_writes(tmp_path: Path) -> None:
    with umask(0), LiveCluster(groups=1, controllers=1, replicas=1) as cluster:
        place = tmp_path / "backups"
        cluster.run("put", "k", "v")
        cluster.run("backup", "create", f"file://{place}")
        cluster.run("backup", "archive", f"file://{place}", "--once")
        for process in cluster.cluster().processes:
            assert (Path(process.data) / "audit.log").exists()
        assert open_to_others(cluster.directory) == []
        assert open_to_others(place) == []
        assert list(cluster.directory.rglob("rocks/*/*")), "RocksDB's own files are among them"

        # As an older version left them: a start closes them, and says so once for each directory.
        cluster.cluster().stop_all()
        loosen(cluster.directory)
        loosen(place)
        cluster.up()
        assert open_to_others(cluster.directory) == []
        for process in cluster.cluster().processes:
            lines = [
                line
                for line in (Path(process.data) / "log").read_text().splitlines()
                if "users of this machine could read" in line
            ]
            assert len(lines) == 1 and process.data in lines[0], lines

        cluster.run("put", "k", "w")
        cluster.run("backup", "create", f"file://{place}")
        assert {path.name for path in place.iterdir() if path.stat().st_mode & 0o077} == set()


def test_certificates_are_for_everybody_and_their_keys_are_not(tmp_path: Path) -> None:
    with umask(0):
        assert attempt(None, "certs", str(tmp_path / "ca"), "--name", "one").returncode == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "ca").iterdir()}
    assert modes == {"ca.pem": 0o644, "ca.key": 0o600, "one.pem": 0o644, "one.key": 0o600}


def test_a_directory_is_tightened_and_links_lead_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    (data / "rocks").mkdir(parents=True)
    (data / "rocks" / "table").write_bytes(b"x")
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    (data / "link").symlink_to(outside)
    loosen(tmp_path)
    with umask(0):
        assert tighten(data) > 0
    assert open_to_others(data) == []
    assert outside.stat().st_mode & 0o077 == 0o044, "a link does not lead elsewhere"
    assert len([record for record in caplog.records if str(data) in record.getMessage()]) == 1


def test_a_directory_that_many_users_share_stays_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    assert tighten(shared) == 0
    assert shared.stat().st_mode & 0o7777 == 0o1777
    assert "cannot be changed" in caplog.text
