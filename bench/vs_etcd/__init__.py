"""etcd and shardkv in turn on one machine: same keys, values and callers, each with a capable client."""
