"""`make bench`: a fresh cluster of 2 groups on loopback, and `shardkv bench` with 1, 64 and 1,000 callers."""

from __future__ import annotations

from bench.live import LiveCluster

LOADS = [
    ("put", 1, 3_000),
    ("put", 64, 50_000),
    ("put", 1_000, 200_000),
    ("get", 1, 5_000),
    ("get", 1_000, 200_000),
    ("a", 1_000, 100_000),
]


def main() -> None:
    with LiveCluster(groups=2) as live:
        print(f"{'load':8} {'callers':>8} {'ops/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8}")
        for workload, clients, operations in LOADS:
            figures = live.json(
                "bench", "--workload", workload, "--clients", str(clients), "--ops", str(operations)
            )
            print(
                f"{workload:8} {clients:8} {figures['ops_per_s']:10.0f} {figures['p50_ms']:8.2f} "
                f"{figures['p99_ms']:8.2f} {figures['max_ms']:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
