"""Pairs to the groups as chunks: each chunk is one entry of a group's log, and several are on their way at once.

A chunk is bounded by its pairs as well as by its bytes, so that no group works on one for more than a few
milliseconds. A chunk whose answer is lost is sent again: the group knows it by its number.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from shardkv import shardkv_pb2 as pb
from shardkv.backup.errors import first_error
from shardkv.backup.run import Fenced, Run
from shardkv.backup.source import Throttle
from shardkv.wire import frames

CHUNK_BYTES = 512 << 10
CHUNK_PAIRS = 1024
AT_ONCE = 8  # chunks of one group; fewer than `restoring.WINDOW`

Pair = tuple[bytes, bytes]


def chunks_of(pairs: Iterable[Pair]) -> Iterator[tuple[list[Pair], int]]:  # hot: runs per pair
    """(pairs, bytes), in order. A pair larger than a chunk has one of its own."""
    chunk: list[Pair] = []
    size = 0
    for pair in pairs:
        chunk.append(pair)
        size += len(pair[0]) + len(pair[1])
        if size >= CHUNK_BYTES or len(chunk) >= CHUNK_PAIRS:
            yield chunk, size
            chunk, size = [], 0
    if chunk:
        yield chunk, size


class Installer:
    def __init__(self, run: Run, throttle: Throttle, installed: Callable[[int], None]) -> None:
        """`installed` hears of bytes that are in."""
        self._run, self._throttle, self._installed = run, throttle, installed
        self.keys = self.size = 0

    async def install(self, pairs_in: Callable[[bytes, bytes], Iterable[Pair]]) -> None:
        """Fill every shard with what `pairs_in` (start, end) has, by the engine's keys. Raises BackupError, AccessDenied."""
        by_group: dict[int, list[Fenced]] = {}
        for fenced in self._run.shards:
            by_group.setdefault(fenced.target.gid, []).append(fenced)
        try:
            async with asyncio.TaskGroup() as groups:
                for shards in by_group.values():
                    groups.create_task(self._fill(shards, pairs_in))
        except ExceptionGroup as failed:
            raise first_error(failed) from None

    async def _fill(self, shards: Sequence[Fenced], pairs_in: Callable[[bytes, bytes], Iterable[Pair]]) -> None:
        """The shards of one group, one after the other."""
        free = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as sending:
            for fenced in shards:
                for pairs, size in chunks_of(pairs_in(fenced.start, fenced.end)):
                    await self._throttle.take(size)
                    await free.acquire()
                    number, fenced.chunks = fenced.chunks, fenced.chunks + 1
                    sent = sending.create_task(self._send(fenced, number, pairs, size))
                    sent.add_done_callback(lambda _: free.release())

    async def _send(self, fenced: Fenced, number: int, pairs: list[Pair], size: int) -> None:
        page = frames.pack_page(True, b"", pairs)
        digest = hashlib.sha256(page).digest()
        chunk = pb.RestoreChunk(shard=fenced.shard, run=self._run.id, number=number, page=page, digest=digest)
        self._run.check(fenced, await fenced.target.chunk(chunk.SerializeToString()))
        self.keys, self.size = (
            self.keys + len(pairs),
            self.size + size - len(pairs),
        )  # without the engine's prefix
        self._installed(size)
