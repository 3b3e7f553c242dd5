"""Prometheus metrics of one process, on a port of their own (`--metrics`).

Nearly everything is read when somebody asks, from what the replica knows anyway: a scrape
costs a millisecond, and the hot path nothing. Only durations are noted as they happen: of
each call (a frame of many operations) and of each append to the log.

The HTTP server is `scrapes.py`; a thread renders what is gathered on the event loop, which owns the state.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Tally
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, cast

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from shardkv.raft.figures import figures
from shardkv.raft.replica import Replica
from shardkv.shardctrler.machine import ControllerMachine
from shardkv.shardctrler.shard_map import NO_GROUP
from shardkv.state.machine import ShardMachine
from shardkv.state.row import State
from shardkv.storage.rocks import RocksEngine
from shardkv.wire.acceptor import Acceptor
from shardkv.wire.calls import Handler
from shardkv.wire.tls_files import TlsFiles

GATHER_SECONDS = 5.0
# From the time that a fast disk or a call on loopback takes, to what is too long for any.
BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ROCKS = {
    "estimate-num-keys": "keys, as RocksDB estimates them",
    "total-sst-files-size": "bytes of table files, obsolete ones included",
    "live-sst-files-size": "bytes of table files in use",
    "cur-size-all-mem-tables": "bytes in memtables",
    "block-cache-usage": "bytes in the block cache",
    "estimate-pending-compaction-bytes": "bytes that compactions have yet to rewrite",
    "num-running-compactions": "compactions at work",
    "num-running-flushes": "flushes at work",
}


class Metrics:
    """One process's registry, and the two histograms that are fed as things happen."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._calls = Histogram(
            "shardkv_call_seconds",
            "Calls answered, by method",
            ["method"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._appends = Histogram(
            "shardkv_wal_append_seconds",
            "Appends to the raft log, synced",
            buckets=BUCKETS,
            registry=self.registry,
        )

    def appended(self, seconds: float) -> None:
        """The log's disk took so long for one batch; called on the disk's thread."""
        self._appends.observe(seconds)

    def timed(self, handler: Handler, methods: Container[str]) -> Handler:
        """`handler`, with each call's duration noted. Methods that a peer makes up count as one."""
        known: dict[str, Histogram] = {}

        async def handle(method: str, payload: bytes) -> bytes:
            began = time.perf_counter()
            try:
                return await handler(method, payload)
            finally:
                name = method if method in methods else "other"
                if name not in known:
                    known[name] = self._calls.labels(name)
                known[name].observe(time.perf_counter() - began)

        return handle

    def watch(self, replica: Replica) -> None:
        """Report what this replica knows, at each scrape. Call it on the replica's event loop."""
        self.registry.register(_OnLoop(asyncio.get_running_loop(), lambda: list(_of_replica(replica))))

    def watch_acceptor(self, acceptor: Acceptor) -> None:
        """Report how full the process's own listener is. Call it on the event loop."""
        self.registry.register(
            _OnLoop(asyncio.get_running_loop(), lambda: list(_of_acceptor(acceptor.status())))
        )

    def watch_quotas(self, refused: Mapping[str, int]) -> None:
        """Report what quotas refused, by whose they are. Call it on the event loop."""
        self.registry.register(
            _OnLoop(
                asyncio.get_running_loop(),
                lambda: [
                    _by(
                        "quota_refusals",
                        "Operations (and gRPC calls) that a quota refused, by whose quota it is",
                        "whose",
                        {whose: float(refused.get(whose, 0)) for whose in ("user", "prefix")},
                    )
                ],
            )
        )

    def watch_certificates(self, certificates: TlsFiles) -> None:
        """Report when the TLS files end. Call it on the event loop."""
        self.registry.register(
            _OnLoop(asyncio.get_running_loop(), lambda: list(_of_certificates(certificates)))
        )


class _OnLoop(Collector):
    """Gathers on the event loop what the HTTP server's thread asks for."""

    def __init__(self, loop: asyncio.AbstractEventLoop, gather: Callable[[], list[Metric]]) -> None:
        self._loop, self._gather = loop, gather

    def describe(self) -> Iterable[Metric]:
        return []  # asked for on the loop itself, when registering: there is nothing to clash with

    def collect(self) -> Iterable[Metric]:
        async def gather() -> list[Metric]:
            return self._gather()

        # A loop that stands still fails the scrape, which is what a monitor should see.
        return asyncio.run_coroutine_threadsafe(gather(), self._loop).result(GATHER_SECONDS)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"shardkv_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"shardkv_{name}", text, value=value)


def _by(name: str, text: str, label: str, values: dict[str, float]) -> Metric:
    family = GaugeMetricFamily(f"shardkv_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _of_replica(replica: Replica) -> Iterator[Metric]:
    yield from _of_raft(replica)
    if isinstance(replica.machine, ShardMachine):
        yield from _of_group(replica.machine)
    elif isinstance(replica.machine, ControllerMachine):
        yield from _of_controller(replica.machine)


def _of_acceptor(status: dict[str, Any]) -> Iterator[Metric]:
    kinds = ("strangers", "known", "peers")
    held = {kind: float(status[kind]) for kind in kinds}
    yield _by("connections", "Connections by what is known of who is behind them", "standing", held)
    places = dict(zip(kinds, map(float, status["places"]), strict=True))
    yield _by("connection_places", "How many of each there may be", "standing", places)
    yield _counter("connections_accepted", "Connections accepted", status["accepted"])
    yield _by(
        "connections_turned_away",
        "Connections that this process ended, by why",
        "why",
        {why: float(count) for why, count in status["turned_away"].items()},
    )
    yield _counter("tls_handshakes", "TLS handshakes begun", status["handshakes_begun"])
    yield _gauge("tls_handshakes_waiting", "Connections that wait for theirs", status["handshakes_waiting"])
    yield _gauge("connection_held_bytes", "Bytes in memory for connections", status["held_bytes"])
    yield _counter(
        "accept_failures", "Times that the system had no descriptor for a connection", status["accept_failures"]
    )


def _of_certificates(certificates: TlsFiles) -> Iterator[Metric]:
    status = certificates.status()
    yield _gauge(
        "certificate_expiry_time_seconds",
        "When the TLS certificate, or its CA's, expires",
        cast(float, status["expires_at"]),
    )
    if status["revocations_until"] is not None:
        yield _gauge(
            "revocation_list_expiry_time_seconds",
            "When the revocation list is to be replaced: from then on no certificate is accepted",
            cast(float, status["revocations_until"]),
        )
    yield _counter("certificate_reloads", "Times that changed TLS files were read", certificates.reloads)
    yield _gauge(
        "certificate_files_broken", "1 while the TLS files cannot be used", float(bool(certificates.problem))
    )


def _of_raft(replica: Replica) -> Iterator[Metric]:
    raft, node = figures(replica), replica.node
    applied = replica.machine.applied.index
    yield _gauge("raft_up", "1 while the replica has not stopped for a fault", not node.stopped)
    yield _gauge("raft_term", "Term", raft.term)
    yield _gauge("raft_is_leader", "1 at the leader", raft.is_leader)
    yield _gauge("raft_has_leader", "1 where a leader is known", raft.has_leader)
    yield _counter(
        "raft_leader_changes", "Times that this replica learnt of another leader", node.leader_changes
    )
    yield _gauge("raft_commit_index", "Last entry known to be committed", raft.commit_index)
    yield _gauge("raft_applied_index", "Last entry applied", applied)
    yield _gauge("raft_apply_lag_entries", "Committed and not yet applied", raft.commit_index - applied)
    yield _gauge("raft_log_entries", "Entries in the log", raft.log_entries)
    yield _gauge("raft_log_bytes", "Bytes of them", raft.log_bytes)
    yield _gauge(
        "raft_unsynced_entries",
        "Entries that are not on this disk yet",
        raft.unsynced_entries,
    )
    yield _gauge(
        "wall_clock_ahead_seconds",
        "This machine's wall clock against its group's time: where one replica differs, its clock is wrong",
        replica.wall_ahead_ms / 1000,
    )
    yield _gauge("disk_free_bytes", "Free on the file system of the data", node.free_bytes)
    yield _gauge("disk_room", "Room on it: 0 plenty, 1 low, 2 full", node.room)
    yield _gauge(
        "raft_disk_silent_seconds",
        "For how long a write to the log has waited without an answer of the disk",
        node.disk_silent_seconds,
    )
    damage = replica.damage
    yield _counter("damage_found", "Files of the state found damaged", damage.found if damage else 0)
    yield _counter("damage_repairs", "Times that the state was repaired", damage.repaired if damage else 0)
    yield _gauge("raft_state_lost", "1 while the state is damaged and being repaired", raft.state_lost)
    yield _gauge("raft_queued_writes", "Jobs that wait for the disk", node.queued_writes)
    yield _gauge("raft_waiting_proposals", "Commands that wait to be applied", replica.waiting_proposals)
    yield _gauge(
        "raft_waiting_reads", "Read rounds that wait for an index, or to be applied", replica.waiting_reads
    )
    yield _gauge("raft_snapshots_sending", "Snapshots being streamed to others", node.snapshots_sending)
    refused = {str(sender): float(count) for sender, count in sorted(node.refusals.by_sender.items())}
    yield _by(
        "raft_mail_refused",
        "Messages refused since the start, by their sender (0: not told)",
        "replica",
        refused,
    )
    members = {kind: float(len(nodes)) for kind, nodes in replica.members.items()}
    yield _by("raft_members", "Replicas of the group", "kind", members)
    if raft.uncommitted_bytes is not None:
        yield _gauge("raft_uncommitted_bytes", "Proposed and not yet committed", raft.uncommitted_bytes)
        lag = {str(peer): float(entries) for peer, (entries, _) in raft.followers.items()}
        yield _by("raft_follower_lag_entries", "Entries that a follower has yet to store", "replica", lag)
        silent = {str(peer): float(not heard) for peer, (_, heard) in raft.followers.items()}
        yield _by(
            "raft_follower_silent", "1 if not heard from since the leader last checked", "replica", silent
        )


def _of_group(machine: ShardMachine) -> Iterator[Metric]:
    rows = machine.ownership.rows.values()
    states = Tally(row.state.name for row in rows)
    yield _gauge("config_num", "Configuration that the group has come to", machine.ownership.config_num)
    yield _by("shards", "Shards by state", "state", {state.name: float(states[state.name]) for state in State})
    yield _gauge(
        "shard_changes_waiting",
        "Configuration changes of shards that wait for an earlier one",
        sum(len(row.queue) for row in rows),
    )
    yield _counter("operations", "Writes applied since the start", machine.operations)
    scrub = machine.engine.scrub_progress()
    if scrub:
        yield _gauge(
            "scrub_bytes_checked", "Bytes that the scrub has read in this round", scrub["bytes_checked"]
        )
        yield _gauge("scrub_bytes_total", "Bytes that it reads in a round", scrub["bytes_total"])
        yield _counter("scrub_rounds", "Rounds since the start in which everything was whole", scrub["rounds"])
        yield _gauge("scrub_last_round_time_seconds", "When the last of them ended", scrub["last_round_at"])
        yield _gauge("scrub_damaged_files", "Files that it found damaged", len(scrub["damaged"]))
    if isinstance(machine.engine, RocksEngine):
        for name, text in ROCKS.items():
            yield _gauge(f"rocksdb_{name.replace('-', '_')}", f"RocksDB: {text}", machine.engine.property(name))


def _of_controller(machine: ControllerMachine) -> Iterator[Metric]:
    config = machine.config
    yield _gauge("config_num", "Latest configuration", config.num)
    yield _gauge("groups", "Groups in it", len(config.groups))
    counts = {str(gid): float(count) for gid, count in config.counts().items()}
    counts["none"] = float(sum(shard.gid == NO_GROUP for shard in config.by_id.values()))
    yield _by("group_shards", "Shards by the group that is to serve them", "gid", counts)
