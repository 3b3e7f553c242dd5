"""What travels between processes: frames, streams, TLS, proofs of who is there, the table of calls. No consensus, no shards."""
