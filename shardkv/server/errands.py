"""The leader's errands: claim the group's place, learn configurations, fetch shards that come, let go of shards that went.

Each errand asks another process and proposes what it heard to its own log; the
state machine decides whether that still applies. So an errand may be cut off
anywhere, run twice, or run at two replicas that both think they lead: nothing is
lost but time. Errands run only while this replica leads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import takewhile
from random import Random

from google.protobuf.message import DecodeError

from shardkv import shardkv_pb2 as pb
from shardkv.raft.errors import RaftError
from shardkv.raft.figures import settled_voters
from shardkv.raft.replica import Replica
from shardkv.raft.space_watch import has_room_for
from shardkv.shardctrler import shardctrler_pb2 as ctl
from shardkv.shardctrler.client import (
    AccessDenied,
    AdminRefused,
    BadQuery,
    ControllerClient,
    ControllerUnavailable,
)
from shardkv.shardctrler.codec import change_to_pb
from shardkv.shardctrler.shard_map import Gid, Group
from shardkv.state import commands, layout
from shardkv.state.cursor import JOURNAL
from shardkv.state.machine import ShardMachine
from shardkv.state.row import Row, State
from shardkv.state.rows import cursor_to_pb
from shardkv.wire.backoff import longer, spread
from shardkv.wire.calls import Code, Dialer, Unreachable, parse

log = logging.getLogger(__name__)

CALL_SECONDS = 2.0
NEWS_SECONDS = 10.0  # one long poll for configurations
BACKOFF_SECONDS = (0.005, 0.5)
CHANGES_AT_ONCE = 64
MOST_REST_SECONDS = 0.1
STUCK_SECONDS = 10.0  # without headway, to be worth a word
ABANDON_SECONDS = 3.0  # without headway while the giver is closed: it had better serve again

Errand = tuple[str, int, int]  # kind, shard, epoch


class Migrator:
    """Runs the errands of one replica; call `turned` whenever state may have changed."""

    def __init__(
        self,
        replica: Replica,
        machine: ShardMachine,
        controller: ControllerClient,
        dialer: Dialer,
        rng: Random,
    ) -> None:
        self._replica, self._machine = replica, machine
        self._controller, self._dialer, self._rng = controller, dialer, rng
        self._errands: dict[Errand, asyncio.Task[None]] = {}
        self._preferred: dict[Gid, str] = {}  # who answered last for a group
        self._seen = (False, -1)
        # By shard and epoch: since when an errand makes no headway, why, when to say so (seconds).
        self._waiting: dict[tuple[int, int], tuple[float, str, float]] = {}

    def turned(self) -> None:
        """Begin and end errands as leadership and rows have it. Cheap when nothing changed."""
        leads = self._replica.is_leader
        applied = self._machine.applied.index
        if (leads, applied) == self._seen:
            return
        self._seen = (leads, applied)
        if not leads:
            self._cancel_all()
            return
        self._begin(("learn", 0, 0), self._learn_forever)
        if self._moved_away():
            self._begin(("announce", 0, 0), self._announce)
        for row in self._machine.ownership.rows.values():
            if row.state is State.PULLING:
                self._begin(("fetch", row.shard, row.epoch), partial(self._fetch, row.shard, row.epoch))
            elif row.inherits:
                self._begin(("inherit", row.shard, row.epoch), partial(self._inherit, row.shard))
            elif row.state is State.FROZEN or row.comes_back:
                self._begin(("release", row.shard, row.epoch), partial(self._release, row.shard, row.epoch))

    async def stop(self) -> None:
        tasks = list(self._errands.values())
        self._cancel_all()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- errands

    async def _learn_forever(self) -> None:
        """Follow the configurations, one after the other, through our log, from our first join on."""
        while True:
            ownership = self._machine.ownership
            if not self._machine.incarnation:
                await self._replica.propose(commands.begin(self._rng.getrandbits(64) or 1))
            elif not ownership.joins[0]:
                await self._claim(0)
            else:
                known = ownership.config_num
                changes = await self._controller.changes(
                    known, NEWS_SECONDS, CALL_SECONDS, limit=CHANGES_AT_ONCE
                )
                learnable = list(takewhile(self._machine.ownership.may_learn, changes))
                if learnable:
                    encoded = [change_to_pb(change).SerializeToString() for change in learnable]
                    await self._replica.propose(commands.learn(encoded))
                elif changes:
                    await self._claim(changes[0].num)

    async def _claim(self, joined: int) -> None:
        """Ask whether a join is ours, and log the answer; after a "no", wait for another configuration.

        The incarnation is in our log before it is claimed, and the claim in the controllers'
        log before it is in ours: whoever leads next finds the same, or asks again.
        """
        gid, incarnation = self._machine.gid, self._machine.incarnation
        try:
            num = await self._controller.claim(gid, incarnation, joined, CALL_SECONDS)
        except AdminRefused as refused:
            if refused.kind == "OtherIncarnation" and refused.num > self._machine.ownership.others:
                log.error("the controllers do not let this group in: %s", refused)
                await self._replica.propose(commands.claimed(incarnation, 0, refused.num))
            await self._controller.changes(refused.num, NEWS_SECONDS, CALL_SECONDS, limit=1)
        else:
            await self._replica.propose(commands.claimed(incarnation, num))

    def _moved_away(self) -> tuple[str, ...]:
        """Where our replicas are, if their membership has changed and the map does not name them so."""
        named, present = self._machine.ownership.addresses, settled_voters(self._replica)
        if not named or not present or not self._replica.has_moved:
            return ()
        return present if set(present) != set(named) else ()

    async def _announce(self) -> None:
        """Have the map name our replicas of now, so that clients find them; over when we learn that it does."""
        backoff = BACKOFF_SECONDS[0]
        while present := self._moved_away():
            group = ctl.Group(gid=self._machine.gid, addresses=present)
            try:
                await self._controller.admin(ctl.AdminRequest(readdress=group), CALL_SECONDS)
            except AdminRefused as error:
                # We have left meanwhile, and will learn so; or somebody else claims an address.
                log.warning(
                    "the controllers refused the addresses %s of this group: %s", ", ".join(present), error
                )
            backoff = await self._pause(backoff)

    async def _fetch(self, shard: int, epoch: int) -> None:
        """Copy a shard that the map gave us, chunk by chunk through our log, from whoever has it."""
        loop = asyncio.get_running_loop()
        backoff = BACKOFF_SECONDS[0]
        left_bytes = 0  # to come, as the giver says
        while (row := self._row(shard, epoch, State.PULLING)) is not None:
            began = loop.time()
            assert row.peer is not None
            if row.comes_back:
                await self._replica.propose(commands.give_up(shard, epoch))
                continue
            request = pb.PullRequest(
                shard=shard,
                epoch=epoch,
                gid=row.peer.gid,
                joined=row.peer.joined,
                attempt=row.attempt,
                can_finish=has_room_for(self._replica, left_bytes),
            )
            getattr(request, "from").CopyFrom(cursor_to_pb(row.cursor))
            body = await self._ask(row.peer.gid, row.peer.addresses, "shard.pull", request.SerializeToString())
            reply = pb.PullReply.FromString(body) if body is not None else pb.PullReply()
            if reply.ended and row.goes_on:  # it has: what it says stays true, and we have not installed
                await self._replica.propose(commands.ended(shard, epoch))
                continue
            if not reply.ready:  # the giver is down, is gone, or this replica of it has not come so far
                why = "does not answer" if body is None else "has not come so far"
                if reply.other_group:
                    why = _other(row.peer, reply.incarnation)
                elif reply.ended:
                    why = "has taken the shard back, by a configuration that this group has not learnt yet"
                self._waits(shard, epoch, f"{_named(row.peer)} {why}")
                if body is not None:
                    self._try_another(row.peer.gid, row.peer.addresses)
                backoff = await self._pause(backoff)
                continue
            if not all(layout.belongs(item.key, shard, row.start, row.end) for item in reply.items):
                log.error("group %d sent items of other shards with shard %d: refused", row.peer.gid, shard)
                backoff = await self._pause(backoff)
                continue
            left_bytes = reply.left_bytes
            needs_room = bool(reply.items) or not reply.final
            if needs_room and not has_room_for(self._replica, left_bytes):
                # The giver serves as long as we have no room. If it has stopped for us, we let it serve again.
                self._waits(
                    shard, epoch, f"this group's disks have no room for the {left_bytes:,} bytes to come"
                )
                if reply.frozen:
                    await self._replica.propose(commands.abandon(shard, epoch, request.attempt))
                backoff = await self._pause(backoff)
                continue
            backoff = BACKOFF_SECONDS[0]
            self._waiting.pop((shard, epoch), None)
            chunk = pb.Install(
                shard=shard,
                epoch=epoch,
                attempt=request.attempt,
                next=reply.next,
                items=reply.items,
                final=reply.final,
                clock_ms=reply.clock_ms,
            )
            getattr(chunk, "from").CopyFrom(cursor_to_pb(row.cursor))
            if chunk.next == getattr(chunk, "from") and not chunk.items and not chunk.final:
                backoff = await self._pause(backoff)  # at the journal's end, and not yet frozen
                continue
            await self._replica.propose(commands.install(chunk))
            if chunk.next.phase != JOURNAL:
                # The bulk takes at most half of the time: both groups serve others meanwhile.
                await asyncio.sleep(min(loop.time() - began, MOST_REST_SECONDS))

    async def _inherit(self, shard: int) -> None:
        """After a split or merge: take the exactly-once records over, step by step, in half of the time."""
        loop = asyncio.get_running_loop()
        while (row := self._machine.ownership.rows.get(shard)) is not None and row.inherits:
            began = loop.time()
            await self._replica.propose(commands.inherit(shard, row.inherited))
            await asyncio.sleep(min(loop.time() - began, MOST_REST_SECONDS))

    async def _release(self, shard: int, epoch: int) -> None:
        """Delete our frozen copy once the next owner says that it serves, or serve again if it never will.

        Each answer that we act on is a fact of the taker's log that stays true.
        """
        backoff = BACKOFF_SECONDS[0]
        while (row := self._lent(shard, epoch)) is not None:
            assert row.peer is not None
            if row.state is State.LENDING:  # not closed, and the map gives it back
                await self._replica.propose(commands.keep(shard, epoch))
                continue
            request = pb.ServesRequest(
                shard=shard,
                epoch=epoch,
                gid=row.peer.gid,
                joined=row.peer.joined,
                attempt=row.attempt,
                frozen=True,
            )
            body = await self._ask(
                row.peer.gid, row.peer.addresses, "shard.serves", request.SerializeToString()
            )
            reply = pb.ServesReply.FromString(body) if body is not None else pb.ServesReply()
            if reply.yes:
                await self._replica.propose(commands.release(shard, epoch))
                self._waiting.pop((shard, epoch), None)
            elif reply.given_up and row.comes_back:
                await self._replica.propose(commands.take_back(shard, epoch))
                self._waiting.pop((shard, epoch), None)
            elif reply.attempt > request.attempt:
                log.warning(
                    "shard %d@%d: %s cannot take the shard now: this group serves it again",
                    shard,
                    epoch,
                    _named(row.peer),
                )
                await self._replica.propose(commands.thaw(shard, epoch, reply.attempt))
                self._waiting.pop((shard, epoch), None)
            else:
                why = "does not answer" if body is None else "does not serve it yet"
                if reply.other_group:
                    why = _other(row.peer, reply.incarnation)
                self._waits(shard, epoch, f"{_named(row.peer)} {why}")
                if body is not None:  # "no", or only this replica of it lags behind
                    self._try_another(row.peer.gid, row.peer.addresses)
                backoff = await self._pause(backoff)

    def giver_waits(self, shard: int, epoch: int, attempt: int) -> None:
        """The giver of a shard asks whether we serve: it has stopped serving. Let it go on if we cannot.

        It decides nothing: what we tell it, and do, rests on our own log. Only the leader knows of headway.
        """
        row = self._row(shard, epoch, State.PULLING)
        since = self._waiting.get((shard, epoch), (0.0, "", 0.0))[0]
        if row is None or row.attempt != attempt or not since or not self._replica.is_leader:
            return
        if asyncio.get_running_loop().time() - since >= ABANDON_SECONDS:
            self._begin(("abandon", shard, epoch), partial(self._abandon, shard, epoch, attempt))

    async def _abandon(self, shard: int, epoch: int, attempt: int) -> None:
        """Let go of this attempt, so that the giver serves again meanwhile; the next one follows."""
        await self._replica.propose(commands.abandon(shard, epoch, attempt))

    # ---- what is stuck

    def stuck(self, shard: int, epoch: int) -> tuple[float, str]:
        """(seconds, why) of a hand-over that makes no headway; (0, "") of one that does."""
        since, why, _ = self._waiting.get((shard, epoch), (0.0, "", 0.0))
        seconds = asyncio.get_running_loop().time() - since
        return (seconds, why) if why and seconds >= STUCK_SECONDS else (0.0, "")

    def _waits(self, shard: int, epoch: int, why: str) -> None:
        """No headway now: said aloud after a while, and again when that has doubled."""
        now = asyncio.get_running_loop().time()
        since, _, say_after = self._waiting.get((shard, epoch), (now, "", STUCK_SECONDS))
        if now - since >= say_after:
            log.warning("shard %d@%d is stuck for %.0f s: %s", shard, epoch, now - since, why)
            say_after *= 2
        self._waiting[shard, epoch] = (since, why, say_after)

    # ---- inside

    def _row(self, shard: int, epoch: int, state: State) -> Row | None:
        row = self._machine.ownership.rows.get(shard)
        return row if row is not None and row.state is state and row.epoch == epoch else None

    def _lent(self, shard: int, epoch: int) -> Row | None:
        """The row of a hand-over that we ask the taker about: frozen, or ended by the map."""
        frozen = self._row(shard, epoch, State.FROZEN)
        lending = self._row(shard, epoch, State.LENDING)
        return frozen or (lending if lending is not None and lending.comes_back else None)

    async def _ask(self, gid: Gid, addresses: Sequence[str], method: str, payload: bytes) -> bytes | None:
        """One answer from another group, or None; moves on to the next replica when there is none."""
        address = self._preferred.setdefault(gid, self._rng.choice(list(addresses)))
        try:
            code, body = parse(await self._dialer.call(address, method, payload, CALL_SECONDS))
        except (Unreachable, ValueError) as error:
            log.debug("%s of group %d: %s", method, gid, error)
            code, body = Code.STOPPED, b""
        if code is Code.OK:
            self._preferred[gid] = address
            return body
        hint = body.decode(errors="replace") if code is Code.NOT_LEADER else ""
        if hint:
            self._preferred[gid] = hint
        else:
            self._try_another(gid, addresses)
        return None

    def _try_another(self, gid: Gid, addresses: Sequence[str]) -> None:
        address = self._preferred.get(gid, "")
        position = addresses.index(address) if address in addresses else 0
        self._preferred[gid] = addresses[(position + 1) % len(addresses)]

    async def _pause(self, backoff: float) -> float:
        await asyncio.sleep(spread(backoff, self._rng))
        return longer(backoff, BACKOFF_SECONDS)

    def _begin(self, errand: Errand, work: Callable[[], Awaitable[None]]) -> None:
        if errand not in self._errands:
            self._errands[errand] = asyncio.get_running_loop().create_task(self._run(errand, work))

    async def _run(self, errand: Errand, work: Callable[[], Awaitable[None]]) -> None:
        """Do it until it is done or we no longer lead, whatever the world answers."""
        try:
            while self._replica.is_leader:
                try:
                    await work()
                    return
                except (RaftError, ControllerUnavailable, AccessDenied, BadQuery, DecodeError) as error:
                    log.debug("%s of shard %d@%d: %s", *errand, error)
                    if errand[1]:
                        self._waits(errand[1], errand[2], str(error))
                    await self._pause(BACKOFF_SECONDS[0] * 4)
        finally:
            if self._errands.get(errand) is asyncio.current_task():  # else a later one took its place
                del self._errands[errand]

    def _cancel_all(self) -> None:
        for task in self._errands.values():
            task.cancel()
        self._errands.clear()
        self._waiting.clear()


def _other(group: Group, incarnation: int) -> str:
    return (
        f"is another group now (incarnation {incarnation:016x}) than the one that joined in configuration "
        f"{group.joined}, whose disks are gone or which runs elsewhere"
    )


def _named(group: Group) -> str:
    return f"group {group.gid} at {', '.join(group.addresses)}"
