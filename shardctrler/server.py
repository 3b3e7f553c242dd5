"""One controller replica as a server: admin requests, queries, and news of changes.

Changes are committed facts, so every replica may tell them, and whoever waits for
the next one is answered as soon as it is applied here. A query of the *latest*
configuration is linearizable, on any replica.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import ClassVar

from google.protobuf.message import DecodeError

from shardkv.raft import figures
from shardkv.raft.errors import Busy, RaftError
from shardkv.raft.replica import Replica
from shardkv.raft.service import change_members, refusal_of
from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.codec import config_to_pb
from shardkv.shardctrler.machine import ControllerMachine
from shardkv.wire.calls import Code, answer, busy_text, refuse
from shardkv.wire.lines import Lines
from shardkv.wire.sealed_answers import Sealing, plainly
from shardkv.wire.turns import OWNER

log = logging.getLogger(__name__)

MAX_WAIT_MS = 60_000
MAX_CHANGES = 256
MAX_WAITING = 20_000  # long polls at once, shared by users; beyond, Busy
BUSY_SECONDS = 1.0


class ControllerServer:
    """Answers the calls of one replica of the controller."""

    def __init__(
        self,
        replica: Replica,
        cluster: str,
        initial_shards: int,
    ) -> None:
        self.replica = replica
        self._cluster, self._initial_shards = cluster, initial_shards
        self.sealing: Sealing = plainly  # what is done to the users before they travel
        assert isinstance(replica.machine, ControllerMachine)
        self.machine: ControllerMachine = replica.machine
        self._news = asyncio.Event()
        self._waiting = Lines(MAX_WAITING)
        self._digest = (0, b"")  # of the state at which entry
        self._known = self._noticed()
        self.about: Callable[[], dict[str, object]] = dict  # of this process, for its status
        self._initializing: asyncio.Task[None] | None = None
        replica.on_turn.append(self._turned)

    async def stop(self) -> None:
        await self.replica.stop()

    async def handle(self, method: str, payload: bytes) -> bytes:
        """Answer one call; bad input is answered too."""
        answering = self.ANSWERS.get(method)
        if answering is None:
            return refuse(Code.BAD_REQUEST, f"the controller has no call {method!r}")
        try:
            return await answering(self, payload)
        except (DecodeError, ValueError) as error:
            return refuse(Code.BAD_REQUEST, f"not a request: {error}")
        except RaftError as error:
            return refusal_of(error, self.replica)

    async def _on_admin(self, payload: bytes) -> bytes:
        return answer(await self.admin(pb.AdminRequest.FromString(payload)))

    async def _on_claim(self, payload: bytes) -> bytes:
        return answer(await self._claim(pb.Claim.FromString(payload)))

    async def _on_query(self, payload: bytes) -> bytes:
        return await self._query(pb.QueryRequest.FromString(payload))

    async def _on_changes(self, payload: bytes) -> bytes:
        return await self._changes(pb.ChangesRequest.FromString(payload))

    async def _on_members(self, payload: bytes) -> bytes:
        return await change_members(self.replica, payload)

    async def _on_accounts(self, payload: bytes) -> bytes:
        return await self._accounts(pb.AccountsRequest.FromString(payload))

    async def _on_users(self, payload: bytes) -> bytes:
        await self.replica.read_barrier()
        return answer(json.dumps(self._users()).encode())

    async def _on_status(self, payload: bytes) -> bytes:
        return answer(self._status())

    async def _on_check(self, payload: bytes) -> bytes:
        return answer(self._check())

    # Who may make each of these is in `wire/methods.py`, which has to have them all.
    ANSWERS: ClassVar[dict[str, Callable[[ControllerServer, bytes], Awaitable[bytes]]]] = {
        "ctl.admin": _on_admin,
        "ctl.claim": _on_claim,
        "ctl.query": _on_query,
        "ctl.changes": _on_changes,
        "ctl.accounts": _on_accounts,
        "ctl.users": _on_users,
        "ctl.status": _on_status,
        "ctl.check": _on_check,
        "raft.members": _on_members,
    }

    async def admin(self, request: pb.AdminRequest) -> bytes:
        """Carry out an admin request. Raises RaftError."""
        if len(request.session) != 16 or request.WhichOneof("op") in (None, "initialize", "claim"):
            reply = pb.AdminReply(refusal="BadRequest", message="no operation, or no session of 16 bytes")
            return reply.SerializeToString()
        return await self.replica.propose(request.SerializeToString())

    async def _claim(self, claim: pb.Claim) -> bytes:
        """Record which incarnation of a group a join belongs to. Raises RaftError."""
        return await self.replica.propose(pb.AdminRequest(claim=claim).SerializeToString())

    async def query(self, request: pb.QueryRequest) -> pb.Config | None:
        """The configuration asked for; None if there is none yet. Raises RaftError."""
        await self.replica.read_barrier()
        config = self.machine.config if request.latest else self.machine.config_at(request.num)
        if config is None:
            return None
        message = config_to_pb(config)
        message.claims.extend(self.machine.claims())
        return message

    async def _query(self, request: pb.QueryRequest) -> bytes:
        config = await self.query(request)
        if config is None:
            return refuse(Code.BAD_REQUEST, f"there is no configuration {request.num} yet")
        return answer(config.SerializeToString())

    async def _changes(self, request: pb.ChangesRequest) -> bytes:
        addresses = self._addresses()
        # Who waits is also told when we move: before those that it knows are gone.
        await self._wait_while(
            lambda: self.machine.config.num <= request.since and self._addresses() == addresses,
            request.wait_ms,
        )
        reply = pb.ChangesReply(
            num=self.machine.config.num,
            # A clerk's first idea of the time: not that of the last change, which may be days old.
            clock_ms=self.replica.now_ms(),
            cluster=self._cluster,
            controllers=self._addresses(),
        )
        limit = min(request.limit or MAX_CHANGES, MAX_CHANGES)
        reply.changes.extend(self.machine.changes_since(request.since, limit))
        return answer(reply.SerializeToString())

    async def _accounts(self, request: pb.AccountsRequest) -> bytes:
        """The users as they are known here; a group that has older ones is told at once, or when they change."""
        await self._wait_while(lambda: self.machine.accounts.version <= request.since, request.wait_ms)
        return answer(self.sealing(self.machine.accounts.encode()))

    def _users(self) -> dict[str, object]:
        accounts = self.machine.accounts
        return {
            "enabled": accounts.enabled,
            "version": accounts.version,
            "users": accounts.listed(),
            "quotas": accounts.quotas.listed(),
        }

    async def _wait_while(self, old: Callable[[], bool], wait_ms: int) -> None:
        """Return when `old` is no longer so, or the time is up: no news is an answer. Raises Busy, Stopped, NotLeader."""
        self.replica.check_serving()
        if wait_ms and old():
            owner = OWNER.get()
            if not self._waiting.enter(owner):
                raise Busy(busy_text(f"{self._waiting.used} clients wait for news", BUSY_SECONDS))
            try:
                async with asyncio.timeout(min(wait_ms, MAX_WAIT_MS) / 1000):
                    while old():
                        await self._news.wait()
            except TimeoutError:
                pass
            finally:
                self._waiting.leave(owner)
        self.replica.check_serving()

    def _addresses(self) -> list[str]:
        """Where our replicas are, once that is not any more what clients were started with."""
        if not self.machine.membership or not self.replica.has_moved:
            return []
        return list(figures.voters(self.replica))

    def _check(self) -> bytes:
        """A digest of the whole state at the last applied entry, for a comparison with the other replicas."""
        self.replica.check_serving()
        applied = self.machine.applied.index
        if self._digest[0] != applied:
            self._digest = applied, blake2b(self.machine.dump(), digest_size=16).digest()
        members = figures.voters(self.replica)
        return json.dumps({"index": applied, "digest": self._digest[1].hex(), "members": members}).encode()

    def _status(self) -> bytes:
        told = {**figures.status(self.replica), **self.about(), "config_num": self.machine.config.num}
        return json.dumps(told).encode()

    def _noticed(self) -> tuple[int, bytes, int]:
        """What somebody may wait for to change."""
        return self.machine.config.num, self.machine.membership, self.machine.accounts.version

    def _turned(self) -> None:
        known = self._noticed()
        if known != self._known or self.replica.node.stopped:
            self._known = known
            self._news.set()
            self._news = asyncio.Event()
        if self.replica.is_leader and self.machine.config.num == 0 and self._initializing is None:
            self._initializing = asyncio.get_running_loop().create_task(self._initialize())

    async def _initialize(self) -> None:
        """The first leader pre-splits the key space; a second attempt finds it done."""
        request = pb.AdminRequest(initialize=pb.Initialize(shards=self._initial_shards))
        try:
            await self.replica.propose(request.SerializeToString())
        except RaftError as error:
            log.info("pre-splitting is left to the next leader: %s", error)
        finally:
            self._initializing = None
