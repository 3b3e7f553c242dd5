"""A session belongs to the user whose frame brought it: nobody writes under another user's number. Pure.

A session's number is no secret: whoever sees one frame knows it. With the number alone, another user could have a
sequence number recorded first, or raise `acked_below`, and the owner's write would be answered and never done. So
the number that goes into the log, and into exactly-once records, is a digest of the client's number and the user's
name. The leader computes it before it proposes the frame; replicas and records know nothing of it.

A user keeps his name whatever token or certificate he shows, and has it also while access control is off, so a
retry finds its record again whenever that is switched. Who has not proven a name (no access control and no TLS; the
operator) keeps the number as it is.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

from shardkv.wire.frames import FIRST_VERSION, FRAME, MAGIC, NO_SESSION, SECTION, VERSION, WRITE

SESSION_AT = 8  # in a section's header: after the shard
SESSION_BYTES = len(NO_SESSION)
KNOWN_SESSIONS = 16_384  # digests that are kept: a clerk has a session for each shard that it writes to
FIXED_BYTES = 17  # of a write: kind, number, two lengths


@lru_cache(KNOWN_SESSIONS)
def owned(session: bytes, user: str) -> bytes:
    """The session that `user` has under that number. No session stays none."""
    if session == NO_SESSION or not user:
        return session
    return blake2b(session + user.encode(), digest_size=SESSION_BYTES, person=b"shardkv session").digest()


def own_frame(frame: bytes, user: str) -> bytes:  # hot: runs per frame and section
    """A write frame with its sessions as `user`'s; bytes that are no frame come back as they are, to be refused later."""
    if not user or len(frame) < FRAME.size:
        return frame
    magic, version, kind, sections, *_ = FRAME.unpack_from(frame)
    if magic != MAGIC or not FIRST_VERSION <= version <= VERSION or kind != WRITE:
        return frame
    view, copied, offset = memoryview(frame), 0, FRAME.size
    parts: list[bytes | memoryview] = []
    for _ in range(sections):
        if offset + SECTION.size > len(frame):
            return frame
        _, session, _, count, blob_bytes = SECTION.unpack_from(frame, offset)
        start = offset + SESSION_AT
        parts += (view[copied:start], owned(session, user))
        copied = start + SESSION_BYTES
        offset += SECTION.size + count * FIXED_BYTES + blob_bytes
    return b"".join((*parts, view[copied:]))
