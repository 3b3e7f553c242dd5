"""Every command, given what is wrong: no traceback, one line that says what to do, and JSON for programs.

The commands come from click's tree, so that a new command is walked as well.
"""

from __future__ import annotations

import asyncio
import base64
import json
import unicodedata
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from shardkv.cli import options, output
from shardkv.cli.main import main

STATUSES = {0, 1, 2, 3}
NOBODY = "127.0.0.1:1"  # a privileged port, on which nothing listens
SERVERS = {("serve", "controller"), ("serve", "group")}  # would go on until they are stopped
FOREGROUND = {("up",)}  # starts processes
SLOW = {("backup", "create"), ("backup", "archive"), ("admin", "abort-restore")}  # ask for 10 s in any case

# An argument that is right, by its name; others by their type.
RIGHT = {
    "newcomer": "4=127.0.0.1:9",
    "address": NOBODY,
    "url": "file:///nowhere/at/all",
    "groups": "1",
    "gids": "1",
    "num": "1",
}
TEXTS = ["", "[/x]", "\x1b[31m", "\udcff", "9" * 30, "é" * 5000]
NUMBERS = ["x", "-1", "1.5", "9" * 30, ""]
FLOATS = ["x", "nan", "-1", "inf", "0"]


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(leaves(main))
names = [pytest.param(path, id=" ".join(path)) for path in COMMANDS]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster here, and nothing kept of the command before."""
    monkeypatch.chdir(tmp_path)
    forget()


def forget() -> None:
    options._tls_files.clear()
    options._login.clear()


def run(*arguments: str) -> Result:
    forget()
    return CliRunner().invoke(main, arguments)


def right_for(parameter: click.Parameter, tmp_path: Path) -> str:
    if parameter.name in RIGHT:
        return RIGHT[parameter.name]
    kind = parameter.type
    if isinstance(kind, click.Choice):
        return str(kind.choices[0])
    if isinstance(kind, click.Path):
        if kind.exists:
            there = tmp_path / "there"
            there.mkdir(exist_ok=True)
            return str(there)
        return str(tmp_path / f"new-{parameter.name}")
    return "1" if isinstance(kind, click.types.IntParamType) else "x"


def line_for(path: tuple[str, ...], tmp_path: Path, instead: tuple[str, str] | None = None) -> list[str]:
    """A command line that is right but for the one parameter in `instead`, against a cluster that is not there."""
    line, arguments = list(path), []
    for parameter in COMMANDS[path].params:
        value = right_for(parameter, tmp_path)
        if instead is not None and parameter.name == instead[0]:
            value = instead[1]
        elif parameter.name == "controllers":
            value = NOBODY if isinstance(parameter.type, click.types.StringParamType) else "1"
        elif parameter.name in ("timeout", "wait_timeout"):
            value = "0.05"
        elif parameter.name == "peers" and path in SERVERS:
            value = NOBODY
        elif isinstance(parameter, click.Option) and not parameter.required:
            continue
        if isinstance(parameter, click.Argument):
            arguments.append(value)
            if parameter.name == "groups" and path == ("admin", "join"):
                arguments.append("127.0.0.1:9")
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            line.append(parameter.opts[-1])
        else:
            line += [parameter.opts[-1], value]
    return [*line, "--", *arguments]


def check(result: Result, line: list[str]) -> None:
    told = f"{line}: {result.output!r} {result.exception!r}"
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    assert result.exit_code in STATUSES, told
    assert "Traceback" not in result.output and "bug of shardkv" not in result.output, told
    if result.exit_code:
        lines = result.stderr.strip().splitlines()
        assert lines and any(each.startswith("shardkv: ") for each in lines), told
        assert all(char.isprintable() or char == "\n" for char in result.stderr), told


def refusal(result: Result) -> dict[str, Any]:
    (document,) = result.stdout.splitlines()
    found = json.loads(document)
    assert isinstance(found, dict) and found["ok"] is False
    error = found["error"]
    assert set(error) == {"kind", "message", "status"} and error["status"] == result.exit_code
    assert error["kind"] and error["message"]
    return found


@pytest.mark.parametrize("path", names)
def test_json_is_an_output_of_every_command(path: tuple[str, ...]) -> None:
    (found,) = [each for each in COMMANDS[path].params if each.name == "output"]
    assert isinstance(found.type, click.Choice) and "json" in found.type.choices


@pytest.mark.parametrize("path", [each for each in names if each.values[0] not in SERVERS | FOREGROUND | SLOW])
def test_a_cluster_that_is_not_there_is_a_refusal_in_words_and_in_json(
    path: tuple[str, ...], tmp_path: Path
) -> None:
    line = line_for(path, tmp_path)
    result = run(*line)
    check(result, line)
    if not result.exit_code:  # a command that needs no cluster
        return
    result = run(*path, "-o", "json", *line[len(path) :])
    check(result, line)
    refusal(result)


@pytest.mark.parametrize("path", names)
def test_what_no_option_is_is_refused_in_json(path: tuple[str, ...]) -> None:
    result = run(*path, "--no-such-option", "-o", "json")
    assert result.exit_code == 2
    assert refusal(result)["error"]["kind"] == "Usage"
    assert f"shardkv {' '.join(path)} --help" in result.stderr


def wrong_for(parameter: click.Parameter, tmp_path: Path) -> list[str]:
    match parameter.type:
        case click.types.BoolParamType():
            return []
        case click.types.IntParamType():
            return NUMBERS
        case click.types.FloatParamType():
            return FLOATS
        case click.Choice():
            return ["no such choice", ""]
        case click.Path():
            file = tmp_path / "file"
            file.write_bytes(b"\xff\x00{[")
            return [str(file), str(file / "below"), "/proc/nothing", ""]
    return FLOATS if parameter.type.name == "seconds" else TEXTS


@pytest.mark.parametrize("path", [each for each in names if each.values[0] not in SERVERS | FOREGROUND | SLOW])
def test_a_wrong_value_of_any_parameter_is_told(path: tuple[str, ...], tmp_path: Path) -> None:
    for parameter in COMMANDS[path].params:
        for value in wrong_for(parameter, tmp_path):
            line = line_for(path, tmp_path, (str(parameter.name), value))
            check(run(*line), line)


@pytest.mark.parametrize(
    "line",
    [
        "peers = 5",
        "data = 5",
        'ephemeral = "maybe"',
        "id = true",
        "peers = {a = 1}",
        "id = 1.5",
        "id =",
        "x = 1",
    ],
)
def test_a_config_file_with_wrong_types_is_told(line: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(line)
    command = ["serve", "controller", "--config", str(file)]
    command += [] if line.startswith("data") else ["--data", str(tmp_path / "data")]
    result = run(*command, "-o", "json")
    check(result, command)
    refusal(result)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"controllers": [5]}', '{"controllers": ["a:1"], "tls": 5}', "\x00"]
)
def test_a_damaged_manifest_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cluster.json").write_text(text)
    for command in (["get", "k"], ["down"], ["admin", "status", "--timeout", "0.05"]):
        result = run(*command, "-o", "json")
        check(result, command)
        refusal(result)


def test_reading_a_backup_never_writes(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/mistyped"
    for command in (["list", url], ["verify", url], ["delete", url, "x"]):
        assert run("backup", *command).exit_code == 1
    assert not (tmp_path / "mistyped").exists()


def test_cells_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    output.begin_output()
    output.print_table(("a", "b"), [("[/x]", "list[int]/"), ("\x1b[31mred", "\u202eback\n")])
    shown = capsys.readouterr().out
    assert "[/x]" in shown and "list[int]/" in shown
    assert "\\x1b[31mred" in shown and "\\u202eback\\n" in shown


@given(st.binary())
def test_bytes_in_json_come_back(data: bytes) -> None:
    found = json.loads(json.dumps(output.json_bytes(data)))
    assert (base64.b64decode(found["base64"]) if isinstance(found, dict) else found.encode()) == data


@given(st.text())
def test_no_text_moves_the_cursor(text: str) -> None:
    assert all(char.isprintable() or unicodedata.category(char) == "Zs" for char in output.escaped(text))


def test_ctrl_c_during_wait_says_that_the_change_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The change is made; only the waiting for it ends."""

    class Made:
        async def admin(self, request: object, timeout: float) -> int:
            return 7

    def with_session(controllers: object, run: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        asyncio.run(run(SimpleNamespace(controller=Made(), dialer=None, overview=None)))

    async def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("shardkv.cli.admin.with_session", with_session)
    monkeypatch.setattr("shardkv.cli.admin._wait", interrupted)
    result = run("admin", "leave", "1", "--wait", "-o", "json")
    assert result.exit_code == 130
    assert "configuration 7 is made, and its moves go on" in result.stderr
    assert json.loads(result.stdout)["error"]["kind"] == "Interrupted"
