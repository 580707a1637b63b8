from tandem.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_STARTING: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
    WORKER_STATE_DEAD: _ClassVar[WorkerState]
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_STARTING: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_DRAINING: WorkerState
WORKER_STATE_DEAD: WorkerState

class BlockCounts(_message.Message):
    __slots__ = ("total", "free", "cached", "active")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    total: int
    free: int
    cached: int
    active: int
    def __init__(self, total: _Optional[int] = ..., free: _Optional[int] = ..., cached: _Optional[int] = ..., active: _Optional[int] = ...) -> None: ...

class WorkerReport(_message.Message):
    __slots__ = ("worker_id", "role", "epoch", "sequence", "state", "pid", "node", "host_id", "grpc_address", "metrics_address", "http_address", "blocks", "leases_open", "running", "waiting", "waiting_tokens", "layout", "model", "progress", "detail", "context_tokens", "step_cost", "proposal", "peer_address", "demand")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASES_OPEN_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_COST_FIELD_NUMBER: _ClassVar[int]
    PROPOSAL_FIELD_NUMBER: _ClassVar[int]
    PEER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: _common_pb2.WorkerRole
    epoch: int
    sequence: int
    state: WorkerState
    pid: int
    node: str
    host_id: str
    grpc_address: str
    metrics_address: str
    http_address: str
    blocks: BlockCounts
    leases_open: int
    running: int
    waiting: int
    waiting_tokens: int
    layout: _common_pb2.KvLayout
    model: ModelInfo
    progress: float
    detail: str
    context_tokens: int
    step_cost: StepCost
    proposal: RoleProposal
    peer_address: str
    demand: Demand
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ..., epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., state: _Optional[_Union[WorkerState, str]] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., host_id: _Optional[str] = ..., grpc_address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., http_address: _Optional[str] = ..., blocks: _Optional[_Union[BlockCounts, _Mapping]] = ..., leases_open: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., progress: _Optional[float] = ..., detail: _Optional[str] = ..., context_tokens: _Optional[int] = ..., step_cost: _Optional[_Union[StepCost, _Mapping]] = ..., proposal: _Optional[_Union[RoleProposal, _Mapping]] = ..., peer_address: _Optional[str] = ..., demand: _Optional[_Union[Demand, _Mapping]] = ...) -> None: ...

class Demand(_message.Message):
    __slots__ = ("requests", "answered", "prompt_tokens", "prompt_squares", "cached_tokens", "answer_tokens", "answer_squares")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SQUARES_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_SQUARES_FIELD_NUMBER: _ClassVar[int]
    requests: int
    answered: int
    prompt_tokens: int
    prompt_squares: float
    cached_tokens: int
    answer_tokens: int
    answer_squares: float
    def __init__(self, requests: _Optional[int] = ..., answered: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., prompt_squares: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., answer_tokens: _Optional[int] = ..., answer_squares: _Optional[float] = ...) -> None: ...

class RoleProposal(_message.Message):
    __slots__ = ("target", "role", "reason")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    target: str
    role: _common_pb2.WorkerRole
    reason: str
    def __init__(self, target: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class StepCost(_message.Message):
    __slots__ = ("base_s", "prefill_token_s", "prefill_pair_s", "decode_row_s", "decode_context_s", "samples", "median_error", "p90_error")
    BASE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PAIR_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_ROW_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONTEXT_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MEDIAN_ERROR_FIELD_NUMBER: _ClassVar[int]
    P90_ERROR_FIELD_NUMBER: _ClassVar[int]
    base_s: float
    prefill_token_s: float
    prefill_pair_s: float
    decode_row_s: float
    decode_context_s: float
    samples: int
    median_error: float
    p90_error: float
    def __init__(self, base_s: _Optional[float] = ..., prefill_token_s: _Optional[float] = ..., prefill_pair_s: _Optional[float] = ..., decode_row_s: _Optional[float] = ..., decode_context_s: _Optional[float] = ..., samples: _Optional[int] = ..., median_error: _Optional[float] = ..., p90_error: _Optional[float] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "max_model_len", "vocab_size", "path")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_model_len: int
    vocab_size: int
    path: str
    def __init__(self, name: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., path: _Optional[str] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ("drain", "drain_deadline_s", "role")
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    DRAIN_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    drain: bool
    drain_deadline_s: float
    role: _common_pb2.WorkerRole
    def __init__(self, drain: _Optional[bool] = ..., drain_deadline_s: _Optional[float] = ..., role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("watcher_id",)
    WATCHER_ID_FIELD_NUMBER: _ClassVar[int]
    watcher_id: str
    def __init__(self, watcher_id: _Optional[str] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClusterSnapshot(_message.Message):
    __slots__ = ("version", "workers", "ages_s", "model", "tandem_version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    AGES_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TANDEM_VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    workers: _containers.RepeatedCompositeFieldContainer[WorkerReport]
    ages_s: _containers.RepeatedScalarFieldContainer[float]
    model: str
    tandem_version: str
    def __init__(self, version: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[WorkerReport, _Mapping]]] = ..., ages_s: _Optional[_Iterable[float]] = ..., model: _Optional[str] = ..., tandem_version: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("target", "deadline_s")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    target: str
    deadline_s: float
    def __init__(self, target: _Optional[str] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("found", "detail")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    found: bool
    detail: str
    def __init__(self, found: _Optional[bool] = ..., detail: _Optional[str] = ...) -> None: ...

class SetRoleRequest(_message.Message):
    __slots__ = ("target", "role")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    target: str
    role: _common_pb2.WorkerRole
    def __init__(self, target: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ...) -> None: ...

class SetRoleResponse(_message.Message):
    __slots__ = ("found", "detail")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    found: bool
    detail: str
    def __init__(self, found: _Optional[bool] = ..., detail: _Optional[str] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShutdownResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
