"""Opens the store of backups that a URL names."""

from __future__ import annotations

from shardkv.backup.errors import BackupError
from shardkv.backup.store import Store


def open_store(url: str, endpoint: str = "", region: str = "", create: bool = True) -> Store:
    """A store by its URL, `file:///…` or `s3://bucket/prefix`. What goes in is not sealed: see `sealed.py`.

    `create`: make a directory that is not there. Who only reads gives False: reading never writes. Raises BackupError.
    """
    try:
        # Here, for it is large, and most commands do without.
        from shardkv.backup.objects import open_object_store
    except ImportError:
        raise BackupError("backups need the package obstore: pip install 'shardkv[backup]'") from None
    return open_object_store(url, endpoint, region, create)
