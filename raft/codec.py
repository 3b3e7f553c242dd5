"""Envelopes to bytes and back. The only file in `raft` that knows protobuf.

`decode_mail` takes bytes from the network: whatever they are, it returns mail
or raises `MalformedMail`, and never anything else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import assert_never

import google_crc32c
from google.protobuf.message import DecodeError

from raft import messages as m
from raft import raft_pb2 as pb
from raft.bounds import flaw
from raft.types import NOBODY, Entry, Kind, NodeId

PROTOCOL_VERSION = 2


MAGIC = b"SKM"
HEAD = struct.Struct("<3sBI")  # magic, version, CRC32C of the protobuf message that follows


class MalformedMail(Exception):
    """Bytes that are no mail for this replica: damaged, of another version, cluster or group.

    `sender` is the replica that the mail says it is from; 0 where it does not say.
    """

    def __init__(self, why: str, sender: NodeId = NOBODY) -> None:
        super().__init__(why)
        self.sender = sender


def encode_mail(
    cluster: str,
    group: int,
    address: str,
    envelopes: Iterable[m.Envelope],
    incarnation: int = 0,
    to_incarnation: int = 0,
) -> bytes:
    """`address`: where the sender listens, for a receiver that does not know it yet.

    `incarnation` is that of the sender's disk, `to_incarnation` that of the receiver's as the
    sender's log knows it.
    """
    mail = pb.Mail(
        cluster=cluster,
        group=group,
        address=address,
        incarnation=incarnation,
        to_incarnation=to_incarnation,
    )
    for envelope in envelopes:
        _fill(mail.envelopes.add(), envelope)
    body = mail.SerializeToString()
    return HEAD.pack(MAGIC, PROTOCOL_VERSION, google_crc32c.value(body)) + body


def decode_mail(cluster: str, group: int, data: bytes) -> tuple[str, list[m.Envelope]]:
    """The sender's address and the envelopes in `data`. Raises MalformedMail."""
    if len(data) < HEAD.size or not data.startswith(MAGIC):
        raise MalformedMail(f"{len(data)} bytes are no mail")
    _, version, crc = HEAD.unpack_from(data)
    if version != PROTOCOL_VERSION:
        raise MalformedMail(f"protocol version {version}, this replica speaks {PROTOCOL_VERSION}")
    body = data[HEAD.size :]
    # A flipped bit in a commit index or a match index commits what no quorum has stored. TCP's own
    # checksum has 16 bits and does not see what a memory or a network card does before it or after it.
    if google_crc32c.value(body) != crc:
        raise MalformedMail(f"{len(data)} bytes of mail do not match their checksum")
    try:
        mail = pb.Mail.FromString(body)
    except DecodeError as error:
        raise MalformedMail(f"{len(data)} bytes are no mail: {error}") from None
    if mail.cluster != cluster or mail.group != group:
        raise MalformedMail(
            f"mail for cluster {mail.cluster!r} group {mail.group}, this is {cluster!r} group {group}"
        )
    disks = mail.incarnation, mail.to_incarnation
    envelopes = [_envelope(envelope, *disks) for envelope in mail.envelopes]
    for envelope in envelopes:
        why = flaw(envelope)
        if why is not None:
            raise MalformedMail(f"replica {envelope.sender} at {mail.address[:64]}: {why}", envelope.sender)
    return mail.address, envelopes


