"""The write-ahead log on real files: torn tails are cut, damage is refused, nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import TypeVar

import pytest

from shardkv.raft.disk import RealDirectory
from shardkv.raft.errors import CorruptLog, DirectoryInUse
from shardkv.raft.protocol.types import Entry, HardState, Kind
from shardkv.raft.wal import SEGMENT_HEADER, Recovered, Wal, open_wal
from tests.sim import loop
from tests.sim.disk import SimDisk

T = TypeVar("T")


def entry(index: int, term: int = 1, size: int = 40) -> Entry:
    return Entry(index, term, Kind.COMMAND, b"%d:" % index + b"x" * size)


def on_disk(path: Path, work: Callable[[Wal, Recovered], Awaitable[T]], segment_bytes: int = 1 << 20) -> T:
    """Open the log in `path`, let `work` use it, close it."""

    async def main() -> T:
        directory = RealDirectory(path)
        try:
            wal, recovered = await open_wal(directory, Random(1), segment_bytes)
            result = await work(wal, recovered)
            wal.close()
            return result
        finally:
            directory.close()

    return asyncio.run(main())


async def write_five(wal: Wal, recovered: Recovered) -> None:
    await wal.append(HardState(1, 2), [entry(1), entry(2)])
    await wal.append(None, [entry(3)])
    await wal.append(HardState(2, 0), [entry(4, 2)])
    await wal.append(None, [entry(5, 2)])


async def just_read(wal: Wal, recovered: Recovered) -> Recovered:
    return recovered


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("wal-*"))


def test_what_was_appended_is_there_again(tmp_path: Path) -> None:
    on_disk(tmp_path, write_five)
    recovered = on_disk(tmp_path, just_read)
    assert recovered.hard_state == HardState(2, 0)
    assert recovered.entries == [entry(1), entry(2), entry(3), entry(4, 2), entry(5, 2)]
    assert recovered.cut_bytes == 0


def test_an_entry_takes_the_place_of_what_conflicts(tmp_path: Path) -> None:
    async def conflict(wal: Wal, recovered: Recovered) -> None:
        await wal.append(HardState(3, 1), [entry(3, 3)])

    on_disk(tmp_path, write_five)
    on_disk(tmp_path, conflict)
    assert on_disk(tmp_path, just_read).entries == [entry(1), entry(2), entry(3, 3)]


def test_every_torn_tail_is_cut_and_the_rest_kept(tmp_path: Path) -> None:
    """The last batch torn at each of its bytes, and each of its bytes flipped."""
    on_disk(tmp_path, write_five)
    (segment,) = segments(tmp_path)
    whole = segment.read_bytes().rstrip(b"\0")
    last = whole.rindex(b"\xa7BAT")
    damages = [whole[:end] for end in range(last, len(whole))]
    damages += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(last, len(whole))]
    for damaged in damages:
        segment.write_bytes(damaged)
        for old in segments(tmp_path)[1:]:
            old.unlink()
        recovered = on_disk(tmp_path, just_read)
        assert recovered.entries == [entry(1), entry(2), entry(3), entry(4, 2)]
        assert recovered.cut_bytes == len(damaged.rstrip(b"\0")) - last
        assert on_disk(tmp_path, just_read).cut_bytes == 0, "what is cut stays cut"


def test_every_flipped_bit_before_the_tail_is_refused(tmp_path: Path) -> None:
    on_disk(tmp_path, write_five)
    (segment,) = segments(tmp_path)
    whole = segment.read_bytes().rstrip(b"\0")
    last = whole.rindex(b"\xa7BAT")
    for at in range(last):
        for bit in range(8):
            segment.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            with pytest.raises(CorruptLog) as error:
                on_disk(tmp_path, just_read)
            assert error.value.file == segment.name
            assert error.value.offset <= max(at, SEGMENT_HEADER.size), "a damaged salt shows at the first batch"


def test_damage_in_an_earlier_segment_is_refused_even_at_its_end(tmp_path: Path) -> None:
    async def fill(wal: Wal, recovered: Recovered) -> None:
        for n in range(1, 20):
            await wal.append(None, [entry(n)])

    on_disk(tmp_path, fill, segment_bytes=300)
    first = segments(tmp_path)[1]
    data = first.read_bytes()
    first.write_bytes(data.rstrip(b"\0")[:-1])
    with pytest.raises(CorruptLog):
        on_disk(tmp_path, just_read)
    first.unlink()
    with pytest.raises(CorruptLog):
        on_disk(tmp_path, just_read)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    on_disk(tmp_path, write_five)
    (segment,) = segments(tmp_path)
    data = bytearray(segment.read_bytes())
    data[8] = 9
    segment.write_bytes(bytes(data))
    with pytest.raises(CorruptLog, match="version 9"):
        on_disk(tmp_path, just_read)
    assert len(data) > SEGMENT_HEADER.size


def test_what_is_compacted_is_gone_from_disk_and_the_rest_stays(tmp_path: Path) -> None:
    async def fill(wal: Wal, recovered: Recovered) -> int:
        for n in range(1, 101):
            await wal.append(HardState(1, 1) if n == 1 else None, [entry(n)])
            if n % 10 == 0:
                await wal.set_base(n - 3, 1)
                await wal.removed()
        return len(wal.segment_names)

    kept = on_disk(tmp_path, fill, segment_bytes=500)
    assert kept <= 4
    assert len(segments(tmp_path)) == kept
    recovered = on_disk(tmp_path, just_read)
    assert (recovered.base_index, recovered.base_term) == (97, 1)
    assert recovered.entries == [entry(98), entry(99), entry(100)]
    assert recovered.hard_state == HardState(1, 1), "the hard state outlives its segment"


def test_a_base_explains_entries_whose_segment_it_let_go(tmp_path: Path) -> None:
    """Found by simulation (seed 0): a segment went because of a base noted only after later entries."""

    async def fill(wal: Wal, recovered: Recovered) -> None:
        for n in range(1, 6):
            await wal.append(None, [entry(n)])
        await wal.set_base(4, 1)  # begins a segment; entry 5 is in the one before
        await wal.append(None, [entry(6)])
        await wal.set_base(5, 1)  # that one goes
        await wal.append(None, [entry(7)])

    on_disk(tmp_path, fill, segment_bytes=600)
    recovered = on_disk(tmp_path, just_read)
    assert recovered.base_index == 5
    assert recovered.entries == [entry(6), entry(7)]


def test_a_user_s_bytes_never_pass_for_a_batch(tmp_path: Path) -> None:
    """A torn entry whose data holds a copy of an earlier batch is still a torn tail."""

    async def write(wal: Wal, recovered: Recovered) -> None:
        await wal.append(None, [entry(1)])
        (segment,) = segments(tmp_path)
        forged = segment.read_bytes().rstrip(b"\0")[SEGMENT_HEADER.size :]  # valid batches, salt and all
        await wal.append(None, [Entry(2, 1, Kind.COMMAND, forged + b"z" * 50)])

    on_disk(tmp_path, write)
    (segment,) = segments(tmp_path)
    segment.write_bytes(segment.read_bytes().rstrip(b"\0")[:-20])
    assert on_disk(tmp_path, just_read).entries == [entry(1)]


def test_a_failed_write_is_not_tried_again() -> None:
    async def main() -> None:
        disk = SimDisk(Random(1))
        wal, _ = await open_wal(disk.open(), Random(1))
        await wal.append(None, [entry(1)])
        disk.faults.failing = True
        with pytest.raises(OSError, match="simulated"):
            await wal.append(None, [entry(2)])
        disk.faults.failing = False
        disk.crash()
        _, recovered = await open_wal(disk.open(), Random(1))
        assert recovered.entries in ([entry(1)], [entry(1), entry(2)])

    loop.run(main())


def test_a_directory_has_one_user(tmp_path: Path) -> None:
    directory = RealDirectory(tmp_path)
    with pytest.raises(DirectoryInUse):
        RealDirectory(tmp_path)
    directory.close()
    RealDirectory(tmp_path).close()


@pytest.mark.quick
def test_a_base_of_another_term_than_the_log_s_entry_voids_the_log() -> None:
    """A snapshot was installed over a log that conflicts: its later entries were never committed."""
    for term, kept in ((1, [4, 5]), (2, [])):
        recovered = Recovered()
        for index in range(1, 6):
            recovered.replay_entry(entry(index))
        recovered.replay_base(3, term)
        assert [each.index for each in recovered.entries] == kept
        assert (recovered.base_index, recovered.base_term) == (3, term)


class Written:
    """What a log must hold, told in the simplest way: a dictionary."""

    def __init__(self) -> None:
        self.hard_state = HardState()
        self.base = (0, 0)
        self.terms: dict[int, int] = {}  # index -> term, above the base
        self.term = 1

    @property
    def last_index(self) -> int:
        return max(self.terms, default=self.base[0])

    def holds(self, recovered: Recovered) -> bool:
        entries = [(entry.index, entry.term) for entry in recovered.entries]
        return (recovered.hard_state, (recovered.base_index, recovered.base_term), entries) == (
            self.hard_state,
            self.base,
            sorted(self.terms.items()),
        )


@pytest.mark.parametrize("seed", range(40))
def test_a_log_holds_what_was_written_through_many_lives(tmp_path: Path, seed: int) -> None:
    """Appends, conflicts, compactions and installed snapshots in small segments; nothing is lost, nothing comes back."""

    async def story() -> None:
        rng, written = Random(seed), Written()
        for _ in range(4):
            directory = RealDirectory(tmp_path)
            wal, recovered = await open_wal(directory, Random(seed), segment_bytes=300)
            assert written.holds(recovered)
            for _ in range(rng.randrange(1, 25)):
                await step(wal, rng, written)
            wal.close()
            await asyncio.sleep(0)
            directory.close()

    async def step(wal: Wal, rng: Random, written: Written) -> None:
        base, last = written.base[0], written.last_index
        match rng.choices(["append", "conflict", "compact", "snapshot"], [5, 1, 3, 1])[0]:
            case "compact" if last > base:
                index = rng.randrange(base + 1, last + 1)
                written.base = (index, written.terms[index])
                written.terms = {at: term for at, term in written.terms.items() if at > index}
                await wal.set_base(*written.base)
            case "snapshot":
                written.term += 1
                written.base, written.terms = (last + rng.randrange(1, 3), written.term), {}
                await wal.set_base(*written.base)
            case kind:
                start = last + 1
                if kind == "conflict" and last > base:
                    start = rng.randrange(base + 1, last + 1)
                    written.term += 1
                entries = [
                    Entry(index, written.term, Kind.COMMAND, b"x" * rng.randrange(60))
                    for index in range(start, start + rng.randrange(1, 4))
                ]
                written.terms = {at: term for at, term in written.terms.items() if at < start}
                written.terms |= {entry.index: entry.term for entry in entries}
                state = HardState(written.term, rng.randrange(3)) if rng.random() < 0.5 else None
                written.hard_state = state or written.hard_state
                await wal.append(state, entries)

    asyncio.run(story())
