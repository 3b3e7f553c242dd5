"""Which replica a data directory belongs to: written when the directory is first used, checked at every start.

A replica that starts on the data of another one breaks the promises of both. So the
identity is read before the log and the state machine are opened, and a directory of
another cluster, group, replica or engine is refused.
"""

from __future__ import annotations

import json
from random import Random

from raft.disk import RealDirectory
from raft.errors import WrongDirectory
from raft.rpc import TcpDialer
from shardctrler.query import ControllerClient, ControllerUnavailable
from shardkv.options import ProcessOptions

FORMAT = 3  # 3: a group has an incarnation
IDENTITY = "identity.json"
LEARN_SECONDS = 30.0


class CannotStart(Exception):
    """The process cannot do its work; the text says why in one line."""


async def learn_cluster(directory: RealDirectory, options: ProcessOptions, rng: Random) -> str:
    """The cluster that our data belongs to or, for a new replica, that of the controllers. Raises CannotStart."""
    if IDENTITY in directory.names():
        return str(json.loads(directory.read(IDENTITY))["cluster"])
    dialer = TcpDialer(tls=options.tls, login=options.login)
    client = ControllerClient(options.controllers, dialer, rng)
    try:
        await client.changes(0, 0.0, LEARN_SECONDS, limit=1)
    except ControllerUnavailable as error:
        raise CannotStart(f"which cluster is this? {error}; or name it with --cluster") from None
    finally:
        await dialer.close()
    return client.cluster


async def check_identity(directory: RealDirectory, options: ProcessOptions) -> None:
    """Refuse another replica's data; claim a new directory. Raises WrongDirectory."""
    identity = {
        "format": FORMAT,
        "cluster": options.cluster,
        "gid": options.gid,
        "replica": options.replica,
        "engine": "memory" if options.ephemeral else "rocksdb",
    }
    if IDENTITY not in directory.names():
        if any(name.startswith("wal-") for name in directory.names()):
            raise WrongDirectory(f"{options.data} has a log but no {IDENTITY}")
        await directory.replace(IDENTITY, json.dumps(identity).encode())
        return
    found = json.loads(directory.read(IDENTITY))
    if found != identity:
        raise WrongDirectory(f"{options.data} belongs to {found}, not to {identity}")
