"""Whether what a backup wrote of a group is what the group's replicas hold, by count and digest of each shard.

The replica that was read from may be damaged in a way that it does not see: a scan that ends early and
calls that the end. So its own word is not enough where there are others. What was written must be what
a majority of those that answered holds; a source that differs from the majority is left, and another
one is read. Where no majority tells who is right, nothing is called a backup. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from shardkv.backup.errors import BackupError
from shardkv.backup.source import SourceLost
from shardkv.observe.compare import GroupCheck
from shardkv.state.digests import Digest, Part

Digests = Mapping[Part | None, Digest]


class SourceDiffers(BackupError):
    """The replica at `address` was read from, and holds something else than the majority: read another."""

    def __init__(self, address: str, text: str) -> None:
        super().__init__(text)
        self.address = address


@dataclass
class Confirmed:
    """Who holds what was written, and who does not."""

    replicas: list[str]
    differing: dict[str, str] = field(
        default_factory=dict
    )  # address to a sentence; the majority is against them
    alone: str = ""  # why no second replica confirmed it


def confirm(gid: int, source: str, written: Digests, found: GroupCheck) -> Confirmed:
    """Compare what was written with what the members said. Raises SourceLost, SourceDiffers, BackupError."""
    said = {address: reply.digests for address, reply in found.said.items() if not reply.why_not}
    if source not in said:
        why = found.not_compared.get(source, "it is no member")
        raise SourceLost(f"group {gid}: {source} was read, and gives no digest: {why}")
    same = sorted(address for address, digests in said.items() if digests == written)
    others = {address: digests for address, digests in said.items() if digests != written}
    if not others:
        return Confirmed(same, alone=_alone(found) if len(same) == 1 else "")
    if 2 * len(same) > len(said):
        return Confirmed(same, {at: _differs(gid, at, digests, written) for at, digests in others.items()})
    votes = Counter(tuple(digests.values()) for digests in said.values())
    ((most, count),) = votes.most_common(1)
    agreed = next(digests for digests in said.values() if tuple(digests.values()) == most)
    if 2 * count > len(said) and count > 1:
        raise SourceDiffers(source, _differs(gid, source, written, agreed))
    raise BackupError(
        f"{_differs(gid, *next(iter(others.items())), written)}: no majority of {', '.join(sorted(said))} tells "
        "which is right, so no backup was made; `shardkv admin check` shows more"
    )


def _alone(found: GroupCheck) -> str:
    if len(found.begun.members) == 1:
        return "no second replica confirmed it, for the group has only one"
    silent = "; ".join(f"{address}: {why}" for address, why in sorted(found.not_compared.items()))
    return f"no second replica confirmed it ({silent})"


def _differs(gid: int, address: str, its: Digests, others: Digests) -> str:
    """Where one replica differs from others, and by what."""
    part = next(part for part in its if its[part] != others[part])
    where = "the group's own records" if part is None else f"shard {part.shard}"
    one, other = its[part], others[part]
    return (
        f"group {gid}: the replica at {address} differs from the others in {where}: "
        f"{one.pairs:,} pairs with digest {one.value.hex()}, the others have {other.pairs:,} with {other.value.hex()}"
    )
