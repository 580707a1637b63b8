from tandem.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_DRAM: _ClassVar[Tier]
    TIER_DISK: _ClassVar[Tier]
TIER_DRAM: Tier
TIER_DISK: Tier

class FollowOpen(_message.Message):
    __slots__ = ("key", "epoch", "puller_id")
    KEY_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PULLER_ID_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.AttemptKey
    epoch: int
    puller_id: str
    def __init__(self, key: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ..., epoch: _Optional[int] = ..., puller_id: _Optional[str] = ...) -> None: ...

class FollowRenew(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FollowDone(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FollowRequest(_message.Message):
    __slots__ = ("open", "renew", "done")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    open: FollowOpen
    renew: FollowRenew
    done: FollowDone
    def __init__(self, open: _Optional[_Union[FollowOpen, _Mapping]] = ..., renew: _Optional[_Union[FollowRenew, _Mapping]] = ..., done: _Optional[_Union[FollowDone, _Mapping]] = ...) -> None: ...

class BlockRecord(_message.Message):
    __slots__ = ("index", "key", "block_id", "generation", "digest", "num_tokens")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    index: int
    key: bytes
    block_id: int
    generation: int
    digest: int
    num_tokens: int
    def __init__(self, index: _Optional[int] = ..., key: _Optional[bytes] = ..., block_id: _Optional[int] = ..., generation: _Optional[int] = ..., digest: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class AnnouncedBlocks(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockRecord]
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockRecord, _Mapping]]] = ...) -> None: ...

class Closing(_message.Message):
    __slots__ = ("num_tokens", "generated", "finished", "prefill_s")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    generated: _containers.RepeatedScalarFieldContainer[int]
    finished: bool
    prefill_s: float
    def __init__(self, num_tokens: _Optional[int] = ..., generated: _Optional[_Iterable[int]] = ..., finished: _Optional[bool] = ..., prefill_s: _Optional[float] = ...) -> None: ...

class Revoked(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Announcement(_message.Message):
    __slots__ = ("blocks", "closing", "revoked")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CLOSING_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    blocks: AnnouncedBlocks
    closing: Closing
    revoked: Revoked
    def __init__(self, blocks: _Optional[_Union[AnnouncedBlocks, _Mapping]] = ..., closing: _Optional[_Union[Closing, _Mapping]] = ..., revoked: _Optional[_Union[Revoked, _Mapping]] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("key", "epoch", "codec", "indices", "block_ids", "generations", "digests")
    KEY_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.AttemptKey
    epoch: int
    codec: str
    indices: _containers.RepeatedScalarFieldContainer[int]
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    digests: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, key: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ..., epoch: _Optional[int] = ..., codec: _Optional[str] = ..., indices: _Optional[_Iterable[int]] = ..., block_ids: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., digests: _Optional[_Iterable[int]] = ...) -> None: ...

class Encoding(_message.Message):
    __slots__ = ("length", "digest")
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    length: int
    digest: int
    def __init__(self, length: _Optional[int] = ..., digest: _Optional[int] = ...) -> None: ...

class ReadChunk(_message.Message):
    __slots__ = ("data", "begins")
    DATA_FIELD_NUMBER: _ClassVar[int]
    BEGINS_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    begins: _containers.RepeatedCompositeFieldContainer[Encoding]
    def __init__(self, data: _Optional[bytes] = ..., begins: _Optional[_Iterable[_Union[Encoding, _Mapping]]] = ...) -> None: ...

class HoldRequest(_message.Message):
    __slots__ = ("holder", "epoch", "layout", "keys", "lease_s")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    holder: _common_pb2.AttemptKey
    epoch: int
    layout: _common_pb2.KvLayout
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    lease_s: float
    def __init__(self, holder: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ..., epoch: _Optional[int] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., keys: _Optional[_Iterable[bytes]] = ..., lease_s: _Optional[float] = ...) -> None: ...

class HoldReply(_message.Message):
    __slots__ = ("records", "source", "lease_s", "promoted")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[BlockRecord]
    source: _common_pb2.KvSource
    lease_s: float
    promoted: int
    def __init__(self, records: _Optional[_Iterable[_Union[BlockRecord, _Mapping]]] = ..., source: _Optional[_Union[_common_pb2.KvSource, _Mapping]] = ..., lease_s: _Optional[float] = ..., promoted: _Optional[int] = ...) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("holder", "epoch")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    holder: _common_pb2.AttemptKey
    epoch: int
    def __init__(self, holder: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ..., epoch: _Optional[int] = ...) -> None: ...

class DropReply(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: _Optional[bool] = ...) -> None: ...

class OfferRequest(_message.Message):
    __slots__ = ("holder", "epoch", "layout", "source", "records", "tenant", "cost_s")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    COST_S_FIELD_NUMBER: _ClassVar[int]
    holder: _common_pb2.AttemptKey
    epoch: int
    layout: _common_pb2.KvLayout
    source: _common_pb2.KvSource
    records: _containers.RepeatedCompositeFieldContainer[BlockRecord]
    tenant: bytes
    cost_s: float
    def __init__(self, holder: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ..., epoch: _Optional[int] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., source: _Optional[_Union[_common_pb2.KvSource, _Mapping]] = ..., records: _Optional[_Iterable[_Union[BlockRecord, _Mapping]]] = ..., tenant: _Optional[bytes] = ..., cost_s: _Optional[float] = ...) -> None: ...

class OfferReply(_message.Message):
    __slots__ = ("taken", "known", "refused")
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    taken: int
    known: int
    refused: int
    def __init__(self, taken: _Optional[int] = ..., known: _Optional[int] = ..., refused: _Optional[int] = ...) -> None: ...

class ChangesRequest(_message.Message):
    __slots__ = ("epoch", "stream")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    stream: int
    def __init__(self, epoch: _Optional[int] = ..., stream: _Optional[int] = ...) -> None: ...

class StatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TierStat(_message.Message):
    __slots__ = ("tier", "blocks", "blocks_max", "bytes", "hits", "misses", "evictions", "pinned", "pinned_max")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_MAX_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    PINNED_MAX_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    blocks: int
    blocks_max: int
    bytes: int
    hits: int
    misses: int
    evictions: int
    pinned: int
    pinned_max: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., blocks: _Optional[int] = ..., blocks_max: _Optional[int] = ..., bytes: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., evictions: _Optional[int] = ..., pinned: _Optional[int] = ..., pinned_max: _Optional[int] = ...) -> None: ...

