"""The deterministic state of a group: ownership of shards, exactly-once records, data. The same on every replica."""
