"""What an operator is told of damage and of cut logs: in plain words, and as a problem only while it is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardkv.observe.notes import TOLD_MS, damage_problems, notes_of
from shardkv.process.stores import named_below
from shardkv.raft.errors import DamagedState
from shardkv.storage.faults import fault_of, meaning_of

pytestmark = pytest.mark.quick
NOW = 10 * TOLD_MS


def status(repaired_ms: int, lost: bool = False, suspect: bool = False, **more: Any) -> dict[str, Any]:
    item = {"file": "rocks/db-1/000008.sst", "why": "W", "found_ms": NOW - 9000, "repaired_ms": repaired_ms}
    damage = {
        "history": [{**item, "repaired_from": 1}],
        "now_ms": NOW,
        "state_lost": lost,
        "suspect_disk": suspect,
    }
    return {"wall_ms": NOW, "damage": {**damage, "leader": 1, "alone": False}, **more}


def test_damage_is_a_problem_until_it_is_repaired_and_then_a_note_for_a_day() -> None:
    present = status(0, lost=True)
    assert notes_of(present) == []
    (line,) = damage_problems(present)
    assert "000008.sst was found damaged" in line and "waits for the leader's snapshot" in line
    present["damage"] |= {"refused": "it needs 150.0 MB", "repairing_from": 2, "percent": 0}
    assert "the snapshot of replica 2 cannot be taken: it needs 150.0 MB." in damage_problems(present)[0]
    repaired = status(NOW - 1000)
    assert damage_problems(repaired) == []
    (line,) = notes_of(repaired)
    assert "000008.sst was found damaged" in line and "repaired from replica 1" in line
    old = status(NOW - TOLD_MS - 1)
    assert damage_problems(old) == notes_of(old) == []
    assert "suspect" in damage_problems(status(NOW - 1000, suspect=True))[0]
    assert damage_problems({}) == notes_of({"damage": None, "log_cut": None}) == []


def test_a_cut_log_is_told_for_a_day() -> None:
    (line,) = notes_of({"wall_ms": NOW, "log_cut": {"bytes": 1168, "at_ms": NOW - 5}})
    assert "cut 1,168 bytes of an unfinished write" in line
    assert notes_of({"wall_ms": NOW, "log_cut": {"bytes": 168, "at_ms": NOW - TOLD_MS}}) == []


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        (
            "Corruption: block checksum mismatch: stored(context removed) = 3494136748, computed = 185, type = 1  "
            "in /d/rocks/db-1/000008.sst offset 20480 size 4058",
            "a block at byte 20480 does not match its checksum",
        ),
        (
            "IO error: While pread offset 32768 len 4088: /d/rocks/db-1/000008.sst: Input/output error",
            "the disk cannot read it at byte 32768: Input/output error",
        ),
        (
            "IO error: No such file or directory: While open a file for random read: /d/rocks/db-1/000008.sst: "
            "No such file or directory",
            "the file is missing",
        ),
        ("Corruption: bad block contents in /d/rocks/db-1/000008.sst", "bad block contents"),
    ],
)
def test_what_rocksdb_says_is_told_in_plain_words(text: str, meaning: str) -> None:
    assert meaning_of(text) == meaning
    fault = fault_of(Exception(text), Path("/d/rocks"))
    assert isinstance(fault, DamagedState)
    told = named_below(Path("/d"), fault)
    assert (told.file, told.why) == ("rocks/db-1/000008.sst", meaning)
    assert named_below(Path("/other"), fault).file == "/d/rocks/db-1/000008.sst"
