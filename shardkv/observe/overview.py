"""What the whole cluster looks like: one question to each process, put together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any

from shardkv.observe.notes import damage_problems, notes_of
from shardkv.shardctrler.client import ControllerClient
from shardkv.shardctrler.shard_map import Config, Gid, ShardId
from shardkv.wire.bounded_json import parse_json
from shardkv.wire.calls import Code, Dialer, Unreachable, parse

STATUS_SECONDS = 1.0
LAGGING_ENTRIES = 10_000  # a replica so far behind is named
CERTIFICATE_DAYS = 30  # before its end a certificate is named
CLOCK_APART_MS = 2000  # … and one whose wall clock differs so much from those of its group


@dataclass
class Overview:
    """The latest configuration, and what each replica said of itself (None: no answer)."""

    config: Config
    controllers: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    groups: dict[Gid, dict[str, dict[str, Any] | None]] = field(default_factory=dict)

    def leader(self, gid: Gid) -> dict[str, Any] | None:
        """What the group's leader said; the one with the highest term, if two claim it."""
        said = [status for status in self.groups.get(gid, {}).values() if status]
        leaders = [status for status in said if status["role"] == "leader"]
        return max(leaders, key=lambda status: status["term"], default=None)

    def settled(self) -> tuple[int, int]:
        """(shards that their owner serves under the latest configuration, shards)."""
        serving = 0
        for shard in self.config.by_id.values():
            leader = self.leader(shard.gid)
            row = leader and leader["shards"].get(str(shard.id))
            if leader and row and row["state"] == "SERVING" and row["epoch"] == shard.epoch:
                serving += leader["config_num"] >= self.config.num and not row["waiting"]
        return serving, len(self.config.by_id)

    def as_json(self) -> dict[str, object]:
        """What `admin status -o json` prints."""
        serving, total = self.settled()
        return {
            "config_num": self.config.num,
            "shards": total,
            "serving": serving,
            "controllers": self.controllers,
            "groups": {str(gid): replicas for gid, replicas in sorted(self.groups.items())},
            "problems": problems(self),
            "notes": notes(self),
        }


def role_of(said: Mapping[str, Any] | None) -> str:
    """What a replica is, for people, with what is wrong with it."""
    if said is None:
        return "no answer"
    if said.get("disks", {}).get("known_as"):
        return "REFUSED (disk)"
    if (said.get("damage") or {}).get("state_lost"):
        return f"{said['role']}, DAMAGED"
    if said.get("read_only"):
        return f"{said['role']}, READ-ONLY"
    if said.get("disk", "ok") != "ok":
        return f"{said['role']}, disk HANGS"
    room = said.get("room", "PLENTY")
    return str(said["role"]) if room == "PLENTY" else f"{said['role']}, disk {room.lower()}"


def moves(overview: Overview) -> list[str]:
    """Hand-overs under way, a line each: from whom, to whom, and how far."""
    found = []
    for gid in sorted(overview.groups):
        for shard, row in ((overview.leader(gid) or {}).get("shards") or {}).items():
            if row["state"] == "PULLING":
                source = f" from group {row['peer']}" if row.get("peer") else ""
                found.append(
                    f"shard {shard} is on its way to group {gid}{source}: {row.get('copying', 'begun')}"
                )
            elif row["state"] == "FROZEN":
                found.append(
                    f"shard {shard} waits at group {gid} to be let go of: does group {row.get('peer')} serve?"
                )
    return found


def held_up(overview: Overview) -> dict[ShardId, str]:
    """Shards that cannot move since their next group does not answer: why, and what to do, by shard."""
    found = {}
    for gid in sorted(overview.groups):
        for shard, row in ((overview.leader(gid) or {}).get("shards") or {}).items():
            taker = row.get("peer")
            if row["state"] not in ("LENDING", "FROZEN") or taker not in overview.groups:
                continue
            if overview.leader(taker) is None:
                found[int(shard)] = (
                    f"shard {shard} cannot move to group {taker}, which has no leader that answers: "
                    + (
                        f"group {gid} serves it meanwhile. Start group {taker}, or take the move back: "
                        f"`shardkv admin move {shard} {gid}`"
                        if row["state"] == "LENDING"
                        else f"group {gid} has closed it, and nobody serves it. Start group {taker}: it may have all of it"
                    )
                )
    return found


