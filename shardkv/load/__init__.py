"""The load generator behind `shardkv bench`: workloads, drivers, worker processes, figures, plots."""
