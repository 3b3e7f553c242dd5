"""The replica group: a sharded state machine on RocksDB, its migrations, its server and its command."""
