from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_PREFILL: _ClassVar[WorkerRole]
    WORKER_ROLE_DECODE: _ClassVar[WorkerRole]
    WORKER_ROLE_COLOCATED: _ClassVar[WorkerRole]
    WORKER_ROLE_STORE: _ClassVar[WorkerRole]
    WORKER_ROLE_ROUTER: _ClassVar[WorkerRole]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_ERROR: FinishReason
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_PREFILL: WorkerRole
WORKER_ROLE_DECODE: WorkerRole
WORKER_ROLE_COLOCATED: WorkerRole
WORKER_ROLE_STORE: WorkerRole
WORKER_ROLE_ROUTER: WorkerRole

class AttemptKey(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "n", "logprobs", "stop", "stop_token_ids", "ignore_eos")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    seed: int
    n: int
    logprobs: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., seed: _Optional[int] = ..., n: _Optional[int] = ..., logprobs: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("fingerprint", "dtype", "num_layers", "kv_heads", "head_dim", "block_size")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    dtype: str
    num_layers: int
    kv_heads: int
    head_dim: int
    block_size: int
    def __init__(self, fingerprint: _Optional[bytes] = ..., dtype: _Optional[str] = ..., num_layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_size: _Optional[int] = ...) -> None: ...

class KvSource(_message.Message):
    __slots__ = ("worker_id", "epoch", "grpc_address", "host_id", "arena_path", "num_blocks", "transports", "tcp_address")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    ARENA_PATH_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    TCP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    grpc_address: str
    host_id: str
    arena_path: str
    num_blocks: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    tcp_address: str
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., grpc_address: _Optional[str] = ..., host_id: _Optional[str] = ..., arena_path: _Optional[str] = ..., num_blocks: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., tcp_address: _Optional[str] = ...) -> None: ...

class KvTicket(_message.Message):
    __slots__ = ("key", "layout", "source", "lease_s", "codec")
    KEY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    layout: KvLayout
    source: KvSource
    lease_s: float
    codec: str
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., source: _Optional[_Union[KvSource, _Mapping]] = ..., lease_s: _Optional[float] = ..., codec: _Optional[str] = ...) -> None: ...

class WorkItem(_message.Message):
    __slots__ = ("key", "token_ids", "prompt_len", "sampling", "choice", "eos_token_ids", "cache_salt", "remaining_s")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_len: int
    sampling: SamplingParams
    choice: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_salt: bytes
    remaining_s: float
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_len: _Optional[int] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., choice: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., cache_salt: _Optional[bytes] = ..., remaining_s: _Optional[float] = ...) -> None: ...

class GeneratedToken(_message.Message):
    __slots__ = ("key", "position", "token_id", "logprob", "top_logprobs", "finish_reason")
    KEY_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    position: int
    token_id: int
    logprob: float
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    finish_reason: FinishReason
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., position: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_logprobs: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ...) -> None: ...

class SessionHello(_message.Message):
    __slots__ = ("peer_id", "epoch", "expected_epoch", "lease_s")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    epoch: int
    expected_epoch: int
    lease_s: float
    def __init__(self, peer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., expected_epoch: _Optional[int] = ..., lease_s: _Optional[float] = ...) -> None: ...

class StartPrefill(_message.Message):
    __slots__ = ("item",)
    ITEM_FIELD_NUMBER: _ClassVar[int]
    item: WorkItem
    def __init__(self, item: _Optional[_Union[WorkItem, _Mapping]] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("item",)
    ITEM_FIELD_NUMBER: _ClassVar[int]
    item: WorkItem
    def __init__(self, item: _Optional[_Union[WorkItem, _Mapping]] = ...) -> None: ...

class OpenHandoff(_message.Message):
    __slots__ = ("key", "ticket")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    ticket: KvTicket
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., ticket: _Optional[_Union[KvTicket, _Mapping]] = ...) -> None: ...

class GenerateLocal(_message.Message):
    __slots__ = ("item",)
    ITEM_FIELD_NUMBER: _ClassVar[int]
    item: WorkItem
    def __init__(self, item: _Optional[_Union[WorkItem, _Mapping]] = ...) -> None: ...

class CancelAttempt(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ...) -> None: ...

class FollowKv(_message.Message):
    __slots__ = ("stream",)
    STREAM_FIELD_NUMBER: _ClassVar[int]
    stream: int
    def __init__(self, stream: _Optional[int] = ...) -> None: ...

