"""Whether the chunks of a group's part hold what they should: its pairs, by count and digest, shard by shard.

A chunk's name is its own digest, so a chunk cannot be another. A list of chunks can be wrong all the same:
one that is missing, comes twice or belongs elsewhere shows here, and so does a backup that was
cut short while it was made.
"""

from __future__ import annotations

from operator import lt

from shardkv.backup.chunks import MalformedFrame, pairs_of
from shardkv.backup.errors import Damaged
from shardkv.backup.manifest import GroupPart
from shardkv.state.digests import Digester

Pairs = list[tuple[bytes, bytes]]


class Wholeness:
    """Takes the chunks of one group's part in order; says at the end whether they are all of it."""

    def __init__(self, backup: str, gid: int, part: GroupPart) -> None:
        self._where, self._part = f"backup {backup}: group {gid}", part
        self._digester = Digester([found.part for found in part.ranges])
        self._last: bytes | None = None
        self._bytes = 0

    def add(self, name: str, content: bytes) -> Pairs:
        """The pairs of the next chunk. Raises Damaged."""
        try:
            pairs = pairs_of(content)
        except MalformedFrame as error:
            raise Damaged(f"{self._where}: chunk {name} is not one: {error}") from None
        keys = [key for key, _ in pairs]
        if keys:
            after = self._last is None or self._last < keys[0]
            if not after or not all(map(lt, keys, keys[1:])):
                raise Damaged(f"{self._where}: chunk {name} is out of order, or comes a second time")
            self._last = keys[-1]
        self._digester.add(pairs)
        self._bytes += sum(len(key) + len(value) for key, value in pairs)
        return pairs

    def finish(self) -> None:
        """Raises Damaged, naming the shard."""
        part = self._part
        wanted = [(f"shard {found.shard}", found.pairs, found.digest) for found in part.ranges]
        wanted.append(("its own records", part.rest_pairs, part.rest_digest))
        there = [*self._digester.parts(), self._digester.rest()]
        for (what, pairs, digest), found in zip(wanted, there, strict=True):
            if found.pairs != pairs:
                raise Damaged(
                    f"{self._where}, {what}: its chunks hold {found.pairs:,} pairs, {pairs:,} were backed up: "
                    "the list of chunks is not whole"
                )
            if found.value.hex() != digest:
                raise Damaged(
                    f"{self._where}, {what}: its chunks hold other pairs than those that were backed up"
                )
        if (self._digester.pairs, self._bytes) != (part.pairs, part.bytes):
            raise Damaged(f"{self._where}: its chunks hold other pairs than those that were backed up")
