"""What must hold in a cluster at every step, whatever fails: checked as entries are applied and roles change.

The histories that clients see are judged elsewhere (`tests/check`); this looks inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from shardkv.raft.protocol.types import Entry, Index, NodeId, Term
from shardkv.raft.replica import Replica
from shardkv.shardctrler.codec import config_to_pb
from shardkv.shardctrler.machine import ControllerMachine
from shardkv.state.machine import ShardMachine

Gid = int
Served = tuple[tuple[bytes, bytes], ...]

QUEUED_WRITES = 20_000  # jobs for one disk
STREAMS = 8  # snapshots being sent by one replica; one that is not wanted any more ends within a second
PENDING = 50_000  # proposals and reads of one replica that wait for their answer


class Invariants:
    """Facts about all replicas of all groups, over their whole life."""

    def __init__(self) -> None:
        self.elections = 0
        self.moves = 0  # times that a group began to serve something
        self._leaders: dict[tuple[Gid, Term], NodeId] = {}
        self._applied: dict[Gid, dict[Index, tuple[Term, bytes]]] = {}
        self._commits: dict[Gid, dict[Index, tuple[Term, Term]]] = {}  # the entry's term, its committer's
        self._newest: dict[Gid, Index] = {}  # the newest entry that any replica applied
        self._served: dict[Gid, Served] = {}  # what the group serves as of that entry
        self._highest: WeakKeyDictionary[Replica, Index] = WeakKeyDictionary()  # of this run of it
        self._config_num: dict[Gid, int] = {}
        self._configs: dict[int, bytes] = {}  # configuration number -> the map, as first seen

    @property
    def newest_config(self) -> int:
        """The highest number of a configuration that any controller has ever applied."""
        return max(self._configs, default=0)

    def forget(self, gid: Gid) -> None:
        """All disks of a group are gone: what comes under its number is another group."""
        for facts in (self._applied, self._commits, self._newest, self._served, self._config_num):
            facts.pop(gid, None)
        self._leaders = {(of, term): node for (of, term), node in self._leaders.items() if of != gid}

    def watch(self, gid: Gid, machine: ControllerMachine | ShardMachine) -> None:
        """State Machine Safety (Figure 3), and what rests on it."""
        apply = machine.apply
        history = self._applied.setdefault(gid, {})

        def watched(entries: Sequence[Entry]) -> list[bytes]:
            for entry in entries:
                told = (entry.term, entry.data)
                first = history.setdefault(entry.index, told)
                assert first == told, f"group {gid} applied two entries at {entry.index}"
            assert entries[0].index == machine.applied.index + 1, "a gap or a repetition"
            replies = apply(entries)
            assert machine.applied.index == entries[-1].index
            if self._applied.get(gid) is not history:
                return replies  # a process of the group before this one, being put away
            if isinstance(machine, ShardMachine):
                machine.check()
                self._look_at_shards(gid, machine)
            else:
                self._look_at_map(machine)
            return replies

        machine.apply = watched  # type: ignore[method-assign]

    def turned(self, gid: Gid, replica: Replica) -> None:
        """Election Safety and Leader Completeness (Figure 3); and what a replica has applied stays applied."""
        core = replica.core
        assert not replica.node.refusals.by_sender, f"group {gid}: the border refused what a sound peer sent"
        applied = replica.machine.applied.index
        assert applied >= self._highest.get(replica, 0), f"replica {core.id} of group {gid} was rolled back"
        self._highest[replica] = applied
        if not core.is_leader:
            return
        commits = self._commits.setdefault(gid, {})
        known = self._leaders.setdefault((gid, core.term), 0)
        if known == 0:
            self._leaders[gid, core.term] = core.id
            self.elections += 1
            for index, (term, committed_in) in commits.items():
                if committed_in < core.term and index > core.log.base_index:
                    found = core.log.term_at(index)
                    assert found == term, f"group {gid}: leader {core.id} lacks committed entry {index}"
        else:
            assert known == core.id, f"group {gid}: {known} and {core.id} both led term {core.term}"
        index = core.commit_index
        while index > core.log.base_index and index not in commits:
            of_entry = core.log.term_at(index)
            assert of_entry is not None
            commits[index] = (of_entry, core.term)
            index -= 1

    def _look_at_shards(self, gid: Gid, machine: ShardMachine) -> None:
        """Each key is served by at most one group, and configurations only go up.

        Judged by the newest state of each group: an older replica may believe that it
        still serves, but can neither commit nor answer.
        """
        if machine.applied.index <= self._newest.get(gid, 0):
            return
        self._newest[gid] = machine.applied.index
        ownership = machine.ownership
        assert ownership.config_num >= self._config_num.get(gid, 0), "a configuration was taken back"
        self._config_num[gid] = ownership.config_num
        served = tuple((row.start, row.end) for row in ownership.rows.values() if row.serves)
        if served == self._served.get(gid):
            return
        self._served[gid] = served
        self.moves += 1
        for other, ranges in self._served.items():
            if other != gid:
                for start, end in served:
                    for low, high in ranges:
                        apart = (end and end <= low) or (high and high <= start)
                        assert apart, f"groups {gid} and {other} both serve [{max(start, low)!r}, …)"

    def _look_at_map(self, machine: ControllerMachine) -> None:
        """The history of configurations is one, and each covers all keys once."""
        for num in range(max(self._configs, default=-1) + 1, machine.config.num + 1):
            config = machine.config_at(num)
            assert config is not None
            config.check()
            self._configs[num] = config_to_pb(config).SerializeToString(deterministic=True)

    def check_bounds(self, replica: Replica) -> None:
        """Nothing queues without bound."""
        node = replica.node
        assert node._jobs.qsize() <= QUEUED_WRITES, "writes pile up before the disk"
        assert len(replica._pending) <= PENDING
        assert len(replica._tickets) + len(replica._unapplied) <= PENDING
        assert len(node._senders) <= STREAMS, "snapshot streams pile up"
