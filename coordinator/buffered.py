"""Asynchronous rounds: FedBuff (Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation").

Each of `cohort.size` clients trains on the newest model as soon as it is free. What comes back waits in a buffer. When that holds
`cohort.buffer` updates, or `cohort.minimum` and the deadline has passed since the last step, the server makes a step: here, a round.
An update from a model that is s steps old counts 1/√(1 + s) of itself; training of more than `MOST_STALE` is called off.

What is under way is not in the checkpoint: it lies in the outbox, with the model that it is about, until a checkpoint has what came of
it. A coordinator that was killed finds it there, and a client's trainings, which are counted, are the same messages as before.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lichen.common import records
from lichen.common.errors import Code, LichenError
from lichen.common.result import Round
from lichen.coordinator.replies import Counted, note_failure
from lichen.coordinator.strategy import FederatedStrategy

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message
    from flwr.serverapp import Grid

log = logging.getLogger(__name__)
MOST_STALE = 20
LOOK_S = 1.0
"""Seconds between two looks for nodes that have become free, or have come."""


@runtime_checkable
class Asynchronous(Protocol):
    """What a grid needs beside Flower's own methods."""

    def replies(self, message_ids: Iterable[str], timeout: float | None = None) -> Generator[Message, None, None]:
        """Replies to pushed messages as they come."""
        ...

    def cancel(self, message_ids: Iterable[str]) -> list[str]:
        """Withdraw messages."""
        ...

    def let_go(self, message_ids: Iterable[str], keep: Iterable[str]) -> None:
        """Erase messages and replies, and their payloads but ``keep``."""
        ...

    def unreleased(self) -> list[Message]:
        """All messages of the run that were not let go of."""
        ...

    def clock(self) -> float:
        """Seconds, as timeouts count them."""
        ...


@dataclass(frozen=True)
class _UnderWay:
    """A client's training that is not settled."""

    client: str
    message: Message
    assignment: records.Assignment


def _checked(grid: Grid) -> Asynchronous:
    if not isinstance(grid, Asynchronous):
        raise LichenError(
            Code.PLAN_UNSOUND,
            "cohort.mode: buffered needs a grid that tells of each reply as it comes, which Flower's own does not",
            fix="Use `lichen simulate` without --engine ray, or a lichen coordinator; or set cohort.mode: synchronous.",
        )
    return grid


