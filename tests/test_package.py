"""The bare package is the client; what is missing for the rest is named with the extra that brings it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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
    code = "import client; print(*{name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
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
