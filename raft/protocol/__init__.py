"""The Raft protocol as pure functions and state: no disk, network, clock or chance. See `core.py`."""
