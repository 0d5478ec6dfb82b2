"""The round: choose a cohort, ask it, add what comes back, step, checkpoint; score beside the next. A Flower Strategy that resumes."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result as FlowerResult
from flwr.serverapp.strategy import Strategy

from lichen.common import records
from lichen.common.aggregation import MERGED, part_of, properties, update_like
from lichen.common.codec.codec import Payload
from lichen.common.codec.layout import Layout
from lichen.common.codec.registry import downlink_codec, uplink_codec
from lichen.common.errors import Code, LichenError, name_of
from lichen.common.model.adapter import State, check_finite
from lichen.common.privacy.accounting import Segment, epsilon
from lichen.common.privacy.schedule import MOST_NOISE, planned_evaluation, planned_steps
from lichen.common.result import ClientPrivacy, Metrics, Privacy, Result, Round, Transfer
from lichen.coordinator.aggregation import make_rule
from lichen.coordinator.aggregation.central_dp import CentralDP
from lichen.coordinator.aggregation.normalised import Contribution, effective_steps, factor
from lichen.coordinator.downlink import Downlink
from lichen.coordinator.optimizers import server_step
from lichen.coordinator.run_directory import Release, RunDirectory, ServerState
from lichen.coordinator.scoring import Beside

if TYPE_CHECKING:
    import torch
    from flwr.serverapp import Grid

    from lichen.common.plan import Plan
    from lichen.coordinator.aggregation.rule import Rule

log = logging.getLogger(__name__)
POLL_S = 0.05
R = TypeVar("R", records.TrainReport, records.EvaluateReport)


class Evaluator(Protocol):
    """Scores a model on the coordinator's own data."""

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split."""
        ...

    def validation(self, state: State) -> Metrics | None:
        """Metrics on the validation split; None if there is none."""
        ...

    def add_counts(self, reports: list[records.EvaluateReport]) -> Metrics | None:
        """Metrics of the clients' hold-outs together.

        Raises:
            LichenError: FRAME_INVALID, if the counts of one are no counts of this task.
        """
        ...


@dataclass(frozen=True)
class Counted:
    """A reply whose report holds, and what its update weighs by."""

    report: records.TrainReport
    message: Message
    rank: int
    """Of its client's adapter."""
    counts: Contribution


