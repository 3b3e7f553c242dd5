"""Every sync that is promised, on real files: what a killed process or a loss of power leaves is enough."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import TypeVar

import pytest

from shardkv.raft.codec import MalformedMail, decode_mail, encode_mail
from shardkv.raft.disk import RealDirectory
from shardkv.raft.errors import CorruptEntry, CorruptLog
from shardkv.raft.protocol.messages import AppendEntries, AppendReply, Envelope
from shardkv.raft.protocol.types import Entry, HardState, Kind
from shardkv.raft.state_file import STATE_FILE
from shardkv.raft.wal import Recovered, open_wal
from tests.power import Killed, Power, eio, kill

T = TypeVar("T")
FIRST = "wal-0000000000000001.log"
SECOND = "wal-0000000000000002.log"


@pytest.fixture
def power(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Power:
    (tmp_path / "disk").mkdir()
    return Power(monkeypatch, tmp_path / "disk")


def entry(index: int, term: int = 1) -> Entry:
    return Entry(index, term, Kind.COMMAND, b"%d:" % index + b"x" * 40)


def use(path: Path, work: Callable[[RealDirectory], Awaitable[T]]) -> T:
    """Open the directory, work in it, let it go. A `Killed` or a failure ends the work where it is."""

    async def main() -> T:
        directory = RealDirectory(path)
        try:
            return await work(directory)
        finally:
            directory.close()

    return asyncio.run(main())


def log_in(path: Path, segment_bytes: int = 1 << 20) -> Recovered:
    async def read(directory: RealDirectory) -> Recovered:
        wal, recovered = await open_wal(directory, Random(2), segment_bytes)
        wal.close()
        return recovered

    return use(path, read)


def write(path: Path, *batches: tuple[HardState | None, list[Entry]], segment_bytes: int = 1 << 20) -> None:
    async def work(directory: RealDirectory) -> None:
        wal, _ = await open_wal(directory, Random(1), segment_bytes)
        for hard_state, entries in batches:
            await wal.append(hard_state, entries)

    use(path, work)


# ---- which syncs each change makes


def test_each_change_makes_its_syncs_and_no_more(power: Power) -> None:
    async def work(directory: RealDirectory) -> None:
        power.taken()
        wal, _ = await open_wal(directory, Random(1), 500)
        assert power.taken() == [], "an empty log holds nothing to rest on"
        await wal.append(HardState(1, 1), [entry(1)])
        put = [f"pwrite d/{FIRST}.tmp", f"fsync d/{FIRST}.tmp", f"rename d/{FIRST}.tmp", "fsync d"]
        append = [f"pwrite d/{FIRST}", f"fdatasync d/{FIRST}"]
        assert power.taken() == put + append, "a roll, then the append"
        await wal.append(None, [entry(2)])
        assert power.taken() == append
        await directory.replace(STATE_FILE, b"state")
        assert power.taken() == ["pwrite d/state.tmp", "fsync d/state.tmp", "rename d/state.tmp", "fsync d"]
        await directory.rewrite_tail(STATE_FILE, 3, b"te")
        assert power.taken() == ["pwrite d/state", "ftruncate d/state", "fsync d/state"]
        for name in ("one", "two"):
            await directory.replace(name, b"")
        power.taken()
        await directory.remove(["one", "two"])
        assert power.taken() == ["unlink d/one", "fsync d", "unlink d/two", "fsync d"]

    use(power.root / "d", work)


def test_a_directory_is_made_with_everything_above_it(power: Power, tmp_path: Path) -> None:
    write(power.root / "a" / "b" / "c", (HardState(3, 1), [entry(1)]))
    left = power.lost(tmp_path / "after")
    assert log_in(left / "a" / "b" / "c").entries == [entry(1)]


def test_a_directory_whose_maker_was_killed_before_its_syncs(power: Power, tmp_path: Path) -> None:
    power.fail = kill("fsync a", "fsync .")
    with pytest.raises(Killed):
        RealDirectory(power.root / "a" / "b")
    assert (power.root / "a" / "b").is_dir()
    power.fail = lambda call: None
    write(power.root / "a" / "b", (HardState(3, 1), [entry(1)]))
    assert log_in(power.lost(tmp_path / "after") / "a" / "b").entries == [entry(1)]


# ---- appended, rolled, removed: there after a loss of power


def test_what_was_appended_survives_a_loss_of_power(power: Power, tmp_path: Path) -> None:
    async def work(directory: RealDirectory) -> None:
        wal, _ = await open_wal(directory, Random(1), 300)  # rolls every few appends
        for n in range(1, 20):
            await wal.append(HardState(n, 1), [entry(n)])
            left = await asyncio.to_thread(log_in, power.lost(tmp_path / f"after-{n}") / "d")
            assert left.entries == [entry(i) for i in range(1, n + 1)]
            assert left.hard_state == HardState(n, 1)

    use(power.root / "d", work)


def test_segments_go_oldest_first_each_for_good(power: Power, tmp_path: Path) -> None:
    """The power goes after each single call of a removal: no segment is there beside a missing later one."""

    async def work(directory: RealDirectory) -> None:
        wal, _ = await open_wal(directory, Random(1), 300)
        for n in range(1, 20):
            await wal.append(HardState(1, 1), [entry(n)])
        assert len(wal.segment_names) > 5
        power.taken()
        count = 0

        def after_each(call: str) -> None:
            nonlocal count
            count += 1
            left = log_in(power.lost(tmp_path / f"after-{count}") / "d")
            assert left.entries[-1] == entry(19), "and it opens"

        power.fail = after_each
        await wal.set_base(18, 1)
        await wal.removed()
        power.fail = lambda call: None
        unlinked = [call.split()[1] for call in power.taken() if call.startswith("unlink")]
        assert len(unlinked) > 4 and unlinked == sorted(unlinked)

    use(power.root / "d", work)


def test_a_gap_among_segments_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, *((None, [entry(n)]) for n in range(1, 20)), segment_bytes=300)
    (tmp_path / SECOND).unlink()
    with pytest.raises(CorruptLog, match=f"the segment between {FIRST} and this one is missing"):
        log_in(tmp_path)


# ---- what a killed process wrote and never synced (issue 10, B6)


def test_what_a_start_reads_is_durable_before_it_is_rested_on(power: Power, tmp_path: Path) -> None:
    """kill -9 between write and sync, start, acknowledge, loss of power: the write was gone everywhere."""
    write(power.root, (HardState(1, 1), [entry(1)]))
    power.fail = kill("fdatasync")
    with pytest.raises(Killed):
        write(power.root, (HardState(2, 3), [entry(2, 2)]))
    assert log_in(power.lost(tmp_path / "before")).entries == [entry(1)]
    power.fail = lambda call: None
    recovered = log_in(power.root)
    assert recovered.entries == [entry(1), entry(2, 2)], "the kernel shows it"
    left = log_in(power.lost(tmp_path / "after"))
    assert (left.entries, left.hard_state) == (recovered.entries, HardState(2, 3)), "so the disk has it"


def test_what_a_failed_sync_left_is_written_again(power: Power, tmp_path: Path) -> None:
    """The kernel takes the page for clean; a second sync succeeds and writes nothing (fsyncgate)."""
    write(power.root, (HardState(1, 1), [entry(1)]))
    power.fail = eio("fdatasync")
    with pytest.raises(OSError, match="the disk failed"):
        write(power.root, (HardState(2, 3), [entry(2, 2)]))
    power.fail = lambda call: None
    recovered = log_in(power.root)
    assert recovered.entries == [entry(1), entry(2, 2)]
    assert log_in(power.lost(tmp_path / "after")).entries == recovered.entries


def test_a_start_that_is_killed_while_it_rewrites_changes_nothing(power: Power, tmp_path: Path) -> None:
    write(power.root, (HardState(1, 1), [entry(1)]), (None, [entry(2)]))
    for call in ("pwrite", "ftruncate", "fsync wal"):
        power.fail = kill(call)
        with pytest.raises(Killed):
            log_in(power.root)
        power.fail = lambda call: None
        assert log_in(power.lost(tmp_path / call.split()[0])).entries == [entry(1), entry(2)]


def test_a_file_that_was_renamed_and_not_synced_is_durable_once_it_is_read(
    power: Power, tmp_path: Path
) -> None:
    """The state file: a log that is compacted against it must not outlive it."""

    async def replace(directory: RealDirectory) -> None:
        await directory.replace(STATE_FILE, b"old")
        power.fail = lambda call: Killed() if call == "fsync d" else None
        await directory.replace(STATE_FILE, b"new")

    with pytest.raises(Killed):
        use(power.root / "d", replace)
    power.fail = lambda call: None
    assert (power.lost(tmp_path / "before") / "d" / STATE_FILE).read_bytes() == b"old"

    async def read(directory: RealDirectory) -> bytes:
        return directory.read(STATE_FILE)

    assert use(power.root / "d", read) == b"new"
    assert (power.lost(tmp_path / "after") / "d" / STATE_FILE).read_bytes() == b"new"


# ---- closing


def test_a_file_is_not_closed_under_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptor's number would go to the next file that is opened, and the write with it."""
    real, begun, go_on = os.pwrite, threading.Event(), threading.Event()

    def slow(descriptor: int, data: bytes, offset: int) -> int:
        if b"held up" in bytes(data):
            begun.set()
            assert go_on.wait(10)
        return real(descriptor, data, offset)

    async def work(directory: RealDirectory) -> None:
        file = await directory.create("log", b"head")
        monkeypatch.setattr(os, "pwrite", slow)
        append = asyncio.ensure_future(file.append(b"held up"))
        await asyncio.to_thread(begun.wait, 10)
        file.close()
        others = [os.open(tmp_path / f"other-{n}", os.O_RDWR | os.O_CREAT) for n in range(5)]
        go_on.set()
        await append
        for descriptor in others:
            assert os.pread(descriptor, 100, 0) == b"", "a write of the log went to another file"
            os.close(descriptor)
        assert directory.read("log").startswith(b"headheld up")

    use(tmp_path / "d", work)


