from tandem.v1 import common_pb2 as _common_pb2
from tandem.v1 import kv_pb2 as _kv_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NodeRecord(_message.Message):
    __slots__ = ("source", "layout", "role")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    source: _common_pb2.KvSource
    layout: _common_pb2.KvLayout
    role: _common_pb2.WorkerRole
    def __init__(self, source: _Optional[_Union[_common_pb2.KvSource, _Mapping]] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("node", "ttl_s")
    NODE_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    node: NodeRecord
    ttl_s: float
    def __init__(self, node: _Optional[_Union[NodeRecord, _Mapping]] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("known",)
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    known: bool
    def __init__(self, known: _Optional[bool] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("worker_id", "epoch")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AnnounceRequest(_message.Message):
    __slots__ = ("worker_id", "epoch", "added_dram", "added_disk", "removed_dram", "removed_disk")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDED_DRAM_FIELD_NUMBER: _ClassVar[int]
    ADDED_DISK_FIELD_NUMBER: _ClassVar[int]
    REMOVED_DRAM_FIELD_NUMBER: _ClassVar[int]
    REMOVED_DISK_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    added_dram: bytes
    added_disk: bytes
    removed_dram: bytes
    removed_disk: bytes
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., added_dram: _Optional[bytes] = ..., added_disk: _Optional[bytes] = ..., removed_dram: _Optional[bytes] = ..., removed_disk: _Optional[bytes] = ...) -> None: ...

class AnnounceReply(_message.Message):
    __slots__ = ("known",)
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    known: bool
    def __init__(self, known: _Optional[bool] = ...) -> None: ...

class LocateRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    def __init__(self, keys: _Optional[bytes] = ...) -> None: ...

class LocateReply(_message.Message):
    __slots__ = ("nodes", "runs")
    NODES_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeRecord]
    runs: _containers.RepeatedCompositeFieldContainer[HolderRun]
    def __init__(self, nodes: _Optional[_Iterable[_Union[NodeRecord, _Mapping]]] = ..., runs: _Optional[_Iterable[_Union[HolderRun, _Mapping]]] = ...) -> None: ...

class HolderRun(_message.Message):
    __slots__ = ("blocks", "nodes", "tiers")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    nodes: _containers.RepeatedScalarFieldContainer[int]
    tiers: _containers.RepeatedScalarFieldContainer[_kv_pb2.Tier]
    def __init__(self, blocks: _Optional[int] = ..., nodes: _Optional[_Iterable[int]] = ..., tiers: _Optional[_Iterable[_Union[_kv_pb2.Tier, str]]] = ...) -> None: ...

class NodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodesReply(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeRecord]
    def __init__(self, nodes: _Optional[_Iterable[_Union[NodeRecord, _Mapping]]] = ...) -> None: ...