def what_waits(overview: Overview) -> list[str]:
    """Why shards do not serve where the map has them, a line each: the newest configuration waits for that."""
    found = list(held_up(overview).values())
    found += [
        f"group {gid} has no leader that answers"
        for gid in sorted({shard.gid for shard in overview.config.by_id.values()} & overview.groups.keys())
        if overview.leader(gid) is None
    ]
    return found + _stuck(overview)


def problems(overview: Overview) -> list[str]:
    """What an operator should look at, a line each; empty if all is well."""
    found = [*_nobody_serves(overview), *held_up(overview).values()]
    for name, replicas in _by_name(overview):
        said = {address: status for address, status in replicas.items() if status}
        if not any(status["role"] == "leader" for status in said.values()):
            found.append(f"{name} has no leader that answers")
        if any(status.get("read_only") for status in said.values()):
            found.append(f"{name} is READ-ONLY but for deletes: a quorum's disks are nearly full")
        found += _wrong_clocks(name, said)
        newest = max((status["commit_index"] for status in said.values()), default=0)
        for address in replicas:
            if address not in said:
                found.append(f"{name}: {address} does not answer")
                continue
            status = said[address]
            if status.get("room", "PLENTY") != "PLENTY":
                megabytes = status.get("free_bytes", 0) / 1e6
                found.append(f"{name}: {address} has {megabytes:,.0f} MB left on its disk ({status['room']})")
            if status.get("disk", "ok") != "ok":
                found.append(f"{name}: {address}: {status['disk']}, so another replica leads")
            found += [f"{name}: {address} {why}" for why in _of_connections(status)]
            found += [f"{name}: {address} {why}" for why in _of_certificates(status)]
            found += [f"{name}: {address} {why}" for why in _of_disks(status)]
            found += [f"{name}: {address}: {line}" for line in damage_problems(status)]
            if newest - status["applied_index"] > LAGGING_ENTRIES:
                found.append(f"{name}: {address} is {newest - status['applied_index']:,} entries behind")
    for gid in sorted(overview.groups):
        found += _wrong_incarnation(overview, gid)
    return found + _stuck(overview)


def _stuck(overview: Overview) -> list[str]:
    """A line for each hand-over that has made no headway for a while."""
    return [
        f"shard {shard} is stuck at group {gid} ({row['state'].lower()}) "
        f"for {row['stuck_seconds']:.0f} s: {row['why']}"
        for gid in sorted(overview.groups)
        for shard, row in ((overview.leader(gid) or {}).get("shards") or {}).items()
        if row.get("stuck_seconds")
    ]


def notes(overview: Overview) -> list[str]:
    """What happened of late and needs no hand, a line each."""
    return [
        f"{name}: {address}: {line}"
        for name, replicas in _by_name(overview)
        for address, status in replicas.items()
        if status
        for line in notes_of(status)
    ]


def _by_name(overview: Overview) -> list[tuple[str, dict[str, dict[str, Any] | None]]]:
    groups = ((f"group {gid}", group) for gid, group in sorted(overview.groups.items()))
    return [("the controller", overview.controllers), *groups]


def _nobody_serves(overview: Overview) -> list[str]:
    """A line if shards have no group: after the last one has left, or before the first one joins."""
    shards = overview.config.by_id
    unassigned = sum(not shard.gid for shard in shards.values())
    if not unassigned:
        return []
    holders = sorted({shard.holder for shard in shards.values() if shard.holder and not shard.gid})
    where = f"; group {', '.join(map(str, holders))} still has their data" if holders else ""
    return [
        f"nobody serves {unassigned} of {len(shards)} shards: they have no group{where}. "
        "Let a group join: `shardkv admin join`"
    ]


