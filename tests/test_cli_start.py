"""A command that only asks a cluster imports no server: scripts and probes start it again and again."""

from __future__ import annotations

import subprocess
import sys

import pytest

SERVER = {
    "rocksdict",
    "shardkv.raft.protocol.core",
    "shardkv.raft.replica",
    "shardkv.process.run",
    "shardkv.state.machine",
    "prometheus_client",
}
HEAVY = {*SERVER, "grpc", "rich.console", "rich.table", "obstore", "aiohttp"}

SHOW = """
import sys
from shardkv.cli.main import main
try:
    main({arguments!r})
except SystemExit:
    pass
print(*sys.modules, file=sys.stderr)
"""


def imported_by(*arguments: str) -> set[str]:
    """The modules that one run of the command has imported at its end."""
    run = subprocess.run(
        [sys.executable, "-c", SHOW.format(arguments=list(arguments))],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(run.stderr.split())


@pytest.mark.quick
@pytest.mark.parametrize("command", ["get", "put", "scan", "delete"])
def test_a_call_imports_nothing_of_the_server(command: str) -> None:
    assert not imported_by(command, "--help") & HEAVY


@pytest.mark.quick
def test_a_probe_imports_grpc_and_no_more() -> None:
    assert not imported_by("health", "--help") & (HEAVY - {"grpc"} | {"client", "shardctrler"})


@pytest.mark.quick
def test_the_server_is_imported_by_the_command_that_serves() -> None:
    """The test above can fail: the names it forbids are those that a server has."""
    assert imported_by("serve", "--help") >= SERVER
