"""What backups there are, whether they are whole, and getting rid of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from shardkv.backup.archive import Segment, segments, watermark, watermark_name
from shardkv.backup.errors import BackupError, Damaged
from shardkv.backup.fence import Cleaning, cleaning
from shardkv.backup.keys import refuse_sealed
from shardkv.backup.manifest import Manifest, name_of
from shardkv.backup.sealed import check_place
from shardkv.backup.store import Store, chunk_name, log_entries
from shardkv.backup.whole import Wholeness

READS_AT_ONCE = 8


async def backups(store: Store) -> list[Manifest]:
    """All of them, the oldest first. Raises Damaged."""
    await check_place(store, writing=False)
    found = []
    async for item in store.list("backups/"):
        found.append(await _manifest(store, item.name))
    return sorted(found, key=lambda manifest: manifest.time_ms)


async def find(store: Store, id: str) -> Manifest:
    """A backup by its id; the newest for an empty one. Raises BackupError."""
    if not id:
        found = await backups(store)
        if not found:
            raise BackupError(f"{store.url}: there is no backup")
        return found[-1]
    await check_place(store, writing=False)
    if not id.replace("-", "").isalnum():
        raise BackupError(f"{id!r} is not a backup's id")
    name = name_of(id)
    if name not in [item.name async for item in store.list("backups/")]:
        raise BackupError(f"{store.url}: there is no backup {id}")
    return await _manifest(store, name)


async def _manifest(store: Store, name: str) -> Manifest:
    data = await store.get(name)
    return Manifest.decode(
        f"{store.url}: {name}", data if store.key_id else refuse_sealed(store.url, name, data)
    )


async def verify(store: Store, manifest: Manifest, done: Callable[[int], None] = lambda count: None) -> None:
    """Read all of a backup. Raises BackupError.

    Every chunk is what its name says, and all of them are what was backed up: no key is missing,
    by each shard's count and digest, and no entry of the logs.
    """
    read = 0
    for gid, part in sorted(manifest.groups.items()):
        whole, names = Wholeness(manifest.id, gid, part), iter(part.chunks)
        async for _, content in fetched(store, part.chunks):
            whole.add(next(names), content)
            read += 1
            done(read)
        whole.finish()
        last = part.index
        async for _, content in fetched(store, part.log):
            for entry in log_entries(f"backup {manifest.id}: the log of group {gid}", content):
                if entry.index != last + 1:
                    raise Damaged(f"backup {manifest.id}: group {gid}: its log has no entry {last + 1}")
                last = entry.index
            read += 1
            done(read)
        if last != part.last:
            raise Damaged(f"backup {manifest.id}: group {gid}: its log ends at {last}, not at {part.last}")


async def fetched(store: Store, digests: Iterable[str]) -> AsyncIterator[tuple[int, bytes]]:
    """The chunks in order, some read ahead: (how many by now, content). Raises BackupError."""
    waiting: list[asyncio.Task[bytes]] = []
    count = 0
    try:
        for digest in digests:
            if len(waiting) == READS_AT_ONCE:
                count += 1
                yield count, await waiting.pop(0)
            waiting.append(asyncio.create_task(store.get_chunk(digest)))
        while waiting:
            count += 1
            yield count, await waiting.pop(0)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def delete(store: Store, id: str) -> tuple[int, int] | None:
    """Delete a backup, and then what no other one needs: (chunks, segments of the archive).

    While a backup is being made its chunks have no manifest yet: then nothing but the
    manifest goes (None), and the next deletion cleans up. Raises BackupError.
    """
    await find(store, id)
    await store.delete(name_of(id))
    async with cleaning(store) as right:
        if right is None:
            return None
        left = await backups(store)
        needed = {chunk_name(digest) for manifest in left for digest in manifest.digests()}
        chunks = 0
        for item in [item async for item in store.list("chunks/")]:
            if item.name not in needed:
                await right.check()
                await store.delete(item.name)
                chunks += 1
        return chunks, await _prune_archive(store, left, right)


async def _prune_archive(store: Store, left: list[Manifest], right: Cleaning) -> int:
    """Segments before every backup that is left: no restore begins so early any more."""
    count = 0
    for cluster in {manifest.cluster for manifest in left}:
        of_cluster = [manifest for manifest in left if manifest.cluster == cluster]
        for group, of_group in (await segments(store, cluster)).items():
            parts = [manifest.groups.get(group.gid) for manifest in of_cluster]
            first = [part.index for part in parts if part is not None and part.incarnation == group.incarnation]
            # A group that no backup knows joined later, and its log is needed from the beginning;
            # or nothing was archived of it any more when the oldest of them was made: then it was gone.
            mark = None if first else await watermark(store, cluster, group)
            gone = mark is not None and mark.time_ms < min(manifest.time_ms for manifest in of_cluster)
            for segment in of_group:
                if gone or (first and segment.last <= min(first)):
                    await right.check()
                    await store.delete(segment.name)
                    count += 1
            if gone:
                await store.delete(watermark_name(cluster, group))
    return count


__all__ = ["Damaged", "Segment", "backups", "delete", "fetched", "find", "verify"]
