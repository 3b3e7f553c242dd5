"""`up` on a directory that has a cluster, or that cannot have one: what differs is refused, and nothing is written."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shardkv.cli.main import main
from shardkv.process.local_cluster import Cluster, ClusterError


def made(directory: Path) -> Cluster:
    """A cluster of one group, with the files that a start left."""
    directory.mkdir()
    cluster = Cluster(directory)
    cluster.plan(controllers=1, groups=1, replicas=1, port=7600)
    cluster.save()
    return cluster


def files(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def up(directory: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["up", "--data", str(directory), *more])


@pytest.mark.parametrize(
    ("option", "asked", "has"),
    [
        ("--controllers", "3", "1"),
        ("--replicas", "3", "1"),
        ("--shards", "16", "8"),
        ("--port", "7700", "7600"),
    ],
)
def test_what_differs_from_the_cluster_is_refused_with_both_named(
    tmp_path: Path, option: str, asked: str, has: str
) -> None:
    directory = tmp_path / "data"
    made(directory)
    before = files(directory)
    result = up(directory, option, asked)
    assert result.exit_code == 1
    assert f"{option} {asked}, and it has {has}" in result.stderr
    assert files(directory) == before


def test_fewer_groups_and_another_kind_of_data_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    cluster = made(directory)
    cluster.plan(controllers=1, groups=2, replicas=1, port=7610)
    cluster.save()
    result = up(directory, "--groups", "1", "--ephemeral")
    assert result.exit_code == 1
    assert "--groups 1, and it has 2" in result.stderr and "--ephemeral True, and it has False" in result.stderr


def planned(directory: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[tuple[str, int]]:
    """The processes that `up` would start."""

    def stop_here(self: Cluster) -> list[object]:
        raise ClusterError("far enough")

    monkeypatch.setattr(Cluster, "start_all", stop_here)
    result = up(directory, *more)
    assert "far enough" in result.stderr, result.output
    return [(process.role, process.gid) for process in Cluster.load(directory).processes]


def test_a_cluster_starts_again_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`up --groups 1`, `down`, `up`: the default of two groups asks for nothing."""
    directory = tmp_path / "data"
    made(directory)
    assert planned(directory, monkeypatch) == [("controller", 0), ("group", 1)]
    assert planned(directory, monkeypatch, "--groups", "1", "--replicas", "1") == [
        ("controller", 0),
        ("group", 1),
    ]


def test_more_groups_may_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "data"
    made(directory)
    asked = ("--groups", "2", "--replicas", "3", "--port", "0")
    assert planned(directory, monkeypatch, *asked) == [("controller", 0), ("group", 1), *[("group", 2)] * 3]


def test_a_port_that_is_taken_leaves_no_directory_behind(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = up(directory, "--port", str(port))
    assert result.exit_code == 1 and f"port {port} is in use" in result.stderr
    assert not directory.exists(), "the next start is not spoiled"


def test_a_page_without_its_package_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "data"
    monkeypatch.setattr("shardkv.cli.up.find_spec", lambda name: None)
    result = up(directory, "--web-port", "7700", "--port", "0")
    assert result.exit_code == 1 and "shardkv[web]" in result.stderr
    assert not directory.exists()
