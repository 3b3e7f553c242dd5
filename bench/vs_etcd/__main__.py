"""`make bench-vs-etcd`: rounds of etcd and shardkv in turn, and the ratios between them.

Both run three replicas with every acknowledged write synced on a majority, on the same
cores as their clients. A round starts each cluster anew, puts every key once, and then
runs the loads; ratios are taken within a round, since the machine's mood changes between
them. What one number is worth, the spread over the rounds shows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.live import LiveCluster
from bench.vs_etcd.etcd import EtcdCluster, Missing, build_client, require

KEYS, VALUE_BYTES = 100_000, 256
WARM_UP_SECONDS = 1.0


@dataclass(frozen=True)
class Load:
    """One row of the table: the same load for both, and how ours is to compare."""

    name: str
    etcd: tuple[str, int, int]  # kind, callers, connections
    shardkv: tuple[str, ...]
    figure: str  # what the ratio is of
    target: str


def _ours(workload: str, callers: int, *more: str) -> tuple[str, ...]:
    return ("--workload", workload, "--clients", str(callers), *more)


LOADS = (
    Load("put, 1,000 callers", ("put", 1000, 100), _ours("put", 1000), "ops_per_s", ">= 6 x"),
    Load("put, 1,000 callers, p99", ("put", 1000, 100), _ours("put", 1000), "p99_ms", "< 1 x"),
    Load("put, 64 callers", ("put", 64, 8), _ours("put", 64), "ops_per_s", ">= 4 x"),
    Load("put, 1 caller, p50", ("put", 1, 1), _ours("put", 1), "p50_ms", "<= 1 x"),
    Load("get, 1,000 callers", ("get", 1000, 100), _ours("get", 1000), "ops_per_s", ">= 10 x"),
    Load(
        "get from any replica, 1,000",
        ("serializable", 1000, 100),
        _ours("get", 1000, "--consistency", "any"),
        "ops_per_s",
        "(etcd: serializable, may be stale)",
    ),
    Load("put, 64 threads, blocking", ("put", 64, 8), _ours("put", 64, "--blocking"), "ops_per_s", ">= 2 x"),
)


def etcd_round(client: Path, seconds: float) -> dict[str, dict[str, float]]:
    """Figures by load; a load that several rows share runs once."""
    found: dict[tuple[str, int, int], dict[str, float]] = {}
    with EtcdCluster(client) as etcd:
        etcd.load("load", 256, 32, keys=KEYS, value_size=VALUE_BYTES)
        for load in LOADS:
            if load.etcd not in found:
                found[load.etcd] = etcd.load(
                    *load.etcd, keys=KEYS, value_size=VALUE_BYTES, seconds=seconds, warm_up=WARM_UP_SECONDS
                )
    return {load.name: found[load.etcd] for load in LOADS}


def shardkv_round(seconds: float, groups: int) -> dict[str, dict[str, float]]:
    found: dict[tuple[str, ...], dict[str, float]] = {}
    common = ("--keys", str(KEYS), "--value-size", str(VALUE_BYTES))
    with LiveCluster(groups=groups) as live:
        live.json("bench", *common, "--load", "--ops", "1")
        for load in LOADS:
            if load.shardkv not in found:
                measured = ("--no-load", "--seconds", str(seconds), "--warm-up", str(WARM_UP_SECONDS))
                found[load.shardkv] = live.json("bench", *common, *load.shardkv, *measured)
    return {load.name: found[load.shardkv] for load in LOADS}


def show(load: Load, etcd: list[float], shardkv: list[float]) -> None:
    ratios = [ours / theirs for ours, theirs in zip(shardkv, etcd, strict=True)]
    spread = f"{min(ratios):6.2f} {median(ratios):6.2f} {max(ratios):6.2f}"
    print(f"{load.name:28} {median(etcd):10,.2f} {median(shardkv):12,.2f}   {spread}   {load.target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each load")
    parser.add_argument("--groups", type=int, default=1, help="ours; etcd is always one group of three")
    parser.add_argument("--json", type=Path, help="also write every figure of every round there")
    options = parser.parse_args()
    try:
        version = require()
    except Missing as error:
        sys.exit(f"bench-vs-etcd: {error}")
    scratch = Path(tempfile.mkdtemp(prefix="vs-etcd-"))
    try:
        client = build_client(scratch)
        rounds: list[dict[str, dict[str, dict[str, float]]]] = []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}: etcd …", flush=True)
            etcd = etcd_round(client, options.seconds)
            print(f"round {number + 1} of {options.rounds}: shardkv …", flush=True)
            rounds.append({"etcd": etcd, "shardkv": shardkv_round(options.seconds, options.groups)})
    finally:
        shutil.rmtree(scratch)
    go = subprocess.run(["go", "version"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"\n{version}, {go}; {KEYS:,} keys, values of {VALUE_BYTES} B, {options.groups} group(s) of ours")
    print(f"{'':28} {'etcd':>10} {'shardkv':>12}   {'min':>6} {'median':>6} {'max':>6}   target for the ratio")
    for load in LOADS:
        show(load, *([each[who][load.name][load.figure] for each in rounds] for who in ("etcd", "shardkv")))
    leader, everyone = (
        median(each["shardkv"][name]["ops_per_s"] for each in rounds)
        for name in ("get, 1,000 callers", "get from any replica, 1,000")
    )
    print(f"linearizable gets from any replica: {everyone / leader:.2f} x the leader's alone")
    if options.json is not None:
        options.json.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
