from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FetchRequest(_message.Message):
    __slots__ = ("protocol", "run_id", "digest", "offset")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    run_id: int
    digest: bytes
    offset: int
    def __init__(self, protocol: _Optional[int] = ..., run_id: _Optional[int] = ..., digest: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class FetchPart(_message.Message):
    __slots__ = ("about", "data")
    ABOUT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    about: About
    data: bytes
    def __init__(self, about: _Optional[_Union[About, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class About(_message.Message):
    __slots__ = ("run_id", "digest", "length", "offset")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    run_id: int
    digest: bytes
    length: int
    offset: int
    def __init__(self, run_id: _Optional[int] = ..., digest: _Optional[bytes] = ..., length: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...
