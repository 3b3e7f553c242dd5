"""The `shardkv` command: one file a topic."""
