from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Shard(_message.Message):
    __slots__ = ("id", "start", "end", "gid", "epoch", "holder")
    ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    GID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    id: int
    start: bytes
    end: bytes
    gid: int
    epoch: int
    holder: int
    def __init__(self, id: _Optional[int] = ..., start: _Optional[bytes] = ..., end: _Optional[bytes] = ..., gid: _Optional[int] = ..., epoch: _Optional[int] = ..., holder: _Optional[int] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("gid", "addresses", "joined", "incarnation")
    GID_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    gid: int
    addresses: _containers.RepeatedScalarFieldContainer[str]
    joined: int
    incarnation: int
    def __init__(self, gid: _Optional[int] = ..., addresses: _Optional[_Iterable[str]] = ..., joined: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class Config(_message.Message):
    __slots__ = ("num", "shards", "groups", "claims")
    NUM_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    CLAIMS_FIELD_NUMBER: _ClassVar[int]
    num: int
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    claims: _containers.RepeatedCompositeFieldContainer[Claim]
    def __init__(self, num: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., claims: _Optional[_Iterable[_Union[Claim, _Mapping]]] = ...) -> None: ...

class Move(_message.Message):
    __slots__ = ("shard", "to", "start", "end", "source", "target")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    shard: int
    to: int
    start: bytes
    end: bytes
    source: Group
    target: Group
    def __init__(self, shard: _Optional[int] = ..., to: _Optional[int] = ..., start: _Optional[bytes] = ..., end: _Optional[bytes] = ..., source: _Optional[_Union[Group, _Mapping]] = ..., target: _Optional[_Union[Group, _Mapping]] = ...) -> None: ...

class Split(_message.Message):
    __slots__ = ("shard", "key", "new_shard", "holder")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    NEW_SHARD_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    shard: int
    key: bytes
    new_shard: int
    holder: int
    def __init__(self, shard: _Optional[int] = ..., key: _Optional[bytes] = ..., new_shard: _Optional[int] = ..., holder: _Optional[int] = ...) -> None: ...

class Merge(_message.Message):
    __slots__ = ("shard", "right", "holder")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    shard: int
    right: int
    holder: int
    def __init__(self, shard: _Optional[int] = ..., right: _Optional[int] = ..., holder: _Optional[int] = ...) -> None: ...

class Change(_message.Message):
    __slots__ = ("num", "joined", "left", "moves", "split", "merge", "initial", "readdressed")
    NUM_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    MERGE_FIELD_NUMBER: _ClassVar[int]
    INITIAL_FIELD_NUMBER: _ClassVar[int]
    READDRESSED_FIELD_NUMBER: _ClassVar[int]
    num: int
    joined: _containers.RepeatedCompositeFieldContainer[Group]
    left: _containers.RepeatedScalarFieldContainer[int]
    moves: _containers.RepeatedCompositeFieldContainer[Move]
    split: Split
    merge: Merge
    initial: _containers.RepeatedCompositeFieldContainer[Shard]
    readdressed: _containers.RepeatedCompositeFieldContainer[Group]
    def __init__(self, num: _Optional[int] = ..., joined: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., left: _Optional[_Iterable[int]] = ..., moves: _Optional[_Iterable[_Union[Move, _Mapping]]] = ..., split: _Optional[_Union[Split, _Mapping]] = ..., merge: _Optional[_Union[Merge, _Mapping]] = ..., initial: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., readdressed: _Optional[_Iterable[_Union[Group, _Mapping]]] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    def __init__(self, groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ("gids", "force")
    GIDS_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    gids: _containers.RepeatedScalarFieldContainer[int]
    force: bool
    def __init__(self, gids: _Optional[_Iterable[int]] = ..., force: bool = ...) -> None: ...

class MoveShard(_message.Message):
    __slots__ = ("shard", "gid")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    GID_FIELD_NUMBER: _ClassVar[int]
    shard: int
    gid: int
    def __init__(self, shard: _Optional[int] = ..., gid: _Optional[int] = ...) -> None: ...

class SplitShard(_message.Message):
    __slots__ = ("shard", "key")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    shard: int
    key: bytes
    def __init__(self, shard: _Optional[int] = ..., key: _Optional[bytes] = ...) -> None: ...

class MergeShard(_message.Message):
    __slots__ = ("shard",)
    SHARD_FIELD_NUMBER: _ClassVar[int]
    shard: int
    def __init__(self, shard: _Optional[int] = ...) -> None: ...

class Rebalance(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Initialize(_message.Message):
    __slots__ = ("shards",)
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    shards: int
    def __init__(self, shards: _Optional[int] = ...) -> None: ...

class Claim(_message.Message):
    __slots__ = ("gid", "incarnation", "joined")
    GID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    gid: int
    incarnation: int
    joined: int
    def __init__(self, gid: _Optional[int] = ..., incarnation: _Optional[int] = ..., joined: _Optional[int] = ...) -> None: ...

class User(_message.Message):
    __slots__ = ("name", "role", "prefixes", "verifier")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    prefixes: _containers.RepeatedScalarFieldContainer[bytes]
    verifier: bytes
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., prefixes: _Optional[_Iterable[bytes]] = ..., verifier: _Optional[bytes] = ...) -> None: ...

class Accounts(_message.Message):
    __slots__ = ("version", "enabled", "users", "quotas")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    QUOTAS_FIELD_NUMBER: _ClassVar[int]
    version: int
    enabled: bool
    users: _containers.RepeatedCompositeFieldContainer[User]
    quotas: _containers.RepeatedCompositeFieldContainer[Quota]
    def __init__(self, version: _Optional[int] = ..., enabled: bool = ..., users: _Optional[_Iterable[_Union[User, _Mapping]]] = ..., quotas: _Optional[_Iterable[_Union[Quota, _Mapping]]] = ...) -> None: ...

class Quota(_message.Message):
    __slots__ = ("user", "prefix", "operations", "bytes", "connections")
    USER_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    user: str
    prefix: bytes
    operations: int
    bytes: int
    connections: int
    def __init__(self, user: _Optional[str] = ..., prefix: _Optional[bytes] = ..., operations: _Optional[int] = ..., bytes: _Optional[int] = ..., connections: _Optional[int] = ...) -> None: ...

class SetUser(_message.Message):
    __slots__ = ("name", "create", "role", "set_prefixes", "prefixes", "verifier")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CREATE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SET_PREFIXES_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_FIELD_NUMBER: _ClassVar[int]
    name: str
    create: bool
    role: str
    set_prefixes: bool
    prefixes: _containers.RepeatedScalarFieldContainer[bytes]
    verifier: bytes
    def __init__(self, name: _Optional[str] = ..., create: bool = ..., role: _Optional[str] = ..., set_prefixes: bool = ..., prefixes: _Optional[_Iterable[bytes]] = ..., verifier: _Optional[bytes] = ...) -> None: ...

class RemoveUser(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class SetAccessControl(_message.Message):
    __slots__ = ("enabled",)
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    def __init__(self, enabled: bool = ...) -> None: ...

class AccountsRequest(_message.Message):
    __slots__ = ("since", "wait_ms")
    SINCE_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    since: int
    wait_ms: int
    def __init__(self, since: _Optional[int] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class AdminRequest(_message.Message):
    __slots__ = ("session", "seq", "acked_below", "issued_ms", "join", "leave", "move", "split", "merge", "rebalance", "initialize", "set_user", "remove_user", "access_control", "set_quota", "remove_quota", "readdress", "claim")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    ACKED_BELOW_FIELD_NUMBER: _ClassVar[int]
    ISSUED_MS_FIELD_NUMBER: _ClassVar[int]
    JOIN_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    MERGE_FIELD_NUMBER: _ClassVar[int]
    REBALANCE_FIELD_NUMBER: _ClassVar[int]
    INITIALIZE_FIELD_NUMBER: _ClassVar[int]
    SET_USER_FIELD_NUMBER: _ClassVar[int]
    REMOVE_USER_FIELD_NUMBER: _ClassVar[int]
    ACCESS_CONTROL_FIELD_NUMBER: _ClassVar[int]
    SET_QUOTA_FIELD_NUMBER: _ClassVar[int]
    REMOVE_QUOTA_FIELD_NUMBER: _ClassVar[int]
    READDRESS_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    seq: int
    acked_below: int
    issued_ms: int
    join: Join
    leave: Leave
    move: MoveShard
    split: SplitShard
    merge: MergeShard
    rebalance: Rebalance
    initialize: Initialize
    set_user: SetUser
    remove_user: RemoveUser
    access_control: SetAccessControl
    set_quota: Quota
    remove_quota: Quota
    readdress: Group
    claim: Claim
    def __init__(self, session: _Optional[bytes] = ..., seq: _Optional[int] = ..., acked_below: _Optional[int] = ..., issued_ms: _Optional[int] = ..., join: _Optional[_Union[Join, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ..., move: _Optional[_Union[MoveShard, _Mapping]] = ..., split: _Optional[_Union[SplitShard, _Mapping]] = ..., merge: _Optional[_Union[MergeShard, _Mapping]] = ..., rebalance: _Optional[_Union[Rebalance, _Mapping]] = ..., initialize: _Optional[_Union[Initialize, _Mapping]] = ..., set_user: _Optional[_Union[SetUser, _Mapping]] = ..., remove_user: _Optional[_Union[RemoveUser, _Mapping]] = ..., access_control: _Optional[_Union[SetAccessControl, _Mapping]] = ..., set_quota: _Optional[_Union[Quota, _Mapping]] = ..., remove_quota: _Optional[_Union[Quota, _Mapping]] = ..., readdress: _Optional[_Union[Group, _Mapping]] = ..., claim: _Optional[_Union[Claim, _Mapping]] = ...) -> None: ...

class AdminReply(_message.Message):
    __slots__ = ("refusal", "message", "num", "clock_ms")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_FIELD_NUMBER: _ClassVar[int]
    CLOCK_MS_FIELD_NUMBER: _ClassVar[int]
    refusal: str
    message: str
    num: int
    clock_ms: int
    def __init__(self, refusal: _Optional[str] = ..., message: _Optional[str] = ..., num: _Optional[int] = ..., clock_ms: _Optional[int] = ...) -> None: ...

class QueryRequest(_message.Message):
    __slots__ = ("latest", "num")
    LATEST_FIELD_NUMBER: _ClassVar[int]
    NUM_FIELD_NUMBER: _ClassVar[int]
    latest: bool
    num: int
    def __init__(self, latest: bool = ..., num: _Optional[int] = ...) -> None: ...

class ChangesRequest(_message.Message):
    __slots__ = ("since", "wait_ms", "limit")
    SINCE_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    since: int
    wait_ms: int
    limit: int
    def __init__(self, since: _Optional[int] = ..., wait_ms: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ChangesReply(_message.Message):
    __slots__ = ("changes", "num", "clock_ms", "cluster", "controllers")
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    NUM_FIELD_NUMBER: _ClassVar[int]
    CLOCK_MS_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    CONTROLLERS_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[Change]
    num: int
    clock_ms: int
    cluster: str
    controllers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, changes: _Optional[_Iterable[_Union[Change, _Mapping]]] = ..., num: _Optional[int] = ..., clock_ms: _Optional[int] = ..., cluster: _Optional[str] = ..., controllers: _Optional[_Iterable[str]] = ...) -> None: ...

class State(_message.Message):
    __slots__ = ("changes", "sessions", "clock", "next_shard", "membership", "config", "accounts", "known", "claims")
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    NEXT_SHARD_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    ACCOUNTS_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    CLAIMS_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedScalarFieldContainer[bytes]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionState]
    clock: bytes
    next_shard: int
    membership: bytes
    config: Config
    accounts: bytes
    known: _containers.RepeatedCompositeFieldContainer[Group]
    claims: _containers.RepeatedCompositeFieldContainer[Claim]
    def __init__(self, changes: _Optional[_Iterable[bytes]] = ..., sessions: _Optional[_Iterable[_Union[SessionState, _Mapping]]] = ..., clock: _Optional[bytes] = ..., next_shard: _Optional[int] = ..., membership: _Optional[bytes] = ..., config: _Optional[_Union[Config, _Mapping]] = ..., accounts: _Optional[bytes] = ..., known: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., claims: _Optional[_Iterable[_Union[Claim, _Mapping]]] = ...) -> None: ...

class SessionState(_message.Message):
    __slots__ = ("session", "record")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    record: bytes
    def __init__(self, session: _Optional[bytes] = ..., record: _Optional[bytes] = ...) -> None: ...
