"""The documents are true: what they name exists, what they draw is what the tables say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import shardkv
import shardkv.testing
from shardkv.cli.main import main
from shardkv.state.ownership import TRANSITIONS
from tests import test_mutants, test_mutants_of_time

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
REFERENCE = re.compile(r"`([\w./-]+\.py)::([\w.]+)`")
FILE = re.compile(r"`((?:raft|shardctrler|shardkv|client|tests|bench|docs|proto)/[\w./-]+\.\w+)`")


def symbols(path: Path) -> set[str]:
    """Functions, classes and names of a file, methods and fields as Class.name."""
    found: set[str] = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    visit(child, prefix + child.name + ".")
            elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                found.add(prefix + child.target.id)
            elif isinstance(child, ast.Assign):
                found.update(prefix + target.id for target in child.targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text()), "")
    return found


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)
def test_what_a_document_names_exists(doc: Path) -> None:
    text = doc.read_text()
    for file, symbol in REFERENCE.findall(text):
        assert (ROOT / file).exists(), f"{doc.name} names {file}"
        assert symbol in symbols(ROOT / file), f"{doc.name} names {file}::{symbol}"
    for file in FILE.findall(text):
        assert (ROOT / file).exists(), f"{doc.name} names {file}"


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(doc: Path) -> None:
    for target in LINK.findall(doc.read_text()):
        assert (doc.parent / target).exists(), f"{doc.name} links to {target}"


def diagram() -> str:
    """The shard's states as Mermaid draws them, from the table that the code runs."""
    lines = ["stateDiagram-v2", "    [*] --> ABSENT"]
    lines += [f"    {old.name} --> {new.name}: {event.name}" for (old, event), new in TRANSITIONS.items()]
    return "\n".join(lines)


def test_the_state_diagram_is_the_table() -> None:
    assert diagram() in (ROOT / "docs/sharding.md").read_text(), f"docs/sharding.md should hold:\n{diagram()}"


def children(command: click.Command) -> dict[str, click.Command]:
    if not isinstance(command, click.Group):
        return {}
    context = click.Context(command)
    found = {name: command.get_command(context, name) for name in command.list_commands(context)}
    assert all(found.values()), found
    return {name: child for name, child in found.items() if child is not None}


def test_every_command_in_the_documents_is_one() -> None:
    """`shardkv a b …` at the start of a line: the words that name commands do."""
    for doc in DOCS:
        for line in re.findall(r"^\$? ?shardkv ([a-z][\w -]*)", doc.read_text(), re.MULTILINE):
            words = line.split()
            command: click.Command = main
            for word in words:
                if word not in children(command):
                    break
                command = children(command)[word]
            assert command is not main, f"{doc.name}: shardkv {line}"
            assert not children(command), f"{doc.name}: shardkv {line} is not a whole command"


def test_help_works_for_every_command() -> None:
    def walk(command: click.Command, path: list[str]) -> None:
        result = CliRunner().invoke(main, [*path, "--help"])
        assert result.exit_code == 0, path
        for name, child in children(command).items():
            walk(child, [*path, name])

    walk(main, [])


def test_every_scenario_id_of_this_release_has_a_test() -> None:
    named = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    ids = [f"r_e{n}" for n in range(1, 7)] + [f"r_a{n}" for n in range(1, 11)]
    ids += ["r_p1", "r_p2"] + [f"r_s{n}" for n in range(1, 6)] + [f"k_{n}" for n in range(1, 6)]
    ids += [f"c_{n}" for n in range(1, 7)] + [f"s_{n}" for n in range(1, 11)] + ["s_8b"]
    for id in ids:
        assert f"def test_{id}_" in named, f"no test carries {id}"


def test_every_mutant_is_in_the_table() -> None:
    told = (ROOT / "docs/testing.md").read_text()
    for mutant in (*test_mutants.MUTANTS, *test_mutants_of_time.MUTANTS):
        assert mutant.__name__.replace("_", " ") in told, f"docs/testing.md lacks {mutant.__name__}"


def test_the_index_leads_to_every_document() -> None:
    """The site's navigation is made of these links."""
    index = ROOT / "docs/index.md"
    linked = {(index.parent / target).resolve() for target in LINK.findall(index.read_text())}
    assert linked == {doc.resolve() for doc in DOCS} - {index.resolve()}


def test_the_api_reference_has_every_public_name() -> None:
    told = re.findall(
        r"^\.\. auto(?:class|exception):: ([\w.]+)", (ROOT / "docs/api.md").read_text(), re.MULTILINE
    )
    public = {f"shardkv.{name}" for name in shardkv.__all__ if not name.startswith("_")}
    fixtures = {
        f"shardkv.testing.{name}"
        for name, value in vars(shardkv.testing).items()
        if isinstance(value, type) and value.__module__ == "shardkv.testing"
    }
    assert sorted(told) == sorted(public | fixtures)


@pytest.mark.skipif(find_spec("sphinx") is None, reason="the extra [docs] is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """A link that leads nowhere, a docstring that does not parse or a name that is gone is a warning."""
    made = subprocess.run(
        [
            sys.executable,
            *["-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-c", "docs/site", "."],
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert "OutcomeUnknown" in (tmp_path / "docs/api.html").read_text()
    assert "admin-join" in (tmp_path / "docs/commands.html").read_text()
