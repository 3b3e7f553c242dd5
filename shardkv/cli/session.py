"""What an admin command works with: the controllers, and calls to any process of the cluster."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from random import Random
from typing import TypeVar

from shardkv.cli.options import (
    find_controllers,
    find_login,
    find_tls,
    run_async,
)
from shardkv.observe.overview import Overview, look
from shardkv.shardctrler.client import ControllerClient
from shardkv.wire.dialer import TcpDialer

T = TypeVar("T")


class Session:
    """One connection to the cluster for one command."""

    def __init__(self, controllers: str | None) -> None:
        self.addresses = find_controllers(controllers)
        self.dialer = TcpDialer(tls=find_tls(), login=find_login())
        self.controller = ControllerClient(self.addresses, self.dialer, Random(random.SystemRandom().random()))

    async def overview(self, timeout: float = 10.0) -> Overview:
        return await look(self.controller, self.dialer, self.addresses, timeout)


def with_session(controllers: str | None, work: Callable[[Session], Awaitable[T]]) -> T:
    async def run() -> T:
        session = Session(controllers)
        try:
            return await work(session)
        finally:
            await session.dialer.close()

    return run_async(run())
