"""What replies report: each report is checked against the plan, and what its client spent is charged, before an update is opened."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from lichen.common import records
from lichen.common.aggregation import properties
from lichen.common.continual.stream import stage_of
from lichen.common.errors import Code, LichenError
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.schedule import MOST_NOISE, planned_evaluation, planned_steps
from lichen.coordinator.aggregation.normalised import Contribution, effective_steps

if TYPE_CHECKING:
    from flwr.app import Message

    from lichen.common.plan import Plan
    from lichen.common.result import Round
    from lichen.coordinator.run_directory import ServerState

log = logging.getLogger(__name__)
R = TypeVar("R", records.TrainReport, records.EvaluateReport)


@dataclass(frozen=True)
class Counted:
    """A reply whose report holds, and what its update weighs by."""

    report: records.TrainReport
    message: Message
    rank: int
    """Of its client's adapter."""
    counts: Contribution


class Replies:
    """Those of one run.

    Args:
        plan: the run's.
        name_of: the name of a node, where the grid knows it: then a report must bear it.
    """

    def __init__(self, plan: Plan, name_of: Callable[[int], str] | None) -> None:
        self._plan, self._name_of = plan, name_of

    def read(self, kind: type[R], message: Message) -> R:
        """The report of a reply.

        Raises:
            LichenError: the client's own error, if it has failed; FRAME_INVALID, if its report is none, or another node's.
        """
        if message.has_error():
            number = message.error.code
            code = Code(number) if number in set(Code) else Code.INTERNAL
            raise LichenError(code, message.error.reason or "the client failed")
        report = records.from_config(kind, message.content.config_records.get("report", {}))
        if self._name_of is not None and report.client != self._name_of(message.metadata.src_node_id):
            raise LichenError(Code.FRAME_INVALID, f"the report bears the name {report.client!r}, which is not its node's")
        return report

    def reports(self, kind: type[R], replies: Iterable[Message], told: Round) -> Iterator[tuple[R, Message]]:
        """The replies that bear a report of this round and of their own node, at most one a client; the others have failed."""
        seen: set[str] = set()
        for message in replies:
            try:
                report = self.read(kind, message)
                if report.round != told.round or report.client in seen:
                    raise LichenError(Code.FRAME_INVALID, f"a second report, or one of another round ({report.round})")
            except LichenError as error:
                note_failure(told, (self._name_of or str)(message.metadata.src_node_id), error.code, error.what)
                continue
            seen.add(report.client)
            yield report, message

    def counted(self, replies: Iterable[Message], told: Round, state: ServerState) -> list[Counted]:
        """The replies whose reports hold, in the order of the clients' names so that sums repeat.

        From here on an update has left its node, and is paid for, whether it is usable or not.
        """
        found = []
        for report, message in sorted(self.reports(records.TrainReport, replies, told), key=lambda found: found[0].client):
            try:
                found.append(self.count(report, message, state))
            except LichenError as error:
                note_failure(told, report.client, error.code, error.what)
        return found

    def count(self, report: records.TrainReport, message: Message, state: ServerState, staleness: int = 0) -> Counted:
        """What the update of one reply weighs by; under local privacy its steps are charged, whatever follows.

        Raises:
            LichenError: FRAME_INVALID, if the report tells of what the plan does not ask for.
        """
        counts = self._contribution(report, state, staleness)  # first: it charges
        return Counted(report, message, self.rank(report), counts)

    def rank(self, report: records.TrainReport) -> int:
        """Of the adapter that a client trained.

        Raises:
            LichenError: FRAME_INVALID, if the plan has no such rank.
        """
        rank = self._plan.model.adapter.rank
        if report.rank in {None, rank}:
            return rank
        if report.rank is None or report.rank > rank or not properties(self._plan).mixed_ranks:
            raise LichenError(Code.FRAME_INVALID, f"an adapter of rank {report.rank}, where the plan has {rank}")
        return report.rank

    def charge_evaluation(self, report: records.EvaluateReport, state: ServerState) -> None:
        """Under privacy, charge a client's hold-out.

        Raises:
            LichenError: FRAME_INVALID, if its noise is not the plan's.
        """
        if not self._plan.private:
            return
        planned = planned_evaluation(self._plan)
        told = Segment(report.noise_multiplier or 0.0, 1.0, 1)
        if not _as_planned(told, planned):
            raise LichenError(Code.FRAME_INVALID, f"the report tells of {told}, the plan of {planned}")
        state.evaluated.setdefault(report.client, []).append(told)

    def _contribution(self, report: records.TrainReport, state: ServerState, staleness: int) -> Contribution:
        steps = 1.0
        local = self._plan.local
        if local.partial or ("steps" in self._plan.cohort.assign and not self._plan.private):
            if not 1 <= report.steps <= _most_steps(self._plan, report.examples or 0):
                raise LichenError(Code.FRAME_INVALID, f"the report tells of {report.steps} steps, more than the plan's or none")
            steps = effective_steps(report.steps, local.betas[0] if local.optimizer == "sgd" else 0.0)
        return Contribution(self._weight(report, state), steps, staleness)

    def _weight(self, report: records.TrainReport, state: ServerState) -> float:
        if self._plan.central:
            return 1.0
        if not self._plan.private:
            if report.examples is None:
                raise LichenError(Code.FRAME_INVALID, "the report bears no weight")
            return float(report.examples)
        if report.declared_size is None:
            raise LichenError(Code.FRAME_INVALID, "the report bears no weight")
        planned = planned_steps(self._plan, report.declared_size, stage_of(self._plan, report.round))
        told = Segment(report.noise_multiplier or 0.0, report.sample_rate or 0.0, report.steps)
        if not _as_planned(told, planned):
            raise LichenError(Code.FRAME_INVALID, f"the report tells of {told}, the plan of {planned}")
        state.spent.setdefault(report.client, []).append(told)
        return float(report.declared_size)


def note_failure(told: Round, client: str, code: Code | None, what: str) -> None:
    """Log that a client failed, and put its error's number into the round's line; no ``code``: it has not answered."""
    log.warning("round %d: %s failed: %s", told.round, client, what)
    told.errors[client] = None if code is None else int(code)


def _most_steps(plan: Plan, examples: int) -> int:
    """Steps of a client that was in time."""
    return plan.local.steps or max(1, math.ceil((plan.local.epochs or 1) * examples / plan.local.batch_size))


def _as_planned(told: Segment, planned: Segment) -> bool:
    """Whether the sample rate is the plan's, and neither the noise less nor the steps more.

    A client's own budget for life may have asked for more noise or fewer steps; another machine's accountant may differ in the last places.
    """
    noise = told.noise_multiplier / planned.noise_multiplier
    return 0.99 <= noise <= 1.01 * MOST_NOISE and math.isclose(told.sample_rate, planned.sample_rate) and 1 <= told.steps <= planned.steps
