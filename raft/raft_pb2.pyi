from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Entry(_message.Message):
    __slots__ = ("index", "term", "kind", "data", "crc")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC_FIELD_NUMBER: _ClassVar[int]
    index: int
    term: int
    kind: int
    data: bytes
    crc: int
    def __init__(self, index: _Optional[int] = ..., term: _Optional[int] = ..., kind: _Optional[int] = ..., data: _Optional[bytes] = ..., crc: _Optional[int] = ...) -> None: ...

class RequestVote(_message.Message):
    __slots__ = ("pre", "last_log_index", "last_log_term", "transfer")
    PRE_FIELD_NUMBER: _ClassVar[int]
    LAST_LOG_INDEX_FIELD_NUMBER: _ClassVar[int]
    LAST_LOG_TERM_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    pre: bool
    last_log_index: int
    last_log_term: int
    transfer: bool
    def __init__(self, pre: bool = ..., last_log_index: _Optional[int] = ..., last_log_term: _Optional[int] = ..., transfer: bool = ...) -> None: ...

class RequestVoteReply(_message.Message):
    __slots__ = ("pre", "granted")
    PRE_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    pre: bool
    granted: bool
    def __init__(self, pre: bool = ..., granted: bool = ...) -> None: ...

class AppendEntries(_message.Message):
    __slots__ = ("prev_log_index", "prev_log_term", "entries", "leader_commit", "read_seq")
    PREV_LOG_INDEX_FIELD_NUMBER: _ClassVar[int]
    PREV_LOG_TERM_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    LEADER_COMMIT_FIELD_NUMBER: _ClassVar[int]
    READ_SEQ_FIELD_NUMBER: _ClassVar[int]
    prev_log_index: int
    prev_log_term: int
    entries: _containers.RepeatedCompositeFieldContainer[Entry]
    leader_commit: int
    read_seq: int
    def __init__(self, prev_log_index: _Optional[int] = ..., prev_log_term: _Optional[int] = ..., entries: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ..., leader_commit: _Optional[int] = ..., read_seq: _Optional[int] = ...) -> None: ...

class AppendReply(_message.Message):
    __slots__ = ("success", "match_index", "read_seq", "rejected_index", "conflict_term", "conflict_index", "low", "state_lost")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    MATCH_INDEX_FIELD_NUMBER: _ClassVar[int]
    READ_SEQ_FIELD_NUMBER: _ClassVar[int]
    REJECTED_INDEX_FIELD_NUMBER: _ClassVar[int]
    CONFLICT_TERM_FIELD_NUMBER: _ClassVar[int]
    CONFLICT_INDEX_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    STATE_LOST_FIELD_NUMBER: _ClassVar[int]
    success: bool
    match_index: int
    read_seq: int
    rejected_index: int
    conflict_term: int
    conflict_index: int
    low: bool
    state_lost: bool
    def __init__(self, success: bool = ..., match_index: _Optional[int] = ..., read_seq: _Optional[int] = ..., rejected_index: _Optional[int] = ..., conflict_term: _Optional[int] = ..., conflict_index: _Optional[int] = ..., low: bool = ..., state_lost: bool = ...) -> None: ...

class InstallSnapshot(_message.Message):
    __slots__ = ("last_index", "last_term", "total", "offset", "data", "crc", "stream")
    LAST_INDEX_FIELD_NUMBER: _ClassVar[int]
    LAST_TERM_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    last_index: int
    last_term: int
    total: int
    offset: int
    data: bytes
    crc: int
    stream: int
    def __init__(self, last_index: _Optional[int] = ..., last_term: _Optional[int] = ..., total: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., crc: _Optional[int] = ..., stream: _Optional[int] = ...) -> None: ...

class InstallSnapshotReply(_message.Message):
    __slots__ = ("last_index", "offset", "done", "chunk_offset", "stream")
    LAST_INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_OFFSET_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    last_index: int
    offset: int
    done: bool
    chunk_offset: int
    stream: int
    def __init__(self, last_index: _Optional[int] = ..., offset: _Optional[int] = ..., done: bool = ..., chunk_offset: _Optional[int] = ..., stream: _Optional[int] = ...) -> None: ...

class ReadIndex(_message.Message):
    __slots__ = ("seq",)
    SEQ_FIELD_NUMBER: _ClassVar[int]
    seq: int
    def __init__(self, seq: _Optional[int] = ...) -> None: ...

class ReadIndexReply(_message.Message):
    __slots__ = ("seq", "index")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    seq: int
    index: int
    def __init__(self, seq: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class TimeoutNow(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("sender", "to", "term", "request_vote", "request_vote_reply", "append_entries", "append_reply", "install_snapshot", "install_snapshot_reply", "read_index", "read_index_reply", "timeout_now")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    REQUEST_VOTE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_VOTE_REPLY_FIELD_NUMBER: _ClassVar[int]
    APPEND_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    APPEND_REPLY_FIELD_NUMBER: _ClassVar[int]
    INSTALL_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    INSTALL_SNAPSHOT_REPLY_FIELD_NUMBER: _ClassVar[int]
    READ_INDEX_FIELD_NUMBER: _ClassVar[int]
    READ_INDEX_REPLY_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_NOW_FIELD_NUMBER: _ClassVar[int]
    sender: int
    to: int
    term: int
    request_vote: RequestVote
    request_vote_reply: RequestVoteReply
    append_entries: AppendEntries
    append_reply: AppendReply
    install_snapshot: InstallSnapshot
    install_snapshot_reply: InstallSnapshotReply
    read_index: ReadIndex
    read_index_reply: ReadIndexReply
    timeout_now: TimeoutNow
    def __init__(self, sender: _Optional[int] = ..., to: _Optional[int] = ..., term: _Optional[int] = ..., request_vote: _Optional[_Union[RequestVote, _Mapping]] = ..., request_vote_reply: _Optional[_Union[RequestVoteReply, _Mapping]] = ..., append_entries: _Optional[_Union[AppendEntries, _Mapping]] = ..., append_reply: _Optional[_Union[AppendReply, _Mapping]] = ..., install_snapshot: _Optional[_Union[InstallSnapshot, _Mapping]] = ..., install_snapshot_reply: _Optional[_Union[InstallSnapshotReply, _Mapping]] = ..., read_index: _Optional[_Union[ReadIndex, _Mapping]] = ..., read_index_reply: _Optional[_Union[ReadIndexReply, _Mapping]] = ..., timeout_now: _Optional[_Union[TimeoutNow, _Mapping]] = ...) -> None: ...

class Mail(_message.Message):
    __slots__ = ("cluster", "group", "envelopes", "address", "incarnation", "to_incarnation")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ENVELOPES_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TO_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    group: int
    envelopes: _containers.RepeatedCompositeFieldContainer[Envelope]
    address: str
    incarnation: int
    to_incarnation: int
    def __init__(self, cluster: _Optional[str] = ..., group: _Optional[int] = ..., envelopes: _Optional[_Iterable[_Union[Envelope, _Mapping]]] = ..., address: _Optional[str] = ..., incarnation: _Optional[int] = ..., to_incarnation: _Optional[int] = ...) -> None: ...