def _fill(target: pb.Envelope, envelope: m.Envelope) -> None:
    target.sender, target.to, target.term = envelope.sender, envelope.to, envelope.term
    message = envelope.message
    match message:
        case m.AppendEntries():
            append = target.append_entries
            append.prev_log_index = message.prev_log_index
            append.prev_log_term = message.prev_log_term
            append.leader_commit = message.leader_commit
            append.read_seq = message.read_seq
            for entry in message.entries:
                append.entries.add(
                    index=entry.index, term=entry.term, kind=entry.kind, data=entry.data, crc=entry.crc
                )
        case m.AppendReply():
            reply = target.append_reply
            reply.SetInParent()
            reply.success = message.success
            reply.match_index = message.match_index
            reply.read_seq = message.read_seq
            reply.rejected_index = message.rejected_index
            reply.conflict_term = message.conflict_term
            reply.conflict_index = message.conflict_index
            reply.low = message.low
            reply.state_lost = message.state_lost
        case m.RequestVote():
            target.request_vote.CopyFrom(
                pb.RequestVote(
                    pre=message.pre,
                    last_log_index=message.last_log_index,
                    last_log_term=message.last_log_term,
                    transfer=message.transfer,
                )
            )
        case m.RequestVoteReply():
            target.request_vote_reply.CopyFrom(pb.RequestVoteReply(pre=message.pre, granted=message.granted))
        case m.InstallSnapshot():
            target.install_snapshot.CopyFrom(
                pb.InstallSnapshot(
                    last_index=message.last_index,
                    last_term=message.last_term,
                    total=message.total,
                    offset=message.offset,
                    data=message.data,
                    crc=message.crc,
                    stream=message.stream,
                )
            )
        case m.InstallSnapshotReply():
            target.install_snapshot_reply.CopyFrom(
                pb.InstallSnapshotReply(
                    last_index=message.last_index,
                    chunk_offset=message.chunk_offset,
                    offset=message.offset,
                    done=message.done,
                    stream=message.stream,
                )
            )
        case m.ReadIndex():
            target.read_index.CopyFrom(pb.ReadIndex(seq=message.seq))
        case m.ReadIndexReply():
            target.read_index_reply.CopyFrom(pb.ReadIndexReply(seq=message.seq, index=message.index))
        case m.TimeoutNow():
            target.timeout_now.SetInParent()
        case _ as never:
            assert_never(never)


def _envelope(envelope: pb.Envelope, incarnation: int, to_incarnation: int) -> m.Envelope:
    return m.Envelope(
        envelope.sender, envelope.to, envelope.term, _message(envelope), incarnation, to_incarnation
    )


def _message(envelope: pb.Envelope) -> m.Message:
    match envelope.WhichOneof("message"):
        case "append_entries":
            append = envelope.append_entries
            return m.AppendEntries(
                append.prev_log_index,
                append.prev_log_term,
                _entries(append),
                append.leader_commit,
                append.read_seq,
            )
        case "append_reply":
            reply = envelope.append_reply
            return m.AppendReply(
                reply.success,
                reply.match_index,
                reply.read_seq,
                reply.rejected_index,
                reply.conflict_term,
                reply.conflict_index,
                reply.low,
                reply.state_lost,
            )
        case "request_vote":
            vote = envelope.request_vote
            return m.RequestVote(vote.pre, vote.last_log_index, vote.last_log_term, vote.transfer)
        case "request_vote_reply":
            return m.RequestVoteReply(envelope.request_vote_reply.pre, envelope.request_vote_reply.granted)
        case "install_snapshot":
            chunk = envelope.install_snapshot
            return m.InstallSnapshot(
                chunk.last_index,
                chunk.last_term,
                chunk.total,
                chunk.offset,
                chunk.data,
                chunk.crc,
                chunk.stream,
            )
        case "install_snapshot_reply":
            answer = envelope.install_snapshot_reply
            return m.InstallSnapshotReply(
                answer.last_index, answer.chunk_offset, answer.offset, answer.done, answer.stream
            )
        case "read_index":
            return m.ReadIndex(envelope.read_index.seq)
        case "read_index_reply":
            return m.ReadIndexReply(envelope.read_index_reply.seq, envelope.read_index_reply.index)
        case "timeout_now":
            return m.TimeoutNow()
        case _:
            raise MalformedMail("an envelope without a message that this version knows")


def _entries(append: pb.AppendEntries) -> tuple[Entry, ...]:
    try:
        return tuple(Entry(e.index, e.term, Kind(e.kind), e.data, e.crc) for e in append.entries)
    except ValueError as error:
        raise MalformedMail(f"an entry of unknown kind: {error}") from None
