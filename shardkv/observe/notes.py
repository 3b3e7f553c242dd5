"""What a replica says of its own disk and state, in lines for people: what needs a hand, and what only to know.

A *problem* lasts until somebody or something has dealt with it. A *note* tells what happened and is over:
it is shown for a day.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

TOLD_MS = 24 * 60 * 60 * 1000


def damage_problems(status: Mapping[str, Any]) -> list[str]:
    """Damage in a replica's state that is not repaired, and a disk that is suspect."""
    damage = status.get("damage")
    if not damage:
        return []
    found = []
    if damage["state_lost"]:
        found.append(f"{_found(damage)}; {repair_line(damage)}")
    if damage["suspect_disk"]:
        found.append("damage was found again and again: the disk itself is suspect, replace it")
    return found


def notes_of(status: Mapping[str, Any]) -> list[str]:
    """What happened to a replica in the last day and is over."""
    found, damage, cut = [], status.get("damage"), status.get("log_cut")
    if damage and not damage["state_lost"]:
        last = damage["history"][-1]
        if damage["now_ms"] - last["repaired_ms"] < TOLD_MS:
            source = f" from replica {last['repaired_from']}" if last["repaired_from"] else " from its log"
            found.append(f"{_found(damage)}; repaired{source} at {when(last['repaired_ms'])}")
    if cut and status.get("wall_ms", 0) - cut["at_ms"] < TOLD_MS:
        found.append(
            f"its start at {when(cut['at_ms'])} cut {cut['bytes']:,} bytes of an unfinished write from the end of its "
            "log, as after a crash (damage there looks the same: docs/operations.md)"
        )
    return found


def _found(damage: Mapping[str, Any]) -> str:
    last = damage["history"][-1]
    return f"{last['file']} was found damaged at {when(last['found_ms'])} ({last['why']})"


def repair_line(damage: Mapping[str, Any]) -> str:
    """How the repair of a lost state goes, or what it waits for."""
    if damage.get("refused"):
        source = f"of replica {damage['repairing_from']} " if "percent" in damage else ""
        return (
            f"the snapshot {source}cannot be taken: {damage['refused']}. The damaged files that were set aside take "
            "room, too (docs/operations.md)"
        )
    if "percent" in damage:
        return f"being repaired from replica {damage['repairing_from']}, {damage['percent']} %"
    if damage["leader"]:
        return "waits for the leader's snapshot"
    if damage["alone"]:
        return (
            "no other replica has a copy, so nothing can repair it: the replica serves nothing, and its damaged "
            "files are kept; restore a backup into a new group"
        )
    return "waits for a leader: only a replica whose state is whole can repair it"


def when(time_ms: int) -> str:
    """A moment, for people here."""
    return datetime.fromtimestamp(time_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")
