"""The round: choose a cohort, ask it, add what comes back, step, checkpoint; score beside the next. A Flower Strategy that resumes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result as FlowerResult
from flwr.serverapp.strategy import Strategy

from lichen.common import records
from lichen.common.aggregation import KEPT, part_of
from lichen.common.codec.registry import downlink_codec
from lichen.common.continual import make_method, training_rounds
from lichen.common.continual.measures import drift_of
from lichen.common.continual.stream import is_online, is_stream, stage_of
from lichen.common.errors import Code, LichenError, name_of
from lichen.common.model.base import rows_by_class
from lichen.common.privacy.schedule import looks
from lichen.common.result import Result, Round
from lichen.coordinator.aggregation.central_dp import CentralDP
from lichen.coordinator.aggregation.merged import folded
from lichen.coordinator.aggregation.normalised import factor
from lichen.coordinator.cohort import Cohorts
from lichen.coordinator.downlink import Downlink
from lichen.coordinator.messages import Messages
from lichen.coordinator.optimizers import server_step
from lichen.coordinator.replies import Counted, Replies, note_failure
from lichen.coordinator.run_directory import Before, Release, RunDirectory, ServerState
from lichen.coordinator.telling import Evaluator, Teller
from lichen.coordinator.updates import Updates
from lichen.coordinator.versions import Versions, measured

if TYPE_CHECKING:
    import torch
    from flwr.serverapp import Grid

    from lichen.common.continual.method import Learned
    from lichen.common.continual.stream import Stage
    from lichen.common.model.adapter import State
    from lichen.common.plan import Plan
    from lichen.common.result import Metrics

log = logging.getLogger(__name__)
_UNHEARD = 0
"""In place of an error's number: who was asked for a look that is not over."""


