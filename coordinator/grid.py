"""Flower's Grid over the fleet's streams: one for each run, all on one `FleetServer`."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from lichen.common.channel.spool import Spool
from lichen.common.errors import Code, LichenError
from lichen.common.hardware import Profile
from lichen.common.records import build_message, message_from_bytes

if TYPE_CHECKING:
    from lichen.coordinator.fleet import FleetServer

Arrivals = queue.SimpleQueue[tuple[str, bytes] | LichenError]  # replies as they come, or what ends the wait
COORDINATOR_NODE_ID = 1  # as Flower numbers its SuperLink
_DEFAULT_TTL = 86400.0


class GrpcGrid(Grid):  # type: ignore[misc]
    """Flower's Grid for one run. Thread-safe; replies wake who waits for them; nothing polls.

    Messages are idempotent: `create_message` derives the id, so a coordinator that died and makes the same message again gets
    the stored reply, or waits for the one that is under way.

    Args:
        fleet: the streams, shared by all grids.
        run_id: 1 … 2^63 - 1.
    """

    def __init__(self, fleet: FleetServer, run_id: int) -> None:
        self._fleet = fleet
        self._run_id = run_id
        self._run: Any = None
        self._interrupted: LichenError | None = None
        self._open: list[Arrivals] = []
        self._lock = threading.Lock()

    @property
    def spool(self) -> Spool:
        """Where payloads of messages and replies lie."""
        return self._fleet.spool

    def set_run(self, run: Any) -> None:
        """Set Flower's Run object and with it the run's id."""
        self._run, self._run_id = run, run.run_id

    @property
    def run(self) -> Any:
        """Flower's Run object.

        Raises:
            LichenError: INTERNAL, if none was set: lichen itself needs only the run's id.
        """
        if self._run is None:
            raise LichenError(Code.INTERNAL, "this grid was given no Flower Run object")
        return self._run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """A message whose id follows from its run, type, group and node."""
        key = f"{self._run_id}|{message_type}|{group_id}|{dst_node_id}"
        return build_message(
            content,
            run_id=self._run_id,
            message_id=hashlib.sha256(key.encode()).hexdigest()[:32],
            src_node_id=COORDINATOR_NODE_ID,
            dst_node_id=dst_node_id,
            message_type=message_type,
            group_id=group_id,
            ttl=_DEFAULT_TTL if ttl is None else ttl,
        )

    def get_node_ids(self) -> list[int]:
        """The ids of the nodes that are attached now, in order.

        Raises:
            LichenError: what `interrupt` was given: who waits for nodes asks here.
        """
        if self._interrupted is not None:
            raise self._interrupted
        return [node.node_id for node in self._fleet.connected()]

    def name_of(self, node_id: int) -> str:
        """A node's name.

        Raises:
            LichenError: NODE_UNKNOWN.
        """
        node = self._fleet.store.node_by_id(node_id)
        if node is None:
            raise LichenError(Code.NODE_UNKNOWN, f"there is no node with id {node_id}")
        return node.name

    def profile_of(self, node_id: int) -> Profile | None:
        """What a node tells of its machine; None if it tells nothing, or is not attached now."""
        return self._fleet.profile_of(node_id)

    def new_rows(self) -> dict[int, int]:
        """By the ids of the nodes that are attached how many new rows they declare for this run, if it is online."""
        return self._fleet.new_rows(self._run_id)

    def wait_for_news(self, timeout: float) -> None:
        """Wait until a node comes, or tells of new rows, at most ``timeout`` seconds."""
        self._fleet.wait(timeout)

    def wait_for_nodes(self, count: int, timeout: float | None = None) -> list[int]:
        """Wait until ``count`` nodes are attached, at most ``timeout`` seconds; the ids of those that are there then."""
        self._fleet.wait_for_nodes(count, timeout)
        return self.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages durably, then send them; returns their ids. A message whose id is known is not stored again.

        Raises:
            LichenError: FRAME_INVALID, if a message is too long, of another run, or its payload is not in the spool.
        """
        pushed = list(messages)
        for message in pushed:
            if message.metadata.run_id != self._run_id:
                raise LichenError(Code.FRAME_INVALID, f"a message of run {message.metadata.run_id} on the grid of run {self._run_id}")
        self._fleet.push(pushed)
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there already; asking again gives them again, until `release`."""
        stored = (self._fleet.store.reply(message_id) for message_id in message_ids)
        return [message_from_bytes(data) for data in stored if data is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push messages and return their replies, in the order of arrival; after ``timeout`` seconds those that are there."""
        return list(self.replies(self.push_messages(messages), timeout))

    def replies(self, message_ids: Iterable[str], timeout: float | None = None) -> Generator[Message, None, None]:
        """Replies to pushed messages, each as soon as it is complete; ends after ``timeout`` seconds.

        Raises:
            LichenError: what `interrupt` was given.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        missing = set(message_ids)
        with self._fleet.waiting(missing) as arrivals, self._interruptible(arrivals):
            for message_id in sorted(missing):
                if (data := self._fleet.store.reply(message_id)) is not None:
                    missing.discard(message_id)
                    yield message_from_bytes(data)
            while missing:
                try:
                    arrival = arrivals.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    return
                if isinstance(arrival, LichenError):
                    raise arrival
                message_id, data = arrival
                if message_id in missing:
                    missing.discard(message_id)
                    yield message_from_bytes(data)

    @contextmanager
    def _interruptible(self, arrivals: Arrivals) -> Iterator[None]:
        with self._lock:
            if self._interrupted is not None:
                raise self._interrupted
            self._open.append(arrivals)
        try:
            yield
        finally:
            with self._lock:
                self._open.remove(arrivals)

    def interrupt(self, error: LichenError) -> None:
        """Make every wait on this grid, now and later, raise ``error``: how a run is stopped from another thread."""
        with self._lock:
            self._interrupted = error
            for arrivals in self._open:
                arrivals.put(error)

    def cancel(self, message_ids: Iterable[str]) -> list[str]:
        """Withdraw messages that have no reply: a late node is not sent stale work. Returns the ids of those withdrawn."""
        return self._fleet.cancel(message_ids)

    def unreleased(self) -> list[Message]:
        """The run's messages that were not let go of, as they were first pushed."""
        return [message_from_bytes(data) for _, data in self._fleet.store.unreleased(self._run_id)]

    def clock(self) -> float:
        """Seconds, as timeouts count them."""
        return time.monotonic()

    def release(self, message_ids: Iterable[str]) -> None:
        """Let go of messages and replies once what was made of them is on the disk; `FleetServer.collect` frees their payloads."""
        self._fleet.store.release(message_ids, time.time())
