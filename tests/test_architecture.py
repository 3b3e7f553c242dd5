"""Style and structure, held by tests: who may import whom, and what pure files may not touch."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("wire", "raft", "shardctrler", "client", "shardkv", "bench")
FILES = sorted(
    path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if "_pb2" not in path.name
)

# A pure file computes, and asks nobody: no clock, disk, network, chance or framework.
PURE = {
    name for name in map(str, (path.relative_to(ROOT) for path in FILES)) if name.startswith("raft/protocol/")
} | {
    "client/errors.py",
    "client/operations.py",
    "client/refusals.py",
    "raft/errors.py",
    "raft/sessions.py",
    "shardctrler/claims.py",
    "shardctrler/key_range.py",
    "shardctrler/planner.py",
    "shardctrler/rebalance.py",
    "shardctrler/shard_map.py",
    "shardkv/backup/moments.py",
    "shardkv/load/figures.py",
    "shardkv/load/histogram.py",
    "shardkv/load/workload.py",
    "shardkv/state/cursor.py",
    "shardkv/state/effects.py",
    "shardkv/state/layout.py",
    "shardkv/state/ownership.py",
    "shardkv/state/row.py",
    "shardkv/state/owned_sessions.py",
    "wire/address.py",
    "wire/backoff.py",
    "wire/bounded_json.py",
    "wire/calls.py",
    "wire/frames.py",
    "wire/methods.py",
    "wire/proof.py",
    "wire/shares.py",
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

# What lies beside `shardkv` and is imported below it, by links in `shardkv/`.
MOUNTED = ("wire", "raft", "shardctrler", "client")
# The tower: which of our packages a package may import, besides itself. No arrow runs up.
MAY_IMPORT = {
    "wire": set(),
    "raft": {"wire"},
    "shardctrler": {"wire", "raft"},
    "client": {"wire", "raft", "shardctrler"},
    "shardkv": {"wire", "raft", "shardctrler", "client"},
    "bench": {"wire", "raft", "shardctrler", "client", "shardkv"},
}
# The floors of the servers' package, from the ground up: what each may import of the others.
FLOORS = {
    "storage": set(),
    "state": {"storage"},
    "server": {"storage", "state"},
    "observe": {"storage", "state", "server"},
    "web": {"observe"},
    "process": {"storage", "state", "server", "observe", "web"},
    "load": set(),
    "backup": {"storage", "state", "observe"},
    "cli": {"storage", "state", "server", "observe", "process", "load", "backup"},
}
# What in the servers' package is a client itself; `shardkv` itself names the clients, and loads one when it is asked for.
SHARDKV_CLIENTS = (
    "shardkv/__init__.py",
    "shardkv/cli/",
    "shardkv/load/",
    "shardkv/backup/",
    "shardkv/testing.py",
)
# A client knows nothing of servers: of raft and the controller it uses these alone.
CLIENT_MAY = {
    "raft.protocol.clock",
    "shardctrler.client",
    "shardctrler.shard_map",
}


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of everything that a file imports; modules of ours by the folder where they lie."""
    found = []
    for module, name in _imports(path):
        top, _, rest = module.partition(".")
        assert top not in MOUNTED, f"{path}: say shardkv.{module}, or the same module is loaded twice"
        ours = top == "shardkv" and (rest or name).split(".")[0] in MOUNTED
        found.append((rest or name, name if rest else "") if ours else (module, name))
    return found


def _imports(path: Path) -> list[tuple[str, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


# What stands in one place, and in which: nobody else writes it again.
ONCE = {
    "shardctrler/key_range.py": re.compile(r"not \w+(?:\.\w+)*\.?end or \w+ <"),
    "wire/address.py": re.compile(r"\.r(?:partition|split)\(\":\""),
    "shardkv/process/wiring.py": re.compile(r"(?<!class )\b(?:GroupServer|ControllerServer)\("),
    "wire/backoff.py": re.compile(r"uniform\(0\.5, 1\.5\)"),
}


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
            if package == "client" and target != "wire":
                assert module in CLIENT_MAY or f"{module}.{name}" in CLIENT_MAY, (
                    f"a client does not know {module}"
                )
            clients = name_of(path).startswith(SHARDKV_CLIENTS)
            if package == "shardkv" and target == "client" and not clients:
                raise AssertionError("only commands, load, backups and fixtures are clients")


def files_of(module: str, name: str) -> str:
    """The file that an import statement means, as a path from the root; empty where it is none of ours."""
    for candidate in (f"{module}.{name}" if name else module, module):
        for path in (candidate.replace(".", "/") + ".py", candidate.replace(".", "/") + "/__init__.py"):
            if (ROOT / path).exists():
                return path
    return ""


@pytest.mark.quick
@pytest.mark.parametrize("path", [f for f in FILES if name_of(f).count("/") == 2], ids=name_of)
def test_floors_point_one_way(path: Path) -> None:
    package, floor = name_of(path).split("/")[:2]
    for module, name in imports(path):
        file = files_of(module, name)
        if package == "raft" and file.startswith("raft/"):
            assert file.startswith("raft/protocol/") or file == "raft/errors.py", (
                f"the protocol does not know {file}"
            )
        if package == "shardkv" and file.startswith("shardkv/") and file.count("/") == 2:
            other = file.split("/")[1]
            assert other == floor or other in FLOORS[floor], f"{floor} does not know {other} ({file})"


@pytest.mark.quick
@pytest.mark.parametrize("path", [f for f in FILES if not name_of(f).startswith("raft/")], ids=name_of)
def test_nobody_outside_looks_into_the_core_of_a_replica(path: Path) -> None:
    """What others want to know of a replica, it tells (`raft/replica.py`, `raft/figures.py`)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr == "core":
            assert not ast.unparse(node.value).endswith("replica"), f"{name_of(path)}:{node.lineno}"


@pytest.mark.quick
@pytest.mark.parametrize("home", sorted(ONCE))
def test_what_stands_once_stands_nowhere_else(home: str) -> None:
    found = {
        name_of(path) for path in [*FILES, ROOT / "tests/sim/world.py"] if ONCE[home].search(path.read_text())
    }
    assert found == {home}


@pytest.mark.quick
def test_no_circle_of_files() -> None:
    """Imports that only a type checker follows count too."""
    graph = {
        name_of(path): {files_of(module, name) for module, name in imports(path)} - {"", name_of(path)}
        for path in FILES
    }
    done: set[str] = set()

    def visit(file: str, way: tuple[str, ...]) -> None:
        assert file not in way, " -> ".join([*way[way.index(file) :], file])
        if file in done or file not in graph:
            return
        for other in sorted(graph[file]):
            visit(other, (*way, file))
        done.add(file)

    for file in sorted(graph):
        visit(file, ())


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
    most = 700 if name_of(path) == "raft/protocol/core.py" else 450
    assert lines <= most, f"{name_of(path)} has {lines} lines: is there a second idea inside?"


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_silences_errors_or_waits_by_the_clock(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name_of(path)}:{node.lineno}: a bare except"
    assert "TODO" not in path.read_text() and "FIXME" not in path.read_text()
