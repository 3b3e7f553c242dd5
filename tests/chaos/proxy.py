"""Stands before every process of a real cluster, and cuts who may talk to whom.

Processes know each other by the proxies' addresses. A connection is told apart by the
process at its other end, which the kernel knows: so a cut is between two processes, or
only from one to the other, as a firewall or a broken switch makes it. What is cut
waits unread, as it does in a network that loses everything: nobody is told.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CHUNK = 1 << 16


def socket_inode(local_port: int, remote_port: int) -> str:
    """The kernel's number of the loopback connection between two ports, at the first one's end."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        ports = [int(field.rpartition(":")[2], 16) for field in fields[1:3]]
        if ports == [local_port, remote_port]:
            return fields[9]
    return ""


def holds(pid: int, inode: str) -> bool:
    """Whether process `pid` has that socket open."""
    with suppress(OSError):
        for descriptor in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if os.readlink(descriptor.path) == f"socket:[{inode}]":
                    return True
    return False


class Cuts:
    """Pairs (from, to) of names between which nothing passes."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, str], int] = {}  # how many cuts there are between them
        self._changed = asyncio.Condition()

    async def cut(self, pairs: set[tuple[str, str]], seconds: float) -> None:
        """Cut for a while; cuts may overlap."""
        for pair in pairs:
            self._pairs[pair] = self._pairs.get(pair, 0) + 1
        try:
            await asyncio.sleep(seconds)
        finally:
            for pair in pairs:
                self._pairs[pair] -= 1
            async with self._changed:
                self._changed.notify_all()

    async def passes(self, source: str, target: str) -> None:
        """Wait until bytes get through."""
        while self._pairs.get((source, target), 0):
            async with self._changed:
                await self._changed.wait()


class Proxy:
    """Listens in one process's place."""

    def __init__(
        self, name: str, listen: str, forward: str, cuts: Cuts, who: Callable[[int, int], str]
    ) -> None:
        self._name, self._listen, self._forward = name, listen, forward
        self._cuts, self._who = cuts, who
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        host, _, port = self._listen.rpartition(":")
        self._server = await asyncio.start_server(self._accepted, host, int(port), limit=CHUNK)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            source = self._who(writer.get_extra_info("peername")[1], writer.get_extra_info("sockname")[1])
            await self._cuts.passes(source, self._name)
            host, _, port = self._forward.rpartition(":")
            try:
                onward, back = await asyncio.open_connection(host, int(port), limit=CHUNK)
            except OSError:
                return  # the process is down: the caller's connection ends, as it would without us
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, back, source, self._name))
                    group.create_task(self._pump(onward, writer, self._name, source))
            except* (OSError, EOFError):
                pass  # one end is gone: so is the connection
            finally:
                back.close()
        finally:
            writer.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: str, target: str
    ) -> None:
        while data := await reader.read(CHUNK):
            await self._cuts.passes(source, target)
            writer.write(data)
            await writer.drain()
        raise EOFError
