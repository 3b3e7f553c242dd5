"""Backups into object stores: snapshots of all groups at one moment, the log since, and back."""