class BufferedStrategy(FederatedStrategy):
    """Steps of one plan with `cohort.mode: buffered`. The arguments are those of `FederatedStrategy`."""

    def _resume(self, num_rounds: int) -> None:
        super()._resume(num_rounds)
        self._grid: Asynchronous | None = None
        self._under_way: dict[str, _UnderWay] = {}  # by message id
        self._settled: list[str] = []  # messages that the next checkpoint has the outcome of
        self._failed_nodes: set[int] = set()  # since the last step: they are not asked again before the next

    def _round(self, number: int, num_rounds: int, grid: Grid, timeout: float) -> None:
        asynchronous = _checked(grid)
        began = time.monotonic()
        self._told = Round(round=number, participants=0, failed=0, uplink_bytes=0, downlink_bytes=0, seconds=0)
        self._failed_nodes = set()
        if self._grid is None:
            self._grid = asynchronous
            self._under_way = dict(self._found(asynchronous))
            if not self._under_way:
                self._cohorts.wait_for_nodes(number, grid)
        arrays = self._arrays()
        asynchronous.let_go(self._settled, self._downlink.needed(self.state))  # the checkpoint with what came of them is on the disk
        self._settled = []
        self._call_off(number, asynchronous)
        buffer = self._fill(number, arrays, grid, asynchronous.clock() + timeout)
        # in an order that repeats, whoever was first
        self._apply(number, sorted(buffer, key=lambda one: (one.report.client, one.message.metadata.reply_to_message_id)))
        self._told.staleness = sum(one.counts.staleness for one in buffer) / len(buffer)
        self._add_to_average(number)
        self._told.seconds = round(time.monotonic() - began, 3)
        self.state.round = number

    def _save(self) -> None:
        super()._save()
        if self._grid is not None and self.state.round == self.plan.rounds:
            self._grid.cancel(self._under_way)  # only now: a coordinator that is killed before waits for these

    def _found(self, grid: Asynchronous) -> Iterator[tuple[str, _UnderWay]]:
        """What a coordinator that was killed has left under way; what its last checkpoint has already is let go of."""
        for message in grid.unreleased():
            if message.metadata.message_type != records.TRAIN:
                continue
            assignment = records.from_config(records.Assignment, message.content.config_records["assignment"])
            client, message_id = self._name(message.metadata.dst_node_id), message.metadata.message_id
            if assignment.number > self.state.trained.get(client, 0):
                yield message_id, _UnderWay(client, message, assignment)
            else:
                grid.let_go([message_id], self._downlink.needed(self.state))

    def _fill(self, number: int, arrays: ArrayRecord, grid: Grid, until: float) -> list[Counted]:
        """The updates of a step, while every free client is given work. Fewer than `cohort.buffer`, if nobody is left or time is up."""
        buffer: list[Counted] = []
        asynchronous = _checked(grid)
        while (left := until - asynchronous.clock()) > 0:
            if len(buffer) >= (wanted := self._wanted(grid.get_node_ids())):
                break
            connected = self._give_work(number, arrays, grid)
            if not self._under_way:
                if connected:
                    break  # all that are here have failed, or have no training left
                time.sleep(min(left, LOOK_S))
            wait = min(left, LOOK_S)
            while len(buffer) < wanted and (reply := self._next(asynchronous, wait)) is not None:
                if (found := self._take(number, reply)) is not None:
                    buffer.append(found)
                wait = 0.0  # those that are there as well; then their clients get work
        return buffer

    def _next(self, grid: Asynchronous, timeout: float) -> Message | None:
        with closing(grid.replies(list(self._under_way), timeout)) as replies:
            return next(replies, None)

    def _wanted(self, connected: Iterable[int]) -> int:
        """Updates that make a step: under privacy not more than there are clients left that may train, so that these see it to its end."""
        cohort, wanted = self.plan.cohort, self.plan.cohort.step_updates
        if not self.plan.private:
            return wanted
        clients = {self._name(node) for node in self._able(list(connected))} | {one.client for one in self._under_way.values()}
        return min(wanted, max(cohort.minimum, len(clients)))

    def _able(self, nodes: list[int]) -> list[int]:
        """Those that have privacy budget, and trainings that the plan's noise is calibrated for."""
        nodes = self._cohorts.with_budget(records.TRAIN, nodes, self.state)
        return [node for node in nodes if self.state.trained.get(self._name(node), 0) < self.plan.rounds] if self.plan.private else nodes

    def _give_work(self, number: int, arrays: ArrayRecord, grid: Grid) -> list[int]:
        """Have free clients train on the newest model, up to `cohort.size` at once; the nodes that are connected."""
        connected = sorted(grid.get_node_ids(), key=self._name)
        busy = {one.message.metadata.dst_node_id for one in self._under_way.values()}
        free = [node for node in self._able(connected) if node not in busy | self._failed_nodes]
        room = self.plan.cohort.size - len(busy.intersection(connected))  # who has left holds up nobody
        given = sum(self.state.trained.values()) + len(busy)
        generator = random.Random(f"{self.plan.seed}|free|{given}")  # noqa: S311 - who is asked is no secret here
        for node in generator.sample(free, max(0, min(len(free), room))):
            client = self._name(node)
            assignment = self._messages.assignment(records.TRAIN, number, self.state, self.state.trained.get(client, 0) + 1)
            message = self._messages.to_node(assignment, records.TRAIN, node, arrays, grid, self._told, self.state)
            self._under_way[message.metadata.message_id] = _UnderWay(client, message, assignment)
            grid.push_messages([message])
        return connected

    def _take(self, number: int, reply: Message) -> Counted | None:
        """An update for the buffer, or None, where the client failed."""
        one = self._settle(reply.metadata.reply_to_message_id)
        self._messages.arrived(reply, one.message, self.state)
        try:
            report = self._replies.read(records.TrainReport, reply)
            if report.round != one.assignment.round:
                raise LichenError(Code.FRAME_INVALID, f"a report of step {report.round} on training for step {one.assignment.round}")
            counted = self._replies.count(report, reply, self.state, number - one.assignment.round)
            self._updates.open(counted, self.state.model)  # what cannot be opened is no update for the buffer
        except LichenError as error:
            note_failure(self._told, one.client, error.code, error.what)
            self._failed_nodes.add(one.message.metadata.dst_node_id)
            return None
        return counted

    def _settle(self, message_id: str) -> _UnderWay:
        """A training is over: its number is never used again."""
        one = self._under_way.pop(message_id)
        self._settled.append(message_id)
        self.state.trained[one.client] = max(one.assignment.number, self.state.trained.get(one.client, 0))
        return one

    def _call_off(self, number: int, grid: Asynchronous) -> None:
        """Wait no longer for what is too stale to be used."""
        old = [key for key, one in self._under_way.items() if number - one.assignment.round > MOST_STALE]
        if old:
            grid.cancel(old)
        for message_id in old:
            one = self._settle(message_id)
            note_failure(self._told, one.client, None, f"more than {MOST_STALE} steps behind: called off")
