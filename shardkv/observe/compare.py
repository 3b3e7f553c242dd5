"""The replicas of a group compared with each other at one entry of their log, while they serve.

A check begins at the leader. Then every member is asked for its digests until it has them,
says that it will never have them, or says nothing new for too long. Only what answered
counts: a replica without digests is *not compared*, which is never the same as equal.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from google.protobuf.message import DecodeError

from shardkv import shardkv_pb2 as pb
from shardkv.shardctrler.client import AccessDenied
from shardkv.state.digests import Digest, Part
from shardkv.wire.bounded_json import parse_json
from shardkv.wire.calls import Code, Dialer, Unreachable, parse

CALL_SECONDS = 5.0
BEGIN_SECONDS = 15.0  # for the group to have a leader that begins
ASK_SECONDS = 0.1  # between two questions to a replica
PATIENCE_SECONDS = 30.0  # for a replica that says nothing new
CONTROLLERS = 0  # the controller as a group


class NotBegun(Exception):
    """No replica of the group could begin a check: it has no leader that answers."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A check that the group's log has."""

    id: bytes
    index: int
    config_num: int
    parts: tuple[Part, ...]
    members: tuple[str, ...]  # addresses


@dataclass(frozen=True, slots=True)
class Said:
    """What one replica said of a check: its digests, or why it has none."""

    digests: dict[Part | None, Digest] = field(default_factory=dict)  # None: the rest
    why_not: str = ""

    @property
    def keys(self) -> int:
        return sum(digest.pairs for part, digest in self.digests.items() if part is not None)

    @property
    def whole(self) -> bytes:
        """One digest of all of them."""
        return blake2b(b"".join(digest.value for digest in self.digests.values()), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Difference:
    """A part that is not the same on all replicas that were compared."""

    part: Part | None  # None: the rest
    digests: dict[str, Digest]  # by address
    odd: tuple[
        str, ...
    ]  # those that differ from what a majority of the compared has; empty where there is none

    @property
    def where(self) -> str:
        return "its own records (not data)" if self.part is None else f"shard {self.part.shard}"


@dataclass
class GroupCheck:
    """One group, compared."""

    gid: int
    begun: Begun
    said: dict[str, Said] = field(default_factory=dict)

    def differences(self) -> Iterator[Difference]:
        compared = {address: said.digests for address, said in self.said.items() if not said.why_not}
        for part in (*self.begun.parts, None):
            digests = {address: found[part] for address, found in compared.items()}
            if len(set(digests.values())) > 1:
                yield Difference(part, digests, tuple(odd_ones(digests)))

    @property
    def not_compared(self) -> dict[str, str]:
        """Why, by address."""
        return {address: said.why_not for address, said in self.said.items() if said.why_not}

    @property
    def agrees(self) -> bool:
        """Every member answered, and all answers are the same."""
        answered = set(self.said) >= set(self.begun.members) and not self.not_compared
        return answered and next(self.differences(), None) is None


def odd_ones(digests: dict[str, Digest]) -> list[str]:
    """Who differs from the majority; nobody where there is no majority."""
    ((most, count),) = Counter(digests.values()).most_common(1)
    return (
        [address for address, digest in digests.items() if digest != most] if 2 * count > len(digests) else []
    )


async def _ask(dialer: Dialer, address: str, request: pb.CheckRequest) -> tuple[Code, bytes]:
    """Raises Unreachable, AccessDenied."""
    try:
        code, body = parse(await dialer.call(address, "kv.check", request.SerializeToString(), CALL_SECONDS))
    except ValueError as error:
        raise Unreachable(f"{address}: {error}") from None
    if code is Code.DENIED:
        raise AccessDenied(body.decode(errors="replace"))
    return code, body


def _part(shard: pb.RangeDigest) -> Part:
    return Part(shard.shard, shard.start, shard.end)


async def begin(dialer: Dialer, addresses: Sequence[str], seconds: float = BEGIN_SECONDS) -> Begun:
    """At the leader of the group with these `addresses`. Raises NotBegun, AccessDenied."""
    loop = asyncio.get_running_loop()
    deadline, why = loop.time() + seconds, "no replica is known"
    while True:
        waiting = list(addresses)
        for address in waiting:  # grows by the leader that a replica names
            try:
                code, body = await _ask(dialer, address, pb.CheckRequest())
                if code is Code.OK:
                    reply = pb.CheckReply.FromString(body)
                    if reply.index:
                        parts = tuple(map(_part, reply.shards))
                        return Begun(reply.id, reply.index, reply.config_num, parts, tuple(reply.members))
                    why = f"{address}: {reply.why}"
                    continue
            except (Unreachable, DecodeError) as error:
                why = f"{address}: {error}"
                continue
            said = body.decode(errors="replace")
            if code is Code.NOT_LEADER and said and said not in waiting:
                waiting.append(said)
            why = f"{address}: {code.name} {said}".strip()
        if loop.time() > deadline:
            raise NotBegun(why)
        await asyncio.sleep(ASK_SECONDS)


async def ask(
    dialer: Dialer,
    address: str,
    begun: Begun,
    patience: float = PATIENCE_SECONDS,
    on_progress: Callable[[int], None] = lambda pairs: None,
) -> Said:
    """One replica's digests, once it has them. Raises AccessDenied."""
    loop = asyncio.get_running_loop()
    news, heard = (-1, -1), loop.time()
    why = "no answer"
    request = pb.CheckRequest(id=begun.id)
    while True:
        try:
            code, body = await _ask(dialer, address, request)
            if code is Code.OK:
                reply = pb.CheckReply.FromString(body)
                on_progress(reply.pairs)
                if reply.state == pb.COMPLETE:
                    return _complete(reply, begun)
                behind = reply.applied_index < begun.index
                if reply.state == pb.GONE and not behind:
                    return Said(why_not=reply.why)
                why = f"{begun.index - reply.applied_index} entries behind" if behind else "still computing"
                if (reply.applied_index if behind else 0, reply.pairs) != news:
                    news, heard = (reply.applied_index if behind else 0, reply.pairs), loop.time()
            elif code is Code.NOT_LEADER:
                # Not this replica's state: what it held at that entry went with the damage.
                return Said(why_not="its state was damaged, and the others repair it")
            else:
                why = f"{code.name} {body.decode(errors='replace')}".strip()
        except (Unreachable, DecodeError) as error:
            why = f"no answer: {error}"
        if loop.time() - heard > patience:
            return Said(why_not=why)
        await asyncio.sleep(ASK_SECONDS)


def _complete(reply: pb.CheckReply, begun: Begun) -> Said:
    found: dict[Part | None, Digest] = {_part(s): Digest(s.pairs, s.digest) for s in reply.shards}
    if reply.index != begun.index or tuple(found) != begun.parts:
        # Rows of ownership are replicated state too: other ranges are a difference, but none of data.
        return Said(why_not=f"it has other shards than the leader at entry {begun.index}, or another entry")
    found[None] = Digest(reply.rest.pairs, reply.rest.digest)
    return Said(found)


async def close(dialer: Dialer, addresses: Sequence[str], id: bytes) -> None:
    """Let the replicas forget a check. Should one not hear of it, it forgets by itself."""

    async def one(address: str) -> None:
        try:
            await _ask(dialer, address, pb.CheckRequest(id=id, close=True))
        except (Unreachable, AccessDenied):
            pass

    await asyncio.gather(*map(one, addresses))


async def check_group(
    dialer: Dialer,
    gid: int,
    addresses: Sequence[str],
    patience: float = PATIENCE_SECONDS,
    on_progress: Callable[[str, int], None] = lambda address, pairs: None,
) -> GroupCheck:
    """Compare all members of a group. Raises NotBegun, AccessDenied."""
    begun = await begin(dialer, addresses)
    found = GroupCheck(gid, begun)

    async def one(address: str) -> None:
        found.said[address] = await ask(
            dialer, address, begun, patience, lambda pairs: on_progress(address, pairs)
        )

    try:
        await asyncio.gather(*map(one, begun.members))
    finally:
        await close(dialer, begun.members, begun.id)
    return found


async def check_controllers(
    dialer: Dialer, addresses: Sequence[str], patience: float = PATIENCE_SECONDS
) -> GroupCheck:
    """Compare the replicas of the controller at an entry that all of them have applied last.

    Their state is small and seldom changes, so nothing has to be pinned: each is asked for a digest of
    the whole until all answers are of one entry. Raises NotBegun, AccessDenied.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience
    seen: dict[str, dict[int, Digest]] = {}
    members: list[str] = list(addresses)
    why: dict[str, str] = {}
    while True:
        for address, said in zip(
            members, await asyncio.gather(*(_state_of(dialer, a) for a in members)), strict=True
        ):
            if isinstance(said, str):
                why[address] = said
                continue
            why.pop(address, None)
            seen.setdefault(address, {})[said["index"]] = Digest(0, bytes.fromhex(said["digest"]))
            members = said["members"] or members
        compared = [seen.get(address, {}) for address in members]
        common = set.intersection(*map(set, compared)) if compared else set()
        if common or loop.time() > deadline:
            break
        await asyncio.sleep(ASK_SECONDS)
    if not seen:
        raise NotBegun("; ".join(why.values()))
    # Where one does not answer or lags behind, the others are compared at the newest entry of most of them.
    counts = Counter(index for digests in seen.values() for index in digests)
    index = max(common) if common else max(counts, key=lambda index: (counts[index], index))
    found = GroupCheck(CONTROLLERS, Begun(b"", index, 0, (), tuple(members)))
    for address in members:
        digest = seen.get(address, {}).get(index)
        if digest is not None:
            found.said[address] = Said({None: digest})
        else:
            behind = f"it never said what it held at entry {index}"
            found.said[address] = Said(why_not=why.get(address, behind))
    return found


async def _state_of(dialer: Dialer, address: str) -> dict[str, Any] | str:
    """What a controller says of its state, or why it does not. Raises AccessDenied."""
    try:
        code, body = parse(await dialer.call(address, "ctl.check", b"", CALL_SECONDS))
        if code is Code.OK:
            said: dict[str, Any] = parse_json(body)
            return said if isinstance(said, dict) else "no answer: it is not JSON of ours"
    except (Unreachable, ValueError) as error:
        return f"no answer: {error}"
    text = body.decode(errors="replace")
    if code is Code.DENIED:
        raise AccessDenied(text)
    return f"{code.name} {text}".strip()
