"""The audit log and the ordinary one: bounded whatever strangers do, and no line can be forged."""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shardkv.observe import logs
from shardkv.observe.logs import JsonFormatter, TextFormatter, _Queued
from shardkv.server.audit import BURST, KEPT_FILES, MAX_TEXT, AuditLog, describe
from shardkv.shardctrler import shardctrler_pb2 as ctl

pytestmark = pytest.mark.quick


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_a_stranger_chose_cannot_forge_a_line_or_grow_one(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.log")
    forged = 'x\n{"kind": "admin", "allowed": true}\x1b[2J\x85\u2028\u202e'
    audit.note(
        "denied", who=forged, address="10.0.0.1:7", door="main", what="a" * 10_000, allowed=False, why="no"
    )
    audit.close()
    text = (tmp_path / "audit.log").read_bytes()
    assert text.count(b"\n") == 1 and text.isascii() and b"\x1b" not in text and len(text) < 1000
    (line,) = lines(tmp_path / "audit.log")
    assert line["who"] == r'x\n{"kind": "admin", "allowed": true}\x1b[2J\x85\u2028\u202e'
    assert len(line["what"]) <= MAX_TEXT + 1 and line["allowed"] is False
    assert (tmp_path / "audit.log").stat().st_mode & 0o777 == 0o600


def test_a_flood_of_one_kind_is_counted_and_hides_no_other(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.log")
    began = time.monotonic()
    for _ in range(50_000):
        audit.note("denied", allowed=False, why="no")
    audit.note("admin", who="root", what="leave: gids: 2", allowed=True)
    seconds = time.monotonic() - began
    audit.close()
    found = lines(tmp_path / "audit.log")
    assert [line["who"] for line in found if line["kind"] == "admin"] == ["root"]
    written = sum(line["kind"] == "denied" for line in found)
    assert BURST <= written <= BURST + 1 + 20 * seconds
    assert written + sum(line.get("left_out", 0) for line in found) == 50_000


def test_it_is_rotated_by_size_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    audit = AuditLog(path, max_file_bytes=2000)
    for number in range(190):
        audit.note(f"kind {number % 3}", what=str(number), allowed=True)
    audit.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 1 + KEPT_FILES and all(file.stat().st_size <= 2000 for file in files)
    kept = [path.with_name(f"audit.log.{number}") for number in range(KEPT_FILES, 0, -1)] + [path]
    numbers = [int(line["what"]) for file in kept for line in lines(file)]
    assert numbers == list(range(numbers[0], 190)), "the newest lines, in order"
    again = AuditLog(path, max_file_bytes=2000)
    again.note("kind", what="after a restart", allowed=True)
    again.close()
    assert lines(path)[-1]["what"] == "after a restart"


def test_a_disk_that_takes_nothing_costs_lines_which_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, full = os.write, True

    def failing(descriptor: int, data: bytes) -> int:
        if full and data.startswith(b'{"time"'):
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    audit = AuditLog(tmp_path / "audit.log")
    monkeypatch.setattr(os, "write", failing)
    for _ in range(5):
        audit.note("denied", allowed=False)
    while audit._left_out["denied"] < 5:
        time.sleep(0.001)
    full = False
    audit.note("denied", allowed=False)
    audit.close()
    (line,) = lines(tmp_path / "audit.log")
    assert line["left_out"] == 5


def test_admin_requests_are_told_without_tokens() -> None:
    user = ctl.SetUser(name="app", create=True, role="read-write", prefixes=[b"app/"], verifier=b"h" * 64)
    told = describe("ctl.admin", ctl.AdminRequest(set_user=user).SerializeToString())
    assert told == 'user add: name: "app" create: true role: "read-write" prefixes: "app/" with a new token'
    for request, expected in (
        (ctl.AdminRequest(remove_user=ctl.RemoveUser(name="x")), 'user remove: name: "x"'),
        (ctl.AdminRequest(access_control=ctl.SetAccessControl(enabled=True)), "access enable"),
        (ctl.AdminRequest(access_control=ctl.SetAccessControl()), "access disable"),
        (ctl.AdminRequest(leave=ctl.Leave(gids=[3])), "leave: gids: 3"),
        (ctl.AdminRequest(), "ctl.admin: no operation"),
    ):
        assert describe("ctl.admin", request.SerializeToString()) == expected
    assert describe("ctl.admin", b"\xff") == "ctl.admin: malformed"
    assert describe("raft.members", b'{"voters": {}}') == 'raft.members {"voters": {}}'
    assert describe("kv.write", b"secret value") == "kv.write"


# ---- the ordinary log


@pytest.fixture
def place() -> tuple[logging.Logger, queue.Queue[logging.LogRecord]]:
    records: queue.Queue[logging.LogRecord] = queue.Queue()
    logger = logging.Logger("test")
    logger.addHandler(_Queued(records))
    return logger, records


def test_a_line_of_the_log_is_one_line(place: tuple[logging.Logger, queue.Queue[logging.LogRecord]]) -> None:
    logger, records = place
    logger.warning("refused a call of %s", "x\n2026-11-25 ERROR forged\r\x1b[31m" + "y" * 100_000)
    record = records.get_nowait()
    for formatter in (TextFormatter(logs.TEXT), JsonFormatter()):
        text = formatter.format(record)
        assert "\n" not in text and "\x1b" not in text and r"x\n2026" in text.replace("\\\\", "\\")
        assert len(text) < logs.MAX_MESSAGE + 200


def test_a_flood_of_one_line_is_counted_and_hides_no_other(
    place: tuple[logging.Logger, queue.Queue[logging.LogRecord]],
) -> None:
    logger, records = place

    def flood(count: int) -> list[str]:
        for number in range(count):
            logger.warning("refused a call of %s", number)
        return [records.get_nowait().getMessage() for _ in range(records.qsize())]

    first = flood(10_000)
    logger.warning("something else")
    assert records.get_nowait().getMessage() == "something else"
    assert logs.BURST <= len(first) <= logs.BURST + 100
    later: list[str] = []
    while not later:  # a tenth of a second
        later = flood(100)
    assert "lines of this kind before this one were left out" in later[0]


def test_a_process_can_send_it_to_standard_error() -> None:
    code = "from shardkv.server.audit import AuditLog; a = AuditLog(None); a.note('login', who='me', allowed=True); a.close()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert json.loads(done.stderr)["who"] == "me"
