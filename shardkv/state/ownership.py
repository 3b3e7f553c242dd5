"""Which shards a group has, and in what state: one table, and the events that wait their turn. Pure.

Each shard has a row of its own and moves along a chain of owners A → B → C, one
hand-over (an *epoch*) after the other. Map changes become events in the row's
queue; an event fires when the row's state has a transition for it, and waits
otherwise. So a shard stuck behind a dead group holds up nothing but itself.

Groups ask, never command. A giver serves until it closes, keeps its copy until it
has asked the taker "do you serve this epoch?" and heard yes; the answer is a fact
of applied state that never becomes untrue, since `served_epoch` only grows.

A closed giver serves again only on another such fact: that the taker, in its own log, has
let go of this *attempt* to copy the shard (it goes on with the next one from the beginning), or
of the hand-over as a whole, since the map gives the shard back. A taker that has installed
does neither, and one that has let go does not install. A giver that is not closed needs no such
fact: when the map gives the shard back, it goes on by itself.

Of two groups that have one number (the first left or lost its disks, the second joined)
each acts on what the map says about itself. A group is named by its number and the
configuration in which it joined; `joins` says which joins are ours, as claimed from the
controllers (`shardctrler/claims.py`). A group learns nothing before its first claim, begins
with the join that it claimed, and learns no later join of its number before it claimed that.
So a group that lost its disks has no rows, and serves nothing.

The table is data: `docs/sharding.md` draws its diagram from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from shardkv.shardctrler.shard_map import Change, Gid, Group, ShardId
from shardkv.state.cursor import START
from shardkv.state.effects import Drop, DropJournal, Effect, Inherit
from shardkv.state.row import Event, Pending, Row, State

TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.ABSENT, Event.CREATED): State.SERVING,
    (State.ABSENT, Event.GAINED): State.PULLING,
    (State.PULLING, Event.INSTALLED): State.SERVING,
    (State.SERVING, Event.LOST): State.LENDING,
    (State.LENDING, Event.CLOSED): State.FROZEN,
    (State.FROZEN, Event.RELEASED): State.ABSENT,
    # A hand-over that cannot go on, or need not.
    (State.PULLING, Event.ABANDONED): State.PULLING,
    (State.FROZEN, Event.THAWED): State.LENDING,
    (State.PULLING, Event.GIVEN_UP): State.ABSENT,
    (State.LENDING, Event.TAKEN_BACK): State.SERVING,
    (State.FROZEN, Event.TAKEN_BACK): State.SERVING,
    # A split or merge rewrites two rows at once and fires when both are ready for it.
    (State.SERVING, Event.SPLIT): State.SERVING,
    (State.ABSENT, Event.BORN): State.SERVING,
    (State.SERVING, Event.MERGE): State.SERVING,
    (State.SERVING, Event.MERGED): State.ABSENT,
}

MAX_PEER_ADDRESSES = 32  # of one group, where it was and where it is


def _moved(peer: Group, group: Group) -> Group:
    """Where to ask for `peer` now that the map names `group`, of the same number.

    After another join it may be the same group or another one, which only its answers tell:
    it is asked at the new addresses first, and then at the old ones.
    """
    old = () if group.joined == peer.joined else peer.addresses
    return replace(peer, addresses=tuple(dict.fromkeys(group.addresses + old))[:MAX_PEER_ADDRESSES])


class Ownership:
    """All rows of a group. Every method is deterministic and only touches rows."""

    def __init__(
        self,
        gid: Gid,
        config_num: int = 0,
        rows: dict[ShardId, Row] | None = None,
        addresses: tuple[str, ...] = (),
        joins: tuple[int, int] = (0, 0),
        others: int = 0,
    ) -> None:
        self.gid = gid
        self.joins = joins  # the first and the last configuration that we joined in; 0: none yet
        self.others = others  # joins of our number up to this configuration are not ours, but for those
        self.addresses = addresses  # ours, as the map names them; none while we are not in it
        self.config_num = config_num
        self.rows: dict[ShardId, Row] = rows or {}
        self.changed: set[ShardId] = set()  # rows to store; emptied by whoever stores them

    def claimed(self, joined: int) -> bool:
        """The join of that configuration is ours. False if that was known before: a repetition."""
        first, last = self.joins
        if joined <= last:
            return False
        if not first:
            first = joined
            self.config_num = self.others = joined - 1  # what came before is about others
        self.joins = first, joined
        return True

    def refused(self, others: int) -> bool:
        """Joins up to that configuration are of other incarnations. False if that was known before."""
        if others <= self.others:
            return False
        self.others = others
        return True

    def may_learn(self, change: Change) -> bool:
        """Whether we know which group we are in that configuration."""
        lets_us_in = any(group.gid == self.gid for group in change.joined)
        return self.joins[0] > 0 and (not lets_us_in or change.num <= self.joins[1])

    def is_us(self, gid: Gid, joined: int) -> bool:
        """Whether we are the group of that number that joined in that configuration."""
        return gid == self.gid and self.joins[0] <= joined <= self.joins[1]

    def is_other(self, gid: Gid, joined: int) -> bool:
        """Whether it is certain that we are not that group; what is neither is not known here yet."""
        return gid != self.gid or (joined <= self.others and not self.is_us(gid, joined))

    def learn(self, change: Change) -> list[Effect]:
        """Queue what the next configuration means for our shards, and fire what can fire."""
        assert change.num == self.config_num + 1, "configurations are learnt in order"
        self.config_num = change.num
        for move in change.moves:
            source, target = move.source, move.target
            if target is None:
                continue
            loses = source is not None and self.is_us(source.gid, source.joined)
            gains = self.is_us(target.gid, target.joined)
            if gains and not loses:
                # From a group of our own number as well: it held the shard, and is not us.
                event = Event.CREATED if source is None else Event.GAINED
                known = self.rows.get(move.shard)
                cut = known.cut if known is not None else 0
                self._queue(move.shard, Pending(event, change.num, move.start, move.end, source, cut=cut))
            elif loses and not gains:
                self._queue(move.shard, Pending(Event.LOST, change.num, peer=target))
        if change.split is not None and change.split.holder == self.gid:
            split = change.split
            self._queue(split.shard, Pending(Event.SPLIT, other=split.new_shard, key=split.key))
            self._queue(split.new_shard, Pending(Event.BORN, other=split.shard))
        if change.merge is not None and change.merge.holder == self.gid:
            merge = change.merge
            self._queue(merge.shard, Pending(Event.MERGE, other=merge.right))
            self._queue(merge.right, Pending(Event.MERGED, other=merge.shard))
        self._note_cuts(change)
        self._follow_addresses(change)  # last: a source that joins again may be elsewhere now
        return self._drain()

    def _note_cuts(self, change: Change) -> None:
        """Shards that we have given away, as the map says, and that their new owner splits or merges."""
        cut: set[ShardId] = set()
        if change.split is not None and change.split.holder != self.gid:
            cut = {change.split.shard}
        if change.merge is not None and change.merge.holder != self.gid:
            cut = {change.merge.shard, change.merge.right}
        for shard in cut & self.rows.keys():
            self.rows[shard].cut = change.num
            self.changed.add(shard)

    def _follow_addresses(self, change: Change) -> None:
        """Ours as the map names them, and those of the groups that our rows deal with."""
        if self.gid in change.left:
            self.addresses = ()
        for group in change.joined + change.readdressed:
            if group.gid == self.gid:
                self.addresses = group.addresses
            for row in self.rows.values():
                if row.peer is not None and row.peer.gid == group.gid:
                    row.peer = _moved(row.peer, group)
                    self.changed.add(row.shard)
                for position, pending in enumerate(row.queue):
                    if pending.peer is not None and pending.peer.gid == group.gid:
                        row.queue[position] = replace(pending, peer=_moved(pending.peer, group))
                        self.changed.add(row.shard)

    def closed(self, shard: ShardId, epoch: int, attempt: int) -> bool:
        """The giver stops serving. False if that is not (or no longer) the row's state: a repetition.

        False as well for an attempt that the taker has abandoned: the request is an old one.
        """
        row = self.rows.get(shard)
        if row is None or attempt < row.attempt or self._fire(shard, epoch, Event.CLOSED) is None:
            return False
        row.attempt = attempt
        return True

    def abandoned(self, shard: ShardId, epoch: int, attempt: int) -> list[Effect]:
        """The taker begins again from nothing. No effects if it has done so, or has installed: too late.

        What it has goes: it may be room that is missing.
        """
        row = self.rows.get(shard)
        if row is None or row.attempt != attempt or self._fire(shard, epoch, Event.ABANDONED) is None:
            return []
        row.attempt, row.cursor = attempt + 1, START
        return [Drop(shard, row.start, row.end)]

    def thawed(self, shard: ShardId, epoch: int, attempt: int) -> bool:
        """The giver serves again, for the taker is at `attempt` and so does not install the one we closed for.

        The journal stays: the next copy replays all of it, with the values as they are then.
        """
        row = self.rows.get(shard)
        if row is None or attempt <= row.attempt or self._fire(shard, epoch, Event.THAWED) is None:
            return False
        row.attempt = attempt
        return True

    def gave_up(self, shard: ShardId, epoch: int, is_ended: bool = False) -> list[Effect]:
        """The taker lets go of a hand-over that the map has ended, and of the way back with it.

        Of a giver that has left and joined again meanwhile, the map does not say whether the shard goes back to
        that same group. But the giver knows, and says so (`is_ended`) when it has taken the shard back.
        """
        row = self.rows.get(shard)
        if row is None or not (row.comes_back or (is_ended and row.goes_on)):
            return []
        if self._fire(shard, epoch, Event.GIVEN_UP) is None:
            return []
        row.queue.pop(0)
        row.given_up += (epoch,)
        drop = Drop(shard, row.start, row.end)
        row.peer, row.cursor, row.attempt, row.start, row.end = None, START, 0, b"", b""
        return [drop, *self._drain()]

    def took_back(self, shard: ShardId, epoch: int, was_asked: bool) -> list[Effect]:
        """The giver serves what the taker has let go of, as if it had gone and come back.

        A giver that has not closed needs to ask nobody (`was_asked` False), however dead the taker is: no answer
        with which this attempt could be installed was ever given, and those for earlier attempts have no effect.
        """
        row = self.rows.get(shard)
        if row is None or not row.comes_back or (row.state is State.FROZEN and not was_asked):
            return []
        if self._fire(shard, epoch, Event.TAKEN_BACK) is None:
            return []
        row.epoch = row.served_epoch = row.queue.pop(0).epoch
        row.peer, row.journal, row.attempt = None, 0, 0
        return [DropJournal(shard), *self._drain()]

    def installed(self, shard: ShardId, epoch: int) -> list[Effect]:
        row = self._fire(shard, epoch, Event.INSTALLED)
        assert row is not None, "asked before by the machine"
        row.served_epoch = epoch
        # Whoever gave it to us has gone on since the hand-overs that we let go of.
        row.peer, row.cursor, row.attempt, row.given_up = None, START, 0, ()
        return self._drain()

    def released(self, shard: ShardId, epoch: int) -> list[Effect]:
        """The giver lets go of its copy. No effects if it did before: a repetition."""
        row = self._fire(shard, epoch, Event.RELEASED)
        if row is None:
            return []
        drop = Drop(shard, row.start, row.end)
        row.peer, row.journal, row.attempt, row.start, row.end = None, 0, 0, b"", b""
        return [drop, *self._drain()]

    def unfenced(self, shard: ShardId) -> list[Effect]:
        """The restore of a shard has ended: what the map asked for meanwhile is done now."""
        row = self.rows[shard]
        assert row.fence is not None, "asked before"
        row.restored, row.fence = row.fence.generation, None
        self.changed.add(shard)
        return self._drain()

    def goes_on_inheriting(self, shard: ShardId, start: bytes) -> list[Effect]:
        """A step that begins at `start`. No effects if that is not the next one: a repetition."""
        row = self.rows.get(shard)
        return [Inherit(shard)] if row is not None and row.inherits and row.inherited == start else []

    def inherited(self, shard: ShardId) -> list[Effect]:
        """A shard has all records that a split or merge brought it: what waited for that is done now."""
        row = self.rows[shard]
        row.inherits, row.folds, row.inherited = 0, False, b""
        self.changed.add(shard)
        return self._drain()

    def in_state(self, state: State) -> Iterator[Row]:
        return (row for row in self.rows.values() if row.state is state)

    def find(self, key: bytes) -> Row | None:
        """The row that holds `key` and serves it."""
        for row in self.rows.values():
            if row.serves and row.contains(key):
                return row
        return None

    def find_below(self, end: bytes) -> Row | None:
        """The row that holds the keys right below `end` and serves them; an empty end is open."""
        for row in self.rows.values():
            if row.serves and row.ends_in(end):
                return row
        return None

    def serves_epoch(self, shard: ShardId, epoch: int) -> bool:
        """Whether this group ever served that epoch: a fact that stays true."""
        row = self.rows.get(shard)
        return row is not None and row.served_epoch >= epoch

    def attempt_at(self, shard: ShardId, epoch: int) -> int:
        """The taker's attempt at that hand-over: none before it will ever be installed. 0 where nothing is known."""
        row = self.rows.get(shard)
        return row.attempt if row is not None and row.state is State.PULLING and row.epoch == epoch else 0

    def has_ended(self, shard: ShardId, epoch: int) -> bool:
        """Whether that hand-over from this group is over: the taker has installed, or we have taken it back."""
        row = self.rows.get(shard)
        return row is not None and row.epoch > epoch

    def has_given_up(self, shard: ShardId, epoch: int) -> bool:
        """Whether this group let go of that hand-over and will never install it."""
        row = self.rows.get(shard)
        return row is not None and epoch in row.given_up

    # ---- inside

    def _queue(self, shard: ShardId, pending: Pending) -> None:
        self.rows.setdefault(shard, Row(shard)).queue.append(pending)
        self.changed.add(shard)

    def _fire(self, shard: ShardId, epoch: int, event: Event) -> Row | None:
        row = self.rows.get(shard)
        if row is None or row.epoch != epoch or (row.state, event) not in TRANSITIONS:
            return None
        row.state = TRANSITIONS[row.state, event]
        self.changed.add(shard)
        return row

    def _drain(self) -> list[Effect]:
        """Fire queued events until none can: one may free another row's."""
        effects: list[Effect] = []
        progress = True
        while progress:
            progress = False
            # In one order on all replicas: that of `rows` tells who was restarted.
            for shard in sorted(row.shard for row in self.rows.values() if row.queue):
                row = self.rows[shard]
                while row.queue and self._can_fire(row, row.queue[0]):
                    effects += self._fire_queued(row, row.queue.pop(0))
                    self.changed.add(shard)
                    progress = True
        return effects

    def _can_fire(self, row: Row, pending: Pending) -> bool:
        if (row.state, pending.event) not in TRANSITIONS or not self._is_free(row):
            return False
        match pending.event:
            case Event.CREATED | Event.GAINED:
                return not any(self._comes_first(other, pending) for other in self.rows.values())
            case Event.SPLIT | Event.MERGE:
                partner = self.rows[pending.other]
                mirror = Event.BORN if pending.event is Event.SPLIT else Event.MERGED
                return (
                    bool(partner.queue)
                    and partner.queue[0].event is mirror
                    and partner.queue[0].other == row.shard
                    and (partner.state, mirror) in TRANSITIONS
                    and self._is_free(partner)
                )
            case Event.BORN | Event.MERGED:
                return False  # fires with its partner
            case _:
                return True

    def _is_free(self, row: Row) -> bool:
        """Whether the row may change: it is not being restored, and no records are on their way to it or from it."""
        return (
            row.fence is None and not row.inherits and all(r.inherits != row.shard for r in self.rows.values())
        )

    @staticmethod
    def _comes_first(other: Row, pending: Pending) -> bool:
        """Whether the range that `pending` brings is not free yet, because of another row.

        A range that we still hold under another id (it was split or merged since) must be
        gone first: its release would delete what we are about to get. And where such a
        gain waits, a later one of the same range waits behind it. Events wait for
        older configurations only, in every group, so they cannot wait in a circle.
        """
        if other.state is not State.ABSENT and other.overlaps(pending):
            return True
        return any(
            earlier.event in (Event.CREATED, Event.GAINED)
            and earlier.epoch < pending.epoch
            and earlier.overlaps(pending)
            for earlier in other.queue
        )

    def _fire_queued(self, row: Row, pending: Pending) -> list[Effect]:
        row.state = TRANSITIONS[row.state, pending.event]
        match pending.event:
            case Event.CREATED:
                row.start, row.end = pending.start, pending.end
                row.epoch = row.served_epoch = pending.epoch
            case Event.GAINED:
                row.start, row.end, row.epoch = pending.start, pending.end, pending.epoch
                row.peer, row.cursor, row.attempt = pending.peer, START, 0
            case Event.LOST:
                row.epoch, row.peer, row.journal, row.attempt = pending.epoch, pending.peer, 0, 0
            case Event.SPLIT:
                child = self._partner(pending, Event.BORN)
                child.start, child.end, row.end = pending.key, row.end, pending.key
                child.epoch = row.epoch
                child.served_epoch = max(child.served_epoch, row.served_epoch)
                child.inherits, child.folds = row.shard, False
                return [Inherit(child.shard)]
            case Event.MERGE:
                right = self._partner(pending, Event.MERGED)
                assert row.end == right.start, "only neighbours merge"
                row.end, row.epoch = right.end, max(row.epoch, right.epoch)  # older copies of both are outdated
                right.start = right.end = b""
                row.inherits, row.folds = right.shard, True
                return [Inherit(row.shard)]
            case _:
                raise AssertionError(f"{pending.event} does not queue")
        return []

    def _partner(self, pending: Pending, event: Event) -> Row:
        partner = self.rows[pending.other]
        partner.queue.pop(0)
        partner.state = TRANSITIONS[partner.state, event]
        self.changed.add(partner.shard)
        return partner

    def check(self) -> None:
        """No key is held twice; every state has what it needs."""
        held = [row for row in self.rows.values() if row.state is not State.ABSENT]
        for position, row in enumerate(held):
            assert row.epoch > 0
            assert (row.peer is not None) == (row.state not in (State.SERVING,)), row
            assert (row.fence is None and not row.inherits) or row.state is State.SERVING, row
            for other in held[position + 1 :]:
                assert not row.overlaps(other), f"{row} overlaps {other}"
        for row in self.rows.values():
            if row.state is State.SERVING:
                assert row.served_epoch > 0
