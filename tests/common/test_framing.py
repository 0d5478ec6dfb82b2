"""Frames from a peer: either every field is within bounds, or the frame is refused by number."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.common.channel import framing
from lichen.common.channel.fleet_pb2 import (
    Ack,
    AgentFrame,
    Cancel,
    Chunk,
    CoordinatorFrame,
    Envelope,
    Heartbeat,
    Hello,
    LedgerState,
    Missing,
    Profile,
    Receipt,
    Stop,
    Want,
    Welcome,
)
from lichen.common.errors import Code, LichenError

ID, DIGEST = "0f" * 16, b"\x07" * 32

GOOD_AGENT = [
    AgentFrame(hello=Hello(protocol=1, version="0.1.0")),
    AgentFrame(envelope=Envelope(message_id=ID, message=b"x")),
    AgentFrame(ack=Ack(message_id=ID)),
    AgentFrame(chunk=Chunk(digest=DIGEST, offset=5, data=b"x" * framing.MAX_CHUNK)),
    AgentFrame(want=Want(digest=DIGEST)),
    AgentFrame(stop=Stop(digest=DIGEST)),
    AgentFrame(missing=Missing(digest=DIGEST)),
    AgentFrame(heartbeat=Heartbeat()),
    AgentFrame(profile=Profile()),
    AgentFrame(hello=Hello(protocol=1, version="0.1.0", profile=Profile(device="cuda", memory_mb=2**32 - 1, work=bytes(8)))),
]
BAD_AGENT = [
    AgentFrame(),
    AgentFrame(hello=Hello(protocol=1, version="")),
    AgentFrame(hello=Hello(protocol=1, version="x" * 65)),
    AgentFrame(hello=Hello(protocol=1, version="1\x1b[2J")),
    AgentFrame(envelope=Envelope(message_id="g" * 32, message=b"x")),
    AgentFrame(envelope=Envelope(message_id=ID + "0", message=b"x")),
    AgentFrame(envelope=Envelope(message_id=ID + "\n", message=b"x")),
    AgentFrame(envelope=Envelope(message_id="../" * 10_000, message=b"x")),
    AgentFrame(envelope=Envelope(message_id=ID)),
    AgentFrame(envelope=Envelope(message_id=ID, message=b"x" * (framing.MAX_ENVELOPE + 1))),
    AgentFrame(ack=Ack()),
    AgentFrame(chunk=Chunk(digest=DIGEST)),
    AgentFrame(chunk=Chunk(digest=DIGEST, data=b"x" * (framing.MAX_CHUNK + 1))),
    AgentFrame(chunk=Chunk(digest=DIGEST[1:], data=b"x")),
    AgentFrame(chunk=Chunk(digest=DIGEST, offset=2**63, data=b"x")),
    AgentFrame(want=Want(digest=DIGEST * 2)),
    AgentFrame(want=Want(digest=DIGEST, offset=framing.MAX_PAYLOAD + 1)),
    AgentFrame(stop=Stop(digest=b"")),
    AgentFrame(missing=Missing(digest=b"x")),
    AgentFrame(profile=Profile(device="Tom's laptop")),
    AgentFrame(profile=Profile(device="cpu\n")),
    AgentFrame(profile=Profile(work=bytes(32))),
    AgentFrame(hello=Hello(protocol=1, version="0.1.0", profile=Profile(device="../x"))),
    AgentFrame(envelope=Envelope(message_id=ID, message=b"m", ledger=LedgerState(sequence=1, head=bytes(31), signature=bytes(64)))),
    AgentFrame(envelope=Envelope(message_id=ID, message=b"m", ledger=LedgerState(sequence=0, head=bytes(32), signature=bytes(64)))),
    AgentFrame(envelope=Envelope(message_id=ID, message=b"m", ledger=LedgerState(sequence=1 << 63, head=bytes(32), signature=bytes(64)))),
]
BAD_COORDINATOR = [
    CoordinatorFrame(),
    CoordinatorFrame(welcome=Welcome(version="1", node_id=0, name="a")),
    CoordinatorFrame(welcome=Welcome(version="1", node_id=1, name="A")),
    CoordinatorFrame(welcome=Welcome(version="1", node_id=1, name="a" * 64)),
    CoordinatorFrame(welcome=Welcome(version="1", node_id=1, name="a", outstanding=["x"])),
    CoordinatorFrame(welcome=Welcome(version="1", node_id=1, name="a", outstanding=[ID] * (framing.MAX_IDS + 1))),
    CoordinatorFrame(welcome=Welcome(version="1", node_id=1, name="a", ledger=LedgerState(sequence=1, head=bytes(32)))),
    CoordinatorFrame(welcome=Welcome(version="1", node_id=1, name="a", time=float("nan"))),
    CoordinatorFrame(welcome=Welcome(version="1", node_id=1, name="a", time=-1.0)),
    CoordinatorFrame(receipt=Receipt(message_id="")),
    CoordinatorFrame(cancel=Cancel(message_ids=[ID, "x"])),
]


@pytest.mark.parametrize("frame", GOOD_AGENT, ids=lambda frame: frame.WhichOneof("frame"))
def test_a_good_frame_passes(frame: AgentFrame) -> None:
    assert framing.decode_agent_frame(frame.SerializeToString()) == (frame.WhichOneof("frame"), frame)


@pytest.mark.parametrize("frame", BAD_AGENT + BAD_COORDINATOR, ids=lambda frame: str(frame)[:30])
def test_a_bad_frame_is_refused_by_number_and_not_quoted(frame: Any) -> None:
    decode: Any = framing.decode_agent_frame if isinstance(frame, AgentFrame) else framing.decode_coordinator_frame
    with pytest.raises(LichenError) as caught:
        decode(frame.SerializeToString())
    assert caught.value.code is Code.FRAME_INVALID
    assert len(str(caught.value)) < 300


@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_valid_frame_or_refused(data: bytes) -> None:
    for decode in (framing.decode_agent_frame, framing.decode_coordinator_frame):
        found: list[Any] = []
        try:
            found = list(decode(data))  # type: ignore[operator]
        except LichenError as error:
            found = [error.code]
        assert found == [Code.FRAME_INVALID] or found[1].HasField(found[0])
