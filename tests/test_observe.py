"""What an operator sees of a running cluster: metrics, health, logs, and options that stand in a file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import threading
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from bench.live import SHARDKV, LiveCluster, free_port_base, in_background
from shardkv.cli.top import Screen
from shardkv.client import ShardClerk
from shardkv.observe.overview import Overview
from shardkv.shardctrler.shard_map import Config, Group, Shard

ROOT = Path(__file__).parent.parent
Samples = dict[tuple[str, str], float]


@pytest.fixture(scope="module")
def live():  # type: ignore[no-untyped-def]
    with LiveCluster(groups=1, controllers=1, shards=4, metrics_port=free_port_base() + 20) as cluster:
        yield cluster


def scrape(address: str) -> Samples:
    """Value by (sample, its labels but `le`, joined)."""
    text = urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_group_s_metrics_tell_who_leads_what_it_does_and_who_lags(live: LiveCluster) -> None:
    with live.clerk() as clerk:
        for number in range(50):
            clerk.put(f"k{number}", "v")
        clerk.get("k1")
    leader = live.leader(1)
    told = {p.address: scrape(p.metrics) for p in live.cluster().processes if p.role == "group"}
    assert len(told) == 3
    assert [address for address, each in told.items() if each["shardkv_raft_is_leader", ""]] == [leader.address]
    own = told[leader.address]
    assert own["shardkv_operations_total", ""] >= 50
    # Any replica may answer a read, and one that does not lead answers a write by saying who does.
    for method, least in (("kv.write", 50), ("kv.read", 1)):
        assert sum(each.get(("shardkv_call_seconds_count", method), 0) for each in told.values()) >= least
    assert own["shardkv_shards", "SERVING"] == 4 and own["shardkv_shards", "PULLING"] == 0
    assert {key for key in own if key[0] == "shardkv_raft_follower_lag_entries"} == {
        ("shardkv_raft_follower_lag_entries", str(n)) for n in (1, 2, 3) if n != leader.index + 1
    }
    for each in told.values():
        assert each["shardkv_raft_up", ""] == 1 and each["shardkv_raft_has_leader", ""] == 1
        assert each["shardkv_wal_append_seconds_count", ""] > 0
        assert each["shardkv_raft_members", "voters"] == 3
        assert each["shardkv_rocksdb_cur_size_all_mem_tables", ""] > 0
        assert each["process_resident_memory_bytes", ""] > 1 << 20


def test_a_controller_s_metrics_tell_who_is_to_serve_how_much(live: LiveCluster) -> None:
    (controller,) = [process for process in live.cluster().processes if process.role == "controller"]
    told = scrape(controller.metrics)
    assert told["shardkv_groups", ""] == 1
    assert told["shardkv_group_shards", "1"] == 4 and told["shardkv_group_shards", "none"] == 0
    assert told["shardkv_config_num", ""] >= 2


def test_the_dashboard_asks_for_metrics_that_there_are(live: LiveCluster) -> None:
    names = {name for process in live.cluster().processes for name, _ in scrape(process.metrics)}
    dashboard = json.loads((ROOT / "deploy/grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b(?:shardkv|process)_\w+", target["expr"])
    }
    assert len(asked) > 15 and asked <= names, asked - names


def test_grpc_health_and_reflection_are_there_for_probes_and_grpcurl(live: LiveCluster) -> None:
    for process in live.cluster().processes:
        with grpc.insecure_channel(process.address) as channel:
            status = (
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10).status
            )
            assert status == health_pb2.HealthCheckResponse.SERVING
            services = ProtoReflectionDescriptorDatabase(channel).get_services()
            service = "shardkv.shardkv.KV" if process.role == "group" else "shardkv.shardctrler.Controller"
            assert {service, "grpc.health.v1.Health"} <= set(services)


def put_until(over: threading.Event, clerk: ShardClerk) -> None:
    while not over.is_set():
        clerk.put("t", "v")


def test_top_shows_roles_load_and_what_is_on_its_way(live: LiveCluster) -> None:
    began = live.run("top", "--count", "1")
    assert "4 of 4 shards serve" in began and "leader" in began and "follower" in began
    with live.clerk() as clerk:
        over = threading.Event()
        writing = in_background(lambda: put_until(over, clerk))
        try:
            shown = live.run("top", "--count", "4", "--interval", "0.2")
        finally:
            over.set()
        writing()
    leader = live.leader(1)
    lines = [line.split() for line in shown.splitlines() if leader.address in line]
    assert len(lines) == 4
    assert max(int(line[-2].replace(",", "")) for line in lines[1:]) > 0, "writes a second"
    assert live.json("status")["serving"] == 4


def test_a_move_that_does_not_end_is_seen_by_its_age() -> None:
    config = Config.of(3, [Shard(1, b"", b"", 2, 3, 2)], [Group(1, ("a:1",)), Group(2, ("b:1",))])
    giver = {"role": "leader", "term": 1, "commit_index": 5, "applied_index": 5, "config_num": 3}
    giver |= {"shards": {"1": {"state": "LENDING", "epoch": 3, "waiting": 0}}}
    taker = giver | {"shards": {"1": {"state": "PULLING", "epoch": 3, "waiting": 0}}}
    overview = Overview(config, {}, {1: {"a:1": giver}, 2: {"b:1": taker, "c:1": None}})
    screen, console = Screen(), Console(width=120, record=True)
    screen.draw(overview, 100.0)
    console.print(screen.draw(overview, 142.0))
    shown = console.export_text()
    assert "shard 1: lending at group 1 for 42 s" in shown and "shard 1: pulling at group 2 for 42 s" in shown
    assert "no answer" in shown and "0 of 1 shards serve" in shown


def serve(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*SHARDKV, "serve", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_options_come_from_the_command_line_then_the_environment_then_a_file(tmp_path: Path) -> None:
    port = free_port_base()
    (tmp_path / "controller.toml").write_text(
        f'id = 1\npeers = ["127.0.0.1:{port}"]\ndata = "{tmp_path}/from-file"\nlog-format = "text"\nshards = 3\n'
    )
    process = serve(
        "controller",
        "--config",
        str(tmp_path / "controller.toml"),
        "--data",
        str(tmp_path / "from-line"),
        SHARDKV_CONTROLLER_LOG_FORMAT="json",
    )
    try:
        assert process.stderr is not None
        lines = [json.loads(process.stderr.readline()) for _ in range(2)]
        assert lines[0]["message"] == f"listening on 127.0.0.1:{port}" and lines[0]["level"] == "INFO"
        assert lines[1]["message"] == "replica 1: 1 leads in term 1"
    finally:
        process.terminate()
        assert process.wait(20) == 0
        process.communicate()
    assert (tmp_path / "from-line").is_dir() and not (tmp_path / "from-file").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id = ", "is not TOML"),
        ('colour = "red"\n', "no such option: colour"),
        ('config = "x"\n', "no such option: config"),
    ],
)
def test_a_file_with_mistakes_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "wrong.toml").write_text(text)
    process = serve("group", "--config", str(tmp_path / "wrong.toml"))
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2 and told in said


def test_connections_to_the_metrics_that_say_nothing_cost_no_threads_and_are_let_go(live: LiveCluster) -> None:
    process = live.cluster().processes[0]
    host, _, port = process.metrics.rpartition(":")

    def threads() -> int:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Threads:"))

    scrape(process.metrics)
    before = threads()
    with contextlib.ExitStack() as held:
        silent = [held.enter_context(socket.create_connection((host, int(port)), 10)) for _ in range(300)]
        assert scrape(process.metrics)
        assert threads() <= before + 2, "of the pool of threads that renders, at most"
        for connection in silent[:50]:
            connection.settimeout(30)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b"", "the oldest make room"


def test_a_metrics_port_that_is_taken_is_said_in_one_line(live: LiveCluster, tmp_path: Path) -> None:
    taken = live.cluster().processes[0].metrics
    port = free_port_base()
    process = serve(
        "controller", "--id", "1", "--peers", f"127.0.0.1:{port}", "--data", str(tmp_path), "--metrics", taken
    )
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and f"shardkv: {taken} cannot be listened on" in said
