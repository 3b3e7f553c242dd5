from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CheckState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPUTING: _ClassVar[CheckState]
    COMPLETE: _ClassVar[CheckState]
    GONE: _ClassVar[CheckState]
COMPUTING: CheckState
COMPLETE: CheckState
GONE: CheckState

class Peer(_message.Message):
    __slots__ = ("gid", "addresses", "joined")
    GID_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    gid: int
    addresses: _containers.RepeatedScalarFieldContainer[str]
    joined: int
    def __init__(self, gid: _Optional[int] = ..., addresses: _Optional[_Iterable[str]] = ..., joined: _Optional[int] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("kind", "epoch", "start", "end", "peer", "other", "key", "cut")
    KIND_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    kind: int
    epoch: int
    start: bytes
    end: bytes
    peer: Peer
    other: int
    key: bytes
    cut: int
    def __init__(self, kind: _Optional[int] = ..., epoch: _Optional[int] = ..., start: _Optional[bytes] = ..., end: _Optional[bytes] = ..., peer: _Optional[_Union[Peer, _Mapping]] = ..., other: _Optional[int] = ..., key: _Optional[bytes] = ..., cut: _Optional[int] = ...) -> None: ...

class Cursor(_message.Message):
    __slots__ = ("phase", "key", "position")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    phase: int
    key: bytes
    position: int
    def __init__(self, phase: _Optional[int] = ..., key: _Optional[bytes] = ..., position: _Optional[int] = ...) -> None: ...

class ShardRow(_message.Message):
    __slots__ = ("shard", "state", "epoch", "start", "end", "peer", "served_epoch", "journal", "cursor", "queue", "attempt", "given_up", "fence", "restored", "inherits", "folds", "inherited", "cut")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    SERVED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    GIVEN_UP_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    INHERITS_FIELD_NUMBER: _ClassVar[int]
    FOLDS_FIELD_NUMBER: _ClassVar[int]
    INHERITED_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    shard: int
    state: int
    epoch: int
    start: bytes
    end: bytes
    peer: Peer
    served_epoch: int
    journal: int
    cursor: Cursor
    queue: _containers.RepeatedCompositeFieldContainer[Event]
    attempt: int
    given_up: _containers.RepeatedScalarFieldContainer[int]
    fence: RestoreFence
    restored: int
    inherits: int
    folds: bool
    inherited: bytes
    cut: int
    def __init__(self, shard: _Optional[int] = ..., state: _Optional[int] = ..., epoch: _Optional[int] = ..., start: _Optional[bytes] = ..., end: _Optional[bytes] = ..., peer: _Optional[_Union[Peer, _Mapping]] = ..., served_epoch: _Optional[int] = ..., journal: _Optional[int] = ..., cursor: _Optional[_Union[Cursor, _Mapping]] = ..., queue: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., attempt: _Optional[int] = ..., given_up: _Optional[_Iterable[int]] = ..., fence: _Optional[_Union[RestoreFence, _Mapping]] = ..., restored: _Optional[int] = ..., inherits: _Optional[int] = ..., folds: bool = ..., inherited: _Optional[bytes] = ..., cut: _Optional[int] = ...) -> None: ...

class RestoreFence(_message.Message):
    __slots__ = ("run", "name", "generation", "beat", "next", "later", "sealed")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    LATER_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    run: str
    name: str
    generation: int
    beat: int
    next: int
    later: _containers.RepeatedScalarFieldContainer[int]
    sealed: bool
    def __init__(self, run: _Optional[str] = ..., name: _Optional[str] = ..., generation: _Optional[int] = ..., beat: _Optional[int] = ..., next: _Optional[int] = ..., later: _Optional[_Iterable[int]] = ..., sealed: bool = ...) -> None: ...

class RestoreStep(_message.Message):
    __slots__ = ("kind", "shard", "run", "name", "generation", "over_run", "over_beat", "chunks")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        LOOK: _ClassVar[RestoreStep.Kind]
        BEGIN: _ClassVar[RestoreStep.Kind]
        BEAT: _ClassVar[RestoreStep.Kind]
        SEAL: _ClassVar[RestoreStep.Kind]
        END: _ClassVar[RestoreStep.Kind]
    LOOK: RestoreStep.Kind
    BEGIN: RestoreStep.Kind
    BEAT: RestoreStep.Kind
    SEAL: RestoreStep.Kind
    END: RestoreStep.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OVER_RUN_FIELD_NUMBER: _ClassVar[int]
    OVER_BEAT_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    kind: RestoreStep.Kind
    shard: int
    run: str
    name: str
    generation: int
    over_run: str
    over_beat: int
    chunks: int
    def __init__(self, kind: _Optional[_Union[RestoreStep.Kind, str]] = ..., shard: _Optional[int] = ..., run: _Optional[str] = ..., name: _Optional[str] = ..., generation: _Optional[int] = ..., over_run: _Optional[str] = ..., over_beat: _Optional[int] = ..., chunks: _Optional[int] = ...) -> None: ...

class RestoreChunk(_message.Message):
    __slots__ = ("shard", "run", "number", "page", "digest")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    shard: int
    run: str
    number: int
    page: bytes
    digest: bytes
    def __init__(self, shard: _Optional[int] = ..., run: _Optional[str] = ..., number: _Optional[int] = ..., page: _Optional[bytes] = ..., digest: _Optional[bytes] = ...) -> None: ...

class RestoreReply(_message.Message):
    __slots__ = ("outcome", "start", "end", "fence", "fenced")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        DONE: _ClassVar[RestoreReply.Outcome]
        NOT_SERVED: _ClassVar[RestoreReply.Outcome]
        HAS_DATA: _ClassVar[RestoreReply.Outcome]
        OTHER_RUN: _ClassVar[RestoreReply.Outcome]
        INCOMPLETE: _ClassVar[RestoreReply.Outcome]
        TOO_FAR: _ClassVar[RestoreReply.Outcome]
        MALFORMED: _ClassVar[RestoreReply.Outcome]
    DONE: RestoreReply.Outcome
    NOT_SERVED: RestoreReply.Outcome
    HAS_DATA: RestoreReply.Outcome
    OTHER_RUN: RestoreReply.Outcome
    INCOMPLETE: RestoreReply.Outcome
    TOO_FAR: RestoreReply.Outcome
    MALFORMED: RestoreReply.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    outcome: RestoreReply.Outcome
    start: bytes
    end: bytes
    fence: RestoreFence
    fenced: _containers.RepeatedCompositeFieldContainer[FencedShard]
    def __init__(self, outcome: _Optional[_Union[RestoreReply.Outcome, str]] = ..., start: _Optional[bytes] = ..., end: _Optional[bytes] = ..., fence: _Optional[_Union[RestoreFence, _Mapping]] = ..., fenced: _Optional[_Iterable[_Union[FencedShard, _Mapping]]] = ...) -> None: ...

class FencedShard(_message.Message):
    __slots__ = ("shard", "fence", "start", "end")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    shard: int
    fence: RestoreFence
    start: bytes
    end: bytes
    def __init__(self, shard: _Optional[int] = ..., fence: _Optional[_Union[RestoreFence, _Mapping]] = ..., start: _Optional[bytes] = ..., end: _Optional[bytes] = ...) -> None: ...

class Learn(_message.Message):
    __slots__ = ("changes",)
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, changes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Item(_message.Message):
    __slots__ = ("key", "value", "absent")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    value: bytes
    absent: bool
    def __init__(self, key: _Optional[bytes] = ..., value: _Optional[bytes] = ..., absent: bool = ...) -> None: ...

class Install(_message.Message):
    __slots__ = ("shard", "epoch", "next", "items", "final", "clock_ms", "attempt")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    CLOCK_MS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    shard: int
    epoch: int
    next: Cursor
    items: _containers.RepeatedCompositeFieldContainer[Item]
    final: bool
    clock_ms: int
    attempt: int
    def __init__(self, shard: _Optional[int] = ..., epoch: _Optional[int] = ..., next: _Optional[_Union[Cursor, _Mapping]] = ..., items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ..., final: bool = ..., clock_ms: _Optional[int] = ..., attempt: _Optional[int] = ..., **kwargs) -> None: ...

class Begin(_message.Message):
    __slots__ = ("incarnation",)
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    def __init__(self, incarnation: _Optional[int] = ...) -> None: ...

class Claimed(_message.Message):
    __slots__ = ("incarnation", "joined", "others")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    joined: int
    others: int
    def __init__(self, incarnation: _Optional[int] = ..., joined: _Optional[int] = ..., others: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("shard", "epoch", "attempt")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    shard: int
    epoch: int
    attempt: int
    def __init__(self, shard: _Optional[int] = ..., epoch: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class Inherit(_message.Message):
    __slots__ = ("shard",)
    SHARD_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    shard: int
    def __init__(self, shard: _Optional[int] = ..., **kwargs) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("shard", "epoch", "gid", "joined", "attempt", "can_finish")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    GID_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CAN_FINISH_FIELD_NUMBER: _ClassVar[int]
    shard: int
    epoch: int
    gid: int
    joined: int
    attempt: int
    can_finish: bool
    def __init__(self, shard: _Optional[int] = ..., epoch: _Optional[int] = ..., gid: _Optional[int] = ..., joined: _Optional[int] = ..., attempt: _Optional[int] = ..., can_finish: bool = ..., **kwargs) -> None: ...

class PullReply(_message.Message):
    __slots__ = ("ready", "items", "next", "final", "clock_ms", "incarnation", "other_group", "frozen", "left_bytes", "ended")
    READY_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    CLOCK_MS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    OTHER_GROUP_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    LEFT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    items: _containers.RepeatedCompositeFieldContainer[Item]
    next: Cursor
    final: bool
    clock_ms: int
    incarnation: int
    other_group: bool
    frozen: bool
    left_bytes: int
    ended: bool
    def __init__(self, ready: bool = ..., items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ..., next: _Optional[_Union[Cursor, _Mapping]] = ..., final: bool = ..., clock_ms: _Optional[int] = ..., incarnation: _Optional[int] = ..., other_group: bool = ..., frozen: bool = ..., left_bytes: _Optional[int] = ..., ended: bool = ...) -> None: ...

class ServesRequest(_message.Message):
    __slots__ = ("shard", "epoch", "gid", "joined", "attempt", "frozen")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GID_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    shard: int
    epoch: int
    gid: int
    joined: int
    attempt: int
    frozen: bool
    def __init__(self, shard: _Optional[int] = ..., epoch: _Optional[int] = ..., gid: _Optional[int] = ..., joined: _Optional[int] = ..., attempt: _Optional[int] = ..., frozen: bool = ...) -> None: ...

class ServesReply(_message.Message):
    __slots__ = ("yes", "incarnation", "other_group", "attempt", "given_up")
    YES_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    OTHER_GROUP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    GIVEN_UP_FIELD_NUMBER: _ClassVar[int]
    yes: bool
    incarnation: int
    other_group: bool
    attempt: int
    given_up: bool
    def __init__(self, yes: bool = ..., incarnation: _Optional[int] = ..., other_group: bool = ..., attempt: _Optional[int] = ..., given_up: bool = ...) -> None: ...

class ViewRequest(_message.Message):
    __slots__ = ("id", "cursor", "close", "check")
    ID_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    id: int
    cursor: bytes
    close: bool
    check: bytes
    def __init__(self, id: _Optional[int] = ..., cursor: _Optional[bytes] = ..., close: bool = ..., check: _Optional[bytes] = ...) -> None: ...

class ViewReply(_message.Message):
    __slots__ = ("id", "applied_index", "applied_term", "config_num", "clock_ms", "page", "incarnation")
    ID_FIELD_NUMBER: _ClassVar[int]
    APPLIED_INDEX_FIELD_NUMBER: _ClassVar[int]
    APPLIED_TERM_FIELD_NUMBER: _ClassVar[int]
    CONFIG_NUM_FIELD_NUMBER: _ClassVar[int]
    CLOCK_MS_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    id: int
    applied_index: int
    applied_term: int
    config_num: int
    clock_ms: int
    page: bytes
    incarnation: int
    def __init__(self, id: _Optional[int] = ..., applied_index: _Optional[int] = ..., applied_term: _Optional[int] = ..., config_num: _Optional[int] = ..., clock_ms: _Optional[int] = ..., page: _Optional[bytes] = ..., incarnation: _Optional[int] = ...) -> None: ...

class LogRequest(_message.Message):
    __slots__ = ("after", "wait_ms", "barrier")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    BARRIER_FIELD_NUMBER: _ClassVar[int]
    after: int
    wait_ms: int
    barrier: bool
    def __init__(self, after: _Optional[int] = ..., wait_ms: _Optional[int] = ..., barrier: bool = ...) -> None: ...

class LoggedEntry(_message.Message):
    __slots__ = ("index", "term", "kind", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    term: int
    kind: int
    data: bytes
    def __init__(self, index: _Optional[int] = ..., term: _Optional[int] = ..., kind: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class LogReply(_message.Message):
    __slots__ = ("entries", "base_index", "applied_index", "now_ms", "incarnation", "claimed", "clock_ms")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    BASE_INDEX_FIELD_NUMBER: _ClassVar[int]
    APPLIED_INDEX_FIELD_NUMBER: _ClassVar[int]
    NOW_MS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CLAIMED_FIELD_NUMBER: _ClassVar[int]
    CLOCK_MS_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[LoggedEntry]
    base_index: int
    applied_index: int
    now_ms: int
    incarnation: int
    claimed: bool
    clock_ms: int
    def __init__(self, entries: _Optional[_Iterable[_Union[LoggedEntry, _Mapping]]] = ..., base_index: _Optional[int] = ..., applied_index: _Optional[int] = ..., now_ms: _Optional[int] = ..., incarnation: _Optional[int] = ..., claimed: bool = ..., clock_ms: _Optional[int] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("id", "close")
    ID_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    close: bool
    def __init__(self, id: _Optional[bytes] = ..., close: bool = ...) -> None: ...

class RangeDigest(_message.Message):
    __slots__ = ("shard", "start", "end", "pairs", "digest")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    shard: int
    start: bytes
    end: bytes
    pairs: int
    digest: bytes
    def __init__(self, shard: _Optional[int] = ..., start: _Optional[bytes] = ..., end: _Optional[bytes] = ..., pairs: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class CheckReply(_message.Message):
    __slots__ = ("id", "state", "index", "config_num", "shards", "rest", "pairs", "why", "members", "applied_index")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CONFIG_NUM_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    REST_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    APPLIED_INDEX_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    state: CheckState
    index: int
    config_num: int
    shards: _containers.RepeatedCompositeFieldContainer[RangeDigest]
    rest: RangeDigest
    pairs: int
    why: str
    members: _containers.RepeatedScalarFieldContainer[str]
    applied_index: int
    def __init__(self, id: _Optional[bytes] = ..., state: _Optional[_Union[CheckState, str]] = ..., index: _Optional[int] = ..., config_num: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[RangeDigest, _Mapping]]] = ..., rest: _Optional[_Union[RangeDigest, _Mapping]] = ..., pairs: _Optional[int] = ..., why: _Optional[str] = ..., members: _Optional[_Iterable[str]] = ..., applied_index: _Optional[int] = ...) -> None: ...

class LogChunk(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[LoggedEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[LoggedEntry, _Mapping]]] = ...) -> None: ...

class Identity(_message.Message):
    __slots__ = ("session", "seq", "issued_ms", "acked_below")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    ACKED_BELOW_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    seq: int
    issued_ms: int
    acked_below: int
    def __init__(self, session: _Optional[bytes] = ..., seq: _Optional[int] = ..., issued_ms: _Optional[int] = ..., acked_below: _Optional[int] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("key", "stale")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    stale: bool
    def __init__(self, key: _Optional[bytes] = ..., stale: bool = ...) -> None: ...

class GetReply(_message.Message):
    __slots__ = ("found", "value")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    found: bool
    value: bytes
    def __init__(self, found: bool = ..., value: _Optional[bytes] = ...) -> None: ...

class PutRequest(_message.Message):
    __slots__ = ("key", "value", "identity")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    value: bytes
    identity: Identity
    def __init__(self, key: _Optional[bytes] = ..., value: _Optional[bytes] = ..., identity: _Optional[_Union[Identity, _Mapping]] = ...) -> None: ...

class PutReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AppendRequest(_message.Message):
    __slots__ = ("key", "value", "identity")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    value: bytes
    identity: Identity
    def __init__(self, key: _Optional[bytes] = ..., value: _Optional[bytes] = ..., identity: _Optional[_Union[Identity, _Mapping]] = ...) -> None: ...

class AppendReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("key", "identity")
    KEY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    identity: Identity
    def __init__(self, key: _Optional[bytes] = ..., identity: _Optional[_Union[Identity, _Mapping]] = ...) -> None: ...

class DeleteReply(_message.Message):
    __slots__ = ("existed",)
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    existed: bool
    def __init__(self, existed: bool = ...) -> None: ...

class CasRequest(_message.Message):
    __slots__ = ("key", "expected", "value", "identity")
    KEY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    expected: bytes
    value: bytes
    identity: Identity
    def __init__(self, key: _Optional[bytes] = ..., expected: _Optional[bytes] = ..., value: _Optional[bytes] = ..., identity: _Optional[_Union[Identity, _Mapping]] = ...) -> None: ...

class CasReply(_message.Message):
    __slots__ = ("swapped",)
    SWAPPED_FIELD_NUMBER: _ClassVar[int]
    swapped: bool
    def __init__(self, swapped: bool = ...) -> None: ...

class IncrRequest(_message.Message):
    __slots__ = ("key", "by", "identity")
    KEY_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    by: int
    identity: Identity
    def __init__(self, key: _Optional[bytes] = ..., by: _Optional[int] = ..., identity: _Optional[_Union[Identity, _Mapping]] = ...) -> None: ...

class IncrReply(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: int
    def __init__(self, value: _Optional[int] = ...) -> None: ...

class DeleteRangeRequest(_message.Message):
    __slots__ = ("start", "end", "limit", "identity")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    start: bytes
    end: bytes
    limit: int
    identity: Identity
    def __init__(self, start: _Optional[bytes] = ..., end: _Optional[bytes] = ..., limit: _Optional[int] = ..., identity: _Optional[_Union[Identity, _Mapping]] = ...) -> None: ...

class DeleteRangeReply(_message.Message):
    __slots__ = ("deleted", "more", "next")
    DELETED_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    deleted: int
    more: bool
    next: bytes
    def __init__(self, deleted: _Optional[int] = ..., more: bool = ..., next: _Optional[bytes] = ...) -> None: ...

class CountRequest(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: bytes
    end: bytes
    def __init__(self, start: _Optional[bytes] = ..., end: _Optional[bytes] = ...) -> None: ...

class CountReply(_message.Message):
    __slots__ = ("count", "more", "next")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    count: int
    more: bool
    next: bytes
    def __init__(self, count: _Optional[int] = ..., more: bool = ..., next: _Optional[bytes] = ...) -> None: ...

class ScanRequest(_message.Message):
    __slots__ = ("start", "end", "limit", "reverse", "keys_only")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    REVERSE_FIELD_NUMBER: _ClassVar[int]
    KEYS_ONLY_FIELD_NUMBER: _ClassVar[int]
    start: bytes
    end: bytes
    limit: int
    reverse: bool
    keys_only: bool
    def __init__(self, start: _Optional[bytes] = ..., end: _Optional[bytes] = ..., limit: _Optional[int] = ..., reverse: bool = ..., keys_only: bool = ...) -> None: ...

class ScanReply(_message.Message):
    __slots__ = ("items", "more", "next")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Item]
    more: bool
    next: bytes
    def __init__(self, items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ..., more: bool = ..., next: _Optional[bytes] = ...) -> None: ...
