"""The load generator: its histogram, what it draws, its figures, and the command on a real cluster."""

from __future__ import annotations

import os
import random
import subprocess
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.live import SHARDKV, LiveCluster
from shardkv.load.driver import Plan, Recorder, Schedule
from shardkv.load.figures import INTERVAL_SECONDS, Figures, Interval
from shardkv.load.fleet import Job
from shardkv.load.histogram import FRACTION_BITS, Histogram
from shardkv.load.workload import INSERT, KINDS, READ, SCAN, WORKLOADS, Source, Workload, bench_key, parse_mix

PRECISION = 2.0**-FRACTION_BITS


@pytest.mark.quick
@given(st.lists(st.floats(1e-9, 1e6), min_size=1), st.floats(0, 1))
def test_a_histogram_answers_to_within_a_bucket(values: list[float], share: float) -> None:
    histogram = Histogram()
    histogram.add_all(values)
    rank = max(0, -int(-share * len(values) // 1) - 1)
    exact = sorted(values)[min(rank, len(values) - 1)]
    assert exact * (1 - PRECISION) <= histogram.percentile(share) <= exact * (1 + PRECISION) * (1 + 1e-9)
    assert histogram.percentile(1) == max(values)


@pytest.mark.quick
@given(st.lists(st.lists(st.floats(0, 10))))
def test_histograms_add_up_across_processes(parts: list[list[float]]) -> None:
    whole, merged = Histogram(), Histogram()
    for part in parts:
        one = Histogram()
        one.add_all(part)
        merged.merge(Histogram.decode(one.encode()))
        whole.add_all(part)
    assert merged.encode() == whole.encode() and merged.count == sum(map(len, parts))


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_a_workload_draws_its_shares_from_its_keys(name: str) -> None:
    mix, distribution = WORKLOADS[name]
    source = Source(Workload(mix, distribution, 1000, 10), 0, 1, random.Random(1))
    kinds = Counter(source.draw_kind() for _ in range(20_000))
    for kind, share in enumerate(mix):
        assert kinds[kind] / 20_000 == pytest.approx(share, abs=0.02), KINDS[kind]
    known = {bench_key(number) for number in range(1000)}
    assert {source.draw_key() for _ in range(5000)} <= known
    assert len(source.value()) == 10


@pytest.mark.quick
def test_latest_reads_what_was_inserted_last_and_zipf_has_favourites() -> None:
    source = Source(Workload(WORKLOADS["d"][0], "latest", 1000, 1), 0, 1, random.Random(1))
    fresh = [source.new_key() for _ in range(100)]
    drawn = Counter(source.draw_key() for _ in range(10_000))
    assert drawn.most_common(1)[0][0] == fresh[-1]
    zipf = Source(Workload(WORKLOADS["c"][0], "zipfian", 1000, 1), 0, 1, random.Random(1))
    counts = Counter(zipf.draw_key() for _ in range(10_000))
    assert counts.most_common(1)[0][1] > 10 * 10_000 / 1000


@pytest.mark.quick
def test_workers_insert_different_keys_and_share_the_work() -> None:
    workload = Workload((0.0, 0.0, 1.0, 0.0, 0.0), "uniform", 10, 1)
    sources = [Source(workload, number, 3, random.Random(1)) for number in range(3)]
    keys = [source.new_key() for source in sources for _ in range(50)]
    assert len(set(keys)) == 150 and not set(keys) & {bench_key(number) for number in range(10)}
    job = Job(("x:1",), workload, Plan(64, 1000, None, 300.0, 0, "leader"), False, False, 1, 3)
    shares = [job.share(worker) for worker in range(3)]
    assert sum(share.callers for share in shares) == 64
    assert sum(share.operations or 0 for share in shares) == 1000
    assert sum(share.rate or 0 for share in shares) == pytest.approx(300)


@pytest.mark.quick
def test_a_mix_is_read_or_refused() -> None:
    shares = parse_mix("read=3,scan=1")
    assert shares[READ] == 0.75 and shares[SCAN] == 0.25 and shares[INSERT] == 0
    for wrong in ("", "read", "fly=1", "read=-1,scan=2", "read=0", "read=x", "read=nan"):
        with pytest.raises(ValueError):
            parse_mix(wrong)


@pytest.mark.quick
def test_an_open_loop_charges_a_stall_to_all_who_were_due() -> None:
    """One caller at 10 operations a second, and the first takes a second: the next nine are late, and it shows."""
    now = [0.0]
    schedule = Schedule(Plan(1, 10, None, 10.0, 0, "leader"), 0.0, lambda: now[0])
    latencies: list[float] = []
    while (due := schedule.next()) is not None:
        now[0] = max(now[0], due)
        now[0] += 1.0 if not latencies else 0.001
        latencies.append(now[0] - due)
    assert len(latencies) == 10
    assert latencies[0] == pytest.approx(1.0)
    assert all(later > 0.1 for later in latencies[1:9]), "a closed loop would show 1 ms for each"


@pytest.mark.quick
def test_warming_up_is_not_measured_and_every_interval_is_told_once() -> None:
    answered = {1: 70, 2: 30}
    told: list[tuple[int, Interval]] = []
    recorder = Recorder(lambda: dict(answered), lambda index, interval: told.append((index, interval)))
    recorder.warmed_up()
    answered[1] += 3
    answered[2] += 1
    recorder.latencies[READ] += [0.001, 0.002, 0.003, 0.004]
    recorder.flush(0)
    recorder.flush(1)
    figures = Figures(seconds=INTERVAL_SECONDS)
    for index, interval in told:
        figures.add(index, Interval.decode(interval.encode()))
    assert figures.total().operations == 4
    assert figures.shares() == {1: 0.75, 2: 0.25}
    shown = figures.as_json()
    assert shown["ops"] == 4 and shown["max_ms"] == 4.0


@pytest.fixture(scope="module")
def live():  # type: ignore[no-untyped-def]
    with LiveCluster(groups=2, replicas=1, controllers=1, shards=4) as cluster:
        yield cluster


def test_processes_share_a_load_and_it_is_drawn(live: LiveCluster, tmp_path: Path) -> None:
    picture = tmp_path / "run.svg"
    arguments = ("--workload", "a", "--clients", "20", "--processes", "2", "--keys", "500", "--ops", "2000")
    figures = live.json("bench", *arguments, "--plot", str(picture))
    assert figures["ops"] == 2000 and figures["errors"] == 0
    assert set(figures["by_kind"]) == {"read", "update"} and set(figures["by_group"]) == {"1", "2"}
    assert sum(part["ops_per_s"] for part in figures["by_group"].values()) == pytest.approx(
        figures["ops_per_s"], rel=0.01
    )
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_a_rate_is_not_exceeded_and_a_warm_up_not_counted(live: LiveCluster) -> None:
    figures = live.json("bench", "--rate", "200", "--ops", "300", "--warm-up", "0.5", "--clients", "10")
    assert figures["ops"] == 300
    assert figures["seconds"] > 1.4, "300 operations at 200 a second take 1.5 s at least"
    assert figures["timeline"][0]["seconds"] == 0


def test_a_load_ends_when_its_time_is_over(live: LiveCluster) -> None:
    figures = live.json("bench", "--seconds", "1", "--clients", "4")
    assert figures["ops"] > 0 and figures["seconds"] >= 1.0


def test_threads_of_the_blocking_clerk_are_callers_too(live: LiveCluster) -> None:
    figures = live.json(
        "bench", "--blocking", "--clients", "8", "--ops", "800", "--mix", "read=1,insert=1", "--keys", "50"
    )
    assert figures["ops"] == 800 and figures["errors"] == 0
    assert set(figures["by_kind"]) == {"read", "insert"}


def test_what_bench_cannot_do_it_refuses_in_one_line(live: LiveCluster) -> None:
    for wrong in (
        ["--mix", "fly=1"],
        ["--processes", "3", "--clients", "2"],
        ["--plot", "run.gif"],
        ["--rate", "0"],
    ):
        assert bench(live, *wrong).returncode == 2
    nobody = bench(live, "--controllers", "127.0.0.1:1", "--timeout", "0.3", "--ops", "1")
    assert nobody.returncode == 3 and nobody.stderr.count("\n") == 1, nobody.stderr


def bench(live: LiveCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    where = os.environ | {"SHARDKV_CONTROLLERS": ",".join(live.controllers)}
    return subprocess.run(
        [*SHARDKV, "bench", *arguments], env=where, capture_output=True, text=True, timeout=60, check=False
    )
