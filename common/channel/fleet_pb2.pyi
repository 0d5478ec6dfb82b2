from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AgentFrame(_message.Message):
    __slots__ = ("hello", "envelope", "ack", "chunk", "want", "stop", "missing", "heartbeat", "bye", "seen", "profile", "news")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    BYE_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    NEWS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    envelope: Envelope
    ack: Ack
    chunk: Chunk
    want: Want
    stop: Stop
    missing: Missing
    heartbeat: Heartbeat
    bye: Bye
    seen: Seen
    profile: Profile
    news: News
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., envelope: _Optional[_Union[Envelope, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., want: _Optional[_Union[Want, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ..., missing: _Optional[_Union[Missing, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., bye: _Optional[_Union[Bye, _Mapping]] = ..., seen: _Optional[_Union[Seen, _Mapping]] = ..., profile: _Optional[_Union[Profile, _Mapping]] = ..., news: _Optional[_Union[News, _Mapping]] = ...) -> None: ...

class CoordinatorFrame(_message.Message):
    __slots__ = ("welcome", "envelope", "receipt", "chunk", "want", "stop", "missing", "heartbeat", "cancel", "seen")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    envelope: Envelope
    receipt: Receipt
    chunk: Chunk
    want: Want
    stop: Stop
    missing: Missing
    heartbeat: Heartbeat
    cancel: Cancel
    seen: Seen
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., envelope: _Optional[_Union[Envelope, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., want: _Optional[_Union[Want, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ..., missing: _Optional[_Union[Missing, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., seen: _Optional[_Union[Seen, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "version", "profile", "news")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    NEWS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    profile: Profile
    news: News
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., profile: _Optional[_Union[Profile, _Mapping]] = ..., news: _Optional[_Union[News, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "version", "node_id", "name", "outstanding", "ledger", "time")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OUTSTANDING_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    node_id: int
    name: str
    outstanding: _containers.RepeatedScalarFieldContainer[str]
    ledger: LedgerState
    time: float
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., node_id: _Optional[int] = ..., name: _Optional[str] = ..., outstanding: _Optional[_Iterable[str]] = ..., ledger: _Optional[_Union[LedgerState, _Mapping]] = ..., time: _Optional[float] = ...) -> None: ...

class LedgerState(_message.Message):
    __slots__ = ("sequence", "head", "signature")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    head: bytes
    signature: bytes
    def __init__(self, sequence: _Optional[int] = ..., head: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("message_id", "message", "ledger")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    message: bytes
    ledger: LedgerState
    def __init__(self, message_id: _Optional[str] = ..., message: _Optional[bytes] = ..., ledger: _Optional[_Union[LedgerState, _Mapping]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("message_id",)
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    def __init__(self, message_id: _Optional[str] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("message_id", "stored")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    stored: bool
    def __init__(self, message_id: _Optional[str] = ..., stored: _Optional[bool] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("message_ids",)
    MESSAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    message_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, message_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class Want(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("digest", "offset", "data", "tell")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TELL_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    data: bytes
    tell: bool
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., tell: _Optional[bool] = ...) -> None: ...

class Seen(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Stop(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class Missing(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class Profile(_message.Message):
    __slots__ = ("device", "memory_mb", "threads", "work", "tokens_per_s", "rows_per_step", "download_kbit_s", "upload_kbit_s")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MB_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_KBIT_S_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_KBIT_S_FIELD_NUMBER: _ClassVar[int]
    device: str
    memory_mb: int
    threads: int
    work: bytes
    tokens_per_s: int
    rows_per_step: int
    download_kbit_s: int
    upload_kbit_s: int
    def __init__(self, device: _Optional[str] = ..., memory_mb: _Optional[int] = ..., threads: _Optional[int] = ..., work: _Optional[bytes] = ..., tokens_per_s: _Optional[int] = ..., rows_per_step: _Optional[int] = ..., download_kbit_s: _Optional[int] = ..., upload_kbit_s: _Optional[int] = ...) -> None: ...

class News(_message.Message):
    __slots__ = ("run_id", "rows")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    run_id: int
    rows: int
    def __init__(self, run_id: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Bye(_message.Message):
    __slots__ = ("code",)
    CODE_FIELD_NUMBER: _ClassVar[int]
    code: int
    def __init__(self, code: _Optional[int] = ...) -> None: ...
