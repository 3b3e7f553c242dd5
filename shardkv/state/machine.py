"""The group's state machine: ownership first, then the exactly-once record, then the operation.

`apply` takes the entries that became committed together, decodes each frame once,
and writes one engine batch with all effects, changed records and the applied index.
Entries that change ownership end the batch before them, since they rearrange what
operations rest on.

Deterministic: whatever a client or a peer sends, refusals are replies. An exception
is a bug or a broken disk, and stops the replica.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence

from shardkv import shardkv_pb2 as pb
from shardkv.raft.machine import unstamp
from shardkv.raft.protocol.types import Entry, Index, Kind, SnapshotMeta
from shardkv.raft.sessions import DEFAULT_TTL_MS, SessionClock, SessionRecord
from shardkv.raft.snapshot import SnapshotSink, SnapshotSource
from shardkv.shardctrler import shardctrler_pb2 as ctl
from shardkv.shardctrler.codec import change_from_pb
from shardkv.state import commands, journal, layout, writes
from shardkv.state.effects import Drop, DropJournal, Effect, Inherit
from shardkv.state.ownership import Ownership
from shardkv.state.records import Records
from shardkv.state.restoring import Restoring
from shardkv.state.row import Row, State
from shardkv.state.rows import cursor_from_pb, decode_row, encode_row
from shardkv.state.writes import OK, Writing
from shardkv.storage.engine import Batch, Engine
from shardkv.wire import frames
from shardkv.wire.frames import DELETE_RANGE, FIRST_VERSION, PUT, Section, SectionStatus, Status

SESSION_EXPIRED = bytes([Status.SESSION_EXPIRED])
WRONG_SHARD = bytes([Status.WRONG_SHARD])
NOT_ANSWERED = bytes([Status.NOT_ANSWERED])
SWEEP_MS = 100  # of replicated time between two steps of the look for expired records
JOINS = struct.Struct(">QQQ")  # the first and the last join that is ours; up to where the rest is others'


class ShardMachine:
    """One group's replicated state; see `raft.replica.StateMachine`."""

    def __init__(self, gid: int, engine: Engine, session_ttl_ms: int = DEFAULT_TTL_MS) -> None:
        self.gid = gid
        self.engine = engine
        self.clock = SessionClock(session_ttl_ms)
        self.operations = 0  # applied since the start, for status
        self.writes: Counter[int] = Counter()  # of these, by shard
        self.reads: Counter[int] = Counter()  # answered by this replica, by shard
        # Called with a check's id when everything up to its entry, and nothing after it, is in the engine.
        self.on_check: Callable[[bytes], None] | None = None
        self._load()

    def _load(self) -> None:
        """Read what is kept in memory from the engine."""
        rows = {}
        for _, value in self.engine.scan(layout.ROW, layout.ROW + b"\xff"):
            row = decode_row(value)
            rows[row.shard] = row
        config_num = int.from_bytes(self.engine.get(layout.CONFIG_NUM) or b"", "big")
        named = (self.engine.get(layout.ADDRESSES) or b"").decode()
        joins = JOINS.unpack(self.engine.get(layout.JOINS) or bytes(JOINS.size))
        self.ownership = Ownership(
            self.gid,
            config_num,
            rows,
            tuple(named.split(",")) if named else (),
            joins[:2],
            joins[2],
        )
        self.incarnation = int.from_bytes(self.engine.get(layout.INCARNATION) or b"", "big")  # 0: none yet
        self._membership = self.engine.get(layout.MEMBERSHIP) or b""
        self.clock.restore(self.engine.get(layout.CLOCK) or b"")
        self._batch = Batch(self.engine)
        self._records = Records(self._batch)
        self._restoring = Restoring(self.ownership, self._batch)
        self._before = self.applied  # the last entry whose effects are all in the batch or the engine
        self._batch_growth = 0  # bytes that the entries of this batch have grown

    # ---- the state machine's protocol

    @property
    def applied(self) -> SnapshotMeta:
        return self.engine.applied

    @property
    def clock_ms(self) -> int:
        return self.clock.now_ms

    @property
    def membership(self) -> bytes:
        return self._membership

    async def flush(self) -> Index:
        return await self.engine.flush()

    async def open_snapshot(self) -> SnapshotSource:
        return await self.engine.open_snapshot()

    def open_sink(self, meta: SnapshotMeta) -> SnapshotSink:
        return self.engine.open_sink(meta)

    def install(self, meta: SnapshotMeta, sink: SnapshotSink) -> None:
        self.engine.install(meta, sink)
        self._load()

    def close(self) -> None:
        self.engine.close()

    def apply(self, entries: Sequence[Entry]) -> list[bytes]:
        replies = []
        self._before = self.applied
        for entry in entries:
            meta = SnapshotMeta(entry.index, entry.term)
            if entry.kind is not Kind.COMMAND:
                if entry.kind is Kind.MEMBERSHIP:
                    self._membership = entry.data
                    self._batch.put(layout.MEMBERSHIP, entry.data)
                replies.append(b"")
            else:
                stamp, command = unstamp(entry)
                if command[0] == commands.FRAME:
                    replies.append(self._apply_frame(command, stamp.clock_ms))
                elif command[0] == commands.RESTORE_CHUNK:
                    self._advance_clock(stamp.clock_ms)
                    chunk = pb.RestoreChunk.FromString(command[1:])
                    replies.append(self._restoring.chunk(chunk).SerializeToString(deterministic=True))
                    self._batch_growth += len(command)
                else:
                    self._commit(self._before)
                    self._advance_clock(stamp.clock_ms)
                    replies.append(self._apply_step(command, meta))
            self._before = meta
            if self._batch_growth > writes.BATCH_BYTES:
                self._commit(meta)
        self._commit(self._before)
        return replies

    def _commit(self, applied: SnapshotMeta) -> None:
        """Write the batch: operations, records, journals, clock, rows and applied index, in one."""
        batch = self._batch
        self._records.store()
        batch.put(layout.CLOCK, self.clock.encode())
        ownership = self.ownership
        if ownership.changed:
            batch.put(layout.CONFIG_NUM, ownership.config_num.to_bytes(8, "big"))
            for shard in sorted(ownership.changed):
                batch.put(layout.row_key(shard), encode_row(ownership.rows[shard]))
            ownership.changed.clear()
        batch.commit(applied)
        self._batch_growth = 0
        self._records.trim()

    def _advance_clock(self, now_ms: int) -> None:
        """Replicated time never goes back; as it passes, expired records go, a few at a time.

        Called before an entry has any effect: what has expired is judged by the entry's own time.
        """
        before = self.clock.now_ms
        self.clock.advance(now_ms)
        if self.clock.now_ms // SWEEP_MS > before // SWEEP_MS:
            self._records.sweep(self.clock)

    # ---- client frames

    def _apply_frame(self, command: bytes, clock_ms: int) -> bytes:
        _, max_value = commands.FRAME_HEADER.unpack_from(command)
        frame = command[commands.FRAME_HEADER.size :]
        header = frames.read_header(frame)
        if header.version != FIRST_VERSION and frames.has_kind(frame, DELETE_RANGE):
            # A range is looked for in few changes, not in those of all entries that share the batch.
            self._commit(self._before)
        self._advance_clock(clock_ms)
        used_ms = self.clock.used_ms(max(header.issued_ms, header.heard_ms))
        writing = Writing(self._batch, max_value, header.version)
        sections = [
            self._apply_section(section, header.issued_ms, used_ms, writing)
            for section in frames.unpack_sections(frame)
        ]
        self._batch_growth += writing.grown
        return frames.pack_reply(self.clock_ms, sections)

    def _apply_section(self, section: Section, issued_ms: int, used_ms: int, writing: Writing) -> bytes:
        row = self.ownership.rows.get(section.shard)
        if row is None or not row.serves:
            return self.refuse(row)
        if row.fence is not None:
            return frames.pack_results(bytes([Status.RESTORING]) * len(section.keys), None)
        self.operations += len(section.keys)
        self.writes[section.shard] += len(section.keys)
        # Whoever comes so late may have been forgotten, also where the session has a newer record since.
        late = section.session != frames.NO_SESSION and not self.clock.may_begin(issued_ms)
        record = self._record_of(section, row, late, used_ms)
        if record is None:
            return frames.pack_results(bytes([Status.SESSION_EXPIRED]) * len(section.keys), None)
        if row.state is State.LENDING:
            journal.note_changes(self._batch, row, section)
            self.ownership.changed.add(row.shard)
        if not late and self._all_new_puts(section, record, row):
            put_keys = [b"d" + key for key in section.keys]
            self._batch.changes.update(zip(put_keys, section.values, strict=True))
            record.replies.update(dict.fromkeys(section.seqs, OK))
            return frames.pack_results(bytes(len(put_keys)), None)
        writing.erased.clear()
        replies = [
            self._apply_once(record, late, row, writing, *write)
            for write in zip(section.seqs, section.kinds, section.keys, section.values, strict=True)
        ]
        if row.state is State.LENDING and writing.erased:
            journal.note_items(self._batch, row, list(dict.fromkeys(writing.erased)))
        return _pack_replies(replies)

    def _record_of(self, section: Section, row: Row, late: bool, used_ms: int) -> SessionRecord | None:
        """The record that this section's writes go into, noted as used; None where they come too late."""
        if section.session == frames.NO_SESSION:
            return SessionRecord()  # tried once: nobody will ask again, so nothing is kept
        record = self._records.find(row, section.session)
        if record is None:
            if late:
                return None
            record = self._records.create(section.shard, section.session)
        record.used_ms = max(record.used_ms, used_ms)
        record.acknowledge(section.acked_below)
        self._records.touch(section.shard, section.session)
        return record

    def _all_new_puts(self, section: Section, record: SessionRecord, row: Row) -> bool:
        """Whether nothing needs a look one by one: the usual case, judged at C speed."""
        keys = section.keys
        return (
            section.kinds.count(PUT) == len(keys)
            and record.replies.keys().isdisjoint(section.seqs)
            and min(section.seqs) >= record.acked_below
            and row.contains_all(keys)
        )

    def _apply_once(
        self,
        record: SessionRecord,
        late: bool,
        row: Row,
        writing: Writing,
        seq: int,
        kind: int,
        key: bytes,
        value: bytes,
    ) -> bytes:
        """Exactly once: a write that was done answers as it did then. The reply: a status and a value, or nothing."""
        done = record.replies.get(seq)
        if done is not None:
            return done
        if late or seq < record.acked_below:
            return SESSION_EXPIRED
        if not row.contains(key):
            return WRONG_SHARD  # leaves no record: the retry at the right shard is the first
        if writing.is_spent:
            return NOT_ANSWERED  # and nothing after it in this frame is done, so their order stays
        reply = record.replies[seq] = writing.apply(row, kind, key, value)
        return reply

    def refuse(self, row: Row | None) -> bytes:
        """Not ours now. Whoever has it, or gets it, is named, as far as this row knows."""
        if row is None or row.peer is None:
            return frames.pack_refusal(SectionStatus.WRONG_GROUP)
        return frames.pack_refusal(SectionStatus.WRONG_GROUP, row.peer.gid, row.peer.addresses)

    # ---- ownership

    def _apply_step(self, command: bytes, meta: SnapshotMeta) -> bytes:
        """A step of a configuration, hand-over or restore; each is idempotent.

        Replies b"1" if it had an effect; a step of a restore, a RestoreReply.
        """
        kind, body = command[0], command[1:]
        ownership = self.ownership
        effects: list[Effect] = []
        done = True
        reply: bytes | None = None
        if kind == commands.LEARN:
            effects, done = self._learn(pb.Learn.FromString(body))
        elif kind == commands.BEGIN:
            done = self._begin(pb.Begin.FromString(body).incarnation)
        elif kind == commands.CLAIMED:
            done = self._claimed(pb.Claimed.FromString(body))
        elif kind == commands.INSTALL:
            effects, done = self._install_chunk(pb.Install.FromString(body))
        elif kind == commands.CLOSE:
            step = pb.Step.FromString(body)
            done = ownership.closed(step.shard, step.epoch, step.attempt)
        elif kind == commands.THAW:
            step = pb.Step.FromString(body)
            done = ownership.thawed(step.shard, step.epoch, step.attempt)
        elif kind == commands.ABANDON:
            step = pb.Step.FromString(body)
            effects = ownership.abandoned(step.shard, step.epoch, step.attempt)
            done = bool(effects)
        elif kind in (commands.GIVE_UP, commands.ENDED):
            step = pb.Step.FromString(body)
            effects = ownership.gave_up(step.shard, step.epoch, is_ended=kind == commands.ENDED)
            done = bool(effects)
        elif kind in (commands.TAKE_BACK, commands.KEEP):
            step = pb.Step.FromString(body)
            effects = ownership.took_back(step.shard, step.epoch, was_asked=kind == commands.TAKE_BACK)
            done = bool(effects)
        elif kind == commands.RELEASE:
            step = pb.Step.FromString(body)
            effects = ownership.released(step.shard, step.epoch)
            done = bool(effects)
        elif kind == commands.INHERIT:
            message = pb.Inherit.FromString(body)
            effects = ownership.goes_on_inheriting(message.shard, getattr(message, "from"))
            done = bool(effects)
        elif kind == commands.RESTORE:
            told, effects = self._restoring.step(pb.RestoreStep.FromString(body))
            reply = told.SerializeToString(deterministic=True)
        elif kind == commands.CHECK:
            pass  # the commit below is what it is for
        else:
            raise AssertionError(f"a command of unknown kind {kind}")
        may_inherit = True  # one step an entry
        for effect in effects:
            effects += self._carry_out(effect, may_inherit)
            may_inherit &= not isinstance(effect, Inherit)
        self._commit(meta)
        if kind != commands.INHERIT or len(effects) > 1:  # such a step alone changes no record that is cached
            self._records.forget()
        for effect in effects:
            if isinstance(effect, Drop):
                self.engine.reclaim(*layout.data_range(effect.start, effect.end))
        if kind == commands.CHECK and self.on_check is not None:
            self.on_check(body)
        if reply is not None:
            return reply
        return b"1" if done else b""

    def _begin(self, incarnation: int) -> bool:
        """The group's incarnation is the one that is logged first; whoever leads later finds it."""
        if self.incarnation:
            return False
        self.incarnation = incarnation
        self._batch.put(layout.INCARNATION, incarnation.to_bytes(8, "big"))
        return True

    def _claimed(self, message: pb.Claimed) -> bool:
        """From here on the group is the one that joined in that configuration, or knows that it is not."""
        ownership = self.ownership
        if message.incarnation != self.incarnation:
            return False
        done = ownership.claimed(message.joined) if message.joined else ownership.refused(message.others)
        if done:
            self._batch.put(layout.CONFIG_NUM, ownership.config_num.to_bytes(8, "big"))
            self._batch.put(layout.JOINS, JOINS.pack(*ownership.joins, ownership.others))
        return done

    def _learn(self, message: pb.Learn) -> tuple[list[Effect], bool]:
        effects: list[Effect] = []
        learnt = False
        for data in message.changes:
            change = change_from_pb(ctl.Change.FromString(data))
            if not self.ownership.may_learn(change):
                break  # this change lets the group in, and no claim of that join is logged yet
            if change.num == self.ownership.config_num + 1:
                effects += self.ownership.learn(change)
                learnt = True
        if learnt:
            self._batch.put(layout.CONFIG_NUM, self.ownership.config_num.to_bytes(8, "big"))
            self._batch.put(layout.ADDRESSES, ",".join(self.ownership.addresses).encode())
        return effects, learnt

    def _install_chunk(self, chunk: pb.Install) -> tuple[list[Effect], bool]:
        """Take one piece of a shard in, if it is the piece that comes next."""
        row = self.ownership.rows.get(chunk.shard)
        if (
            row is None
            or row.state is not State.PULLING
            or row.epoch != chunk.epoch
            or row.attempt != chunk.attempt
            or row.cursor != cursor_from_pb(getattr(chunk, "from"))
        ):
            return [], False
        for item in chunk.items:
            assert layout.belongs(item.key, row.shard, row.start, row.end), "checked before it was proposed"
            if item.absent:
                self._batch.delete(item.key)
            else:
                self._batch.put(item.key, item.value)
        # The records' times are the giver's: a record that has expired there must be too old here.
        self.clock.advance(chunk.clock_ms)
        row.cursor = cursor_from_pb(chunk.next)
        self.ownership.changed.add(row.shard)
        if not chunk.final:
            return [], True
        return self.ownership.installed(chunk.shard, chunk.epoch), True

    def _carry_out(self, effect: Effect, may_inherit: bool) -> list[Effect]:
        """Change the engine as the rows have changed. Returns what follows from that."""
        match effect:
            case Inherit(shard):
                if may_inherit:
                    return self._inherit(self.ownership.rows[shard])
            case Drop(shard, start, end):
                self._batch.delete_range(*layout.data_range(start, end))
                self._batch.delete_range(*layout.record_range(shard))
                journal.drop(self._batch, shard)
            case DropJournal(shard):
                journal.drop(self._batch, shard)
        return []

    def _inherit(self, row: Row) -> list[Effect]:
        self.ownership.changed.add(row.shard)
        return self.ownership.inherited(row.shard) if self._records.inherit(row) else []

    def check(self) -> None:
        """Invariants, for tests and simulation."""
        self.ownership.check()


def _pack_replies(replies: list[bytes]) -> bytes:
    statuses = bytes([reply[0] if reply else Status.OK for reply in replies])
    has_values = any(len(reply) > 1 for reply in replies)
    return frames.pack_results(statuses, [reply[1:] for reply in replies] if has_values else None)
