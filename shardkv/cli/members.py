"""admin member list, add, promote, remove, replace: who the replicas of a group, or of the controller, are.

The group's leader does the work (`raft/reconfigure.py`): newcomers learn first, then all
change at once. Every command says what the members should be, so one that was cut off
may be given again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from dataclasses import replace as replace_fields
from typing import Any

import click

from shardkv.cli.common import MOST, UNREACHABLE, Failed, Seconds, handled, output_option
from shardkv.cli.common import timeout_option as common_timeout
from shardkv.cli.options import controllers_option
from shardkv.cli.output import print_json, print_table, say
from shardkv.cli.session import Session, with_session
from shardkv.observe.overview import ask_status
from shardkv.raft.protocol.quorum import majority
from shardkv.wire.address import split_addresses
from shardkv.wire.calls import Code, Unreachable, parse

GID = click.IntRange(0, MOST)
CALL_SECONDS = 35.0  # a little more than the server gives one attempt
RETRY_SECONDS = 0.2

timeout_option = click.option(
    "--timeout",
    type=Seconds(),
    default=120.0,
    show_default=True,
    help="Seconds for the newcomer to catch up, most of it.",
)
force_option = click.option("--force", is_flag=True, help="Even if too few of the members that stay answer.")


@dataclass(frozen=True)
class Members:
    """Replica numbers to addresses."""

    voters: dict[str, str]
    learners: dict[str, str] = field(default_factory=dict)
    disks: dict[str, str] = field(default_factory=dict)  # incarnations that are to be, of some

    def everybody(self) -> dict[str, str]:
        return {**self.voters, **self.learners}

    def without(self, number: str) -> Members:
        def rest(members: dict[str, str]) -> dict[str, str]:
            return {node: address for node, address in members.items() if node != number}

        return Members(rest(self.voters), rest(self.learners))


@click.group()
def member() -> None:
    """Look at and change the replicas of group GID; 0 is the controller."""


async def _look(session: Session, gid: int, timeout: float) -> dict[str, dict[str, Any] | None]:
    """What each replica of the group says; also those that only the group itself knows of."""
    overview = await session.overview(timeout)
    if gid and gid not in overview.config.groups:
        raise Failed(f"group {gid} is not in configuration {overview.config.num}")
    replicas = dict(overview.groups[gid] if gid else overview.controllers)
    others = {
        address
        for said in list(replicas.values())
        if said
        for kind in said["members"].values()
        for address in kind.values()
    }
    for address in sorted(others - replicas.keys() - {""}):
        replicas[address] = await ask_status(session.dialer, address, _method(gid))
    return replicas


def _method(gid: int) -> str:
    return "kv.status" if gid else "ctl.status"


def _leader(gid: int, replicas: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    leaders = [said for said in replicas.values() if said and said["role"] == "leader"]
    if not leaders:
        raise Failed(f"group {gid} has no leader that answers", UNREACHABLE)
    return max(leaders, key=lambda said: int(said["term"]))


@member.command("list")
@click.argument("gid", type=GID)
@common_timeout
@controllers_option
@output_option
@handled
def list_members(gid: int, timeout: float, controllers: str | None, output: str) -> None:
    """The replicas of group GID, as its leader knows them."""

    async def run(session: Session) -> list[dict[str, object]]:
        replicas = await _look(session, gid, timeout)
        members = _leader(gid, replicas)["members"]
        return [
            {
                "replica": int(node),
                "address": address,
                "member": {"voters": "voter", "outgoing": "leaving", "learners": "learner"}[kind],
                "role": (replicas.get(address) or {"role": "no answer"})["role"],
            }
            for kind in ("voters", "outgoing", "learners")
            for node, address in members[kind].items()
            if kind != "outgoing" or node not in members["voters"]
        ]

    rows = with_session(controllers, run)
    if output == "json":
        print_json(rows)
    else:
        print_table(("replica", "address", "member", "role"), [tuple(row.values()) for row in rows])


def _newcomer(text: str) -> tuple[str, str]:
    number, _, address = text.partition("=")
    try:
        if not 0 < int(number) <= MOST:
            raise ValueError
        return str(int(number)), split_addresses(address)[0]
    except ValueError:
        raise click.UsageError(f"{text!r} is not NUMBER=HOST:PORT") from None


@member.command()
@click.argument("gid", type=GID)
@click.argument("newcomer")
@click.option("--learner", is_flag=True, help="It gets the log and does not vote, until `member promote`.")
@timeout_option
@controllers_option
@output_option
@handled
def add(gid: int, newcomer: str, learner: bool, timeout: float, controllers: str | None, output: str) -> None:
    """Let a replica NEWCOMER (NUMBER=HOST:PORT, started with --join) into group GID."""
    number, address = _newcomer(newcomer)

    def target(now: Members) -> Members:
        _check_new(now.everybody(), number, address)
        if number in now.voters:
            return now
        if learner:
            return Members(now.voters, {**now.learners, number: address})
        return Members({**now.voters, number: address}, now.without(number).learners)

    _change(gid, target, number, address, True, timeout, controllers, output)


@member.command()
@click.argument("gid", type=GID)
@click.argument("replica", type=click.IntRange(1, MOST))
@timeout_option
@controllers_option
@output_option
@handled
def promote(gid: int, replica: int, timeout: float, controllers: str | None, output: str) -> None:
    """Let the learner REPLICA of group GID vote, once it has caught up."""
    number = str(replica)

    def target(now: Members) -> Members:
        if number not in now.everybody():
            raise Failed(f"group {gid} has no replica {replica}; it has {', '.join(now.everybody())}")
        return Members({**now.voters, number: now.everybody()[number]}, now.without(number).learners)

    _change(gid, target, number, None, True, timeout, controllers, output)


@member.command()
@click.argument("gid", type=GID)
@click.argument("replica", type=click.IntRange(1, MOST))
@force_option
@timeout_option
@controllers_option
@output_option
@handled
def remove(gid: int, replica: int, force: bool, timeout: float, controllers: str | None, output: str) -> None:
    """Take REPLICA out of group GID. Stop its process afterwards."""

    def target(now: Members) -> Members:
        rest = now.without(str(replica))
        if not rest.voters:
            raise Failed(f"replica {replica} is the last of group {gid}: `admin leave {gid}` empties a group")
        return rest

    _change(gid, target, None, None, force, timeout, controllers, output)


@member.command()
@click.argument("gid", type=GID)
@click.argument("replica", type=click.IntRange(1, MOST))
@click.argument("newcomer")
@force_option
@timeout_option
@controllers_option
@output_option
@handled
def replace(
    gid: int,
    replica: int,
    newcomer: str,
    force: bool,
    timeout: float,
    controllers: str | None,
    output: str,
) -> None:
    """Let NEWCOMER (NUMBER=HOST:PORT) take the place of REPLICA, dead or alive.

    A newcomer with a number of its own is started with --join. With REPLICA's own number it is that
    replica on another disk, or at another address: started as it always was.
    """
    number, address = _newcomer(newcomer)

    def target(now: Members) -> Members:
        present = now.everybody()
        if str(replica) not in present and number not in present:
            raise Failed(f"group {gid} has no replica {replica}; it has {', '.join(present)}")
        if number != str(replica) and number in now.voters and str(replica) in present:
            # Else a slip of the finger makes the group smaller, and says that it is done.
            raise Failed(
                f"replica {number} votes in group {gid} already: it cannot take the place of replica {replica}. "
                f"To take replica {replica} out, use: shardkv admin member remove {gid} {replica}"
            )
        rest = now.without(str(replica))
        _check_new(rest.everybody(), number, address)
        if str(replica) in now.learners:
            return Members(rest.voters, {**rest.learners, number: address})
        return Members({**rest.voters, number: address}, rest.without(number).learners)

    _change(gid, target, number, address, force, timeout, controllers, output, replacing=True)


def _check_new(now: Mapping[str, str], number: str, address: str) -> None:
    if now.get(number, address) != address:
        raise Failed(f"replica {number} is at {now[number]}; give the newcomer a number never used before")
    if address in [at for node, at in now.items() if node != number]:
        raise Failed(f"another replica is at {address}")


def _change(
    gid: int,
    target: Callable[[Members], Members],
    number: str | None,
    address: str | None,
    force: bool,
    timeout: float,
    controllers: str | None,
    output: str,
    replacing: bool = False,
) -> None:
    """Have the leader, whoever it is by then, bring the group to `target` of what it is now."""

    async def run(session: Session) -> tuple[Members, bool]:
        changed = False
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        wanted: Members | None = None
        why = "no leader answered"
        while loop.time() < deadline:
            try:
                replicas = await _look(session, gid, min(10.0, timeout))
                leader = _leader(gid, replicas)
            except Failed as error:
                if error.status != UNREACHABLE:
                    raise
                why = str(error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if wanted is None:
                before = Members(leader["members"]["voters"], leader["members"]["learners"])
                wanted = target(before)
                if address is not None and number is not None:
                    disk = await _disk_at(session, gid, number, address)
                    known = leader["disks"]["members"].get(number, "")
                    if not replacing and number in before.everybody() and disk != known:
                        raise Failed(
                            f"replica {number} is a member with disk {known or '(not known yet)'}, and {address} "
                            f"has {disk}: `admin member replace {gid} {number} {number}={address}`"
                        )
                    changed = disk != known
                    wanted = replace_fields(wanted, disks={number: disk})
                if replace_fields(wanted, disks={}) == before and not changed:
                    return wanted, False
                if not force:
                    _check_quorum(gid, wanted.voters, replicas, number)
            done, why = await _ask(session, leader["leader"], wanted, deadline - loop.time())
            if done:
                return wanted, True
            await asyncio.sleep(RETRY_SECONDS)
        raise Failed(f"not done in {timeout:.0f} s, and it may still happen: {why}; ask again", UNREACHABLE)

    members, changed = with_session(controllers, run)
    if output == "json":
        print_json({"ok": True, "changed": changed, "members": members.voters, "learners": members.learners})
    else:
        say(
            ("" if changed else "nothing to change: ")
            + f"group {gid} has the replicas {_told(members.voters)}"
            + (f"; the learners {_told(members.learners)}" if members.learners else "")
        )


async def _disk_at(session: Session, gid: int, number: str, address: str) -> str:
    """The incarnation of the disk of the replica that answers at `address`. Raises Failed if that is another one."""
    said = await ask_status(session.dialer, address, _method(gid))
    if said is None:
        raise Failed(
            f"nothing answers at {address}: start replica {number} there first. If its disk is lost or its log damaged, "
            "move its data directory away, and start it on an empty one with the command that it always had; a "
            "replica with a number of its own starts with --join"
        )
    if (said.get("gid", 0), str(said["replica"])) != (gid, number):
        raise Failed(
            f"at {address} is replica {said['replica']} of group {said.get('gid', 0)}, not {number} of group {gid}"
        )
    return str(said["disks"]["incarnation"])


def _told(members: Mapping[str, str]) -> str:
    return ", ".join(f"{node} at {at}" for node, at in sorted(members.items(), key=lambda item: int(item[0])))


def _check_quorum(
    gid: int, wanted: Mapping[str, str], replicas: Mapping[str, dict[str, Any] | None], number: str | None
) -> None:
    up = sum(replicas.get(address) is not None or node == number for node, address in wanted.items())
    if up < majority(len(wanted)):
        raise Failed(
            f"of the {len(wanted)} replicas that group {gid} would have, {up} answer: it could not go on. "
            "Bring others up first, or insist with --force"
        )


async def _ask(session: Session, leader: str, wanted: Members, seconds: float) -> tuple[bool, str]:
    """(whether it is done, why not)"""
    try:
        answered = await session.dialer.call(
            leader, "raft.members", json.dumps(asdict(wanted)).encode(), min(CALL_SECONDS, max(1.0, seconds))
        )
    except Unreachable as error:
        return False, str(error)
    code, body = parse(answered)
    if code is Code.BAD_REQUEST:
        raise Failed(f"refused: {body.decode(errors='replace')}")
    return code is Code.OK, body.decode(errors="replace") or code.name
