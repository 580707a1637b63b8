from tandem.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

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
    __slots__ = ("key", "epoch", "blocks")
    KEY_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.AttemptKey
    epoch: int
    blocks: _containers.RepeatedCompositeFieldContainer[BlockRecord]
    def __init__(self, key: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ..., epoch: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[BlockRecord, _Mapping]]] = ...) -> None: ...

class ReadChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...
