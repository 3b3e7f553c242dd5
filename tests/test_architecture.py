"""Style and structure, held by tests: who may import whom, and what pure files may not touch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("raft", "shardctrler", "shardkv", "client", "bench")
FILES = sorted(
    path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if "_pb2" not in path.name
)

# A pure file computes, and asks nobody: no clock, disk, network, chance or framework.
PURE = {
    "raft/border.py",
    "raft/bounds.py",
    "raft/bounded_json.py",
    "raft/clock.py",
    "raft/address.py",
    "raft/core.py",
    "raft/disk_watch.py",
    "raft/errors.py",
    "raft/log.py",
    "raft/membership.py",
    "raft/replication.py",
    "raft/messages.py",
    "raft/outbox.py",
    "raft/progress.py",
    "raft/quorum.py",
    "raft/reads.py",
    "raft/ready.py",
    "raft/roles.py",
    "raft/sessions.py",
    "raft/types.py",
    "raft/answers.py",
    "shardctrler/claims.py",
    "shardctrler/planner.py",
    "shardctrler/rebalance.py",
    "shardctrler/shard_map.py",
    "shardkv/backup/moments.py",
    "shardkv/frames.py",
    "shardkv/layout.py",
    "shardkv/load/figures.py",
    "shardkv/load/histogram.py",
    "shardkv/load/workload.py",
    "shardkv/cursor.py",
    "shardkv/effects.py",
    "shardkv/owned_sessions.py",
    "shardkv/ownership.py",
    "shardkv/row.py",
    "client/errors.py",
    "client/operations.py",
}
NOT_IN_PURE = {
    "asyncio",
    "os",
    "time",
    "socket",
    "threading",
    "grpc",
    "google",
    "logging",
    "rocksdict",
    "pathlib",
}

# Which of our packages a package may import, besides itself.
MAY_IMPORT = {
    "raft": set(),
    "shardctrler": {"raft"},
    "client": {"raft", "shardctrler", "shardkv"},
    "shardkv": {"raft", "shardctrler", "client"},
    "bench": {"raft", "shardctrler", "shardkv", "client"},
}
# What in the servers' package is a client itself.
SHARDKV_CLIENTS = ("shardkv/cli/", "shardkv/load/", "shardkv/backup/", "shardkv/testing.py")
# A client knows nothing of servers: of the others' files it uses these alone.
CLIENT_MAY = {
    "raft.answers",
    "raft.clock",
    "raft.doors",
    "raft.gate",
    "raft.rpc",
    "raft.tls",
    "shardctrler.query",
    "shardctrler.shard_map",
    "shardkv",
    "shardkv.frames",
}


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of everything that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_dependencies_point_one_way(path: Path) -> None:
    package = name_of(path).split("/")[0]
    for module, name in imports(path):
        target = module.split(".")[0]
        assert target != "tests", "nothing imports the tests"
        if target in PACKAGES and target != package:
            assert target in MAY_IMPORT[package], f"{package} does not know {target}"
            if package == "client":
                assert module in CLIENT_MAY or f"{module}.{name}" in CLIENT_MAY, (
                    f"a client does not know {module}"
                )
            if package == "shardkv" and target == "client" and not name_of(path).startswith(SHARDKV_CLIENTS):
                raise AssertionError("only commands, load, backups and fixtures are clients")


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_files_are_pure(name: str) -> None:
    path = ROOT / name
    for module, imported in imports(path):
        assert module.split(".")[0] not in NOT_IN_PURE, f"{name} imports {module}"
        assert (module, imported) in {("random", "Random")} or module != "random", "chance is handed in"
        if module.split(".")[0] in PACKAGES and imported:
            target = module.replace(".", "/") + ".py"
            package_file = f"{module.replace('.', '/')}/{imported}.py"
            assert target in PURE or package_file in PURE, f"{name} is pure, {module} is not"


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_files_do_not_iterate_over_sets(name: str) -> None:
    """The order of a set of bytes or strings differs from run to run."""
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.For | ast.comprehension):
            assert not isinstance(node.iter, ast.Set | ast.SetComp), f"{name}: iterates over a set"


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_its_one_idea_and_stays_readable(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    lines = len(path.read_text().splitlines())
    most = 700 if name_of(path) == "raft/core.py" else 450
    assert lines <= most, f"{name_of(path)} has {lines} lines: is there a second idea inside?"


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_silences_errors_or_waits_by_the_clock(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name_of(path)}:{node.lineno}: a bare except"
    assert "TODO" not in path.read_text() and "FIXME" not in path.read_text()
