"""The messages of a round: each node's bears its assignment and the model, and its answer is waited for until the deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from flwr.app import ArrayRecord, Message, RecordDict

from lichen.common import records
from lichen.common.errors import Code
from lichen.common.plan import digest_of
from lichen.coordinator.replies import note_failure

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from lichen.common.plan import Plan
    from lichen.common.result import Round
    from lichen.coordinator.cohort import Cohorts
    from lichen.coordinator.downlink import Downlink
    from lichen.coordinator.run_directory import ServerState
    from lichen.coordinator.updates import Updates

log = logging.getLogger(__name__)


@runtime_checkable
class CallsOff(Protocol):
    """A grid that can stop waiting before all have answered."""

    def until_enough(self, messages: Iterable[Message], timeout: float, enough: Callable[[Message], bool]) -> list[Message]:
        """Send messages; the replies in the order of arrival, up to the one with which ``enough`` is true. The others are withdrawn."""
        ...


class Messages:
    """Those of one run.

    Args:
        plan: the run's.
        text: the plan's, which nodes get.
        name: of a node, by its id.
        downlink: the model's way to the nodes.
        cohorts: is told who has no privacy budget left.
        updates: tells which answers are enough.
        assign: what one node is asked otherwise than the plan says, by its id and the payload's bytes (`Assigner.of`).
    """

    def __init__(
        self,
        plan: Plan,
        text: str,
        name: Callable[[int], str],
        downlink: Downlink,
        cohorts: Cohorts,
        updates: Updates,
        assign: Callable[[int, int], dict[str, Any]] | None,
    ) -> None:
        self._plan, self._name, self._assign = plan, name, assign
        self._text, self._plan_sha256 = text, digest_of(text)
        self._downlink, self._cohorts, self._updates = downlink, cohorts, updates

    def prepare(self, nodes: Iterable[int], round: int, timeout: float, grid: Grid, state: ServerState, wanted: int | None = None) -> None:
        """Have nodes load what the plan needs, and tell how fast they are, before a round's time counts; who fails is asked all the same.

        Args:
            nodes: whom the round will ask.
            round: that one.
            timeout: seconds, after which the round begins without the others.
            grid: the way there.
            state: before the round.
            wanted: so many that are ready are enough, where the grid can call the others off.
        """
        messages = self._preparing(nodes, round, grid, state)
        began = time.monotonic()
        replies, _ = _answers(messages, timeout, grid, lambda reply: not reply.has_error(), wanted)
        ready = sum(not reply.has_error() for reply in replies)
        log.info("round %d: %d of %d nodes are ready, after %.1f s", round, ready, len(messages), time.monotonic() - began)

    def announce(self, nodes: Iterable[int], round: int, grid: Grid, state: ServerState) -> list[str]:
        """Let nodes know of an online run whose round they may be in, so that they look for new data; returns the messages' ids."""
        return list(grid.push_messages(self._preparing(nodes, round, grid, state)))

    def _preparing(self, nodes: Iterable[int], round: int, grid: Grid, state: ServerState) -> list[Message]:
        assignment = self.assignment(records.PREPARE, round, state)
        messages = []
        for node in nodes:
            own = self._assign(node, 0) if self._assign else {}
            content = RecordDict({"assignment": records.to_config(assignment.model_copy(update=own))})
            messages.append(grid.create_message(content, records.PREPARE, node, str(round)))
        return messages

    def to_nodes(
        self, kind: str, nodes: Iterable[int], arrays: ArrayRecord, grid: Grid, told: Round, state: ServerState, before: int | None = None
    ) -> Iterator[Message]:
        """One message for each node, of the round that ``told`` is the line of; ``before`` counts evaluations before a batch begins."""
        assignment = self.assignment(kind, told.round, state)
        group = str(assignment.number)
        if before is not None:
            assignment, group = assignment.model_copy(update={"before": True}), f"{group} before {before}"
        for node in nodes:
            yield self.to_node(assignment, kind, node, arrays, grid, told, state, group)

    def assignment(self, kind: str, round: int, state: ServerState, training: int | None = None) -> records.Assignment:
        """What the plan asks of every node in a round.

        Args:
            kind: of message.
            round: from 1.
            state: its clip is the round's.
            training: the number of the client's training, where it is not the round's.
        """
        plan = self._plan
        return records.Assignment(
            plan=self._text,
            plan_sha256=self._plan_sha256,
            round=round,
            clip=(state.clip or plan.privacy.clip) if plan.central else None,
            training=training,
            seconds=plan.cohort.deadline_s if kind == records.TRAIN and plan.local.partial else None,
        )

    def to_node(
        self,
        assignment: records.Assignment,
        kind: str,
        node: int,
        arrays: ArrayRecord,
        grid: Grid,
        told: Round,
        state: ServerState,
        group: str | None = None,
    ) -> Message:
        """The message for one node, of a group, or of its training's number; the bytes that it will fetch are added to the round's line."""
        content = RecordDict({"payload": arrays})
        records.put_chain(content, state.chain)
        fetched = self._downlink.bytes_for(self._name(node), content, state)
        own = self._assign(node, fetched) if self._assign else {}
        content["assignment"] = records.to_config(assignment.model_copy(update=own))
        told.downlink_bytes = (told.downlink_bytes or 0) + fetched
        return grid.create_message(content, kind, node, group or str(assignment.number))

    def ask(
        self, messages: list[Message], timeout: float, grid: Grid, told: Round, state: ServerState, wanted: int | None = None
    ) -> list[Message]:
        """The answers until the deadline, or until ``wanted`` of them bear usable updates, where the grid can call the others off."""
        replies, enough = _answers(messages, timeout, grid, lambda reply: self._updates.is_usable(reply, told.round, state.model), wanted)
        sent = {message.metadata.dst_node_id: message for message in messages}
        for reply in replies:
            self.arrived(reply, sent[reply.metadata.src_node_id], state)
            self._cohorts.answered(reply, grid)
        late = sent.keys() - {reply.metadata.src_node_id for reply in replies}
        if enough and late:
            told.unneeded, told.called_off = len(late), sorted(map(self._name, late))
            log.info("round %d: %d updates are there, so %d clients are called off", told.round, wanted, len(late))
            return replies
        for node in sorted(late):
            note_failure(told, self._name(node), None, "no answer within the deadline")
        return replies

    def arrived(self, reply: Message, asked: Message, state: ServerState) -> None:
        """Note what any answer tells: which model the node has now, and whether it has privacy budget left, and rows of the task."""
        client = self._name(asked.metadata.dst_node_id)
        self._downlink.arrived(client, state, asked)
        if not reply.has_error():
            return
        if reply.error.code == Code.PRIVACY_BUDGET:
            self._cohorts.drop_out(asked.metadata.message_type, client, state)
        elif reply.error.code == Code.DATA_EMPTY and asked.metadata.message_type == records.TRAIN:
            self._cohorts.has_no_rows(client, state)


def _answers(
    messages: list[Message], timeout: float, grid: Grid, counts: Callable[[Message], bool], wanted: int | None
) -> tuple[list[Message], bool]:
    """The replies until the deadline, and whether ``wanted`` of them counted; then, where the grid can, the others were called off."""
    if wanted is None or len(messages) <= wanted or not isinstance(grid, CallsOff):
        return list(grid.send_and_receive(messages, timeout=timeout)), False
    found = 0

    def enough(reply: Message) -> bool:
        nonlocal found
        found += counts(reply)
        return found == wanted

    return grid.until_enough(messages, timeout, enough), found == wanted