class StatReply(_message.Message):
    __slots__ = ("worker_id", "epoch", "role", "layout", "tiers", "leases_open", "policy", "digest_failures")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    LEASES_OPEN_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FAILURES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    role: _common_pb2.WorkerRole
    layout: _common_pb2.KvLayout
    tiers: _containers.RepeatedCompositeFieldContainer[TierStat]
    leases_open: int
    policy: str
    digest_failures: int
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., tiers: _Optional[_Iterable[_Union[TierStat, _Mapping]]] = ..., leases_open: _Optional[int] = ..., policy: _Optional[str] = ..., digest_failures: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class BlockEntry(_message.Message):
    __slots__ = ("key", "tier", "bytes", "hits", "age_s", "tenant", "pinned", "digest", "idle_s", "cost_s")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    COST_S_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    tier: Tier
    bytes: int
    hits: int
    age_s: float
    tenant: bytes
    pinned: bool
    digest: int
    idle_s: float
    cost_s: float
    def __init__(self, key: _Optional[bytes] = ..., tier: _Optional[_Union[Tier, str]] = ..., bytes: _Optional[int] = ..., hits: _Optional[int] = ..., age_s: _Optional[float] = ..., tenant: _Optional[bytes] = ..., pinned: _Optional[bool] = ..., digest: _Optional[int] = ..., idle_s: _Optional[float] = ..., cost_s: _Optional[float] = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[BlockEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[BlockEntry, _Mapping]]] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class VerifyReply(_message.Message):
    __slots__ = ("checked", "dropped")
    CHECKED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    checked: int
    dropped: int
    def __init__(self, checked: _Optional[int] = ..., dropped: _Optional[int] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("keys", "all")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    all: bool
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., all: _Optional[bool] = ...) -> None: ...

class EvictReply(_message.Message):
    __slots__ = ("evicted",)
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    evicted: int
    def __init__(self, evicted: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("keys", "unpin", "all")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    UNPIN_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    unpin: bool
    all: bool
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., unpin: _Optional[bool] = ..., all: _Optional[bool] = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ("pinned", "pinned_blocks", "pinned_max")
    PINNED_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PINNED_MAX_FIELD_NUMBER: _ClassVar[int]
    pinned: int
    pinned_blocks: int
    pinned_max: int
    def __init__(self, pinned: _Optional[int] = ..., pinned_blocks: _Optional[int] = ..., pinned_max: _Optional[int] = ...) -> None: ...

class MeetRequest(_message.Message):
    __slots__ = ("epoch", "group", "backend")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    group: str
    backend: str
    def __init__(self, epoch: _Optional[int] = ..., group: _Optional[str] = ..., backend: _Optional[str] = ...) -> None: ...

class MeetReply(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: str
    def __init__(self, store: _Optional[str] = ...) -> None: ...

class CollectRequest(_message.Message):
    __slots__ = ("group", "seq", "key", "epoch", "block_bytes", "block_ids", "generations", "piece_blocks")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    PIECE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    group: str
    seq: int
    key: _common_pb2.AttemptKey
    epoch: int
    block_bytes: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    piece_blocks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, group: _Optional[str] = ..., seq: _Optional[int] = ..., key: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ..., epoch: _Optional[int] = ..., block_bytes: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., piece_blocks: _Optional[_Iterable[int]] = ...) -> None: ...

class CollectReply(_message.Message):
    __slots__ = ("known", "gone")
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    known: bool
    gone: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, known: _Optional[bool] = ..., gone: _Optional[_Iterable[int]] = ...) -> None: ...
