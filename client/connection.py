"""The agent's connection: one stream to its coordinator, made again whenever it breaks.

A message is handled once, whatever happens to the stream meanwhile; its reply is on the disk before its first byte leaves, and
the same bytes are sent until the coordinator has receipted them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakValueDictionary

import grpc
import grpc.aio

from lichen.client.chain import steps_from
from lichen.client.mailbox import Mailbox
from lichen.client.status import CLOCK_OFF
from lichen.common.channel import framing
from lichen.common.channel.fleet_pb2 import Ack, AgentFrame, Bye, Envelope, Hello, LedgerState, News, Profile, Welcome
from lichen.common.channel.refusal import explain
from lichen.common.channel.retry import jittered
from lichen.common.channel.spool import Spool
from lichen.common.channel.transfer import Link, Locks, PayloadMissingError, next_frame
from lichen.common.errors import Code, LichenError
from lichen.common.records import PayloadRef, error_reply, message_from_bytes, message_to_bytes, offered_refs, payload_refs

if TYPE_CHECKING:
    from flwr.app import Message

    from lichen.client.witness import Witness

log = logging.getLogger(__name__)

Handler = Callable[["Message"], Awaitable["Message"]]
State = Literal["connecting", "connected", "disconnected", "stopped"]

_ACK_AFTER = 0.05  # seconds; most replies are not made so fast, and those that are need no ack
_CORRUPT_LIMIT = 3  # then the sender's copy must be bad, and fetching it again is of no use
_COLLECT_EVERY = 60.0
_LASTING = 2.0  # seconds after which a stream that breaks was a good one
_SHARE = 4  # of the time without a good stream, over which a fleet's next attempts are spread
# What trying again cannot mend.
_FINAL = frozenset(
    {
        Code.CERTIFICATE_MISSING,
        Code.CERTIFICATE_EXPIRED,
        Code.CERTIFICATE_FOREIGN,
        Code.CERTIFICATE_REVOKED,
        Code.CERTIFICATE_INVALID,
        Code.NODE_UNKNOWN,
        Code.PROTOCOL_VERSION,
        Code.AGENT_IN_USE,
    }
)


class Credentials(NamedTuple):
    """What mutual TLS needs, each PEM: the authority that is trusted, and this node's key and certificate."""

    ca: bytes
    key: bytes
    certificate: bytes


@dataclass(frozen=True)
class Status:
    """Where the connection stands, for the owner's eyes.

    Attributes:
        state: now.
        since: Unix time of its last change.
        error: what ended the last attempt.
        node_id: as the coordinator told it.
        name: as the coordinator told it.
        clock_off: seconds by which this machine's clock is ahead of the coordinator's, as the last welcome told.
    """

    state: State
    since: float
    error: LichenError | None = None
    node_id: int | None = None
    name: str | None = None
    clock_off: float = 0.0


@dataclass
class _Item:
    """A message that has no reply yet."""

    message: Message
    refs: list[PayloadRef]
    wanted: bool = False  # the coordinator of now has said so
    started: bool = False
    complete: bool = False
    fault: Code | None = None
    loading: object | None = None  # the stream that fetches its payload
    whole: bool = False  # what this node has does not lead to its model
    came: float = field(default_factory=time.monotonic)


@dataclass
class _Stream:
    """What belongs to one stream only."""

    link: Link[AgentFrame]
    welcome: Welcome | None = None
    replied: set[str] = field(default_factory=set)
    unacked: list[str] = field(default_factory=list)


