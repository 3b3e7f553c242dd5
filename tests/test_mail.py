"""The bytes of raft's mail (`raft/codec.py`): all messages come back as they were, and other bytes are refused."""

from __future__ import annotations

import google_crc32c
import pytest

from shardkv.raft.codec import HEAD, MAGIC, PROTOCOL_VERSION, MalformedMail, decode_mail, encode_mail
from shardkv.raft.protocol.messages import (
    AppendEntries,
    AppendReply,
    Envelope,
    InstallSnapshot,
    InstallSnapshotReply,
    Message,
    ReadIndex,
    ReadIndexReply,
    RequestVote,
    RequestVoteReply,
    TimeoutNow,
)
from shardkv.raft.protocol.types import Entry, Kind

pytestmark = pytest.mark.quick

# Each field has a value of its own, so that two that change places are noticed.
MESSAGES: tuple[Message, ...] = (
    RequestVote(True, 11, 2, False),
    RequestVote(False, 12, 3, True),
    RequestVoteReply(True, False),
    RequestVoteReply(False, True),
    AppendEntries(1, 1, (), 2, 3),
    AppendEntries(4, 2, (Entry(5, 2, Kind.COMMAND, b"a"), Entry(6, 3, Kind.NOOP, b"")), 7, 8),
    AppendReply(True, 1, 2, 3, 4, 5, False, True),
    AppendReply(False, 0, 6, 7, 4, 8, True, False),
    InstallSnapshot(1, 2, 30, 4, b"chunk", 6, 7),
    InstallSnapshotReply(1, 2, 3, True, 5),
    ReadIndex(9),
    ReadIndexReply(10, 11),
    TimeoutNow(),
)


def packed(*messages: Message) -> bytes:
    return encode_mail("c", 1, "h:1", [Envelope(2, 1, 5, message) for message in messages], 22, 11)


def sealed(body: bytes) -> bytes:
    """Mail whose checksum fits, whatever it says."""
    return HEAD.pack(MAGIC, PROTOCOL_VERSION, google_crc32c.value(body)) + body


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_comes_back_as_it_was(message: Message) -> None:
    assert decode_mail("c", 1, packed(message)) == ("h:1", [Envelope(2, 1, 5, message, 22, 11)])


def test_many_messages_come_back_in_order() -> None:
    _, envelopes = decode_mail("c", 1, packed(*MESSAGES))
    assert [envelope.message for envelope in envelopes] == list(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_mail_that_is_cut_anywhere_or_goes_on_is_refused(message: Message) -> None:
    body = packed(message)[HEAD.size :]
    assert decode_mail("c", 1, sealed(body))
    for end in range(len(body)):
        with pytest.raises(MalformedMail):
            decode_mail("c", 1, sealed(body[:end]))
    with pytest.raises(MalformedMail, match="1 bytes after the last of 1 envelopes"):
        decode_mail("c", 1, sealed(body + b"\0"))


@pytest.mark.parametrize(("cluster", "group"), [("d", 1), ("c", 2), ("", 1)])
def test_mail_for_another_cluster_or_group_is_refused_by_name(cluster: str, group: int) -> None:
    with pytest.raises(MalformedMail, match="mail for cluster 'c' group 1"):
        decode_mail(cluster, group, packed(ReadIndex(1)))


def test_a_kind_that_this_version_does_not_know_is_refused() -> None:
    body = packed(ReadIndex(1))[HEAD.size :]
    kind_at = body.index(b"h:1") + 3
    with pytest.raises(MalformedMail):
        decode_mail("c", 1, sealed(body[:kind_at] + b"\x63" + body[kind_at + 1 :]))


def test_another_version_is_refused_by_name() -> None:
    body = packed(ReadIndex(1))[HEAD.size :]
    with pytest.raises(MalformedMail, match="protocol version 2, this replica speaks 3"):
        decode_mail("c", 1, HEAD.pack(MAGIC, 2, google_crc32c.value(body)) + body)
