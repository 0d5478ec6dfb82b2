"""Frames at the edge: limits, validation, and the gRPC options of both ends.

What a peer sends is bytes until `decode_agent_frame` or `decode_coordinator_frame` has checked every field of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from lichen.common.channel.fleet_pb2 import AgentFrame, CoordinatorFrame
from lichen.common.errors import Code, LichenError

PROTOCOL = 4
SERVICE = "lichen.fleet.v1.Fleet"
METHOD = f"/{SERVICE}/Attach"

MAX_ENVELOPE = 4 << 20  # bytes of a message without its payload: a plan and some numbers
MAX_CHUNK = 256 << 10
MAX_IDS = 10_000  # message ids in one frame
MAX_PAYLOAD = 1 << 40
MAX_ROWS = 1 << 40
CONNECT_SECONDS = 10.0
LONGEST_ATTEMPT = 30.0
_MAX_FRAME = MAX_ENVELOPE + 4096
WORK_BYTES = 8
_DIGEST_BYTES = 32
_SIGNATURE_BYTES = 64
_MAX_SEQUENCE = 1 << 62
_MAX_TIME = 1 << 40
_MESSAGE_ID = re.compile(r"[0-9a-f]{32}")
_VERSION = re.compile(r"[0-9A-Za-z.+-]{1,64}")
_DEVICE = re.compile(r"[a-z]{1,16}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

Frame = AgentFrame | CoordinatorFrame
F = TypeVar("F", AgentFrame, CoordinatorFrame)


@dataclass(frozen=True)
class Timing:
    """How fast a dead peer is noticed, in seconds.

    Attributes:
        heartbeat: sent after so long without another frame, which also keeps NATs and proxies from forgetting the connection.
        dead: the peer is given up after so long without a frame. A lost packet can hold up a slow link for ten seconds.
        handshake: for the coordinator's welcome, and for the agent's hello.
    """

    heartbeat: float = 5.0
    dead: float = 30.0
    handshake: float = 60.0


def decode_agent_frame(data: bytes) -> tuple[str, AgentFrame]:
    """An agent's frame and the name of its one field.

    Raises:
        LichenError: FRAME_INVALID, if it is malformed, of an unknown kind, or one of its values is out of bounds.
    """
    return _decode(AgentFrame, data)


def decode_coordinator_frame(data: bytes) -> tuple[str, CoordinatorFrame]:
    """A coordinator's frame and the name of its one field.

    Raises:
        LichenError: FRAME_INVALID, as for `decode_agent_frame`.
    """
    return _decode(CoordinatorFrame, data)


def _decode(kind: type[F], data: bytes) -> tuple[str, F]:
    try:
        frame = kind.FromString(data)
    except DecodeError:
        raise frame_invalid("it cannot be parsed") from None
    field = frame.WhichOneof("frame")
    if field is None:
        raise frame_invalid("it is empty or of an unknown kind")
    check = _CHECKS.get(field)
    if check is not None:
        check(getattr(frame, field))
    return field, frame


def frame_invalid(what: str) -> LichenError:
    """The error that ends the stream of a peer that breaks the protocol."""
    return LichenError(Code.FRAME_INVALID, f"the peer sent an invalid frame: {what}", fix="Run the same version of lichen on both ends.")


def check_message_id(message_id: str) -> None:
    """Raises FRAME_INVALID unless it is 32 hexadecimal digits."""
    if not _MESSAGE_ID.fullmatch(message_id):
        raise frame_invalid(f"a message id of {len(message_id)} characters that is not 32 hexadecimal digits")


def _digest(frame: Any) -> None:
    if len(frame.digest) != _DIGEST_BYTES:
        raise frame_invalid(f"a digest of {len(frame.digest)} bytes")


def _offset(frame: Any) -> None:
    _digest(frame)
    if frame.offset > MAX_PAYLOAD:
        raise frame_invalid(f"offset {frame.offset}")


def _chunk(frame: Any) -> None:
    _offset(frame)
    if not 0 < len(frame.data) <= MAX_CHUNK:
        raise frame_invalid(f"a chunk of {len(frame.data)} bytes")


def _ledger(frame: Any) -> None:
    if frame.HasField("ledger"):
        state = frame.ledger
        if len(state.head) != _DIGEST_BYTES or len(state.signature) != _SIGNATURE_BYTES or not 0 < state.sequence < _MAX_SEQUENCE:
            raise frame_invalid("a ledger's state that is none")


def _envelope(frame: Any) -> None:
    check_message_id(frame.message_id)
    _ledger(frame)
    if not 0 < len(frame.message) <= MAX_ENVELOPE:
        raise frame_invalid(f"an envelope of {len(frame.message)} bytes")


def _message_ids(ids: Any) -> None:
    if len(ids) > MAX_IDS:
        raise frame_invalid(f"{len(ids)} message ids")
    for message_id in ids:
        check_message_id(message_id)


def _greeting(frame: Any) -> None:
    if not _VERSION.fullmatch(frame.version):
        raise frame_invalid("a version that is none")


def _hello(frame: Any) -> None:
    _greeting(frame)
    _profile(frame.profile)
    _news(frame.news)


def _welcome(frame: Any) -> None:
    _greeting(frame)
    _message_ids(frame.outstanding)
    _ledger(frame)
    if not 0 <= frame.time < _MAX_TIME:  # also if it is no number
        raise frame_invalid("a time that is none")
    if frame.node_id <= 0 or not _NAME.fullmatch(frame.name):
        raise frame_invalid("a welcome without a node's id and name")


def _profile(frame: Any) -> None:
    if frame.device and not _DEVICE.fullmatch(frame.device):
        raise frame_invalid("a device that is none")
    if len(frame.work) not in {0, WORK_BYTES}:
        raise frame_invalid(f"a digest of {len(frame.work)} bytes")


def _news(frame: Any) -> None:
    if frame.run_id < 0 or not 0 <= frame.rows <= MAX_ROWS:
        raise frame_invalid(f"{frame.rows} new rows")


_CHECKS = {
    "hello": _hello,
    "welcome": _welcome,
    "envelope": _envelope,
    "ack": lambda frame: check_message_id(frame.message_id),
    "receipt": lambda frame: check_message_id(frame.message_id),
    "cancel": lambda frame: _message_ids(frame.message_ids),
    "want": _offset,
    "chunk": _chunk,
    "stop": _digest,
    "missing": _digest,
    "profile": _profile,
    "news": _news,
}


def _options(timing: Timing) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", _MAX_FRAME),
        ("grpc.max_send_message_length", _MAX_FRAME),
        # Under our heartbeats: notices a dead peer even where one end's process hangs.
        ("grpc.keepalive_time_ms", int(timing.dead * 1000)),
        ("grpc.keepalive_timeout_ms", int(timing.dead * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def server_options(timing: Timing) -> list[tuple[str, int]]:
    """The gRPC options of a coordinator's listener."""
    return [
        *_options(timing),
        ("grpc.http2.min_ping_interval_without_data_ms", int(timing.dead * 500)),
        ("grpc.so_reuseport", 0),  # a second coordinator on the same port must fail, not share it
    ]


def client_options(timing: Timing, address: str, patience: float = CONNECT_SECONDS) -> list[tuple[str, int]]:
    """The gRPC options of a channel to the fleet's listener: the agent's own back-off, not gRPC's, decides when to try again.

    Args:
        timing: as the coordinator's, which permits no more keep-alive than that.
        address: the coordinator's ``host:port``.
        patience: seconds for TCP, the proxy, TLS and HTTP/2 to connect.
    """
    return [
        *_options(timing),
        *proxy_options(address),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", int(patience * 1000)),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]


def proxy_options(address: str) -> list[tuple[str, int]]:
    """The gRPC options of any channel: the environment's proxy is used, as gRPC does, but never to this machine itself."""
    host = address.rpartition(":")[0].strip("[]")
    return [("grpc.enable_http_proxy", int(host != "localhost" and not host.startswith("127.") and host != "::1"))]