def _wrong_clocks(name: str, said: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each replica whose wall clock differs from what most of its group's clocks say."""
    ahead_ms = {address: status.get("wall_ahead_ms", 0) for address, status in said.items()}
    usual_ms = median(ahead_ms.values()) if ahead_ms else 0
    return [
        f"{name}: the wall clock of {address} is {abs(ahead - usual_ms) / 1000:,.0f} s "
        f"{'ahead of' if ahead > usual_ms else 'behind'} those of the others: set it right"
        for address, ahead in ahead_ms.items()
        if abs(ahead - usual_ms) > CLOCK_APART_MS
    ]


def _wrong_incarnation(overview: Overview, gid: Gid) -> list[str]:
    """A line if replicas of a group hold another state than the one that joined: it serves nothing."""
    claimed = overview.config.claims.get(gid, 0)
    for status in overview.groups[gid].values():
        held = status and status.get("incarnation")
        if claimed and held and held != f"{claimed:016x}":
            return [
                f"group {gid}: its replicas hold another incarnation ({held}) than the map knows ({claimed:016x}): "
                "their disks were lost, and it serves nothing. Start it on the disks that it had, or let it leave; "
                'docs/operations.md, "A group that lost all of its disks", says what becomes of its data'
            ]
    return []


def _of_connections(status: Mapping[str, Any]) -> list[str]:
    """Whether a replica cannot take more connections."""
    said = status.get("connections") or {}
    found = []
    if said.get("accepting_pauses"):
        found.append("accepts no connections at this moment: the system has no file descriptor for them")
    for kind, most in zip(("strangers", "known"), said.get("places", ()), strict=False):
        if said[kind] >= most:
            found.append(f"has no place left for connections ({kind}: {most}): the idlest are closed")
    return found


def _of_certificates(status: Mapping[str, Any]) -> list[str]:
    """A certificate that ends soon, or files that cannot be used."""
    said = status.get("certificates") or {}
    found = (
        [f"cannot use its TLS files, and goes on with the old ones: {said['problem']}"]
        if said.get("problem")
        else []
    )
    for name, key, most in (
        ("TLS certificate or its CA", "expires_at", CERTIFICATE_DAYS),
        ("revocation list", "revocations_until", 1),
    ):
        if said.get(key):
            left = (said[key] - status.get("wall_ms", 0) / 1000) / 86_400
            if left <= 0:
                found.append(f"has a {name} that has EXPIRED on {_day(said[key])}")
            elif left < most:
                found.append(f"has a {name} that expires in {left:.0f} days, on {_day(said[key])}")
    return found


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _of_disks(status: Mapping[str, Any]) -> list[str]:
    """What is wrong with whose disk stands behind a replica's number."""
    disk, found = status.get("disks", {}), []
    if disk.get("known_as"):
        gid, replica = status.get("gid", 0), status["replica"]
        found.append(
            f"takes no part: its disk is {disk['incarnation']}, the group knows replica {replica} with disk "
            f"{disk['known_as']}. Start it on that one's directory, or let this one in: "
            f"`shardkv admin member replace {gid} {replica} {replica}=HOST:PORT`"
        )
    found += [
        f"drops the mail of replica {node}, which comes from disk {incarnation}: the group knows another"
        for node, incarnation in disk.get("refuses", {}).items()
    ]
    return found


async def ask_status(dialer: Dialer, address: str, method: str) -> dict[str, Any] | None:
    try:
        code, body = parse(await dialer.call(address, method, b"", STATUS_SECONDS))
        if code is not Code.OK:
            return None
        status: dict[str, Any] = parse_json(body)
    except (Unreachable, ValueError):
        return None
    if not isinstance(status, dict):
        return None
    if "wall_ms" in status:
        # Against our own steady clock, which has no epoch: only differences between processes mean anything.
        status["wall_ahead_ms"] = status["wall_ms"] - asyncio.get_running_loop().time() * 1000
    return status


async def look(
    controller: ControllerClient, dialer: Dialer, controllers: Sequence[str], timeout: float
) -> Overview:
    """Raises ControllerUnavailable."""
    overview = Overview(await controller.query(None, timeout))
    asked = [(None, address) for address in controllers]
    asked += [(group.gid, address) for group in overview.config.groups.values() for address in group.addresses]  # type: ignore[misc]
    answers = await asyncio.gather(
        *(ask_status(dialer, address, "kv.status" if gid else "ctl.status") for gid, address in asked)
    )
    for (gid, address), status in zip(asked, answers, strict=True):
        if gid is None:
            overview.controllers[address] = status
        else:
            overview.groups.setdefault(gid, {})[address] = status
    return overview


async def wait_settled(
    observe: Callable[[], Awaitable[Overview]], timeout: float, progress: Callable[[int, int], None]
) -> bool:
    """Wait until every shard serves under the latest configuration; whether that came to be in time."""
    deadline = asyncio.get_running_loop().time() + timeout
    while True:
        overview = await observe()
        serving, total = overview.settled()
        progress(serving, total)
        if serving == total:
            return True
        if not overview.config.groups:
            return False  # nobody serves, and waiting does not change that
        if asyncio.get_running_loop().time() >= deadline:
            return False
        await asyncio.sleep(0.1)
