"""The fleet: agents' live streams on the coordinator, and Flower's Grid over them (`GrpcGrid`).

A message is on the disk before it is sent, and is sent again on every new stream until its reply is on the disk. One event loop
serves all streams; grids may be used from any thread.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import grpc
import grpc.aio
from flwr.app import Message

from lichen.common.channel import framing
from lichen.common.channel.refusal import refuse
from lichen.common.channel.spool import Spool
from lichen.common.channel.transfer import Locks
from lichen.common.errors import Code, LichenError
from lichen.common.hardware import Profile
from lichen.common.records import error_reply, message_from_bytes, message_to_bytes, offered_refs
from lichen.coordinator.admission import admit, one_line, revoked
from lichen.coordinator.grid import Arrivals, GrpcGrid
from lichen.coordinator.session import Session, take_hello
from lichen.coordinator.store import Node, Store

__all__ = ["FleetServer", "GrpcGrid"]

log = logging.getLogger(__name__)


class FleetServer:
    """All live streams of a coordinator.

    Args:
        store: nodes, outbox and replies.
        spool: payloads, both ways.
        timing: heartbeats; tests shorten them.
    """

    def __init__(self, store: Store, spool: Spool, *, timing: framing.Timing | None = None) -> None:
        self.store = store
        self.spool = spool
        self.timing = timing or framing.Timing()
        self.locks: Locks = WeakValueDictionary()
        self._past_traffic: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: grpc.aio.Server | None = None
        self.corrupt: Counter[str] = Counter()
        self._sessions: dict[int, Session] = {}
        self._changed = threading.Condition()
        self._waiting: dict[str, list[Arrivals]] = {}
        self._waiting_lock = threading.Lock()
        self._unsaved: list[tuple[str, int, bytes, asyncio.Future[bool]]] = []
        self._saving: asyncio.Task[None] | None = None

    # Serving

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """What a server needs to serve the streams."""
        attach = grpc.stream_stream_rpc_method_handler(self._attach)  # bytes in and out: frames are checked by framing.py
        return grpc.method_handlers_generic_handler(framing.SERVICE, {"Attach": attach})

    async def start(self, address: str, key_pem: bytes, cert_pem: bytes, ca_pem: bytes, *handlers: grpc.GenericRpcHandler[Any, Any]) -> int:
        """Listen with mutual TLS and return the port.

        Args:
            address: ``host:port``; port 0 takes a free one.
            key_pem: the server's private key.
            cert_pem: its certificate.
            ca_pem: the authority whose certificates are let in.
            handlers: other services for the same listener.

        Raises:
            LichenError: SERVICE_UNREACHABLE, if the address cannot be had.
        """
        self._loop = asyncio.get_running_loop()
        server = grpc.aio.server(options=framing.server_options(self.timing))
        server.add_generic_rpc_handlers((self.handler(), *handlers))
        try:
            port = server.add_secure_port(address, grpc.ssl_server_credentials([(key_pem, cert_pem)], ca_pem, require_client_auth=True))
        except RuntimeError as error:
            raise LichenError(
                Code.SERVICE_UNREACHABLE, f"cannot listen here: {error}", where=address, fix="Is another coordinator running?"
            ) from None
        await server.start()
        self._server = server
        return port

    def grid(self, run_id: int) -> GrpcGrid:
        """Flower's Grid for one run."""
        return GrpcGrid(self, run_id)

    async def stop(self, grace: float = 1.0) -> None:
        """End all streams and stop listening; what is owed goes on when the coordinator is back."""
        for session in list(self._sessions.values()):
            session.link.fail(LichenError(Code.SERVICE_UNREACHABLE, "the coordinator is shutting down"))
        if self._server is not None:
            await self._server.stop(grace)

    async def _attach(self, _: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Serve one agent's stream, from its handshake to its end."""
        self._loop = asyncio.get_running_loop()
        try:
            node, fingerprint = await asyncio.to_thread(admit, self.store, context.auth_context())
            async with asyncio.timeout(self.timing.handshake):
                profile, news = await take_hello(context)
        except LichenError as error:
            log.warning("refused an agent from %s: %s", context.peer(), one_line(error))
            await refuse(context, error)
        except TimeoutError:
            log.warning("refused an agent from %s: no hello within %g s", context.peer(), self.timing.handshake)
            return
        session = Session(self, node, context, profile, news)
        old, self._sessions[node.node_id] = self._sessions.get(node.node_id), session
        if old is not None:
            old.link.fail(LichenError(Code.AGENT_IN_USE, f"another agent attached as {node.name!r}", fix="Stop one of the two."))
        try:
            await session.serve(fingerprint)
            log.info("node %s has left", node.name)
        except LichenError as error:
            level = logging.INFO if error.code is Code.SERVICE_UNREACHABLE else logging.WARNING  # our own shutdown is no trouble
            log.log(level, "ended the stream of node %s: %s", node.name, error)
            await refuse(context, error)
        except (TimeoutError, OSError, grpc.aio.BaseError) as error:
            log.warning("the stream of node %s broke: %s", node.name, error)
        finally:
            if self._sessions.get(node.node_id) is session:
                del self._sessions[node.node_id]
            self._past_traffic.update(sent=session.link.bytes_sent, received=session.link.bytes_received)

    def attached(self, session: Session) -> None:
        """Tell who waits for nodes that one is there."""
        log.info("node %s is attached", session.node.name)
        self.changed()

    def changed(self) -> None:
        """Wake who waits for nodes, or for what they tell."""
        with self._changed:
            self._changed.notify_all()

    def traffic(self) -> tuple[int, int]:
        """Bytes of envelopes and payloads sent and received since the start, what was sent again included."""
        links = [session.link for session in list(self._sessions.values())]
        sent = self._past_traffic["sent"] + sum(link.bytes_sent for link in links)
        return sent, self._past_traffic["received"] + sum(link.bytes_received for link in links)

    def connected(self) -> list[Node]:
        """The nodes that are attached now, by id."""
        return sorted((item.node for item in list(self._sessions.values()) if item.welcomed), key=lambda node: node.node_id)

    def profile_of(self, node_id: int) -> Profile | None:
        """What an attached node tells of its machine; None if it tells nothing, or is not here. From any thread."""
        session = self._sessions.get(node_id)
        return session.profile if session else None

    def new_rows(self, run_id: int) -> dict[int, int]:
        """By the ids of the nodes that are attached how many new rows they declare for an online run. From any thread."""
        told = [(item.node.node_id, item.news) for item in list(self._sessions.values()) if item.welcomed]
        return {node_id: news.rows for node_id, news in told if news.run_id == run_id}

    def wait(self, timeout: float) -> None:
        """Wait until a node comes, or tells something new, at most ``timeout`` seconds. Not for the event loop's thread."""
        with self._changed:
            self._changed.wait(timeout)

    def wait_for_nodes(self, count: int, timeout: float | None = None) -> bool:
        """Wait until ``count`` nodes are attached; False after ``timeout`` seconds. Not for the event loop's thread."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.connected()) >= count, timeout)

    def revoke(self, name: str) -> Node:
        """Revoke a node: its stream ends at once, and who waits for its replies gets an error reply. From any thread.

        Raises:
            LichenError: NODE_UNKNOWN.
        """
        node = self.store.node_by_name(name)
        if node is not None and node.active:
            self._give_up(self.store.outstanding(node.node_id), node.node_id, Code.CERTIFICATE_REVOKED)
        node = self.store.revoke_node(name, time.time())
        self._call(self._end, node)
        return node

    def _end(self, node: Node) -> None:
        if session := self._sessions.get(node.node_id):
            session.link.fail(revoked(node.name))

    def collect(self, keep: Iterable[str] = (), *, min_age: float = 600.0) -> int:
        """Remove the spool's payloads that no live message refers to, but ``keep``; returns the bytes freed."""
        live = {ref.digest for data in self.store.live_messages() for ref in offered_refs(message_from_bytes(data))}
        return self.spool.collect(live.union(keep), min_age=min_age)

    # Messages out and replies in

    def _call(self, function: Any, *values: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *values)

    def push(self, messages: list[Message]) -> None:
        """Keep messages durably, then send them. From any thread.

        Raises:
            LichenError: FRAME_INVALID for a message that is too long or whose payload is not in the spool.
        """
        rows = [(m.metadata.message_id, m.metadata.run_id, m.metadata.dst_node_id, message_to_bytes(m)) for m in messages]
        for message, row in zip(messages, rows, strict=True):
            framing.check_message_id(row[0])
            if len(row[3]) > framing.MAX_ENVELOPE:
                raise LichenError(Code.FRAME_INVALID, f"a message of {len(row[3])} bytes", fix="Put its tensors in the spool.")
            for ref in offered_refs(message):
                if self.spool.length(ref.digest) != ref.length:
                    raise LichenError(Code.FRAME_INVALID, "a message's payload is not in the spool", where=ref.digest)
        self.store.put_outbox(rows)
        for node_id in {row[2] for row in rows}:
            node = self.store.node_by_id(node_id)
            if node is None or not node.active:
                ids = [row[0] for row in rows if row[2] == node_id]
                self._give_up(ids, node_id, Code.NODE_UNKNOWN if node is None else Code.CERTIFICATE_REVOKED)
        self._call(self._offer, [(row[0], row[2]) for row in rows])

    def _offer(self, messages: list[tuple[str, int]]) -> None:
        for message_id, node_id in messages:
            if session := self._sessions.get(node_id):
                session.offer(message_id)

    def cancel(self, message_ids: Iterable[str]) -> list[str]:
        """Withdraw messages that have no reply yet: they are not sent any more, and an agent that has not begun drops them."""
        cancelled = self.store.cancel(message_ids, time.time())
        self._call(self._cancel, cancelled)
        return [message_id for message_id, _ in cancelled]

    def _cancel(self, cancelled: list[tuple[str, int]]) -> None:
        for node_id in {node_id for _, node_id in cancelled}:
            if session := self._sessions.get(node_id):
                session.cancel([message_id for message_id, owner in cancelled if owner == node_id])

    def _give_up(self, message_ids: list[str], node_id: int, code: Code) -> None:
        """Answer for a node that cannot."""
        rows = []
        for message_id in message_ids:
            if data := self.store.message(message_id):
                rows.append((message_id, node_id, message_to_bytes(error_reply(message_from_bytes(data), int(code)))))
        for row, kept in zip(rows, self.store.save_replies(rows), strict=True):
            if kept:
                self.arrived(row[0], row[2])

    async def give_up(self, message_id: str, node_id: int, code: Code) -> None:
        """Answer for a node whose own answer is of no use."""
        await asyncio.to_thread(self._give_up, [message_id], node_id, code)

    async def save_reply(self, message_id: str, node_id: int, data: bytes) -> bool:
        """Return when the reply is on the disk: whether it was kept. Replies that come together share one transaction."""
        saved: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._unsaved.append((message_id, node_id, data, saved))
        if self._saving is None:
            self._saving = asyncio.create_task(self._save())
        return await saved

    async def _save(self) -> None:
        while self._unsaved:
            batch, self._unsaved = self._unsaved, []
            try:
                kept = await asyncio.to_thread(self.store.save_replies, [row[:3] for row in batch])
            except Exception as error:  # whoever waits must hear of it, whatever it is
                for *_, saved in batch:
                    if not saved.done():
                        saved.set_exception(error)
                continue
            for (message_id, _, data, saved), kept_one in zip(batch, kept, strict=True):
                if kept_one:
                    self.arrived(message_id, data)
                if not saved.done():
                    saved.set_result(kept_one)
        self._saving = None

    def arrived(self, message_id: str, data: bytes) -> None:
        """Wake who waits for this reply."""
        with self._waiting_lock:
            for arrivals in self._waiting.get(message_id, []):
                arrivals.put((message_id, data))

    @contextmanager
    def waiting(self, message_ids: Iterable[str]) -> Iterator[Arrivals]:
        """A queue in which replies to these messages appear from now on."""
        arrivals: Arrivals = queue.SimpleQueue()
        ids = list(message_ids)
        with self._waiting_lock:
            for message_id in ids:
                self._waiting.setdefault(message_id, []).append(arrivals)
        try:
            yield arrivals
        finally:
            with self._waiting_lock:
                for message_id in ids:
                    self._waiting[message_id].remove(arrivals)
                    if not self._waiting[message_id]:
                        del self._waiting[message_id]