# ---- an entry's checksum (issue 10, A5)


def test_an_entry_that_changed_in_memory_is_not_written(tmp_path: Path) -> None:
    whole = entry(2)
    changed = Entry(whole.index, whole.term, whole.kind, whole.data.replace(b"x", b"y", 1), whole.crc)
    assert whole.is_whole() and not changed.is_whole()
    for field, value in (("index", 3), ("term", 2), ("kind", Kind.NOOP)):
        values = {"index": 2, "term": 1, "kind": Kind.COMMAND} | {field: value}
        assert not Entry(data=whole.data, crc=whole.crc, **values).is_whole(), f"{field} is covered"  # type: ignore[arg-type]
    with pytest.raises(CorruptEntry, match="entry 2 changed in memory"):
        write(tmp_path, (None, [entry(1)]), (None, [changed]))
    assert log_in(tmp_path).entries == [entry(1)]


def test_an_entry_that_changed_before_its_batch_was_sealed_is_found_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check and the batch's checksum: only the entry's own tells."""
    changed = Entry(1, 1, Kind.COMMAND, b"other", entry(1).crc)
    with monkeypatch.context() as patch:
        patch.setattr(Entry, "is_whole", lambda self: True)
        write(tmp_path, (None, [changed]))
    with pytest.raises(CorruptLog, match="entry 1 does not match its checksum"):
        log_in(tmp_path)


def test_a_follower_refuses_mail_with_an_entry_that_changed_at_its_leader() -> None:
    """Before it was packed, so that the mail's own checksum fits."""
    sound = entry(2)
    for at in range(len(sound.data)):
        changed = Entry(2, sound.term, sound.kind, sound.data, sound.crc)
        object.__setattr__(changed, "data", flipped(sound.data, at))
        mail = Envelope(2, 1, 1, AppendEntries(0, 0, (entry(1), changed), 0, 0))
        with pytest.raises(MalformedMail, match="entry 2 does not match its checksum") as refusal:
            decode_mail("c", 1, encode_mail("c", 1, "127.0.0.1:1", [mail]))
        assert refusal.value.sender == 2, "the sender is named, and counted by the node"


def test_every_bit_of_mail_is_inside_its_checksum() -> None:
    """One bit of a commit index, of a match index or of a read round would be believed, and lose a write."""
    mail = [
        Envelope(2, 1, 1, AppendEntries(0, 0, (entry(1),), 1, 7), 22, 11),
        Envelope(2, 1, 1, AppendReply(True, 1, 7), 22, 11),
    ]
    packed = encode_mail("c", 1, "127.0.0.1:1", mail, 22, 11)
    assert decode_mail("c", 1, packed)[1] == mail
    for at in range(8 * len(packed)):
        with pytest.raises(MalformedMail):
            decode_mail("c", 1, flipped(packed, at // 8, 1 << at % 8))


def flipped(data: bytes, at: int, bits: int = 4) -> bytes:
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]