class Connection:
    """A coordinator's messages in, replies out.

    Args:
        address: the coordinator's ``host:port``.
        credentials: called before each attempt, so that a renewed certificate is used; may raise a numbered LichenError.
        mailbox: where messages and replies are kept.
        spool: where payloads lie.
        timing: heartbeats; tests shorten them.
        on_status: told of each change.
        witness: signs where the ledger stands for the coordinator to keep, and is told what it kept.
        on_refused: told of each reply that the coordinator did not keep, because nobody waits for it any more.
    """

    def __init__(
        self,
        address: str,
        credentials: Callable[[], Credentials],
        mailbox: Mailbox,
        spool: Spool,
        *,
        timing: framing.Timing | None = None,
        on_status: Callable[[Status], None] | None = None,
        witness: Witness | None = None,
        on_refused: Callable[[Message], None] | None = None,
    ) -> None:
        self.address = address
        self.mailbox = mailbox
        self.spool = spool
        self.status = Status("disconnected", time.time())
        self._credentials = credentials
        self._timing = timing or framing.Timing()
        self._on_status = on_status
        self._witness = witness
        self._on_refused = on_refused
        self._locks: Locks = WeakValueDictionary()
        self._items: dict[str, _Item] = {}
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._stream: _Stream | None = None
        self._corrupt: Counter[str] = Counter()
        self._collected = 0.0
        self._clock_off = 0.0
        self._profile = Profile()
        self._news = News()
        self._speeds: tuple[float | None, float | None] = (None, None)

    def stop(self) -> None:
        """Say goodbye and let `run` return; a message that is being handled is handled again after the next start."""
        self._stopping.set()
        if self._stream is not None:
            self._stream.link.finish(AgentFrame(bye=Bye(code=0)))

    def tell(self, profile: Profile) -> None:
        """Tell the coordinator this of the machine, now and on every new stream."""
        if profile != self._profile:
            self._profile = profile
            if self._stream is not None:
                self._stream.link.send(AgentFrame(profile=profile))

    def tell_news(self, news: News) -> None:
        """Tell the coordinator this of new data, now and on every new stream: before any reply that is made later."""
        if news != self._news:
            self._news = news
            if self._stream is not None:
                self._stream.link.send(AgentFrame(news=news))

    @property
    def speeds(self) -> tuple[float | None, float | None]:
        """Of the last large payloads, in kbit/s, down and up; None before the first."""
        if self._stream is not None:
            link, before = self._stream.link, self._speeds
            self._speeds = (link.download_kbit_s or before[0], link.upload_kbit_s or before[1])
        return self._speeds

    async def run(self, handler: Handler) -> None:
        """Stay connected and have every message handled, until `stop`.

        Args:
            handler: makes the reply to a message, whose payload is complete in the spool then; messages come to it one at a time,
                and the reply's payload must be in the spool. A LichenError becomes an error reply with its number, any other
                exception one with INTERNAL: neither tells the coordinator more.

        Raises:
            LichenError: what trying again cannot mend: the certificate's errors, NODE_UNKNOWN, PROTOCOL_VERSION, AGENT_IN_USE.
        """
        for message_id, data in await asyncio.to_thread(self.mailbox.unhandled):
            self._add(message_id, data)
        worker: asyncio.Task[Any] = asyncio.create_task(self._work(handler))
        stopping: asyncio.Task[Any] = asyncio.create_task(self._stopping.wait())
        connecting: asyncio.Task[Any] = asyncio.create_task(self._stay_connected())
        try:
            await asyncio.wait({worker, stopping, connecting}, return_when=asyncio.FIRST_COMPLETED)
            if self._stopping.is_set() and not connecting.done():
                await asyncio.wait({connecting}, timeout=2.0)
            for task in (connecting, worker):
                if task.done():
                    task.result()
        except LichenError as error:
            self._tell("stopped", error)
            raise
        finally:
            for task in (worker, stopping, connecting):
                task.cancel()
            await asyncio.gather(worker, stopping, connecting, return_exceptions=True)
        self._tell("stopped")

    def _tell(self, state: State, error: LichenError | None = None) -> None:
        welcome = self._stream.welcome if self._stream else None
        node = (welcome.node_id, welcome.name) if welcome else (self.status.node_id, self.status.name)
        self.status = Status(state, time.time(), error, *node, self._clock_off)
        if self._on_status is not None:
            self._on_status(self.status)

    # Connecting

    async def _stay_connected(self) -> None:
        failures = 0  # since the coordinator last answered
        lost = time.monotonic()  # when the last good stream ended
        while not self._stopping.is_set():
            self._tell("connecting", self.status.error)
            began = time.monotonic()
            try:
                await self._connect(min(framing.LONGEST_ATTEMPT, framing.CONNECT_SECONDS * 2.0 ** min(failures, 8)))
                error = None
            except LichenError as refused:
                if refused.code in _FINAL:
                    raise
                error = refused
            now = time.monotonic()
            if self.status.state != "connected":
                failures += 1
            else:
                failures = 0
                lost = now if now - began > _LASTING else lost
            self._tell("disconnected", error)
            log.info("not connected to %s: %s", self.address, error or "the stream ended")
            await self._pause(jittered((now - lost) / _SHARE))

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass

    async def _connect(self, patience: float) -> None:
        """Make one stream and serve it until it ends; short patience finds a way that works again soon, a slow link needs more."""
        ca, key, certificate = await asyncio.to_thread(self._credentials)
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        options = framing.client_options(self._timing, self.address, patience)
        async with grpc.aio.secure_channel(self.address, credentials, options=options) as channel:
            attach: Any = channel.stream_stream(framing.METHOD, None, None)  # bytes in and out: frames are checked by framing.py
            call = attach()
            try:
                await self._serve(call)
            except TimeoutError as error:
                raise self._failed(str(error) or f"no welcome within {self._timing.handshake:g} s") from None
            except grpc.aio.AioRpcError as error:
                raise explain(error, self.address) from None
            except (OSError, asyncio.InvalidStateError, grpc.aio.BaseError) as error:
                raise self._failed(str(error)) from None
            finally:
                self._stream = None
                call.cancel()

    def _failed(self, what: str) -> LichenError:
        return LichenError(
            Code.CONNECT_FAILED,
            what,
            where=self.address,
            fix="Is the coordinator up, and is this its address?",
        )

    async def _serve(self, call: Any) -> None:
        link: Link[AgentFrame] = Link(AgentFrame, self.spool, self._locks, call.write, self._timing)
        stream = _Stream(link)
        async with asyncio.timeout(self._timing.handshake):
            hello = Hello(protocol=framing.PROTOCOL, version=version("lichen"), profile=self._profile, news=self._news)
            await call.write(AgentFrame(hello=hello).SerializeToString())
            data = await next_frame(call)
            if data is None:
                await _raise_status(call)
            kind, frame = framing.decode_coordinator_frame(data or b"")
        if kind != "welcome":
            raise framing.frame_invalid(f"{kind} before welcome")
        self._compare_clocks(frame.welcome)
        if self._witness is not None and frame.welcome.HasField("ledger"):
            await asyncio.to_thread(self._witness.remember, frame.welcome.ledger)  # before any message is wanted
        stream.welcome = frame.welcome
        self._stream = stream
        if self._profile != hello.profile:  # told while this stream was being made
            link.send(AgentFrame(profile=self._profile))
        if self._news != hello.news:
            link.send(AgentFrame(news=self._news))
        self._tell("connected")
        log.info("connected to %s as %s", self.address, frame.welcome.name)
        await self._reconcile(stream, set(frame.welcome.outstanding))
        if self._stopping.is_set():
            link.finish(AgentFrame(bye=Bye(code=0)))
        await link.run(lambda: next_frame(call), self._handle)
        if not self._stopping.is_set():
            await _raise_status(call)
        else:
            await call.done_writing()

    def _compare_clocks(self, welcome: Welcome) -> None:
        """Tell the owner of a wrong clock; which of the two it is, nobody here knows."""
        self._clock_off = time.time() - welcome.time
        if abs(self._clock_off) > CLOCK_OFF:
            log.warning(
                "this machine's clock is %.0f s %s the coordinator's: set it, since certificates and the policy's hours go by it",
                abs(self._clock_off),
                "ahead of" if self._clock_off > 0 else "behind",
            )

    async def _reconcile(self, stream: _Stream, outstanding: set[str]) -> None:
        """Drop what was withdrawn while this agent was away, and send again what was not receipted."""
        await self._drop([message_id for message_id in self._items if message_id not in outstanding])
        for message_id in await asyncio.to_thread(self.mailbox.unreceipted):
            self._send_reply(stream, message_id)

    # Frames

    async def _handle(self, data: bytes) -> bool:
        stream = self._stream
        if stream is None:
            return False
        kind, frame = framing.decode_coordinator_frame(data)
        if await stream.link.receive(kind, frame):
            return True
        match kind:
            case "envelope":
                stream.link.bytes_received += len(data)
                await self._take(stream, frame.envelope.message_id, frame.envelope.message)
            case "receipt":
                stream.link.withdraw(frame.receipt.message_id)
                stream.replied.discard(frame.receipt.message_id)  # a withdrawn message may be wanted again
                if not frame.receipt.stored:
                    await self._tell_refused(frame.receipt.message_id)
                await asyncio.to_thread(self.mailbox.receipt, frame.receipt.message_id)
                self._collect()
            case "cancel":
                await self._drop(list(frame.cancel.message_ids))
            case _:
                raise framing.frame_invalid(f"a second {kind}")
        return True

    async def _tell_refused(self, message_id: str) -> None:
        data = await asyncio.to_thread(self.mailbox.reply, message_id)
        if data is not None and self._on_refused is not None:
            self._on_refused(message_from_bytes(data))

    def waited(self, message: Message) -> float:
        """Seconds since a message that is in work came, or this process began."""
        item = self._items.get(message.metadata.message_id)
        return time.monotonic() - item.came if item else 0.0

    async def _take(self, stream: _Stream, message_id: str, data: bytes) -> None:
        if await asyncio.to_thread(self.mailbox.reply, message_id) is not None:
            self._send_reply(stream, message_id)  # it was handled before
            return
        item = self._items.get(message_id)
        if item is None:
            item = self._add(message_id, data)
            metadata = item.message.metadata
            if metadata.message_id != message_id or stream.welcome is None or metadata.dst_node_id != stream.welcome.node_id:
                del self._items[message_id]
                raise framing.frame_invalid("a message whose metadata are not those of its envelope")
            await asyncio.to_thread(self.mailbox.put, message_id, data)
        item.wanted = True
        self._changed.set()
        if not stream.unacked:
            stream.link.spawn(self._ack(stream))
        stream.unacked.append(message_id)
        if not item.complete and item.loading is not stream:
            item.loading = stream
            stream.link.spawn(self._load(stream, item))

    def _add(self, message_id: str, data: bytes) -> _Item:
        message = message_from_bytes(data)
        refs = payload_refs(message)
        item = _Item(message, refs, complete=all(self.spool.length(ref.digest) == ref.length for ref in refs))
        self._items[message_id] = item
        return item

    async def _ack(self, stream: _Stream) -> None:
        await asyncio.sleep(_ACK_AFTER)
        unacked, stream.unacked = [item for item in stream.unacked if item in self._items], []
        if unacked:
            await asyncio.to_thread(self.mailbox.sync)
            for message_id in unacked:
                stream.link.send(AgentFrame(ack=Ack(message_id=message_id)))

    async def _load(self, stream: _Stream, item: _Item) -> None:
        """Fetch a message's payload, or what makes it of a model that is here."""
        steps = [] if item.whole else await asyncio.to_thread(steps_from, self.spool.directory, item.message)
        for ref in [step.added for step in steps] or item.refs:
            try:
                await stream.link.fetch(ref)
            except LichenError as error:
                self._corrupt[ref.digest] += 1
                hopeless = isinstance(error, PayloadMissingError) or self._corrupt[ref.digest] >= _CORRUPT_LIMIT
                if error.code is not Code.PAYLOAD_CORRUPT or not hopeless:
                    raise
                log.error("%s", error)
                item.fault = error.code
        item.complete = True
        self._changed.set()

    async def _drop(self, message_ids: list[str]) -> None:
        dropped = [message_id for message_id in message_ids if (item := self._items.get(message_id)) and not item.started]
        if dropped:
            log.info("%d messages were withdrawn before they were begun", len(dropped))
            await asyncio.to_thread(self.mailbox.cancel, dropped)
        for message_id in dropped:
            self._items.pop(message_id, None)

    def _send_reply(self, stream: _Stream, message_id: str) -> None:
        if message_id not in stream.replied:
            stream.replied.add(message_id)
            stream.link.send_later(lambda: self._reply_frame(stream.link, message_id))

    async def _reply_frame(self, link: Link[AgentFrame], message_id: str) -> AgentFrame | None:
        data = await asyncio.to_thread(self.mailbox.reply, message_id)
        if data is None:
            return None
        kept = await asyncio.to_thread(self.mailbox.ledger, message_id)
        link.offer(message_id, payload_refs(message_from_bytes(data)))
        ledger = LedgerState.FromString(kept) if kept else None
        return AgentFrame(envelope=Envelope(message_id=message_id, message=data, ledger=ledger))

    def _collect(self) -> None:
        """Now and then free the spool of payloads that no message needs."""
        if time.monotonic() - self._collected > _COLLECT_EVERY and self._stream is not None:
            self._collected = time.monotonic()
            self._stream.link.spawn(asyncio.to_thread(self._collect_now))

    def _collect_now(self) -> None:
        live = [ref.digest for data in self.mailbox.live_messages() for ref in offered_refs(message_from_bytes(data))]
        self.spool.collect([*live, *self.mailbox.models()])

    # Handling

    async def _work(self, handler: Handler) -> None:
        """Handle one message after the other, connected or not."""
        while True:
            ready = next(((key, item) for key, item in self._items.items() if item.wanted and item.complete), None)
            if ready is None:
                self._changed.clear()
                await self._changed.wait()
                continue
            message_id, item = ready
            item.started = True
            reply = await self._answer(handler, item)
            if self._fetch_whole(item, reply):
                continue
            for ref in item.refs:
                await asyncio.to_thread(self.mailbox.hold_model, ref.digest)
            state = await asyncio.to_thread(self._witness.sign) if self._witness and self._witness.due else None
            kept = state.SerializeToString() if state else None
            await asyncio.to_thread(self.mailbox.put_reply, message_id, message_to_bytes(reply), kept)
            del self._items[message_id]
            if self._stream is not None:
                self._send_reply(self._stream, message_id)

    def _fetch_whole(self, item: _Item, reply: Message) -> bool:
        """Whether what this node had did not lead to the message's model: it is fetched whole then, and the message handled again."""
        if item.whole or not reply.has_error() or reply.error.code != Code.MODEL_BEHIND:
            return False
        log.warning("the model that is here does not lead to the coordinator's: fetching it whole")
        item.whole, item.complete, item.started, item.loading = True, False, False, None
        if (stream := self._stream) is not None:
            item.loading = stream
            stream.link.spawn(self._load(stream, item))
        return True

    async def _answer(self, handler: Handler, item: _Item) -> Message:
        if item.fault is not None:
            return error_reply(item.message, int(item.fault))
        try:
            reply = await handler(item.message)
            if any(self.spool.length(ref.digest) != ref.length for ref in payload_refs(reply)):
                raise LichenError(Code.INTERNAL, "the handler's reply refers to a payload that is not in the spool")
            if len(message_to_bytes(reply)) > framing.MAX_ENVELOPE:
                raise LichenError(Code.INTERNAL, "the handler's reply is too long without its payload")
            return reply
        except LichenError as error:
            log.error("message %s: %s", item.message.metadata.message_id, error)
            return error_reply(item.message, int(error.code))
        except Exception:  # whatever training may raise: the coordinator is told a number, the owner's log the rest
            log.exception("message %s could not be handled", item.message.metadata.message_id)
            return error_reply(item.message, int(Code.INTERNAL))


async def _raise_status(call: Any) -> None:
    """Raise the status with which the coordinator ended the stream, unless it ended well."""
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        initial, trailing = await call.initial_metadata(), await call.trailing_metadata()
        raise grpc.aio.AioRpcError(code, initial, trailing, await call.details(), None)
