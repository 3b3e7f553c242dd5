"""Clients that behave badly, many at once: a server's memory stays bounded, and others are served."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from bench.live import LiveCluster
from shardkv.client import ShardClerk
from shardkv.process.local_cluster import Process
from shardkv.wire.framing import ASK, CALL, HELLO, RECORD
from shardkv.wire.hello import stranger

CONNECTIONS = 2_000


@pytest.fixture(scope="module")
def live() -> Iterator[LiveCluster]:
    with LiveCluster(groups=1, replicas=1, controllers=1, shards=2) as cluster:
        yield cluster


@pytest.fixture
def group(live: LiveCluster) -> Process:
    return next(process for process in live.cluster().processes if process.role == "group")


def memory_megabytes(process: Process) -> float:
    return int(Path(f"/proc/{process.pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


def connect(process: Process) -> socket.socket:
    host, _, port = process.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def greeted(process: Process) -> socket.socket:
    connection = connect(process)
    connection.sendall(stranger())
    return connection


def usual_seconds(clerk: ShardClerk) -> float:
    taken = []
    for number in range(30):
        began = time.monotonic()
        clerk.put(f"k{number}", "v")
        taken.append(time.monotonic() - began)
    return median(taken)


def test_two_thousand_idle_connections_cost_little_and_slow_nobody(live: LiveCluster, group: Process) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 2 * CONNECTIONS), most))
    with live.clerk() as clerk, contextlib.ExitStack() as held:
        before, quiet = memory_megabytes(group), usual_seconds(clerk)
        for _ in range(CONNECTIONS):
            held.enter_context(greeted(group))
        crowded = usual_seconds(clerk)
        assert memory_megabytes(group) - before < 100
        assert crowded < max(10 * quiet, 0.05)
    with live.clerk() as clerk:
        clerk.put("after", "it")


def test_a_client_that_stops_reading_is_let_go_before_its_answers_fill_the_memory(
    live: LiveCluster, group: Process
) -> None:
    """It asks for the status again and again, and never takes an answer."""
    before = memory_megabytes(group)
    record = RECORD.pack(CALL, 1, len(b"kv.status"), 0) + b"kv.status"
    with greeted(group) as greedy:
        greedy.settimeout(1.0)
        sent, deadline = 0, time.monotonic() + 30
        with contextlib.suppress(OSError):  # either: it is not read from any more, or let go
            while time.monotonic() < deadline:
                sent += greedy.send(record * 1000)
        assert sent > 1000 * len(record)
        assert memory_megabytes(group) - before < 200
        with live.clerk() as clerk:
            assert usual_seconds(clerk) < 0.5


def test_a_flood_of_oversized_records_is_refused_at_its_first_bytes(live: LiveCluster, group: Process) -> None:
    before = memory_megabytes(group)
    for _ in range(50):
        with greeted(group) as flood, contextlib.suppress(OSError):
            flood.sendall(RECORD.pack(CALL, 1, 8, 0xFFFFFFFF) + b"kv.write" + bytes(1 << 20))
            while flood.recv(1 << 16):  # until it is closed on us
                pass
    assert memory_megabytes(group) - before < 50
    with live.clerk() as clerk:
        assert usual_seconds(clerk) < 0.5


def test_half_a_record_and_half_a_hello_are_not_waited_for_for_long(live: LiveCluster, group: Process) -> None:
    with greeted(group) as slow, connect(group) as silent:
        slow.sendall(RECORD.pack(CALL, 1, 8, 1000)[:7])
        silent.sendall(b"S")
        with live.clerk() as clerk:
            clerk.put("meanwhile", "v")
        silent.settimeout(30)
        assert silent.recv(1) == b"", "who does not say what it speaks is let go"
        _, status, length = HELLO.unpack(slow.recv(HELLO.size, socket.MSG_WAITALL))
        assert status == 0 and len(slow.recv(length, socket.MSG_WAITALL)) == length, "welcome"
        slow.settimeout(30)
        asked = b""
        while data := slow.recv(1000):
            asked += data
        assert asked.startswith(RECORD.pack(ASK, 0, 0, 0)), "asked whether it is there, and then let go"