@runtime_checkable
class CallsOff(Protocol):
    """A grid that can stop waiting before all have answered."""

    def until_enough(self, messages: Iterable[Message], timeout: float, enough: Callable[[Message], bool]) -> list[Message]:
        """Send messages; the replies in the order of arrival, up to the one with which ``enough`` is true. The others are withdrawn."""
        ...


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
    ) -> None:
        self.plan = plan
        self.directory = directory
        self.result = result
        self.state: ServerState
        self._evaluator = evaluator
        self._spool = spool
        self._name_of = name_of
        self._told: Round
        self._beside = beside
        self._assign = assign
        self._scoring = Beside(here=not beside)
        self._used: list[int] = []
        self._codec = uplink_codec(plan.transfer.uplink)
        self._downlink = Downlink(downlink_codec(plan.transfer.downlink), spool)
        self._central = CentralDP(plan, secret=result.privacy.noise == "secret") if plan.central else None

    def summary(self) -> None:
        """Log what is run."""
        log.info("%s: %d rounds, plan %s", self.plan.name, self.plan.rounds, self.plan.sha256()[:12])

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
        return self._messages(records.TRAIN, server_round, arrays, nodes, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the usable updates, and step the model.

        Raises:
            LichenError: COHORT_TOO_SMALL, if fewer than `cohort.minimum` are usable; never under `unit: client`.
        """
        if self._central:
            self._step(self._release(self._central, server_round, replies).update, {})
            return self._arrays(), None
        self._apply(server_round, self._counted(server_round, replies))
        return self._arrays(), None

    def _apply(self, round: int, counted: Sequence[Counted]) -> None:
        """Step the model by those updates that are usable. Raises as `aggregate_train`."""
        total, usable, most = self._sum_of(round, counted)
        if len(usable) < self.plan.cohort.minimum:
            self._tell_privacy()
            raise LichenError(
                Code.COHORT_TOO_SMALL,
                f"usable updates: {len(usable)}, cohort.minimum is {self.plan.cohort.minimum}",
                where=f"round {round}",
                fix=f"By client: {_errors(self._told.errors)}. docs/errors.md explains the numbers; a client's own log has the reason.",
            )
        share, change = factor([one.counts for one in usable], most), total.change()
        self._step(change if share == 1 else {name: share * tensor for name, tensor in change.items()}, total.restart(), total.room)
        if not self.plan.private:
            reports = [one.report for one in usable]
            weight = sum(report.examples or 0 for report in reports)
            self._told.train_loss = sum((report.train_loss or 0) * (report.examples or 0) for report in reports) / weight

    def _sum_of(self, round: int, counted: Sequence[Counted]) -> tuple[Rule, list[Counted], float]:
        """The usable updates, added; which these are, and the most effective steps, which their weights are in proportion to.

        Whether their values are finite is seen from the sum, which spares a pass over each. Only if it is not, each is looked at, and the
        others are added anew: who sends such an update is refused alone, and the sum is the same as without it.
        """
        most = max((one.counts.steps for one in counted), default=1.0)
        total, usable = make_rule(self.plan, round, self.state.model), []
        for one, update in self._opened(counted):
            try:
                total.add(update, one.counts.weight(most), one.rank)
            except LichenError as error:
                self._failed(one.report.client, error.code, error.what)
            else:
                usable.append(one)
        if not total.finite():
            usable = [one for one in usable if self._is_finite(one)]
            most = max((one.counts.steps for one in usable), default=1.0)
            total = make_rule(self.plan, round, self.state.model)
            for one in usable:
                total.add(self._update(one), one.counts.weight(most), one.rank)
        self._count(usable)
        return total, usable, most

    def _counted(self, round: int, replies: Iterable[Message]) -> list[Counted]:
        """The replies whose reports hold, in the order of the clients' names so that sums repeat.

        From here on an update has left its node, and is paid for, whether it is usable or not.
        """
        found = []
        for report, message in sorted(self._reports(records.TrainReport, round, replies), key=lambda found: found[0].client):
            try:
                counts = self._counts(report)  # first: it charges
                found.append(Counted(report, message, self._rank(report), counts))
            except LichenError as error:
                self._failed(report.client, error.code, error.what)
        return found

    def _rank(self, report: records.TrainReport) -> int:
        """Of the adapter that a client trained."""
        rank = self.plan.model.adapter.rank
        if report.rank in {None, rank}:
            return rank
        if report.rank is None or report.rank > rank or not properties(self.plan).mixed_ranks:
            raise LichenError(Code.FRAME_INVALID, f"an adapter of rank {report.rank}, where the plan has {rank}")
        return report.rank

    def _opened(self, counted: Iterable[Counted]) -> Iterator[tuple[Counted, Payload]]:
        """Those whose updates fit the model, one at a time. Whether values are finite is known where a codec wrote them."""
        for one in counted:
            try:
                update = self._update(one)
            except LichenError as error:
                self._failed(one.report.client, error.code, error.what)
                continue
            yield one, update

    def _is_finite(self, one: Counted) -> bool:
        try:
            check_finite(self._update(one).decoded(Layout.of(self._like(one))))
        except LichenError as error:
            self._failed(one.report.client, error.code, error.what)
            return False
        return True

    def _update(self, one: Counted) -> Payload:
        return records.get_update(one.message.content, self._spool, self._codec, self._like(one))

    def _like(self, one: Counted) -> State:
        """Tensors as this update must have them."""
        return update_like(self.plan, one.report.round, one.rank, self.state.model)

    def _count(self, usable: list[Counted]) -> None:
        """Put into the round's line what was used, and who failed."""
        self._used = [one.message.metadata.src_node_id for one in usable]
        self._told.participants, self._told.failed = len(usable), len(self._told.errors)
        self._told.uplink_bytes = sum(records.payload_bytes(one.message.content) for one in usable)

    def _release(self, central: CentralDP, round: int, replies: Iterable[Message]) -> Release:
        """The round's noised sum: the one that a crash left behind, or a new one, which is on the disk before anything follows from it."""
        release = self.directory.load_release(round)
        if release is None:
            like = update_like(self.plan, round, self.plan.model.adapter.rank, self.state.model)
            total = central.sum_of(like, self.state.clip or self.plan.privacy.clip)
            usable = []
            for one, update in self._opened(self._counted(round, replies)):
                if self._is_finite(one):
                    usable.append(one)
                    total.add(update.decoded(Layout.of(like)), within=one.report.within_clip is not False)
            self._count(usable)
            release = central.release(total, round)
            self.directory.save_release(round, release)
        self.result.privacy.max_epsilon = central.spent(round)
        self.state.clip = release.clip
        return release

    def _step(self, change: State, restart: State, room: torch.Tensor | None = None) -> None:
        """Move the model; ``room`` may be overwritten."""
        state = self.state
        step, state.velocity, state.squares = server_step(change, state.velocity, state.squares, self.plan.aggregation)
        state.model = self._downlink.add(step | restart, state, room)

    # --- federated evaluation ---

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message with the model for each node whose update was used, in the rounds that the plan names.

        Who did not answer just before is not waited for again.
        """
        every = self.plan.evaluation.federated_every
        if not every or server_round % every:
            return []
        return self._messages(records.EVALUATE, server_round, arrays, self._with_budget(records.EVALUATE, sorted(self._used)), grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Metrics over all hold-outs together."""
        reports: list[records.EvaluateReport] = []
        for report, _ in self._reports(records.EvaluateReport, server_round, replies):
            try:
                self._charge_evaluation(report)
                self._evaluator.add_counts([report])  # alone first, so that one client's nonsense is its own failure
            except LichenError as error:
                self._failed(report.client, error.code, error.what)
                continue
            reports.append(report)
        found = self._evaluator.add_counts(sorted(reports, key=lambda report: report.client)) if reports else None
        self._told.federated = found
        return MetricRecord({name: value for name, value in found.items() if value is not None}) if found else None

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
        self.state = self.directory.load_state() or ServerState(0, records.get_tensors(content, self._spool), {}, {})
        self._resume(num_rounds)
        if self._central and self.state.round < num_rounds:
            self.directory.check_not_restored()
        before, began = self.result.seconds or 0.0, time.monotonic()
        try:
            for number in range(self.state.round + 1, num_rounds + 1):
                self._round(number, num_rounds, grid, timeout)
                self._scoring.settle()  # lines are told in order, and at most one round waits for its score
                self._save()
                self._score(before + time.monotonic() - began, num_rounds)
            self._scoring.settle()
        except BaseException as error:
            self._scoring.settle_after(error)  # a round that is over is told, however the next one ends
            raise
        self._downlink.close(self.state)
        return FlowerResult()

    def final_model(self) -> State:
        """The mean of the last rounds' models, as the plan asks."""
        count = self.plan.aggregation.average_last
        return {name: tensor / count for name, tensor in self.state.average.items()} if count > 1 else self.state.average

    def _resume(self, num_rounds: int) -> None:
        """Tell what was told already, and the round of the checkpoint if a crash came before its score: it is scored now."""
        self.result.rounds = self.directory.load_rounds(self.state.round)
        if self.state.round:
            self._tell_privacy()
        waiting = self.directory.load_for_operator(self.state.round) if self._central else self.state.told
        before = sum(told.seconds or 0.0 for told in self.result.rounds)
        if waiting is not None and all(told.round < waiting.round for told in self.result.rounds):
            # in this thread: an engine may yet fork its workers, which other threads do not survive
            scored = self._is_scored(waiting.round, num_rounds)
            self._score_and_tell(waiting, self.state.model, before + (waiting.seconds or 0.0), scored=scored)
        elif self.result.rounds:
            self._sum_up(before)

    def _round(self, number: int, num_rounds: int, grid: Grid, timeout: float) -> None:
        began = time.monotonic()
        self._told = Round(round=number, participants=0, failed=0, uplink_bytes=0, downlink_bytes=0, seconds=0)
        messages = list(self.configure_train(number, self._arrays(), ConfigRecord(), grid))
        # a Poisson cohort is never cut short, however many were drawn
        wanted = self.plan.cohort.size if self.plan.cohort.oversample > 1 else None
        self.aggregate_train(number, self._ask(grid, messages, timeout, wanted))
        self._add_to_average(number, num_rounds)
        every = self.plan.evaluation.federated_every
        # only then, since to write a model takes the disk's time
        messages = list(self.configure_evaluate(number, self._arrays(), ConfigRecord(), grid)) if every and not number % every else []
        if messages:
            self.aggregate_evaluate(number, self._ask(grid, messages, timeout))
        self._told.seconds = round(time.monotonic() - began, 3)
        self.state.round = number

    def _add_to_average(self, number: int, num_rounds: int) -> None:
        if number > num_rounds - self.plan.aggregation.average_last:
            self.state.average = {
                name: self.state.average[name] + tensor if self.state.average else tensor for name, tensor in self.state.model.items()
            }

    def _save(self) -> None:
        """Tell what was spent, and write the checkpoint, with the round's line: it is told once its score is there, also after a crash."""
        self._tell_privacy()
        self.directory.save_result(self.result, metrics=False)
        self._told.epsilon = self.result.privacy.max_epsilon
        if self._central:
            self.directory.save_for_operator(self._told)
        else:
            self.state.told = self._told
        self.directory.save_state(self.state)

    def _score(self, seconds: float, num_rounds: int) -> None:
        """Have the round's model scored, and then the round told, beside the next round; a round without a score is told at once.

        What the next round spends is computed there too: an accountant that is asked between two rounds holds the next one up.
        No tensor of a state is ever changed in place, so the model that is scored stays what it is.
        """
        told, model, delta = self._told, self.state.model, self.plan.privacy.delta
        foreseen = self._foreseen() if told.round < num_rounds else []
        scored = self._is_scored(told.round, num_rounds)

        def work() -> None:
            if scored:
                self._score_and_tell(told, model, seconds, scored=True)
            for history in foreseen:
                epsilon(history, delta)  # which keeps what it found

        if not scored:
            self._score_and_tell(told, model, seconds, scored=False)
        if scored or foreseen:
            self._scoring.start(work)

    def _is_scored(self, round: int, num_rounds: int) -> bool:
        return self._evaluator.has_validation and (round % self.plan.evaluation.every == 0 or round == num_rounds)

    def _score_and_tell(self, told: Round, model: State, seconds: float, *, scored: bool) -> None:
        if scored:
            told.validation = self._evaluator.validation(model)
        if self._central:
            self.directory.save_for_operator(told)
        self.result.rounds.append(told.without_cohort() if self._central else told)
        self._sum_up(seconds)

    # --- parts ---

    def _choose(self, round: int, grid: Grid) -> list[int]:
        """A seeded draw of `cohort.asked` of the connected nodes, waiting for `cohort.size`; a secret one by `CentralDP`.

        Drawn from them in the order of their names, where the grid knows them: ids are random, and other in a simulation. Nodes that
        have said that their privacy budget is spent are not drawn.
        """
        nodes = self._wait_for_nodes(round, grid)
        if self._central:
            return sorted(self._central.draw(nodes, round))
        here = len(nodes)
        nodes = self._with_budget(records.TRAIN, nodes)
        if len(nodes) < self.plan.cohort.minimum:
            without = f", {here - len(nodes)} more without privacy budget" if here > len(nodes) else ""
            raise LichenError(
                Code.COHORT_TOO_SMALL,
                f"{len(nodes)} nodes are connected{without}, cohort.minimum is {self.plan.cohort.minimum}",
                where=f"round {round}",
                fix="Connect more nodes, or submit a plan with a smaller minimum.",
            )
        return draw_cohort(self.plan, nodes, round)

    def _wait_for_nodes(self, round: int, grid: Grid) -> list[int]:
        """The connected nodes, by name, once they are `cohort.size`, or those that are there when the deadline has passed."""
        until = time.monotonic() + self.plan.cohort.deadline_s
        if (here := len(list(grid.get_node_ids()))) < self.plan.cohort.size:
            log.info("round %d waits: %d nodes are connected, cohort.size is %d", round, here, self.plan.cohort.size)
        while len(nodes := sorted(grid.get_node_ids(), key=self._name)) < self.plan.cohort.size and time.monotonic() < until:
            time.sleep(POLL_S)
        return nodes

    def _with_budget(self, kind: str, nodes: list[int]) -> list[int]:
        """The nodes that have not answered, in this run, that they have nothing left for such a message."""
        spent = set(self.state.exhausted.get(kind, ()))
        return [node for node in nodes if self._name(node) not in spent]

    def _messages(self, kind: str, round: int, arrays: ArrayRecord, nodes: list[int], grid: Grid) -> Iterator[Message]:
        assignment = self._assignment(kind, round)
        for node in nodes:
            yield self._message(assignment, kind, arrays, node, grid)

    def _assignment(self, kind: str, round: int, training: int | None = None) -> records.Assignment:
        cohort, told = self.plan.cohort, kind == records.TRAIN and self.plan.local.partial
        return records.Assignment(
            plan=self.plan.canonical_json(),
            plan_sha256=self.plan.sha256(),
            round=round,
            clip=(self.state.clip or self.plan.privacy.clip) if self._central else None,
            training=training,
            seconds=cohort.deadline_s if told else None,
        )

    def _message(self, assignment: records.Assignment, kind: str, arrays: ArrayRecord, node: int, grid: Grid) -> Message:
        content = RecordDict({"payload": arrays})
        records.put_chain(content, self.state.chain)
        fetched = self._downlink.bytes_for(self._name(node), content, self.state)
        own = self._assign(node, fetched) if self._assign else {}
        content["assignment"] = records.to_config(assignment.model_copy(update=own))
        self._told.downlink_bytes = (self._told.downlink_bytes or 0) + fetched
        return grid.create_message(content, kind, node, str(assignment.number))

    def _ask(self, grid: Grid, messages: list[Message], timeout: float, wanted: int | None = None) -> list[Message]:
        """The answers until the deadline, or until ``wanted`` of them bear usable updates, where the grid can call the others off."""
        usable = 0

        def enough(reply: Message) -> bool:
            nonlocal usable
            usable += self._is_usable(reply)
            return usable == wanted

        if wanted is not None and len(messages) > wanted and isinstance(grid, CallsOff):
            replies = grid.until_enough(messages, timeout, enough)
        else:
            replies = list(grid.send_and_receive(messages, timeout=timeout))
        sent = {message.metadata.dst_node_id: message for message in messages}
        for reply in replies:
            self._arrived(reply, sent[reply.metadata.src_node_id])
        late = sent.keys() - {reply.metadata.src_node_id for reply in replies}
        if usable == wanted and late:
            self._told.unneeded = len(late)
            log.info("round %d: %d updates are there, so %d clients are called off", self._told.round, usable, len(late))
            return replies
        for node in sorted(late):
            self._failed(self._name(node), None, "no answer within the deadline")
        return replies

    def _arrived(self, reply: Message, asked: Message) -> None:
        client = self._name(asked.metadata.dst_node_id)
        self._downlink.arrived(client, self.state, asked)
        if reply.has_error() and reply.error.code == Code.PRIVACY_BUDGET:
            self._drop_out(asked.metadata.message_type, client)

    def _is_usable(self, reply: Message) -> bool:
        """Whether a reply to training seems to bear an update for the sum. It charges nothing, and tells nobody."""
        try:
            report = self._read(records.TrainReport, reply)
            self._update(Counted(report, reply, self._rank(report), Contribution(1.0)))
        except LichenError:
            return False
        return report.round == self._told.round

    def _drop_out(self, kind: str, client: str) -> None:
        spent = self.state.exhausted.setdefault(kind, [])
        if client not in spent:
            log.warning("%s has no privacy budget left, and is not asked again in this run", client)
            spent.append(client)

    def _reports(self, kind: type[R], round: int, replies: Iterable[Message]) -> Iterator[tuple[R, Message]]:
        """The replies that bear a report of this round and of their own node, at most one a client."""
        seen: set[str] = set()
        for message in replies:
            node = message.metadata.src_node_id
            try:
                report = self._read(kind, message)
                if report.round != round or report.client in seen:
                    raise LichenError(Code.FRAME_INVALID, f"a second report, or one of another round ({report.round})")
            except LichenError as error:
                self._failed(self._name(node), error.code, error.what)
                continue
            seen.add(report.client)
            yield report, message

    def _read(self, kind: type[R], message: Message) -> R:
        if message.has_error():
            number = message.error.code
            code = Code(number) if number in set(Code) else Code.INTERNAL
            raise LichenError(code, message.error.reason or "the client failed")
        report = records.from_config(kind, message.content.config_records.get("report", {}))
        if self._name_of is not None and report.client != self._name_of(message.metadata.src_node_id):
            raise LichenError(Code.FRAME_INVALID, f"the report bears the name {report.client!r}, which is not its node's")
        return report

    def _counts(self, report: records.TrainReport, staleness: int = 0) -> Contribution:
        """What an update weighs by; under local privacy its steps are charged on the way."""
        steps = 1.0
        local = self.plan.local
        if local.partial or ("steps" in self.plan.cohort.assign and not self.plan.private):
            if not 1 <= report.steps <= _most_steps(self.plan, report.examples or 0):
                raise LichenError(Code.FRAME_INVALID, f"the report tells of {report.steps} steps, more than the plan's or none")
            steps = effective_steps(report.steps, local.betas[0] if local.optimizer == "sgd" else 0.0)
        return Contribution(self._weight(report), steps, staleness)

    def _weight(self, report: records.TrainReport) -> float:
        if self._central:
            return 1.0
        if not self.plan.private:
            if report.examples is None:
                raise LichenError(Code.FRAME_INVALID, "the report bears no weight")
            return float(report.examples)
        if report.declared_size is None:
            raise LichenError(Code.FRAME_INVALID, "the report bears no weight")
        planned = planned_steps(self.plan, report.declared_size)
        told = Segment(report.noise_multiplier or 0.0, report.sample_rate or 0.0, report.steps)
        if not _as_planned(told, planned):
            raise LichenError(Code.FRAME_INVALID, f"the report tells of {told}, the plan of {planned}")
        self.state.spent.setdefault(report.client, []).append(told)
        return float(report.declared_size)

    def _charge_evaluation(self, report: records.EvaluateReport) -> None:
        if not self.plan.private:
            return
        planned = planned_evaluation(self.plan)
        told = Segment(report.noise_multiplier or 0.0, 1.0, 1)
        if not _as_planned(told, planned):
            raise LichenError(Code.FRAME_INVALID, f"the report tells of {told}, the plan of {planned}")
        self.state.evaluated.setdefault(report.client, []).append(told)

    def _name(self, node: int) -> str:
        return self._name_of(node) if self._name_of else str(node)

    def _failed(self, client: str, code: Code | None, what: str) -> None:
        log.warning("round %d: %s failed: %s", self._told.round, client, what)
        self._told.errors[client] = None if code is None else int(code)

    def _arrays(self) -> ArrayRecord:
        return self._downlink.arrays(self.state)

    def _sum_up(self, seconds: float) -> None:
        """Bring `result.json` up to date with its rounds."""
        result = self.result
        result.seconds = None if self._central else round(seconds, 3)
        result.parameters = sum(tensor.numel() for name, tensor in self.state.model.items() if part_of(name) != MERGED)
        if self._central:
            result.transfer = Transfer(uplink_bytes=None, downlink_bytes=None)
        else:
            up, down = (sum(getattr(told, key) for told in result.rounds) for key in ("uplink_bytes", "downlink_bytes"))
            updates = sum(told.participants or 0 for told in result.rounds)
            bits = 8 * up / (updates * result.parameters) if updates else None
            result.transfer = Transfer(
                uplink_bytes=up, downlink_bytes=down, bits_per_parameter=bits, ratio_to_fp32=None if bits is None else bits / 32
            )
        self.directory.save_result(result)

    def _tell_privacy(self) -> None:
        if self._central:
            self.result.privacy.central = self._central.account(self.state.round, last=self.state.round == self.plan.rounds)
            self.result.privacy.max_epsilon = self.result.privacy.central.epsilon
        elif self.plan.private:
            clients = self._clients()
            self.result.privacy.clients = clients
            self.result.privacy.max_epsilon = max((client.epsilon for client in clients.values()), default=0.0)

    def _foreseen(self) -> list[list[Segment]]:
        """What clients will have spent if their next training is as their last, where all take part in each round.

        Of many clients few are asked again at once, and where scoring is not beside a round this is not either: then nothing.
        """
        if not self._beside or len(self._used) < len(self.state.spent):
            return []
        return [[*history, history[-1]] for history in self.state.spent.values()]

    def _clients(self) -> dict[str, ClientPrivacy]:
        delta = self.plan.privacy.delta
        found = {}
        for name, history in sorted(self.state.spent.items()):
            segments = {"train": epsilon(history, delta)}
            if name in self.state.evaluated:
                segments["holdout"] = epsilon(self.state.evaluated[name], delta)
            found[name] = ClientPrivacy(
                epsilon=max(segments.values()),
                epsilon_sum=sum(segments.values()),
                steps=sum(segment.steps for segment in history),
                noise_multiplier=history[-1].noise_multiplier,
                sample_rate=history[-1].sample_rate,
                segments=segments,
            )
        return found


def draw_cohort(plan: Plan, nodes: Sequence[int], round: int) -> list[int]:
    """A round's cohort: `cohort.asked` of the nodes, or all if they are fewer; ascending. It follows from the plan's seed."""
    generator = random.Random(f"{plan.seed}|cohort|{round}")  # noqa: S311 - who is asked is no secret here
    return sorted(generator.sample(nodes, min(plan.cohort.asked, len(nodes))))


def _most_steps(plan: Plan, examples: int) -> int:
    """Steps of a client that was in time."""
    return plan.local.steps or max(1, math.ceil((plan.local.epochs or 1) * examples / plan.local.batch_size))


def _errors(by_client: Mapping[str, int | None]) -> str:
    """Numbers and names of the clients' errors, for people."""
    told = {client: "no answer" if number is None else f"error {number} ({name_of(number)})" for client, number in by_client.items()}
    return ", ".join(f"{client}: {error}" for client, error in told.items()) or "nobody failed"


def _as_planned(told: Segment, planned: Segment) -> bool:
    """Whether the sample rate is the plan's, and neither the noise less nor the steps more.

    A client's own budget for life may have asked for more noise or fewer steps; another machine's accountant may differ in the last places.
    """
    noise = told.noise_multiplier / planned.noise_multiplier
    return 0.99 <= noise <= 1.01 * MOST_NOISE and math.isclose(told.sample_rate, planned.sample_rate) and 1 <= told.steps <= planned.steps


def privacy_of(plan: Plan, *, simulated: bool) -> Privacy:
    """The result's privacy section before the first round."""
    if not plan.private:
        return Privacy(unit="none")
    return Privacy(
        unit=plan.privacy.unit,
        adjacency="add/remove",
        delta=plan.privacy.delta,
        max_epsilon=0.0,
        noise="seeded: not private" if simulated else "secret",
    )
