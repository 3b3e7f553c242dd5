"""Consensus from scratch: a pure Raft core and the shell that gives it a disk, a network and a clock.

Nothing in this package knows of keys, shards or configurations.
"""
