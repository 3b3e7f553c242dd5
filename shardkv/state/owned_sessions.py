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

from hashlib import blake2b

from shardkv.wire.frames import FRAME, NO_SESSION, SECTION, WRITE, MalformedFrame, read_header

SESSION_AT = 8  # in a section's header: after the shard
SESSION_BYTES = len(NO_SESSION)
FIXED_BYTES = 17  # of a write: kind, number, two lengths


def owned(session: bytes, user: str) -> bytes:
    """The session that `user` has under that number. No session stays none."""
    if session == NO_SESSION or not user:
        return session
    return blake2b(session + user.encode(), digest_size=SESSION_BYTES, person=b"shardkv session").digest()


def own_frame(frame: bytes, user: str) -> bytes:
    """A write frame with its sessions as `user`'s; bytes that are no frame come back as they are, to be refused later."""
    if not user:
        return frame
    try:
        header = read_header(frame)
    except MalformedFrame:
        return frame
    if header.kind != WRITE:
        return frame
    changed, offset = bytearray(frame), FRAME.size
    known: dict[bytes, bytes] = {}
    for _ in range(header.sections):
        if offset + SECTION.size > len(frame):
            return frame
        _, session, _, count, blob_bytes = SECTION.unpack_from(frame, offset)
        if session not in known:
            known[session] = owned(session, user)
        changed[offset + SESSION_AT : offset + SESSION_AT + SESSION_BYTES] = known[session]
        offset += SECTION.size + count * FIXED_BYTES + blob_bytes
    return bytes(changed)
