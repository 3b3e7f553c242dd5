"""The controller's state machine: the history of changes, the current map, and who asked for what.

Deterministic: a refusal is a reply. Admin requests are exactly-once like writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardkv.raft.interfaces import Directory
from shardkv.raft.machine import unstamp
from shardkv.raft.protocol.types import Entry, Kind, SnapshotMeta
from shardkv.raft.sessions import DEFAULT_TTL_MS, SessionClock, SessionRecord
from shardkv.raft.state_file import InMemoryMachine
from shardkv.shardctrler import planner
from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.accounts import Accounts
from shardkv.shardctrler.claims import Claims, Join
from shardkv.shardctrler.codec import (
    change_from_pb,
    change_to_pb,
    config_from_pb,
    config_to_pb,
    group_from_pb,
    group_to_pb,
)
from shardkv.shardctrler.planner import Refused
from shardkv.shardctrler.shard_map import Change, Config, Gid, Group

PAGE_BYTES = 4 << 20  # of changes in one answer, and so in one entry of a group's log
MAX_CHANGE_BYTES = 32 << 20  # of one: it travels whole, in half of what a record between processes may hold


class ControllerMachine(InMemoryMachine):
    def __init__(self, directory: Directory, session_ttl_ms: int = DEFAULT_TTL_MS) -> None:
        super().__init__(directory)
        self._ttl_ms = session_ttl_ms
        self._reset()

    def _reset(self) -> None:
        self.clock = SessionClock(self._ttl_ms)
        self.membership = b""
        self.config = Config()
        self.accounts = Accounts()
        self._changes: list[bytes] = []  # each as it is stored and sent; the n-th makes configuration n
        self._next_shard = 2
        self._sessions: dict[bytes, SessionRecord] = {}
        self._last_addresses: dict[Gid, Group] = {}  # of every group there ever was
        self._claims = Claims()

    # ---- reading

    @property
    def clock_ms(self) -> int:
        return self.clock.now_ms

    def config_at(self, num: int) -> Config | None:
        """Configuration `num` from the history; None if there is none yet."""
        if num > self.config.num:
            return None
        if num == self.config.num:
            return self.config
        config = Config()
        for data in self._changes[:num]:
            config.apply(change_from_pb(pb.Change.FromString(data)))
        return config

    def changes_since(self, num: int, limit: int) -> list[pb.Change]:
        """What follows configuration `num`: at most `limit` changes and about PAGE_BYTES, but at least one."""
        page: list[pb.Change] = []
        size = 0
        for data in self._changes[num : num + limit]:
            size += len(data)
            if page and size > PAGE_BYTES:
                break
            page.append(pb.Change.FromString(data))
        return page

    def claims(self) -> list[pb.Claim]:
        """Every join of every group, and which incarnation it belongs to."""
        return [pb.Claim(gid=gid, joined=join.num, incarnation=join.incarnation) for gid, join in self._claims]

    # ---- applying

    def apply(self, entries: Sequence[Entry]) -> list[bytes]:
        replies = []
        for entry in entries:
            replies.append(self._apply(entry) if entry.kind is Kind.COMMAND else b"")
            if entry.kind is Kind.MEMBERSHIP:
                self.membership = entry.data
            self._applied = SnapshotMeta(entry.index, entry.term)
        return replies

    def _apply(self, entry: Entry) -> bytes:
        stamp, command = unstamp(entry)
        request = pb.AdminRequest.FromString(command)
        self._advance_clock(stamp.clock_ms)
        if request.WhichOneof("op") == "initialize":  # idempotent by itself: proposed by leaders
            self._carry_out(request)
            return b""
        if request.WhichOneof("op") == "claim":  # likewise
            return self._claim(request.claim)
        record = self._sessions.get(request.session)
        late = not self.clock.may_begin(request.issued_ms)
        if late and (record is None or request.seq not in record.replies):
            return self._reply("SessionExpired", "the request is too old to be retried")
        if record is None:
            record = self._sessions[request.session] = SessionRecord()
        record.used_ms = max(record.used_ms, self.clock.used_ms(request.issued_ms))
        if request.seq in record.replies:
            return record.replies[request.seq]
        if request.seq < record.acked_below:
            return self._reply("SessionExpired", "the request was answered before")
        record.acknowledge(request.acked_below)
        reply = self._carry_out(request)
        record.replies[request.seq] = reply
        return reply

    def _advance_clock(self, now_ms: int) -> None:
        """Once a minute of replicated time expired records go; there are as few as there are admins."""
        before = self.clock.now_ms
        self.clock.advance(now_ms)
        if self.clock.now_ms // 60_000 > before // 60_000:
            self._sessions = {
                session: record
                for session, record in self._sessions.items()
                if not self.clock.has_expired(record.used_ms)
            }

    def _carry_out(self, request: pb.AdminRequest) -> bytes:
        try:
            accounts = self._plan_accounts(request)
            change = self._plan(request) if accounts is None else None
            if change is not None:
                self._extend(self._with_addresses(change))
        except Refused as refused:
            return self._reply(refused.kind, str(refused))
        if accounts is not None:
            self.accounts = accounts
        return self._reply()

    def _reply(self, refusal: str = "", message: str = "") -> bytes:
        return pb.AdminReply(
            refusal=refusal, message=message, num=self.config.num, clock_ms=self.clock_ms
        ).SerializeToString()

    def _claim(self, claim: pb.Claim) -> bytes:
        """Record which incarnation a join belongs to. No new configuration: who serves what stays as it is."""
        try:
            joined = self._claims.claim(claim.gid, claim.incarnation, claim.joined)
        except Refused as refused:
            return self._reply(refused.kind, str(refused))
        self._note_claim(claim.gid)
        return pb.AdminReply(num=joined).SerializeToString()

    def _note_claim(self, gid: Gid) -> None:
        """The configuration shows the claim of a group's last join, while the group is in it."""
        holder = self._claims.holder(gid)
        if holder and gid in self.config.groups:
            self.config.claims[gid] = holder

    def _plan_accounts(self, request: pb.AdminRequest) -> Accounts | None:
        """What becomes of the users; None for requests that are not about them."""
        match request.WhichOneof("op"):
            case "set_user":
                return self.accounts.with_user(request.set_user)
            case "remove_user":
                return self.accounts.without_user(request.remove_user.name)
            case "access_control":
                return self.accounts.switched(request.access_control.enabled)
            case "set_quota":
                return self.accounts.with_quota(request.set_quota)
            case "remove_quota":
                return self.accounts.without_quota(request.remove_quota)
            case _:
                return None

    def _plan(self, request: pb.AdminRequest) -> Change | None:
        config = self.config
        match request.WhichOneof("op"):
            case "join":
                return planner.join(config, [group_from_pb(group) for group in request.join.groups])
            case "leave":
                return planner.leave(config, request.leave.gids, request.leave.force)
            case "move":
                return planner.move(config, request.move.shard, request.move.gid)
            case "split":
                return planner.split(config, request.split.shard, request.split.key, self._next_shard)
            case "merge":
                return planner.merge(config, request.merge.shard)
            case "rebalance":
                change = planner.rebalance(config)
                return change if change.moves else None
            case "readdress":
                return planner.readdress(config, group_from_pb(request.readdress))
            case "initialize":
                return planner.initialize(config, request.initialize.shards)
            case _:
                raise Refused("BadRequest", "a request that this version does not know")

    def _with_addresses(self, change: Change) -> Change:
        """Say where a source that has left still listens: it hands its shards over."""
        moves = tuple(
            type(move)(move.shard, move.start, move.end, self._last_addresses.get(move.source.gid), move.target)
            if move.source is not None and not move.source.addresses
            else move
            for move in change.moves
        )
        return replace(change, moves=moves)

    def _extend(self, change: Change) -> None:
        """Make the next configuration. Raises Refused where the change is too large to travel."""
        encoded = change_to_pb(change).SerializeToString(deterministic=True)
        if len(encoded) > MAX_CHANGE_BYTES:
            raise Refused(
                "TooLarge",
                f"the change would take {len(encoded):,} bytes, and at most {MAX_CHANGE_BYTES:,} travel at once: "
                "give the groups fewer addresses, or move shards one by one first",
            )
        self.config.apply(change)
        self._changes.append(encoded)
        for group in change.joined + change.readdressed:
            self._last_addresses[group.gid] = group
        for group in change.joined:
            self._claims.joined(group.gid, change.num)
        for shard in change.initial:
            self._next_shard = max(self._next_shard, shard.id + 1)
        if change.split is not None:
            self._next_shard = change.split.new_shard + 1

    # ---- the snapshot

    def dump(self) -> bytes:
        known = [group_to_pb(self._last_addresses[gid]) for gid in sorted(self._last_addresses)]
        state = pb.State(
            changes=self._changes,
            clock=self.clock.encode(),
            next_shard=self._next_shard,
            membership=self.membership,
            config=config_to_pb(self.config),
            known=known,
            claims=self.claims(),
            accounts=self.accounts.encode(),
        )
        for session in sorted(self._sessions):
            state.sessions.add(session=session, record=self._sessions[session].encode())
        return state.SerializeToString(deterministic=True)

    def load(self, data: bytes) -> None:
        state = pb.State.FromString(data)
        self._reset()
        self.config = config_from_pb(state.config)
        self._changes = list(state.changes)
        self._last_addresses = {group.gid: group_from_pb(group) for group in state.known}
        for claim in state.claims:
            self._claims.joins.setdefault(claim.gid, []).append(Join(claim.joined, claim.incarnation))
        self.config.check()
        assert self.config.num == len(self._changes), "a map that its history does not make"
        self.clock.restore(state.clock)
        self._next_shard = state.next_shard
        self.membership = state.membership
        self.accounts = Accounts.decode(state.accounts)
        self._sessions = {item.session: SessionRecord.decode(item.record) for item in state.sessions}
