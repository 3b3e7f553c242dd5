"""A group replica's copy of the users, which follows the controller's by long poll and is kept on the disk.

So a replica that starts while no controller answers judges by what it knew. One that never had a
copy lets only processes of the cluster in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from google.protobuf.message import DecodeError

from shardkv.raft.sealed import seal, unseal
from shardkv.shardctrler.accounts import Accounts
from shardkv.shardctrler.client import AccessDenied, BadQuery, ControllerClient, ControllerUnavailable

log = logging.getLogger(__name__)

POLL_SECONDS = 20.0
CALL_SECONDS = 2.0
RETRY_SECONDS = 1.0
ACCOUNTS_MAGIC = b"SKVUSERS"  # the file's format: `raft/sealed.py`, then protobuf
ACCOUNTS_VERSION = 2  # 2: of tokens there are verifiers, which prove nothing to others


class AccountsFollower:
    """A group replica's copy of the users: what its disk has, and then what the controller says."""

    def __init__(self, known: bytes | None, keep: Callable[[bytes], Awaitable[None]], secured: bool) -> None:
        """`known`: the file on the disk, if there is one. `secured`: this process can show that it

        belongs to the cluster; one that cannot, and was never told of users, is of a cluster where
        access control is not in use. A file that is damaged says that we were told, and not what:
        nobody is let in until a controller has told us again.
        """
        self.accounts: Accounts | None = None if secured else Accounts()
        if known is not None:
            try:
                self.accounts = Accounts.decode(unseal(ACCOUNTS_MAGIC, ACCOUNTS_VERSION, known))
            except (ValueError, DecodeError) as error:
                self.accounts = None
                log.error("the copy of the users is damaged: %s; asking the controllers for a new one", error)
        self._keep = keep
        self.on_change: Callable[[], None] = lambda: None

    async def follow(self, controller: ControllerClient) -> None:
        """For as long as this process runs."""
        while True:
            since = self.accounts.version if self.accounts is not None else 0
            try:
                news = await controller.accounts(
                    since, POLL_SECONDS if self.accounts is not None else 0.0, CALL_SECONDS
                )
            except AccessDenied as error:
                log.error("the controllers do not know this process as one of the cluster: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            except (DecodeError, ValueError) as error:
                log.error("no news of the users: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            except (ControllerUnavailable, BadQuery) as error:
                log.debug("no news of the users: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if self.accounts is None or news.version > self.accounts.version:
                self.accounts = news  # at once, then for the next start
                self.on_change()
                await self._keep(seal(ACCOUNTS_MAGIC, ACCOUNTS_VERSION, news.encode()))
