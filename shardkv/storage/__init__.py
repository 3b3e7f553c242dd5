"""Storage engines: ordered keys with atomic batches, in memory and on RocksDB. They know no shards."""
