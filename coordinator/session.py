"""One agent's live stream on the coordinator: its handshake, what it is sent, and how its replies are taken."""

from __future__ import annotations

import asyncio
import logging
import time
from importlib.metadata import version
from typing import TYPE_CHECKING

import grpc.aio

from lichen.common.channel import framing
from lichen.common.channel.fleet_pb2 import Cancel, CoordinatorFrame, Envelope, LedgerState, News, Receipt, Welcome
from lichen.common.channel.transfer import Link, PayloadMissingError, next_frame
from lichen.common.errors import Code, LichenError
from lichen.common.hardware import Profile, from_frame
from lichen.common.records import message_from_bytes, offered_refs, payload_refs
from lichen.coordinator.admission import revoked
from lichen.coordinator.store import Node

if TYPE_CHECKING:
    from lichen.coordinator.fleet import FleetServer

log = logging.getLogger(__name__)

_CORRUPT_LIMIT = 3  # then the sender's copy must be bad, and fetching it again is of no use


class Session:
    """One agent's live stream."""

    def __init__(
        self,
        fleet: FleetServer,
        node: Node,
        context: grpc.aio.ServicerContext[bytes, bytes],
        profile: Profile | None = None,
        news: News | None = None,
    ) -> None:
        self.node = node
        self.profile = profile
        self.news = news or News()
        self.welcomed = False
        self.link: Link[CoordinatorFrame] = Link(CoordinatorFrame, fleet.spool, fleet.locks, context.write, fleet.timing)
        self._fleet = fleet
        self._context = context
        self._offered: set[str] = set()
        self._early: list[str] = []
        self._replying: dict[str, asyncio.Task[None]] = {}

    async def serve(self, fingerprint: str) -> None:
        """Welcome the agent, send it what it owes replies to, and take its frames until the stream ends."""
        outstanding, ledger = await asyncio.to_thread(self._load, fingerprint)
        welcome = Welcome(
            protocol=framing.PROTOCOL,
            version=version("lichen"),
            node_id=self.node.node_id,
            name=self.node.name,
            outstanding=outstanding[: framing.MAX_IDS],
            ledger=ledger,
            time=time.time(),
        )
        self.link.send(CoordinatorFrame(welcome=welcome))
        self.welcomed = True
        for message_id in [*outstanding[: framing.MAX_IDS], *self._early]:
            self.offer(message_id)
        self._fleet.attached(self)
        await self.link.run(self._read, self._handle)

    def _load(self, fingerprint: str) -> tuple[list[str], LedgerState | None]:
        store = self._fleet.store
        store.saw_node(self.node.node_id, fingerprint, time.time())
        node = store.node_by_id(self.node.node_id)
        if node is None or not node.active:  # revoked between the handshake and now
            raise revoked(self.node.name)
        kept = store.ledger_of(self.node.node_id)
        ledger = LedgerState(sequence=kept[0], head=kept[1], signature=kept[2]) if kept else None
        return store.outstanding(self.node.node_id), ledger

    def offer(self, message_id: str) -> None:
        """Send a message, once on this stream."""
        if not self.welcomed:
            self._early.append(message_id)
        elif message_id not in self._offered:
            self._offered.add(message_id)
            self.link.send_later(lambda: self._envelope(message_id))

    async def _envelope(self, message_id: str) -> CoordinatorFrame | None:
        data = await asyncio.to_thread(self._fleet.store.message, message_id)
        if data is None:
            return None  # answered or withdrawn meanwhile
        self.link.offer(message_id, offered_refs(message_from_bytes(data)))
        return CoordinatorFrame(envelope=Envelope(message_id=message_id, message=data))

    def cancel(self, message_ids: list[str]) -> None:
        """Tell the agent to drop messages, or the replies to them that are on their way."""
        for message_id in message_ids:
            if replying := self._replying.get(message_id):
                replying.cancel()
                self._too_late(message_id)
                self._receipt(message_id, stored=False)
            self.link.withdraw(message_id)
            self._offered.discard(message_id)
        for start in range(0, len(message_ids), framing.MAX_IDS):
            self.link.send(CoordinatorFrame(cancel=Cancel(message_ids=message_ids[start : start + framing.MAX_IDS])))

    async def _read(self) -> bytes | None:
        return await next_frame(self._context)

    async def _handle(self, data: bytes) -> bool:
        field, frame = framing.decode_agent_frame(data)
        if await self.link.receive(field, frame):
            return True
        match field:
            case "envelope":
                message_id = frame.envelope.message_id
                if message_id not in self._replying:
                    self.link.bytes_received += len(data)
                    self._replying[message_id] = self.link.spawn(self._reply(message_id, frame.envelope))
            case "ack":
                await asyncio.to_thread(self._fleet.store.ack, frame.ack.message_id, self.node.node_id)
            case "profile":
                self.profile = from_frame(frame.profile)
            case "news":
                self.news = frame.news
                self._fleet.changed()
            case "bye":
                return False
            case _:
                raise framing.frame_invalid(f"a second {field}")
        return True

    async def _reply(self, message_id: str, envelope: Envelope) -> None:
        """Take a reply: where its node's ledger stands first, whatever becomes of the rest; its payload, the reply, then the receipt."""
        try:
            if envelope.HasField("ledger"):
                state = envelope.ledger
                note = self._fleet.store.note_ledger
                await asyncio.to_thread(note, self.node.node_id, state.sequence, state.head, state.signature)
            kept = await self._take(message_id, envelope.message)
        finally:
            self._replying.pop(message_id, None)
        self._receipt(message_id, stored=kept)

    def _too_late(self, message_id: str) -> None:
        log.warning("node %s answered message %s too late: refused, and it is told", self.node.name, message_id)

    def _receipt(self, message_id: str, *, stored: bool) -> None:
        self.link.withdraw(message_id)
        self.link.send(CoordinatorFrame(receipt=Receipt(message_id=message_id, stored=stored)))

    def _was_kept(self, message_id: str) -> bool:
        """Whether a reply came before, and is here or was used: who sends it again has lost the receipt."""
        store = self._fleet.store
        return store.reply(message_id) is not None or store.used(message_id)

    async def _take(self, message_id: str, data: bytes) -> bool:
        awaited = await asyncio.to_thread(self._fleet.store.awaits, message_id, self.node.node_id)
        if awaited is None:
            log.warning("node %s replied to message %s, which this coordinator does not know", self.node.name, message_id)
            return False
        run_id, wanted = awaited
        if not wanted:
            kept = await asyncio.to_thread(self._was_kept, message_id)
            if not kept:
                self._too_late(message_id)
            return kept
        message = message_from_bytes(data)
        metadata = message.metadata
        if (metadata.reply_to_message_id, metadata.run_id, metadata.src_node_id) != (message_id, run_id, self.node.node_id):
            raise framing.frame_invalid("a reply whose metadata are not those of its message")
        for ref in payload_refs(message):
            try:
                await self.link.fetch(ref)
            except PayloadMissingError as error:
                log.error("node %s: %s", self.node.name, error)
                await self._fleet.give_up(message_id, self.node.node_id, error.code)
                return False
            except LichenError as error:
                self._fleet.corrupt[ref.digest] += 1
                if error.code is not Code.PAYLOAD_CORRUPT or self._fleet.corrupt[ref.digest] < _CORRUPT_LIMIT:
                    raise
                log.error("node %s, for the last time: %s", self.node.name, error)
                await self._fleet.give_up(message_id, self.node.node_id, error.code)
                return False
        return await self._fleet.save_reply(message_id, self.node.node_id, data)


async def take_hello(context: grpc.aio.ServicerContext[bytes, bytes]) -> tuple[Profile | None, News]:
    """Take an agent's first frame; returns what it tells of its machine and of new data.

    Raises:
        LichenError: FRAME_INVALID or PROTOCOL_VERSION.
    """
    field, frame = framing.decode_agent_frame(await next_frame(context) or b"")
    if field != "hello":
        raise framing.frame_invalid(f"{field} before hello")
    if frame.hello.protocol != framing.PROTOCOL:
        raise LichenError(
            Code.PROTOCOL_VERSION,
            f"the agent speaks protocol {frame.hello.protocol} (lichen {frame.hello.version}), this coordinator {framing.PROTOCOL}",
            fix="Install the coordinator's version of lichen.",
        )
    return from_frame(frame.hello.profile), frame.hello.news