class SessionCommand(_message.Message):
    __slots__ = ("hello", "start_prefill", "reserve", "open_handoff", "generate_local", "cancel", "follow_kv", "more")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    START_PREFILL_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    OPEN_HANDOFF_FIELD_NUMBER: _ClassVar[int]
    GENERATE_LOCAL_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_KV_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    hello: SessionHello
    start_prefill: StartPrefill
    reserve: Reserve
    open_handoff: OpenHandoff
    generate_local: GenerateLocal
    cancel: CancelAttempt
    follow_kv: FollowKv
    more: _containers.RepeatedCompositeFieldContainer[SessionCommand]
    def __init__(self, hello: _Optional[_Union[SessionHello, _Mapping]] = ..., start_prefill: _Optional[_Union[StartPrefill, _Mapping]] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., open_handoff: _Optional[_Union[OpenHandoff, _Mapping]] = ..., generate_local: _Optional[_Union[GenerateLocal, _Mapping]] = ..., cancel: _Optional[_Union[CancelAttempt, _Mapping]] = ..., follow_kv: _Optional[_Union[FollowKv, _Mapping]] = ..., more: _Optional[_Iterable[_Union[SessionCommand, _Mapping]]] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("key", "granted", "reason", "cached_tokens")
    KEY_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    granted: bool
    reason: str
    cached_tokens: int
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., granted: _Optional[bool] = ..., reason: _Optional[str] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("key", "ticket", "cached_tokens")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    ticket: KvTicket
    cached_tokens: int
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., ticket: _Optional[_Union[KvTicket, _Mapping]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class StepTokens(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[GeneratedToken]
    def __init__(self, tokens: _Optional[_Iterable[_Union[GeneratedToken, _Mapping]]] = ...) -> None: ...

class PrefillDone(_message.Message):
    __slots__ = ("key", "timing", "cached_tokens")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    timing: AttemptTiming
    cached_tokens: int
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., timing: _Optional[_Union[AttemptTiming, _Mapping]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Joined(_message.Message):
    __slots__ = ("key", "timing")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    timing: AttemptTiming
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., timing: _Optional[_Union[AttemptTiming, _Mapping]] = ...) -> None: ...

class AttemptTiming(_message.Message):
    __slots__ = ("queue_s", "prefill_s", "handoff_wait_s", "transfer_s", "transfer_exposed_s", "transfer_bytes", "transport")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    prefill_s: float
    handoff_wait_s: float
    transfer_s: float
    transfer_exposed_s: float
    transfer_bytes: int
    transport: str
    def __init__(self, queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., handoff_wait_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., transfer_exposed_s: _Optional[float] = ..., transfer_bytes: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class AttemptFailed(_message.Message):
    __slots__ = ("key", "code", "message", "retryable")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    code: str
    message: str
    retryable: bool
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., retryable: _Optional[bool] = ...) -> None: ...

class KvChanges(_message.Message):
    __slots__ = ("stream", "sequence", "added_dram", "added_disk", "removed_dram", "removed_disk")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ADDED_DRAM_FIELD_NUMBER: _ClassVar[int]
    ADDED_DISK_FIELD_NUMBER: _ClassVar[int]
    REMOVED_DRAM_FIELD_NUMBER: _ClassVar[int]
    REMOVED_DISK_FIELD_NUMBER: _ClassVar[int]
    stream: int
    sequence: int
    added_dram: bytes
    added_disk: bytes
    removed_dram: bytes
    removed_disk: bytes
    def __init__(self, stream: _Optional[int] = ..., sequence: _Optional[int] = ..., added_dram: _Optional[bytes] = ..., added_disk: _Optional[bytes] = ..., removed_dram: _Optional[bytes] = ..., removed_disk: _Optional[bytes] = ...) -> None: ...

class SessionEvent(_message.Message):
    __slots__ = ("hello", "reserved", "opened", "tokens", "prefill_done", "joined", "failed", "kv_changes", "more")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_DONE_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    KV_CHANGES_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    hello: SessionHello
    reserved: Reserved
    opened: Opened
    tokens: StepTokens
    prefill_done: PrefillDone
    joined: Joined
    failed: AttemptFailed
    kv_changes: KvChanges
    more: _containers.RepeatedCompositeFieldContainer[SessionEvent]
    def __init__(self, hello: _Optional[_Union[SessionHello, _Mapping]] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., tokens: _Optional[_Union[StepTokens, _Mapping]] = ..., prefill_done: _Optional[_Union[PrefillDone, _Mapping]] = ..., joined: _Optional[_Union[Joined, _Mapping]] = ..., failed: _Optional[_Union[AttemptFailed, _Mapping]] = ..., kv_changes: _Optional[_Union[KvChanges, _Mapping]] = ..., more: _Optional[_Iterable[_Union[SessionEvent, _Mapping]]] = ...) -> None: ...
