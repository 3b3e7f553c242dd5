"""The judges are judged: classic bugs, planted one at a time, must be found by the simulations.

Each mutant is a small patch to production code. It runs against seeds of one of two
stories, a bare Raft group or a whole cluster, until one fails; more seeds than stated
means that the simulation is too kind. `python -m tests.test_mutants` prints how many
each took.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from raft import quorum
from raft.core import Raft
from raft.log import Log
from raft.messages import AppendEntries
from raft.rsm import ReplicatedMachine
from shardkv import commands, lending
from shardkv import shardkv_pb2 as pb
from shardkv.engine import MemoryEngine
from shardkv.machine import ShardMachine
from shardkv.migration import Migrator
from shardkv.ownership import Cursor, Ownership, Row, State
from shardkv.records import Records
from tests.sim import loop, soak
from tests.sim.network import Weather
from tests.sim.raft_world import RaftWorld
from tests.test_raft_agreement import _figure_8
from tests.test_raft_persistence import _churn

Patch = Callable[[pytest.MonkeyPatch], None]


def raft_story(seed: int) -> None:
    """A bare group of five: churn on a bad network, then Figure 8, with little logs."""

    async def main() -> None:
        rng = Random(seed)
        weather = Weather(loss=0.1, repeat=0.1, long_delay=rng.choice([0.1, 0.3]))
        world = RaftWorld(5, seed, compact_bytes=rng.choice([300, 1 << 20]), weather=weather)
        await world.start()
        await (_churn(world) if seed % 2 else _figure_8(world, 300))
        for replica in world.replicas.values():
            assert replica.node.fault is None
        await world.crash(list(world.replicas))

    loop.run(main(), limit=3000)


def cluster_story(seed: int) -> None:
    loop.run(soak.story(seed, steps=20), limit=1500)


# ---- Raft


def a_term_is_forgotten_in_a_crash(patch: pytest.MonkeyPatch) -> None:
    from raft import wal

    patch.setattr(wal, "_pack_hard_state", lambda s: wal.HARD_STATE.pack(wal.RECORD_HARD_STATE, 0, 0))


def votes_for_shorter_logs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Log, "is_up_to_date", lambda self, index, term: True)


def answers_before_its_disk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Raft, "_promise", lambda self, to, message: self._send(to, message))


def does_not_truncate_a_conflict(patch: pytest.MonkeyPatch) -> None:
    original = Raft._on_append_entries

    def on_append(self: Raft, sender: int, message: AppendEntries) -> None:
        fresh = tuple(entry for entry in message.entries if entry.index > self.log.last_index)
        if fresh:
            start = fresh[0].index - 1
            message = replace(
                message,
                prev_log_index=start,
                prev_log_term=self.log.term_at(start) or 0,
                entries=tuple(replace(e, term=max(e.term, self.log.last_term)) for e in fresh),
            )
        original(self, sender, message)

    patch.setattr(Raft, "_on_append_entries", on_append)


def an_old_append_truncates(patch: pytest.MonkeyPatch) -> None:
    original = Raft._on_append_entries

    def on_append(self: Raft, sender: int, message: AppendEntries) -> None:
        end = message.prev_log_index + len(message.entries)
        if message.entries and self.commit_index <= end < self.log.last_index:
            self.log.truncate(max(end, self.commit_index) + 1)
        original(self, sender, message)

    patch.setattr(Raft, "_on_append_entries", on_append)


def a_minority_is_enough(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quorum, "majority", lambda count: max(1, count // 2))


# ---- reads, records, shards


def reads_without_a_quorum(patch: pytest.MonkeyPatch) -> None:
    async def barrier(self: ReplicatedMachine) -> None:
        return None

    patch.setattr(ReplicatedMachine, "read_barrier", barrier)


def writes_are_not_remembered(patch: pytest.MonkeyPatch) -> None:
    original = ShardMachine._apply_section

    def apply(self, section, issued_ms, max_value):  # type: ignore[no-untyped-def]
        record = self._records.find(section.shard, section.session)
        if record is not None:
            record.replies.clear()
        return original(self, section, issued_ms, max_value)

    patch.setattr(ShardMachine, "_apply_section", apply)


def records_do_not_move(patch: pytest.MonkeyPatch) -> None:
    original = lending.pull

    def pull(machine, request, *rest):  # type: ignore[no-untyped-def]
        reply = original(machine, request, *rest)
        kept = [item for item in reply.items if not item.key.startswith(b"s")]
        del reply.items[:]
        reply.items.extend(kept)
        return reply

    patch.setattr(lending, "pull", pull)


def records_do_not_split(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Records, "copy", lambda self, batch, source, target: None)


def records_are_not_in_the_snapshot(patch: pytest.MonkeyPatch) -> None:
    original = MemoryEngine.load

    def load(self: MemoryEngine, data: bytes) -> None:
        original(self, data)
        for key in list(self._pairs.irange(b"s", b"t")):
            del self._pairs[key]

    patch.setattr(MemoryEngine, "load", load)


def the_journal_is_not_replayed(patch: pytest.MonkeyPatch) -> None:
    def replay(engine, row, cursor, reply, size, limit):  # type: ignore[no-untyped-def]
        return Cursor(lending.JOURNAL, b"", row.journal), size

    patch.setattr(lending, "_replay", replay)


def the_last_chunk_does_not_wait_for_the_freeze(patch: pytest.MonkeyPatch) -> None:
    original = lending.pull

    def pull(machine, request, *rest):  # type: ignore[no-untyped-def]
        reply = original(machine, request, *rest)
        reply.final = reply.ready and reply.next.phase == lending.JOURNAL
        return reply

    patch.setattr(lending, "pull", pull)


def deletes_before_the_receiver_has_it(patch: pytest.MonkeyPatch) -> None:
    async def release(self: Migrator, shard: int, epoch: int) -> None:
        while self._row(shard, epoch, State.FROZEN) is not None:
            await self._replica.propose(commands.release(shard, epoch))

    patch.setattr(Migrator, "_release", release)


def serves_while_pulling(patch: pytest.MonkeyPatch) -> None:
    served = (State.PULLING, State.SERVING, State.LENDING)
    patch.setattr(Row, "serves", property(lambda self: self.state in served))


def serves_when_frozen(patch: pytest.MonkeyPatch) -> None:
    served = (State.FROZEN, State.SERVING, State.LENDING)
    patch.setattr(Row, "serves", property(lambda self: self.state in served))


def a_chunk_is_installed_wherever_the_cursor_is(patch: pytest.MonkeyPatch) -> None:
    original = ShardMachine._install_chunk

    def install(self: ShardMachine, chunk: pb.Install):  # type: ignore[no-untyped-def]
        row = self.ownership.rows.get(chunk.shard)
        if row is not None and chunk.next.phase == 2:
            chunk.final = True
        return original(self, chunk)

    patch.setattr(ShardMachine, "_install_chunk", install)


def a_configuration_is_skipped(patch: pytest.MonkeyPatch) -> None:
    original = Ownership.learn

    def learn(self, change):  # type: ignore[no-untyped-def]
        if change.num % 3 == 0:
            self.config_num = change.num
            return []
        return original(self, change)

    patch.setattr(Ownership, "learn", learn)


def the_journal_follows_the_batches(patch: pytest.MonkeyPatch) -> None:
    """The real bug of seed 47: positions that mean something else on another replica."""
    patch.setattr(ShardMachine, "_journal", lambda self, row, section: None)
    original = ShardMachine._commit

    def commit(self: ShardMachine, applied) -> None:  # type: ignore[no-untyped-def]
        from shardkv import layout

        self._records.store(self._batch)
        for row in list(self.ownership.in_state(State.LENDING)):
            start, end = layout.data_range(row.start, row.end)
            low, high = layout.record_range(row.shard)
            for key in [k for k in self._batch.changes if start <= k < end or low <= k < high]:
                self._batch.put(layout.journal_key(row.shard, row.journal), key)
                row.journal += 1
                self.ownership.changed.add(row.shard)
        original(self, applied)

    patch.setattr(ShardMachine, "_commit", commit)


# name -> (story, seeds within which it must be found)
MUTANTS: dict[Patch, tuple[Callable[[int], None], int]] = {
    a_term_is_forgotten_in_a_crash: (raft_story, 20),
    votes_for_shorter_logs: (raft_story, 10),
    answers_before_its_disk: (raft_story, 20),
    does_not_truncate_a_conflict: (raft_story, 10),
    an_old_append_truncates: (raft_story, 10),
    a_minority_is_enough: (raft_story, 10),
    reads_without_a_quorum: (cluster_story, 10),
    writes_are_not_remembered: (cluster_story, 10),
    records_do_not_move: (cluster_story, 20),
    records_do_not_split: (cluster_story, 40),
    records_are_not_in_the_snapshot: (cluster_story, 20),
    the_journal_is_not_replayed: (cluster_story, 10),
    the_last_chunk_does_not_wait_for_the_freeze: (cluster_story, 10),
    deletes_before_the_receiver_has_it: (cluster_story, 10),
    serves_while_pulling: (cluster_story, 10),
    serves_when_frozen: (cluster_story, 10),
    a_chunk_is_installed_wherever_the_cursor_is: (cluster_story, 10),
    a_configuration_is_skipped: (cluster_story, 10),
    the_journal_follows_the_batches: (cluster_story, 60),
}


def seeds_until_found(mutant: Patch) -> int | None:
    """How many seeds it took to find the mutant; None if it survived them all."""
    story, most = MUTANTS[mutant]
    logging.disable(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        for seed in range(most):
            try:
                story(seed)
            except Exception:  # however it shows: an assertion, a wrong history, nothing settling
                return seed + 1
    return None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.timeout(300)
def test_the_simulation_finds(mutant: Patch) -> None:
    found = seeds_until_found(mutant)
    logging.disable(logging.NOTSET)
    assert found is not None, f"{mutant.__name__} survived {MUTANTS[mutant][1]} seeds"


@pytest.mark.parametrize("story", [raft_story, cluster_story])
def test_the_stories_pass_without_a_mutant(story: Callable[[int], None]) -> None:
    for seed in range(3):
        story(seed)


if __name__ == "__main__":
    for each in MUTANTS:
        print(f"{each.__name__}: {seeds_until_found(each) or 'SURVIVED'}", flush=True)
