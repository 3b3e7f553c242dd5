"""Which operations of a frame a server lets into its log, or answers: refusals stay with their operations.

Nearly every frame is plain and goes as it came. Of another one the server makes a frame of the operations
that it takes, and puts the refusals of the others between the answers afterwards. So what is refused here is
never in the log, `apply` has nothing to judge twice, and no operation decides the fate of its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

from shardkv.wire import frames
from shardkv.wire.frames import (
    CAS_OP,
    FIRST_BUSY,
    FORBIDDEN,
    GROWS_NOTHING,
    READ,
    FrameHeader,
    Limits,
    MalformedFrame,
    Section,
    SectionStatus,
    Status,
)

TAKEN = Status.OK


class Admission:
    """A frame that `check_frame` has passed, sorted into what is taken and what is refused."""

    def __init__(self, frame: bytes, header: FrameHeader, limits: Limits, has_room: bool) -> None:
        self._shards: list[int] = []
        self._statuses: list[bytes] = []  # by section
        taken: list[bytes] = []
        for section in frames.unpack_sections(frame):
            statuses = _judge(section, header.kind, limits, has_room)
            self._shards.append(section.shard)
            self._statuses.append(statuses)
            if TAKEN in statuses:
                taken.append(_without_refused(section, statuses))
        self.frame: bytes | None = None
        """Of the operations that are taken; None where all are refused."""
        if taken:
            self.frame = frames.pack_frame(
                header.kind, header.config_num, header.issued_ms, taken, header.heard_ms, header.version
            )

    def reply(self, clock_ms: int, answer: bytes | None, refusal: Callable[[int], bytes | None]) -> bytes:
        """The reply to the whole frame. `answer`: to `self.frame`. `refusal`: of a shard that is not served here."""
        answered = iter(frames.unpack_reply(answer)[1] if answer is not None else [])
        sections = []
        for shard, statuses in zip(self._shards, self._statuses, strict=True):
            if TAKEN not in statuses:
                sections.append(refusal(shard) or frames.pack_results(statuses, None))
                continue
            got = next(answered)
            if got.status is not SectionStatus.OK:
                sections.append(frames.pack_refusal(got.status, got.gid, got.addresses))
                continue
            results = iter(zip(got.statuses, got.values, strict=True))
            merged = [next(results) if status == TAKEN else (status, b"") for status in statuses]
            sections.append(
                frames.pack_results(bytes([status for status, _ in merged]), [value for _, value in merged])
            )
        return frames.pack_reply(clock_ms, sections)


def _judge(section: Section, frame_kind: int, limits: Limits, has_room: bool) -> bytes:
    """A status for each operation: `TAKEN`, or why it is refused."""
    statuses = bytearray()
    for kind, key, value in zip(section.kinds, section.keys, section.values, strict=True):
        if kind == FORBIDDEN:
            statuses.append(Status.DENIED)
        elif kind >= FIRST_BUSY:
            statuses.append(kind)
        elif len(key) > limits.key_bytes or (frame_kind != READ and not key):
            statuses.append(Status.KEY_SIZE)
        elif _value_bytes(kind, value) > limits.value_bytes:
            statuses.append(Status.VALUE_SIZE)
        elif not has_room and kind not in GROWS_NOTHING:
            statuses.append(Status.NO_ROOM)
        else:
            statuses.append(TAKEN)
    return bytes(statuses)


def _value_bytes(kind: int, value: bytes) -> int:
    """The larger one of the values that an operation carries."""
    if kind != CAS_OP:
        return len(value)
    try:
        expected, new = frames.unpack_cas(value)
    except MalformedFrame:
        return len(value)  # a small one is refused as malformed when it is applied
    return max(len(expected or b""), len(new))


def _without_refused(section: Section, statuses: bytes) -> bytes:
    at = [n for n, status in enumerate(statuses) if status == TAKEN]
    return frames.pack_section(
        section.shard,
        section.session,
        section.acked_below,
        bytes([section.kinds[n] for n in at]),
        [section.seqs[n] for n in at] if section.seqs else [],
        [section.keys[n] for n in at],
        [section.values[n] for n in at],
    )
