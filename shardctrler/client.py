"""The controller's client: for clerks, for groups and for the command line.

Any replica is asked first; who is not the leader says who is. A call is tried
again, at another replica and with jittered back-off, until it is answered or its
time is up; admin requests carry an identity, so that trying again is safe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Any

from google.protobuf.message import Message

from shardkv.raft.protocol.clock import HeardClock
from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.accounts import Accounts
from shardkv.shardctrler.codec import change_from_pb, config_from_pb
from shardkv.shardctrler.shard_map import Change, Config, Gid, Incarnation
from shardkv.wire.backoff import longer, spread
from shardkv.wire.bounded_json import parse_json
from shardkv.wire.calls import Code, Dialer, Unreachable, parse, retry_after
from shardkv.wire.sealed_answers import Sealing, plainly

ATTEMPT_SECONDS = 1.0
BACKOFF_SECONDS = (0.01, 0.5)


class ControllerUnavailable(Exception):
    """No controller replica gave an answer in time; the text says what was tried."""

    def __init__(self, text: str, retry_after: float = 0.0) -> None:
        """`retry_after`: the last one was busy, and said to come back in so many seconds."""
        super().__init__(text)
        self.retry_after = retry_after


class BadQuery(Exception):
    """The controller refused the call itself."""


class AccessDenied(Exception):
    """The controller does not know us, or our role does not allow it. Nothing was done."""


class AdminRefused(Exception):
    """An admin request was refused and changed nothing. `kind` is for programs."""

    def __init__(self, kind: str, text: str, num: int = 0) -> None:
        super().__init__(text)
        self.kind = kind
        self.num = num  # the latest configuration when it was refused


class ControllerClient:
    """Talks to whichever replica answers. One per clerk, group or command; not thread-safe.

    `addresses` are where to begin; when replicas are replaced, answers tell the new ones.
    """

    def __init__(self, addresses: Sequence[str], dialer: Dialer, rng: Random) -> None:
        assert addresses, "a controller has addresses"
        self._addresses = list(addresses)
        self._dialer, self._rng = dialer, rng
        self._preferred = rng.choice(self._addresses)
        self._session = rng.randbytes(16)
        self._seq = 0
        self._clock = HeardClock(lambda: asyncio.get_running_loop().time())
        self.cluster = ""
        self.unseal: Sealing = plainly
        """Of the users, where they do not come as they are; raises ValueError."""

    @property
    def clock_ms(self) -> int:
        """The controllers' time, as heard; 0 before the first answer."""
        return self._clock.now_ms()

    async def admin(self, request: pb.AdminRequest, timeout: float) -> int:
        """Carry out an admin request, once; returns the number of the configuration it made.

        Raises AdminRefused; ControllerUnavailable, after which it may or may not be done.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        self._seq += 1
        request.session, request.seq, request.acked_below = self._session, self._seq, self._seq
        while True:
            request.issued_ms = self.clock_ms
            left = deadline - asyncio.get_running_loop().time()
            body, doubt = await self._ask("ctl.admin", request, left)
            reply = pb.AdminReply.FromString(body)
            self._clock.hear(reply.clock_ms)
            # Issued before we had heard the time, or at a time too old: refused, and now we know the
            # time. Of the first kind nothing is ever done; of the second, an attempt that was not
            # answered may have been done while it was young.
            if reply.refusal != "SessionExpired" or (doubt and request.issued_ms) or left <= 0:
                break
        if reply.refusal:
            raise AdminRefused(reply.refusal, reply.message, reply.num)
        return reply.num

    async def claim(self, gid: Gid, incarnation: Incarnation, joined: int, timeout: float) -> int:
        """Claim a join for an incarnation of a group; 0: the first that it may have. Returns which it is.

        Safe to ask again. Raises AdminRefused, ControllerUnavailable.
        """
        claim = pb.Claim(gid=gid, incarnation=incarnation, joined=joined)
        reply = pb.AdminReply.FromString(await self._call("ctl.claim", claim, timeout))
        if reply.refusal:
            raise AdminRefused(reply.refusal, reply.message, reply.num)
        return reply.num

    async def query(self, num: int | None, timeout: float) -> Config:
        """Configuration `num`, or the latest, linearizably. Raises BadQuery, ControllerUnavailable."""
        request = pb.QueryRequest(latest=num is None, num=num or 0)
        return config_from_pb(pb.Config.FromString(await self._call("ctl.query", request, timeout)))

    async def incarnations(self, timeout: float) -> set[tuple[Gid, Incarnation]]:
        """All that ever claimed a join, linearizably. Raises ControllerUnavailable."""
        body = await self._call("ctl.query", pb.QueryRequest(latest=True), timeout)
        return {
            (claim.gid, claim.incarnation) for claim in pb.Config.FromString(body).claims if claim.incarnation
        }

    async def changes(self, since: int, wait: float, timeout: float, limit: int = 0) -> list[Change]:
        """What follows configuration `since`; waits up to `wait` seconds for news.

        Raises ControllerUnavailable when nobody answers within `timeout` beyond that.
        """
        request = pb.ChangesRequest(since=since, wait_ms=int(wait * 1000), limit=limit)
        body = await self._call("ctl.changes", request, timeout + wait, attempt=ATTEMPT_SECONDS + wait)
        reply = pb.ChangesReply.FromString(body)
        self._clock.hear(reply.clock_ms)
        self.cluster = reply.cluster
        if reply.controllers:
            self._addresses = list(reply.controllers)
            if self._preferred not in self._addresses:
                self._preferred = self._rng.choice(self._addresses)
        return [change_from_pb(change) for change in reply.changes]

    async def accounts(self, since: int, wait: float, timeout: float) -> Accounts:
        """The users, once they are newer than version `since`; waits so long for that. For servers.

        Raises AccessDenied, BadQuery, ControllerUnavailable; ValueError for what no controller of the cluster sent.
        """
        request = pb.AccountsRequest(since=since, wait_ms=int(wait * 1000))
        body = await self._call("ctl.accounts", request, timeout + wait, attempt=ATTEMPT_SECONDS + wait)
        return Accounts.decode(self.unseal(body))

    async def users(self, timeout: float) -> dict[str, Any]:
        """Who there is, without secrets. Raises AccessDenied, ControllerUnavailable."""
        body = await self._call("ctl.users", pb.AccountsRequest(), timeout)
        try:
            found: dict[str, Any] = parse_json(body)
        except ValueError as error:
            raise ControllerUnavailable(f"a controller answers what is no list of users: {error}") from None
        return found

    async def _call(
        self,
        method: str,
        request: Message,
        timeout: float,
        attempt: float = ATTEMPT_SECONDS,
    ) -> bytes:
        return (await self._ask(method, request, timeout, attempt))[0]

    async def _ask(
        self,
        method: str,
        request: Message,
        timeout: float,
        attempt: float = ATTEMPT_SECONDS,
    ) -> tuple[bytes, bool]:
        """The answer, and whether an earlier attempt may have been carried out as well."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        payload = request.SerializeToString()
        pause, tried, doubt, wait = BACKOFF_SECONDS[0], dict[str, str](), False, 0.0
        while True:
            address = self._preferred
            left = deadline - loop.time()
            if left <= 0:
                break
            try:
                code, body = parse(await self._dialer.call(address, method, payload, min(left, attempt)))
            except (Unreachable, ValueError) as error:
                tried[address] = str(error)
                doubt, wait = True, 0.0
                self._try_another()
            else:
                match code:
                    case Code.OK:
                        return body, doubt
                    case Code.BAD_REQUEST:
                        raise BadQuery(body.decode(errors="replace"))
                    case Code.DENIED:
                        raise AccessDenied(body.decode(errors="replace"))
                    case Code.NOT_LEADER if body.decode(errors="replace") in self._addresses:
                        tried[address] = "not the leader"
                        self._preferred = body.decode()
                        if self._preferred not in tried:
                            continue  # a fresh hint: no reason to wait
                    case _:
                        tried[address] = f"{code.name} {body.decode(errors='replace')}".strip()
                        wait = retry_after(tried[address]) if code is Code.BUSY else 0.0
                        doubt = doubt or code in (Code.RETRY, Code.STOPPED)
                        self._try_another()
            await asyncio.sleep(max(0.0, min(max(wait, spread(pause, self._rng)), deadline - loop.time())))
            pause = longer(pause, BACKOFF_SECONDS)
        what = "; ".join(f"{address}: {why}" for address, why in sorted(tried.items())) or "no time"
        raise ControllerUnavailable(f"no controller answered within {timeout:.3g} s ({what})", wait)

    def _try_another(self) -> None:
        found = self._preferred in self._addresses  # else they have changed since
        position = self._addresses.index(self._preferred) if found else -1
        self._preferred = self._addresses[(position + 1) % len(self._addresses)]
