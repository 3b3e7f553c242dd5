"""One follower as its leader sees it: what it has, what is on its way, how fast to send.

    PROBE      where does its log match? one message out at a time
    REPLICATE  it matches: entries are pipelined up to a window of messages and bytes
    SNAPSHOT   its next entry is compacted: nothing is sent until the snapshot is in

REPLICATE falls back to PROBE on a rejection or when the connection is reported
down; PROBE turns to SNAPSHOT when the follower needs a compacted entry, and back
once the snapshot is installed or given up (thesis §10.2.1, etcd's design.md).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto

from shardkv.raft.protocol.types import Index

MOST_PAUSE = 256  # heartbeats between two snapshot streams to a replica that fails to take them
OLD_NEWS_BEATS = 8  # heartbeats after a snapshot in which answers from before it may still arrive


class Mode(Enum):
    PROBE = auto()
    REPLICATE = auto()
    SNAPSHOT = auto()


@dataclass(slots=True)
class Progress:
    """A leader's view of one replica. Dies with the leadership."""

    next_index: Index
    match_index: Index = 0
    mode: Mode = Mode.PROBE
    probe_sent: bool = False  # PROBE: a message is out, wait for its answer or the next heartbeat
    probe_end: Index = 0  # PROBE: what it must match to be over
    recently_active: bool = True  # heard from since the last CheckQuorum
    read_seq: int = 0  # newest read round this replica has confirmed
    confirmed_at: float = 0.0  # when the newest round that it confirmed was *sent*
    low: bool = False  # its disk has little room, it said
    state_lost: bool = False  # its state machine is damaged, it said: it can vote and store, and not lead
    snapshot_out: bool = False  # a snapshot is being sent to it
    snapshot_index: Index = 0
    catching_up: bool = False  # it takes a snapshot in, or has, and has not yet all that is committed
    failed_snapshots: int = 0  # streams that ended without success, one after the other
    snapshot_pause: int = 0  # heartbeats until the next stream may begin
    installing_beats: int = 0  # heartbeats in which `state_lost` may be older than the snapshot that came in
    in_flight: deque[tuple[Index, int]] = field(default_factory=deque)  # (last index, bytes)
    in_flight_bytes: int = 0

    def may_send(self, window_messages: int, window_bytes: int) -> bool:
        """Whether flow control lets entries go out now."""
        if self.mode is Mode.PROBE:
            return not self.probe_sent
        if self.mode is Mode.REPLICATE:
            return len(self.in_flight) < window_messages and self.in_flight_bytes < window_bytes
        return False

    def sent(self, last_index: Index, size: int) -> None:
        """Entries up to `last_index` left."""
        if self.mode is Mode.PROBE:
            self.probe_sent = True
            self.probe_end = last_index
        else:
            self.next_index = last_index + 1
            self.in_flight.append((last_index, size))
            self.in_flight_bytes += size

    def matched(self, index: Index) -> bool:
        """The follower has everything up to `index`. True if that is news; never goes back."""
        while self.in_flight and self.in_flight[0][0] <= index:
            self.in_flight_bytes -= self.in_flight.popleft()[1]
        news = index > self.match_index
        self.match_index = max(self.match_index, index)
        self.next_index = max(self.next_index, self.match_index + 1)
        return news

    def chunk_answered(self) -> None:
        """It takes in what it is sent of a snapshot."""
        self.recently_active = True
        self.catching_up = self.catching_up or self.snapshot_out

    def look_behind(self, commit_index: Index) -> None:
        """Note whether it has caught up."""
        if self.catching_up and not self.snapshot_out and self.match_index >= commit_index:
            self.catching_up = False

    def end_of_round(self) -> None:
        """CheckQuorum has counted: it is to be heard from again. One that was not does not catch up any more."""
        if not self.recently_active and not self.snapshot_out:
            self.catching_up = False
        self.recently_active = False

    def heartbeat(self) -> None:
        """A heartbeat is due: what was out is lost or late by now."""
        self.probe_sent = False
        self.snapshot_pause = max(0, self.snapshot_pause - 1)
        self.installing_beats = max(0, self.installing_beats - 1)

    @property
    def may_get_snapshot(self) -> bool:
        """Whether to open a snapshot, which costs the disk: not for a replica that is gone, or failed just now."""
        return self.recently_active and not self.snapshot_pause

    def snapshot_ended(self, index: Index) -> None:
        """The follower holds everything up to `index`; 0: the stream failed, and the next one waits longer."""
        self.snapshot_out = False
        self.catching_up = index > 0
        self.failed_snapshots = 0 if index else self.failed_snapshots + 1
        self.snapshot_pause = min(2**self.failed_snapshots, MOST_PAUSE) if self.failed_snapshots else 0
        self.installing_beats = OLD_NEWS_BEATS if index else 0
        if self.mode is Mode.SNAPSHOT:
            self.matched(index)
            self.become_probe()

    def become_probe(self) -> None:
        """Start over from what is known to match.

        Only news ends it. Were an old answer enough, then among reordered messages each
        rejection would bring another window of them, and each of these more rejections.
        """
        self.mode = Mode.PROBE
        self.probe_end = self.match_index + 1
        self.probe_sent = False
        self.next_index = self.match_index + 1
        self.in_flight.clear()
        self.in_flight_bytes = 0

    def become_replicate(self) -> None:
        self.mode = Mode.REPLICATE
        self.probe_sent = False
        self.next_index = self.match_index + 1
        self.in_flight.clear()
        self.in_flight_bytes = 0

    def become_snapshot(self, index: Index) -> None:
        self.mode = Mode.SNAPSHOT
        self.snapshot_index = index
        self.in_flight.clear()
        self.in_flight_bytes = 0

    def begin_snapshot(self) -> bool:
        """Whether a stream is to begin: at most one is out to a follower, until `Raft.snapshot_reported`."""
        begins = not self.snapshot_out and self.may_get_snapshot
        self.snapshot_out = self.snapshot_out or begins
        return begins

    def begin_repair(self) -> bool:
        """Whether a stream is to begin because it says that its state is lost.

        Answers that it made before a snapshot was installed say so too, and may arrive afterwards.
        """
        return not self.installing_beats and self.begin_snapshot()

    def check(self) -> None:
        assert self.match_index < self.next_index
        assert self.in_flight_bytes == sum(size for _, size in self.in_flight)
        assert self.mode is Mode.REPLICATE or not self.in_flight
