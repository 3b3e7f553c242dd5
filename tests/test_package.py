"""The bare package is the client; what is missing for the rest is named with the extra that brings it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from shardkv.testing import ThrowawayCluster

ROOT = Path(__file__).parent.parent

WITHOUT = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
{code}
"""


def run_without(missing: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter that has none of the packages `missing`."""
    script = WITHOUT.format(missing=missing, code=code)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


def names_of_extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.quick
def test_the_client_needs_the_base_dependencies_and_no_other_package() -> None:
    code = "from shardkv import ShardClerk; print(*{name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    run = run_without({"uvloop", "grpc", "click", "rich", "rocksdict", "google_crc32c"}, code)
    assert run.returncode == 0, run.stderr
    foreign = {name for name in run.stdout.split() if not name.startswith("_")}
    # Modules of the interpreter itself, and those that an editable install puts there, are no dependencies.
    assert foreign - {"cython_runtime", "sitecustomize"} <= {
        "client",
        "google",
        "raft",
        "shardctrler",
        "shardkv",
        "sortedcontainers",
        "wire",
    }


@pytest.mark.quick
@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("click", ["get", "k"], "cli"),
        ("rocksdict", ["serve", "--help"], "server"),
        ("grpc", ["health", "x"], "server"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(missing: str, arguments: list[str], extra: str) -> None:
    code = f"sys.argv[1:] = {arguments!r}\nfrom shardkv.__main__ import main\nmain()"
    run = run_without({missing}, code)
    assert run.returncode == 1
    assert run.stderr == f"shardkv: this needs the package {missing}: pip install 'shardkv[{extra}]'\n"
    assert extra in names_of_extras()


@pytest.mark.quick
def test_a_checkout_has_one_client_under_two_names() -> None:
    """Scripts in a checkout say `from client import …`; an error that they catch is the one that is raised."""
    code = """
import client, client.errors, shardkv
assert client.ShardClerk is shardkv.ShardClerk and client.Tls is shardkv.Tls
assert client.errors.OutcomeUnknown is shardkv.OutcomeUnknown
assert set(client.__all__) <= set(shardkv.__all__) <= set(dir(shardkv)), set(client.__all__) ^ set(shardkv.__all__)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


FIVE_LINES = """
import sys
from shardkv import ShardClerk
with ShardClerk(controllers=[sys.argv[1]]) as clerk:
    clerk.put("wheel", "turns")
    print(clerk.get("wheel").decode())
"""
ABSENT = """
import importlib.util, shardkv
print(shardkv.__version__)
print(*[name for name in ("client", "raft", "wire", "shardctrler", "tests", "bench") if importlib.util.find_spec(name)])
"""
# Other interpreters to try the wheel with, separated by spaces; our own is always tried.
PYTHONS = [sys.executable, *os.environ.get("SHARDKV_PYTHONS", "").split()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the sdist, as a release is."""
    scratch = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, tracked.split("\0")):  # not the checkout itself: a build leaves files behind
        (scratch / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, scratch / "src" / name, follow_symlinks=False)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(scratch / "out"),
        str(scratch / "src"),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert built.returncode == 0, built.stdout + built.stderr
    (made,) = (scratch / "out").glob("*.whl")
    return made


def test_a_wheel_holds_one_name_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in names} == {"shardkv"}
    needed = {
        "py.typed",
        "raft/protocol/core.py",
        "wire/frames.py",
        "shardctrler/shardctrler_pb2.py",
        "web/page.html",
    }
    assert {f"shardkv/{name}" for name in needed} <= set(names)
    assert not [name for name in names if {"tests", "bench", "proto"} & set(name.split("/"))]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_five_lines_run_from_a_wheel_in_a_new_environment(
    python: str, wheel: Path, tmp_path: Path, shardkv_cluster: ThrowawayCluster
) -> None:
    subprocess.run([python, "-m", "venv", tmp_path / "env"], check=True, timeout=60)
    there = str(tmp_path / "env/bin/python")
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [there, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)]
    subprocess.run(install, check=True, timeout=100, env=bare, cwd=tmp_path)
    told = subprocess.run(
        [there, "-c", ABSENT], capture_output=True, text=True, env=bare, cwd=tmp_path, timeout=30
    )
    assert told.stdout.split() == [version("shardkv")], told.stdout + told.stderr
    command = [there, "-c", FIVE_LINES, shardkv_cluster.controllers[0]]
    ran = subprocess.run(command, capture_output=True, text=True, env=bare, cwd=tmp_path, timeout=60)
    assert ran.stdout == "turns\n", ran.stderr
    size = sum(file.stat().st_size for file in (tmp_path / "env/lib").rglob("*") if "/pip" not in str(file))
    assert size <= 15 << 20, f"the bare install has {size >> 20} MiB"
