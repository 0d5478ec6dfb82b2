"""The updates that replies bear: opened one at a time, and added; one that is of no use is its own client's failure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lichen.common import records
from lichen.common.aggregation import update_like
from lichen.common.codec.layout import Layout
from lichen.common.codec.registry import uplink_codec
from lichen.common.continual import make_method
from lichen.common.errors import LichenError
from lichen.common.model.adapter import State, check_finite
from lichen.coordinator.aggregation import make_rule
from lichen.coordinator.aggregation.normalised import Contribution
from lichen.coordinator.replies import Counted, Replies, note_failure

if TYPE_CHECKING:
    from flwr.app import Message

    from lichen.common.codec.codec import Payload
    from lichen.common.plan import Plan
    from lichen.common.result import Round
    from lichen.coordinator.aggregation.central_dp import CentralDP, ClippedSum
    from lichen.coordinator.aggregation.rule import Rule
    from lichen.coordinator.run_directory import ServerState


class Sum(NamedTuple):
    """A round's updates, added."""

    rule: Rule
    usable: list[Counted]
    """Those that are in it."""
    most: float
    """The most effective steps of one, which weights are in proportion to."""


class Updates:
    """Those of one run.

    Args:
        plan: the run's.
        spool: where payloads lie beside their messages; None where they travel inside.
        replies: reads reports.
    """

    def __init__(self, plan: Plan, spool: Path | None, replies: Replies) -> None:
        self._plan, self._spool, self._replies = plan, spool, replies
        self._codec = uplink_codec(plan.transfer.uplink)

    def open(self, one: Counted, model: State) -> Payload:
        """An update that fits the model; whether its values are finite is known where a codec wrote them.

        Raises:
            LichenError: as `records.get_update`.
        """
        codec = None if make_method(self._plan).gathers(one.report.round) else self._codec  # sums travel as they are
        return records.get_update(one.message.content, self._spool, codec, self._like(one, model))

    def is_usable(self, reply: Message, round: int, model: State) -> bool:
        """Whether a reply to training seems to bear an update for the sum. It charges nothing, and tells nobody."""
        try:
            report = self._replies.read(records.TrainReport, reply)
            self.open(Counted(report, reply, self._replies.rank(report), Contribution(1.0)), model)
        except LichenError:
            return False
        return report.round == round

    def added(self, counted: Sequence[Counted], told: Round, model: State) -> Sum:
        """The sum of the usable updates.

        Whether their values are finite is seen from the sum, which spares a pass over each. Only if it is not, each is looked at, and the
        others are added anew: who sends such an update is refused alone, and the sum is the same as without it.
        """
        most = max((one.counts.steps for one in counted), default=1.0)
        total, usable = make_rule(self._plan, told.round, model), []
        for one, update in self._opened(counted, told, model):
            try:
                total.add(update, one.counts.weight(most), one.rank)
            except LichenError as error:
                note_failure(told, one.report.client, error.code, error.what)
            else:
                usable.append(one)
        if not total.finite():
            usable = [one for one in usable if self._is_finite(one, told, model)]
            most = max((one.counts.steps for one in usable), default=1.0)
            total = make_rule(self._plan, told.round, model)
            for one in usable:
                total.add(self.open(one, model), one.counts.weight(most), one.rank)
        return Sum(total, usable, most)

    def clipped(self, counted: Iterable[Counted], central: CentralDP, told: Round, state: ServerState) -> tuple[ClippedSum, list[Counted]]:
        """The sum under `unit: client`, and the updates that are in it."""
        like = update_like(self._plan, told.round, self._plan.model.adapter.rank, state.model)
        total, usable = central.sum_of(like, state.clip or self._plan.privacy.clip), []
        for one, update in self._opened(counted, told, state.model):
            if self._is_finite(one, told, state.model):
                usable.append(one)
                total.add(update.decoded(Layout.of(like)), within=one.report.within_clip is not False)
        return total, usable

    def _opened(self, counted: Iterable[Counted], told: Round, model: State) -> Iterator[tuple[Counted, Payload]]:
        """Those whose updates fit the model, one at a time."""
        for one in counted:
            try:
                update = self.open(one, model)
            except LichenError as error:
                note_failure(told, one.report.client, error.code, error.what)
                continue
            yield one, update

    def _is_finite(self, one: Counted, told: Round, model: State) -> bool:
        try:
            check_finite(self.open(one, model).decoded(Layout.of(self._like(one, model))))
        except LichenError as error:
            note_failure(told, one.report.client, error.code, error.what)
            return False
        return True

    def _like(self, one: Counted, model: State) -> State:
        """Tensors as this update must have them."""
        return update_like(self._plan, one.report.round, one.rank, model)
