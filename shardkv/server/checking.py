"""What a replica held after one entry of the log: the moment that all replicas of a group can be compared at.

An entry of its own kind names a check. Every replica that applies it opens a view of its engine
there and then, so all of them hold the same moment, however late they come to it, and nothing is
stopped. Whoever compares them asks each for the digests of its view (`digests.py`). They are
computed when they are first asked for, a step of a millisecond or two at a time.

A view pins tables of the database. So there are few checks at once, and one that nobody
asks for goes after a while. They are in memory only: a replica that has restarted says
that the check is gone. The entry itself changes nothing, and whether a view could be opened
shows in no reply of the state machine.
"""

from __future__ import annotations

import asyncio
import logging
from itertools import islice

from shardkv import shardkv_pb2 as pb
from shardkv.raft.errors import Busy, StorageError
from shardkv.state.digests import Digester, Part, parts_of
from shardkv.state.machine import ShardMachine
from shardkv.storage.engine import View, ViewGone

log = logging.getLogger(__name__)

ID_BYTES = 16
MAX_CHECKS = 4
IDLE_SECONDS = 120.0
STEP_PAIRS = 500  # of one step: a millisecond or two of the event loop
STEP_BYTES = 256 << 10
REST_SECONDS = 0.003  # between steps: two thirds of the time are others'


class Moment:
    """A view that is closed when its last holder lets it go."""

    def __init__(self, machine: ShardMachine) -> None:
        self.view: View = machine.engine.view()
        self.clock_ms, self.config_num = machine.clock_ms, machine.ownership.config_num
        self.incarnation = machine.incarnation
        self.parts: list[Part] = parts_of(machine.ownership.rows.values())
        self._holders = 1

    def hold(self) -> Moment:
        self._holders += 1
        return self

    def release(self) -> None:
        self._holders -= 1
        if not self._holders:
            self.view.close()


class _Check:
    """One check at this replica."""

    def __init__(self, moment: Moment) -> None:
        self.moment = moment
        self.digester = Digester(moment.parts)
        self.work: asyncio.Task[None] | None = None  # None: nobody has asked yet
        self.complete = False
        self.why = ""  # it will never be complete
        self.timer: asyncio.TimerHandle | None = None


class Checks:
    """The checks that one replica holds."""

    def __init__(self, machine: ShardMachine) -> None:
        self._machine = machine
        self._checks: dict[bytes, _Check] = {}
        machine.on_check = self._begun

    def _begun(self, id: bytes) -> None:
        """The entry was applied. What fails here is no matter of the entry's."""
        if id in self._checks:
            return
        if len(self._checks) >= MAX_CHECKS:
            # One that nobody asked for is probably of a log that is replayed after a restart.
            unasked = [other for other, check in self._checks.items() if check.work is None]
            if not unasked:
                log.warning("this replica takes no part in a check: %d checks are open already", MAX_CHECKS)
                return
            self._forget(unasked[0])
        try:
            check = _Check(Moment(self._machine))
        except (StorageError, OSError) as error:  # the engine has told the replica, which stops
            log.warning("this replica takes no part in a check: %s", error)
            return
        self._checks[id] = check
        self._wait(id, check)

    def check_free(self) -> None:
        """To be asked before a check begins. Raises Busy."""
        if len(self._checks) >= MAX_CHECKS and all(check.work for check in self._checks.values()):
            raise Busy(f"{MAX_CHECKS} checks are open")

    def _wait(self, id: bytes, check: _Check) -> None:
        if check.timer is not None:
            check.timer.cancel()
        check.timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._forget, id)

    def _forget(self, id: bytes) -> None:
        check = self._checks.pop(id, None)
        if check is None:
            return
        if check.timer is not None:
            check.timer.cancel()
        if check.work is not None:
            check.work.cancel()
        check.moment.release()

    def lend(self, id: bytes) -> Moment:
        """The moment of a check, to be released by who takes it. Raises ViewGone."""
        check = self._checks.get(id)
        if check is None:
            raise ViewGone("this replica does not hold that check")
        return check.moment.hold()

    def answer(self, request: pb.CheckRequest) -> pb.CheckReply:
        """How far a check is, or what it found."""
        id = request.id
        reply = pb.CheckReply(id=id, applied_index=self._machine.applied.index)
        check = self._checks.get(id)
        if check is None:
            # Whether it is behind or has forgotten: who asks can tell by the index.
            reply.state = pb.GONE
            reply.why = f"it has restarted since, or held {MAX_CHECKS} other checks"
            return reply
        moment = check.moment
        reply.index, reply.config_num = moment.view.applied.index, moment.config_num
        for part in moment.parts:
            reply.shards.add(shard=part.shard, start=part.start, end=part.end)
        if request.close:
            self._forget(id)
            return reply
        self._wait(id, check)
        if check.work is None:
            check.work = asyncio.get_running_loop().create_task(self._compute(check))
        reply.pairs = check.digester.pairs
        if check.why:
            reply.state, reply.why = pb.GONE, check.why
        elif check.complete:
            reply.state = pb.COMPLETE
            for shard, digest in zip(reply.shards, check.digester.parts(), strict=True):
                shard.pairs, shard.digest = digest.pairs, digest.value
            rest = check.digester.rest()
            reply.rest.pairs, reply.rest.digest = rest.pairs, rest.value
        else:
            reply.state = pb.COMPUTING
        return reply

    async def _compute(self, check: _Check) -> None:
        view, cursor = check.moment.view, b""
        try:
            while True:
                pairs: list[tuple[bytes, bytes]] = []
                size = 0
                for key, value in islice(view.scan(cursor), STEP_PAIRS):
                    pairs.append((key, value))
                    size += len(key) + len(value)
                    if size >= STEP_BYTES:
                        break
                if not pairs:
                    check.complete = True
                    return
                check.digester.add(pairs)
                cursor = pairs[-1][0] + b"\0"
                await asyncio.sleep(REST_SECONDS)
        except ViewGone as error:
            check.why = str(error)
        except (StorageError, OSError) as error:  # the engine has told the replica, which stops
            check.why = f"its state cannot be read: {error}"

    async def stop(self) -> None:
        works = [check.work for check in self._checks.values() if check.work is not None]
        for id in list(self._checks):
            self._forget(id)
        await asyncio.gather(*works, return_exceptions=True)
