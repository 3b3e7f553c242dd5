"""The journal of a shard that is being lent: which items may have changed since the copy began, for the next owner."""

from __future__ import annotations

from shardkv.state import layout
from shardkv.state.row import Row
from shardkv.storage.engine import Batch
from shardkv.wire import frames
from shardkv.wire.frames import Section


def note_changes(batch: Batch, row: Row, section: Section) -> None:
    """Note the items that this section may have changed; changes `row`, which the caller stores.

    Entry by entry, not batch by batch: which entries share a batch differs between
    replicas, and the journal must not, since any of them answers from it. An item that is
    in the journal already moves to its end, so that the journal is no larger than the shard.
    """
    # Not what was refused as outside the shard: it is another's, perhaps the next owner's.
    inside = filter(row.contains, section.keys)
    items = list(dict.fromkeys(map(layout.data_key, inside)))
    if section.session != frames.NO_SESSION:
        items.append(layout.record_key(row.shard, section.session))
    note_items(batch, row, items)


def note_items(batch: Batch, row: Row, items: list[bytes]) -> None:
    """Note these engine keys, each of them once; changes `row`, which the caller stores."""
    places = [layout.place_key(row.shard, item) for item in items]
    for item, place, before in zip(items, places, batch.get_many(places), strict=True):
        if before is not None:
            batch.forget_new(layout.journal_key(row.shard, int.from_bytes(before, "big")))
        batch.put(layout.journal_key(row.shard, row.journal), item)
        batch.put(place, row.journal.to_bytes(8, "big"))
        row.journal += 1


def drop(batch: Batch, shard: int) -> None:
    """Delete all of it."""
    batch.delete_range(*layout.journal_range(shard))
    batch.delete_range(*layout.place_range(shard))