class FederatedStrategy(Strategy):  # type: ignore[misc]
    """Rounds of one plan.

    Args:
        plan: what to do.
        directory: where the run is kept; a run that was begun there goes on.
        result: the document to fill in.
        evaluator: scores models.
        spool: where payloads lie beside their messages; None where they travel inside.
        name_of: the name of a node, where the grid knows it: then a report must bear it.
        beside: whether a model is scored in a thread of its own while the next round runs. Only sound where no client trains in this
            process, on the evaluator's model.
        assign: what one node is asked otherwise than the plan says, by its id and the payload's bytes (`Assigner.of`).
        prepare: whether nodes load what the plan needs before the first round's time counts: they are machines of their own.
    """

    def __init__(
        self,
        plan: Plan,
        directory: RunDirectory,
        result: Result,
        evaluator: Evaluator,
        spool: Path | None = None,
        name_of: Callable[[int], str] | None = None,
        *,
        beside: bool = False,
        assign: Callable[[int, int], dict[str, Any]] | None = None,
        prepare: bool = False,
    ) -> None:
        self.plan = plan
        self.directory = directory
        self.result = result
        self.state: ServerState
        self._start: State
        self._told: Round
        self._used: list[int] = []
        self._waited = 0.0
        """Seconds that the round under way waited for new data."""
        self._unprepared = prepare
        # a Poisson cohort is never cut short, however many were drawn
        self._enough = plan.cohort.size if plan.cohort.oversample > 1 else None
        self._evaluator = evaluator
        self._spool = spool
        self._name: Callable[[int], str] = name_of or str
        self._method = make_method(plan)
        self._central = CentralDP(plan, secret=result.privacy.noise == "secret") if plan.central else None
        self._downlink = Downlink(downlink_codec(plan.transfer.downlink), spool)
        self._cohorts = Cohorts(plan, self._name, self._central)
        self._replies = Replies(plan, name_of)
        self._updates = Updates(plan, spool, self._replies)
        self._messages = Messages(plan, directory.text, self._name, self._downlink, self._cohorts, self._updates, assign)
        self._teller = Teller(plan, directory, result, evaluator, self._central, beside=beside)

    def summary(self) -> None:
        """Log what is run."""
        log.info("%s: %d rounds, plan %s", self.plan.name, self.plan.rounds, self.directory.plan_sha256[:12])

    # --- the loop ---

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> FlowerResult:
        """Run the rounds that are left, from the newest checkpoint or from ``initial_arrays``.

        Args:
            grid: the way to the nodes.
            initial_arrays: the payload of round 1.
            num_rounds: rounds in all.
            timeout: seconds for the answers of a round.
            train_config: not used; the assignment carries the plan.
            evaluate_config: not used.
            evaluate_fn: not used; the evaluator scores.

        Raises:
            LichenError: COHORT_TOO_SMALL, ROUND_FAILED, RUN_STOPPED; OUTPUT_UNUSABLE, if a backup took the run back behind a release.
        """
        self.summary()
        content = RecordDict({"payload": initial_arrays})
        self._start = records.get_tensors(content, self._spool)
        self.state = self.directory.load_state() or ServerState(0, self._start, {}, {})
        self._resume(num_rounds)
        if self._central and self.state.round < num_rounds:
            self.directory.check_not_restored()
        before, began = self.result.seconds or 0.0, time.monotonic()
        try:
            for number in range(self.state.round + 1, num_rounds + 1):
                self._round(number, num_rounds, grid, timeout)
                self._teller.settle()  # lines are told in order, and at most one round waits for its score
                self._save()
                self._teller.score(self._told, self.state, before + time.monotonic() - began, num_rounds)
            self._teller.settle()
        except BaseException as error:
            self._teller.settle_after(error)
            raise
        self._downlink.close(self.state)
        return FlowerResult()

    def final_model(self) -> tuple[State, int]:
        """The mean of the last rounds' models, as the plan asks; of a stream the newest version that is not held back.

        With it goes what the continual method keeps, and the number (from 0) of the last task that it has learned.
        """
        if is_stream(self.plan):
            versions = Versions(self.directory.path, self.plan)
            current = versions.current()
            return versions.state(current), current.number - 1
        return self._mean_of_last() | self.state.memory, 0

    def _mean_of_last(self) -> State:
        count = self.plan.aggregation.average_last
        return {name: tensor / count for name, tensor in self.state.average.items()} if count > 1 else self.state.average

    def _resume(self, num_rounds: int) -> None:
        self._teller.resume(self.state, num_rounds)

    def _round(self, number: int, num_rounds: int, grid: Grid, timeout: float) -> None:
        began, stage = time.monotonic(), stage_of(self.plan, number)
        self._waited = 0.0
        task = stage.task.name if stage.task else None
        self._told = Round(round=number, task=task, participants=0, failed=0, uplink_bytes=0, downlink_bytes=0, seconds=0)
        messages = list(self.configure_train(number, self._arrays(), ConfigRecord(), grid))
        self.aggregate_train(number, self._messages.ask(messages, timeout, grid, self._told, self.state, self._enough))
        self._add_to_average(number)
        if task and number == stage.last:
            self._end_task(task, stage)
        every = self.plan.evaluation.federated_every
        # only then, since to write a model takes the disk's time
        messages = list(self.configure_evaluate(number, self._arrays(), ConfigRecord(), grid)) if every and not number % every else []
        if messages:
            self.aggregate_evaluate(number, self._messages.ask(messages, timeout, grid, self._told, self.state))
        self._told.seconds = round(time.monotonic() - began - self._waited, 3)
        self.state.round = number

    def _end_task(self, task: str, stage: Stage) -> None:
        """The next task starts from the mean of this one's last rounds, with budgets of its own: no record is read in both.

        A batch of which no update was used has taught nothing, and leaves what the method keeps as it was.
        """
        state = self.state
        if state.learned:
            if self.plan.aggregation.average_last > 1:
                final = self._mean_of_last()
                step = {name: final[name] - tensor for name, tensor in state.model.items() if part_of(name) != KEPT}
                state.model = self._downlink.add(step, state)
            self._learn(self._method.ended(state.model, state.memory, stage, self._start))
        state.learned = False
        for client, history in state.spent.items():
            state.spent_before.setdefault(client, {})[task] = history
        state.average, state.velocity, state.squares, state.spent, state.exhausted, state.rowless = {}, {}, {}, {}, {}, []

    def _learn(self, learned: Learned) -> None:
        self.state.learned = True
        if learned.step:
            # where 8 bits hold a block's largest well, they lose most of a Fisher matrix, and move what is to stay
            self.state.model = self._downlink.add_exactly(learned.step, self.state)
        self.state.memory = learned.memory

    def _save(self) -> None:
        """Write the checkpoint, with the round's line: it is told once its score is there, also after a crash."""
        self._teller.keep(self._told, self.state)
        self.directory.save_state(self.state)

    # --- training ---

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message with the assignment and the model for each node of the round's cohort.

        Nobody is asked again whose answers are in a noised sum that a crash left behind.
        """
        if self._central and self.directory.load_release(server_round):
            return []
        nodes = self.directory.load_cohort(server_round)
        if nodes is None:
            nodes = self._choose(server_round, grid)
            self.directory.save_cohort(server_round, nodes)
            self._prepare(server_round, nodes, grid)
        if is_online(self.plan):
            self._begin_batch(server_round, nodes)
        return self._messages.to_nodes(records.TRAIN, nodes, arrays, grid, self._told, self.state)

    def _begin_batch(self, number: int, nodes: Iterable[int]) -> None:
        if number == stage_of(self.plan, number).first:
            self.state.batch = sorted(map(self._name, nodes))
            if (before := self.state.before) and before.round == number:
                self._told.before_by_task, self._told.drift, self._told.before_errors = before.by_task, before.drift, before.errors

    def _choose(self, number: int, grid: Grid) -> list[int]:
        if not is_online(self.plan):
            return self._cohorts.choose(number, grid, self.state)
        if number != stage_of(self.plan, number).first:
            try:
                return self._cohorts.choose(number, grid, self.state, among=frozenset(self.state.batch))
            except LichenError as error:
                if error.code is not Code.COHORT_TOO_SMALL:
                    raise
                log.warning("%s; the batch goes on", error.what)
                return []
        self._teller.settle()  # data may come in days: what was done so far is told before
        began = time.monotonic()
        nodes = self._wait_for_batch(number, grid)
        self._waited = time.monotonic() - began
        return nodes

    def _wait_for_batch(self, number: int, grid: Grid) -> list[int]:
        """The cohort of a batch's first round, once there is enough new data, and different enough where the plan asks for that.

        After the last look that the plan counts, more data are enough: hold-outs have no noise for another.
        """
        online, state, most = self.plan.continual.online, self.state, looks(self.plan, stage_of(self.plan, number))
        before = state.before if state.before and state.before.round == number else Before(round=number)

        def announce(nodes: list[int]) -> list[str]:
            return self._messages.announce(nodes, number, grid, state)

        while True:
            nodes, rows = self._cohorts.wait_for_data(number, grid, state, announce, before.least)
            if not self.plan.evaluation.federated_every or before.enough or before.attempts >= most:
                return nodes
            self._evaluate_before(nodes, grid, before)
            before.enough = online.drift is None or before.drift is None or before.drift >= online.drift or not rows
            before.least = rows if before.enough else rows + online.clients * online.rows
            self.directory.save_state(state)  # what was scored is charged, whatever comes next
            if before.enough:
                return nodes
            then = "hold-outs are scored again" if before.attempts < most else f"after {most} looks (continual.online.looks) it begins"
            log.info(
                "round %d waits: drift is %.3f, below continual.online.drift (%g), in %d rows; %s when they are %d",
                *(number, before.drift, online.drift, rows, then, before.least),
            )

    def _evaluate_before(self, nodes: Sequence[int], grid: Grid, before: Before) -> None:
        """Have the model scored on what a batch is about to be trained on.

        A look that a crash cut off is made again under the same number, for which a node pays once. Who was asked the first time and is
        not now may have paid for what nobody counts: it is told as one that failed.
        """
        able = self._cohorts.with_budget(records.EVALUATE, list(nodes), self.state)
        asked = {self._name(node) for node in able}
        before.errors = {**dict.fromkeys(asked, _UNHEARD), **before.errors}
        self.state.before = before
        self.directory.save_state(self.state)
        messages = list(self._messages.to_nodes(records.EVALUATE, able, self._arrays(), grid, self._told, self.state, before.attempts))
        replies = self._messages.ask(messages, self.plan.cohort.deadline_s, grid, self._told, self.state) if messages else []
        found = self._scores(replies)
        before.attempts += 1
        before.errors = {name: number or None for name, number in before.errors.items() if number != _UNHEARD or name not in asked}
        before.errors |= self._told.errors
        self._told.errors.clear()  # the round's own are those of its training
        before.by_task = found[1] if found else {}
        before.drift = drift_of([measured(metrics) for metrics in before.by_task.values()]) if found else None

    def _prepare(self, number: int, nodes: Iterable[int], grid: Grid) -> None:
        """Before the first round that is begun since the start: later ones find most nodes ready, and wait for nobody who is not."""
        if self._unprepared:
            self._messages.prepare(nodes, number, self.plan.cohort.deadline_s, grid, self.state, self._enough)
        self._unprepared = False

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the usable updates, and step the model.

        Raises:
            LichenError: COHORT_TOO_SMALL, if fewer than `cohort.minimum` are usable, and others failed that have rows; never under
                `unit: client`.
        """
        if self._central:
            self._step(self._release(self._central, server_round, replies).update, {})
            return self._arrays(), None
        self._apply(server_round, self._replies.counted(replies, self._told, self.state))
        return self._arrays(), None

    def _apply(self, round: int, counted: Sequence[Counted]) -> None:
        """Step the model by those updates that are usable. Raises as `aggregate_train`."""
        total, usable, most = self._updates.added(counted, self._told, self.state.model)
        self._count(usable)
        if len(usable) < self.plan.cohort.minimum and self._may_pass(round):
            log.warning("round %d: %d usable updates, cohort.minimum is %d: none is used", round, len(usable), self.plan.cohort.minimum)
            self._used, self._told.participants = [], 0
            return
        if len(usable) < self.plan.cohort.minimum:
            self._teller.tell_privacy(self.state)
            raise LichenError(
                Code.COHORT_TOO_SMALL,
                f"usable updates: {len(usable)}, cohort.minimum is {self.plan.cohort.minimum}",
                where=f"round {round}",
                fix=f"By client: {_errors(self._told.errors)}. docs/errors.md explains the numbers; a client's own log has the reason.",
            )
        if self._method.gathers(round):
            self._learn(self._method.gathered(total.change(), self.state.model, self.state.memory, stage_of(self.plan, round)))
            return
        share, change = factor([one.counts for one in usable], most), total.change()
        self._step(change if share == 1 else {name: share * tensor for name, tensor in change.items()}, total.restart(), total.room)
        if not self.plan.private:
            reports = [one.report for one in usable]
            weight = sum(report.examples or 0 for report in reports)
            self._told.train_loss = sum((report.train_loss or 0) * (report.examples or 0) for report in reports) / weight

    def _may_pass(self, round: int) -> bool:
        """Whether a round may go by without an update: where data come as they will, or who failed has no rows of the task, all of them.

        Not one of sums, which no later round makes good.
        """
        if is_online(self.plan):
            return True
        lack_rows = bool(self.plan.continual.stream) and not self.plan.private and set(self._told.errors.values()) == {Code.DATA_EMPTY}
        return lack_rows and not self._method.gathers(round)

    def _release(self, central: CentralDP, round: int, replies: Iterable[Message]) -> Release:
        """The round's noised sum: the one that a crash left behind, or a new one, which is on the disk before anything follows from it."""
        release = self.directory.load_release(round)
        if release is None:
            counted = self._replies.counted(replies, self._told, self.state)
            total, usable = self._updates.clipped(counted, central, self._told, self.state)
            self._count(usable)
            release = central.release(total, round)
            self.directory.save_release(round, release)
        self.result.privacy.max_epsilon = central.spent(round)
        self.state.clip = release.clip
        return release

    def _count(self, usable: list[Counted]) -> None:
        """Put into the round's line what was used, and who failed."""
        self._used = [one.message.metadata.src_node_id for one in usable]
        self._told.participants, self._told.failed = len(usable), len(self._told.errors)
        self._told.uplink_bytes = sum(records.payload_bytes(one.message.content) for one in usable)

    def _step(self, change: State, restart: State, room: torch.Tensor | None = None) -> None:
        """Move the model; ``room`` may be overwritten."""
        state, change = self.state, self._without_noise(change)
        state.learned = True
        step, state.velocity, state.squares = server_step(change, state.velocity, state.squares, self.plan.aggregation)
        whole = step | {name: step[name] + tensor if name in step else tensor for name, tensor in restart.items()}
        state.model = self._downlink.add(whole, state, room)

    def _without_noise(self, change: State) -> State:
        """Without what moves the head's rows of labels on which no loss of the task depends: noise of privacy, and of codecs."""
        import torch

        if not self.plan.continual.stream:
            return change
        labels, moved = self.plan.task.labels, self._method.moved_labels(stage_of(self.plan, self._told.round).number)
        still = torch.tensor([place for place, label in enumerate(labels) if label not in moved], dtype=torch.int64)
        return change | {name: change[name].index_fill(0, still, 0) for name in rows_by_class(change, len(labels))}

    def _add_to_average(self, number: int) -> None:
        if number in training_rounds(self.plan, stage_of(self.plan, number))[-self.plan.aggregation.average_last :]:
            model, sums = folded(self.plan, self.state.model), self.state.average
            self.state.average = {name: sums[name] + tensor if sums else tensor for name, tensor in model.items()}

    def _arrays(self) -> ArrayRecord:
        return self._downlink.arrays(self.state)

    # --- federated evaluation ---

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message with the model for each node whose update was used, in the rounds that the plan names.

        Who did not answer just before is not waited for again.
        """
        every = self.plan.evaluation.federated_every
        if not every or server_round % every:
            return []
        nodes = self._cohorts.with_budget(records.EVALUATE, sorted(self._used), self.state)
        return self._messages.to_nodes(records.EVALUATE, nodes, arrays, grid, self._told, self.state)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Metrics over all hold-outs together."""
        if (found := self._scores(replies)) is None:
            return None
        self._told.federated, self._told.federated_by_task = found
        return MetricRecord({name: value for name, value in found[0].items() if value is not None})

    def _scores(self, replies: Iterable[Message]) -> tuple[Metrics, dict[str, Metrics | None]] | None:
        """The clients' hold-outs together, and by task; None where there are none."""
        reports: list[records.EvaluateReport] = []
        stage = stage_of(self.plan, self._told.round)
        for report, _ in self._replies.reports(records.EvaluateReport, replies, self._told):
            try:
                self._replies.charge_evaluation(report, self.state)
                self._evaluator.add_counts([report], stage)  # alone first, so that one client's nonsense is its own failure
            except LichenError as error:
                note_failure(self._told, report.client, error.code, error.what)
                continue
            reports.append(report)
        return self._evaluator.add_counts(sorted(reports, key=lambda report: report.client), stage) if reports else None


def _errors(by_client: Mapping[str, int | None]) -> str:
    """Numbers and names of the clients' errors, for people."""
    told = {client: "no answer" if number is None else f"error {number} ({name_of(number)})" for client, number in by_client.items()}
    return ", ".join(f"{client}: {error}" for client, error in told.items()) or "nobody failed"
