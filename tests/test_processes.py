"""Real processes, real disks, the real command: killed, restarted, misused."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from bench.acceptance import kill, load
from bench.live import SHARDKV, Appenders, LiveCluster, attempt, free_port_base
from shardkv import shardkv_pb2 as pb
from shardkv import shardkv_pb2_grpc as pb_grpc
from shardkv.client import (
    AsyncShardClerk,
    ClerkClosed,
    ForkedClerk,
    KeyTooLarge,
    ShardClerk,
    ShardKVError,
    Unavailable,
    ValueTooLarge,
)
from shardkv.process.local_cluster import Cluster, Process
from shardkv.wire.framing import CALL, PROTOCOL_VERSION, RECORD, pack_hello
from shardkv.wire.hello import stranger

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def live() -> Iterator[LiveCluster]:
    """A small cluster that the tests of this file share; they leave it whole."""
    with LiveCluster(groups=2, controllers=1, replicas=1) as cluster:
        yield cluster


def test_real_input_survives_joins_moves_splits_and_leaves() -> None:
    """Points 2 and 4 of the acceptance, on a part of the standard library; `make acceptance` takes all of it."""
    load(files=150)


def test_sigkill_of_every_leader_and_then_of_everything() -> None:
    """Point 3 of the acceptance."""
    kill()


def test_a_rolling_restart_is_not_noticed() -> None:
    """SIGTERM hands the leadership over first: every process in turn, and no call fails or waits long."""
    with LiveCluster(groups=1, controllers=3, replicas=3) as live, live.clerk() as clerk:
        appenders = Appenders(clerk).start()
        for n in range(len(live.cluster().processes)):
            cluster = live.cluster()  # as it is now: `up` gave the one before a new process id
            cluster.stop([cluster.processes[n]])
            live.up()
            until_all_follow(live)  # as an operator does, before the next one
        assert appenders.stop() > 0
        appenders.verify()
        assert appenders.longest_gap < 1.0, f"{appenders.longest_gap:.2f} s without an append"


def until_all_follow(live: LiveCluster) -> None:
    """Wait until every replica answers and follows a leader of its group."""
    deadline = time.monotonic() + 30
    while True:
        status = live.json("admin", "status")
        said = [*status["controllers"].values(), *status["groups"]["1"].values()]
        if all(one and one["leader"] for one in said):
            return
        assert time.monotonic() < deadline, status


def test_the_command_line_s_contract(live: LiveCluster) -> None:
    assert attempt(live, "put", "greeting", "hello").returncode == 0
    assert attempt(live, "get", "greeting").stdout == "hello"
    assert attempt(live, "append", "greeting", ", you").returncode == 0
    assert json.loads(attempt(live, "get", "greeting", "-o", "json").stdout)["value"] == "hello, you"
    assert attempt(live, "cas", "greeting", "hello, you", "bye").returncode == 0
    refused = attempt(live, "cas", "greeting", "wrong", "x")
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
    assert attempt(live, "get", "no such key").returncode == 1
    attempt(live, "put", "zz1", "a")
    attempt(live, "put", "zz2", "b")
    scanned = json.loads(attempt(live, "scan", "--prefix", "zz", "-o", "json").stdout)
    assert scanned == [{"key": "zz1", "value": "a"}, {"key": "zz2", "value": "b"}]
    assert attempt(live, "scan", "zz", "zzz", "--limit", "1").stdout == "zz1\ta\n"
    assert attempt(live, "delete", "zz1").returncode == 0
    assert attempt(live, "delete", "zz1").returncode == 1
    config = json.loads(attempt(live, "admin", "query", "-o", "json").stdout)
    assert {"num", "shards", "groups"} <= config.keys() and {"id", "start", "end", "gid"} <= config["shards"][
        0
    ].keys()
    assert json.loads(attempt(live, "admin", "query", "0", "-o", "json").stdout)["num"] == 0
    refused = attempt(live, "admin", "move", "1", "77")
    assert refused.returncode == 1 and "UnknownGroup" in refused.stderr
    assert attempt(live, "admin", "move", "one", "two").returncode == 2
    status = json.loads(attempt(live, "admin", "status", "-o", "json").stdout)
    assert status["serving"] == status["shards"] == 8
    assert attempt(live, "get", "k", "--controllers", "127.0.0.1:1", "--timeout", "0.5").returncode == 3


def test_bench_reports_what_scripts_rely_on(live: LiveCluster) -> None:
    for workload in ("put", "get", "a", "e", "f"):
        done = attempt(
            live,
            "bench",
            "--workload",
            workload,
            "--clients",
            "20",
            "--ops",
            "400",
            "--keys",
            "200",
            "-o",
            "json",
        )
        figures = json.loads(done.stdout)
        assert {"ops_per_s", "errors", "p50_ms", "p99_ms", "max_ms", "by_group"} <= figures.keys()
        assert figures["errors"] == 0 and figures["ops"] == 400
        assert sum(group["ops_per_s"] for group in figures["by_group"].values()) == pytest.approx(
            figures["ops_per_s"], rel=0.01
        )


def test_many_threads_share_a_clerk(live: LiveCluster) -> None:
    with live.clerk() as clerk:
        errors: list[ShardKVError] = []

        def work(number: int) -> None:
            try:
                for turn in range(20):
                    clerk.append(f"thread/{turn}", f"{number};")
            except ShardKVError as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        for turn in range(20):
            tokens = (clerk.get(f"thread/{turn}") or b"").split(b";")[:-1]
            assert sorted(tokens) == sorted(b"%d" % n for n in range(16))
        with clerk.batch() as batch:
            for n in range(2500):
                batch.put(f"batch/{n:05}", f"{n}")
        pairs = list(clerk.scan("batch/", "batch0"))
        assert [key for key, _ in pairs] == [b"batch/%05d" % n for n in range(2500)], "over several pages"
        assert clerk.multi_get(["batch/00001", "none"]) == {"batch/00001": b"1", "none": None}
        with pytest.raises(KeyTooLarge):
            clerk.put("", "x")
        with pytest.raises(ValueTooLarge):
            clerk.put("k", b"x" * (2 << 20))
        with pytest.raises(TypeError):
            clerk.put("k", 5)  # type: ignore[arg-type]
    with pytest.raises(ClerkClosed):
        clerk.get("k")


async def _async_story(controllers: list[str]) -> None:
    import asyncio

    async with AsyncShardClerk(controllers) as clerk:
        await asyncio.gather(*(clerk.put(f"async/{n}", f"{n}") for n in range(500)))
        assert await clerk.get("async/77") == b"77"
        assert await clerk.get("async/77", consistency="any") == b"77"
        assert await clerk.get("async/77", consistency="stale") == b"77"


def test_the_async_clerk(live: LiveCluster) -> None:
    import asyncio

    asyncio.run(_async_story(live.controllers))


def _child(controllers: list[str], clerk: ShardClerk, results: object) -> None:
    try:
        clerk.get("fork")
        results.put("used the parent's clerk")  # type: ignore[attr-defined]
    except ForkedClerk:
        with ShardClerk(controllers) as own:
            own.append("fork", "child;")
            results.put(own.get("fork"))  # type: ignore[attr-defined]


def test_a_forked_worker_makes_its_own_clerk(live: LiveCluster) -> None:
    with live.clerk() as clerk:
        clerk.put("fork", "parent;")
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        worker = context.Process(target=_child, args=(live.controllers, clerk, results))
        worker.start()
        assert results.get() == b"parent;child;"
        worker.join(10)
        assert clerk.get("fork") == b"parent;child;", "the parent's clerk goes on"


def test_grpc_for_everybody_else(live: LiveCluster) -> None:
    """The unary service on the same address; the wrong group says so, a retry is safe."""
    found = 0
    for gid in (1, 2):
        with grpc.insecure_channel(live.cluster().addresses("group", gid)[0]) as channel:
            stub = pb_grpc.KVStub(channel)
            try:
                identity = pb.Identity(session=b"i" * 16, seq=gid)
                for _ in range(2):
                    stub.Append(pb.AppendRequest(key=b"grpc", value=b"x", identity=identity), timeout=5)
                assert stub.Get(pb.GetRequest(key=b"grpc"), timeout=5).value == b"x", "done once"
                assert stub.Cas(pb.CasRequest(key=b"grpc", expected=b"x", value=b"y"), timeout=5).swapped
                assert not stub.Cas(pb.CasRequest(key=b"grpc", value=b"z"), timeout=5).swapped
                assert stub.Scan(pb.ScanRequest(start=b"grpc", end=b"grpd"), timeout=5).items[0].value == b"y"
                assert stub.Delete(pb.DeleteRequest(key=b"grpc"), timeout=5).existed
                with pytest.raises(grpc.RpcError) as refused:
                    stub.Put(pb.PutRequest(key=b"grpc", value=b"x" * (3 << 20)), timeout=5)
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                found += 1
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                    raise
    assert found == 1, "one group serves the key"


def test_garbage_on_every_port_harms_nobody(live: LiveCluster) -> None:
    with live.clerk() as clerk:
        clerk.put("steady", "yes")
        hello = stranger()
        record = RECORD.pack(CALL, 1, 8, 10) + b"kv.write" + b"not a frame"[:10]
        hugest = RECORD.pack(CALL, 1, 8, 0xFFFFFFFF)
        garbage = [
            b"GET / HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
            os.urandom(4096),
            pack_hello(99, b""),
            stranger("another-cluster"),
            hello + os.urandom(1000),
            pack_hello(PROTOCOL_VERSION, os.urandom(200)),
            hello + record,
            hello + hugest,
            hello + struct.pack("<I", 7),
            b"S",
        ]
        for process in live.cluster().processes:
            host, _, port = process.address.rpartition(":")
            for data in garbage:
                with socket.create_connection((host, int(port)), timeout=5) as connection:
                    connection.sendall(data)
                    connection.shutdown(socket.SHUT_WR)
                    connection.settimeout(5)
                    try:
                        while connection.recv(4096):
                            pass
                    except OSError:
                        pass  # reset: refused, which is an answer too
        assert clerk.get("steady") == b"yes"
        assert all(process.running for process in live.cluster().processes)


def test_a_refusal_says_which_cluster_it_is(live: LiveCluster) -> None:
    host, _, port = live.controllers[0].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(stranger("another-cluster"))
        answer = connection.recv(4096)
    assert answer[3] == 1 and b"another-cluster" in answer


def test_another_version_of_the_protocol_or_of_the_data_is_refused_by_its_number(
    live: LiveCluster, tmp_path: Path
) -> None:
    for process in live.cluster().processes:
        host, _, port = process.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(stranger(version=PROTOCOL_VERSION + 1))
            answer = connection.recv(4096)
        said = f"protocol version {PROTOCOL_VERSION + 1}, this server speaks {PROTOCOL_VERSION}"
        assert answer[3] == 1 and said.encode() in answer
    first = live.cluster().processes[0]
    identity = json.loads((Path(first.data) / "identity.json").read_text())
    command = live.cluster().command(first)
    command[command.index("--data") + 1] = str(tmp_path)
    (tmp_path / "identity.json").write_text(json.dumps(identity | {"format": identity["format"] + 1}))
    refused = serve(command)
    assert refused.returncode == 1 and f"format {identity['format'] + 1}, this program reads" in refused.stderr


def test_a_group_started_by_hand_learns_its_cluster_and_joins(live: LiveCluster, tmp_path: Path) -> None:
    """As README tells it: no cluster id is typed."""
    address = f"127.0.0.1:{free_port_base(1)}"
    command = [*SHARDKV, "serve", "group", "--gid", "9", "--id", "1", "--peers", address]
    command += ["--controllers", ",".join(live.controllers), "--data", str(tmp_path / "g9")]
    command += ["--secret-file", str(live.secret_file)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            assert attempt(live, "admin", "join", "9", address, "--wait").returncode == 0
            assert attempt(live, "put", "by hand", "yes").returncode == 0
            assert attempt(live, "admin", "leave", "9", "--wait").returncode == 0
            assert attempt(live, "get", "by hand").stdout == "yes"
        finally:
            process.terminate()
            assert process.wait(20) == 0


def test_a_process_runs_from_the_moment_it_is_started(tmp_path: Path) -> None:
    """The acceptance run once took a process for ended just after it began (its command line was still empty)."""
    cluster = Cluster(tmp_path, cluster="c")
    cluster.plan(1, 1, 1, free_port_base(2))
    cluster.command = lambda process: [sys.executable, "-c", "import signal; signal.pause()", process.data]  # type: ignore[method-assign]
    for _ in range(50):
        cluster.start_all()
        assert all(process.running for process in cluster.processes)
        for process in cluster.processes:
            cluster.kill(process)
            assert not process.running


def serve(process_command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(process_command, capture_output=True, text=True, timeout=30, check=False)


def test_a_process_runs_until_its_last_thread_has_ended(tmp_path: Path) -> None:
    """Killed in a sync, its first thread is gone before the one that syncs, and the port is not free before that."""
    script = """if True:
        import ctypes, threading
        threading.Thread(target=ctypes.CDLL(None).pause).start()
        print("ready", flush=True)
        ctypes.CDLL(None).pthread_exit(None)
    """
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        process = Process("group", 1, 0, "127.0.0.1:1", child.pid, str(tmp_path))
        deadline = time.monotonic() + 30
        while not Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].startswith(" Z"):
            assert time.monotonic() < deadline
        assert process.running
        child.kill()
        while process.running:
            assert time.monotonic() < deadline
        assert Path(f"/proc/{child.pid}").exists(), "dead, and not yet waited for"


def test_wrong_used_and_taken_things_are_refused_in_one_line(live: LiveCluster, tmp_path: Path) -> None:
    cluster = live.cluster()
    first, second = (next(p for p in cluster.processes if p.gid == gid) for gid in (1, 2))
    used = serve(cluster.command(first))
    assert used.returncode == 1 and "in use by another process" in used.stderr
    wrong = cluster.command(second)
    wrong[wrong.index("--data") + 1] = str(tmp_path / "copy")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "identity.json").write_bytes((Path(first.data) / "identity.json").read_bytes())
    refused = serve(wrong)
    assert refused.returncode == 1 and "belongs to" in refused.stderr
    taken = cluster.command(second)
    taken[taken.index("--data") + 1] = str(tmp_path / "fresh")
    port = serve(taken)
    assert port.returncode == 1 and "cannot be listened on" in port.stderr
    assert [len(done.stderr.strip().splitlines()) for done in (used, refused)] == [1, 1]
    up = serve([*SHARDKV, "up", "--data", str(tmp_path / "other"), "--port", first.address.rpartition(":")[2]])
    assert up.returncode == 1 and "in use" in up.stderr and len(up.stderr.strip().splitlines()) == 1


def test_up_stays_until_ctrl_c_and_resumes_with_its_data(tmp_path: Path) -> None:
    base = str(free_port_base())
    command = [
        *SHARDKV,
        "up",
        "--data",
        str(tmp_path / "d"),
        "--groups",
        "1",
        "--replicas",
        "1",
        "--controllers",
        "1",
    ]
    for turn in range(2):
        up = subprocess.Popen([*command, "--port", base], stdout=subprocess.PIPE, text=True)
        assert up.stdout is not None
        said = []
        for line in up.stdout:
            said.append(line)
            if "Ctrl-C" in line:
                break
        assert any("first put and get" in line for line in said), said
        cluster = Cluster.load(tmp_path / "d")
        with ShardClerk(cluster.addresses("controller", 0)) as clerk:
            if turn == 0:
                clerk.put("kept", "yes")
            assert clerk.get("kept") == b"yes"
        up.send_signal(signal.SIGINT)
        assert up.wait(30) == 0
        assert not any(process.running for process in Cluster.load(tmp_path / "d").processes)


def test_unknown_controllers_are_unavailable_within_the_timeout() -> None:
    began = time.monotonic()
    with ShardClerk(["127.0.0.1:1"], timeout=1.0) as clerk, pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        clerk.get("k")
    assert time.monotonic() - began < 2.0
