"""What a run tells: its rounds, each once its score is there, what was spent, and what travelled. A crash loses no line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from lichen.common.aggregation import KEPT, MEMORY, MERGED, part_of
from lichen.common.continual.stream import is_online, is_stream, stage_of
from lichen.common.privacy.accounting import Segment, epsilon
from lichen.common.privacy.schedule import one_task_each
from lichen.common.result import ClientPrivacy, Metrics, Privacy, Result, Round, Transfer
from lichen.coordinator.scoring import Beside
from lichen.coordinator.versions import Versions

if TYPE_CHECKING:
    from lichen.common import records
    from lichen.common.continual.stream import Stage
    from lichen.common.model.adapter import State
    from lichen.common.plan import Plan
    from lichen.coordinator.aggregation.central_dp import CentralDP
    from lichen.coordinator.run_directory import RunDirectory, ServerState


class Evaluator(Protocol):
    """Scores a model on the coordinator's own data."""

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split."""
        ...

    def validation(self, state: State, stage: Stage) -> Metrics | None:
        """Metrics on the validation split, of a stream on the rows of its tasks until this one; None if there is none."""
        ...

    def validation_by_task(self, state: State, stage: Stage | None) -> dict[str, Metrics | None]:
        """The same on the rows of each task of the stream, after a stage or before the first; empty if there is no split."""
        ...

    def add_counts(self, reports: list[records.EvaluateReport], stage: Stage) -> tuple[Metrics, dict[str, Metrics | None]]:
        """Metrics of the clients' hold-outs together, and by task of the stream until the stage.

        Raises:
            LichenError: FRAME_INVALID, if the counts of one are no counts of this task.
        """
        ...


class Teller:
    """Fills in the result of one run.

    Args:
        plan: the run's.
        directory: where it is kept.
        result: the document.
        evaluator: scores models.
        central: accounts for what is released under `unit: client`; else None.
        beside: whether a model is scored in a thread of its own while the next round runs.
    """

    def __init__(
        self, plan: Plan, directory: RunDirectory, result: Result, evaluator: Evaluator, central: CentralDP | None, *, beside: bool
    ) -> None:
        self._plan, self._directory, self._result = plan, directory, result
        self._evaluator, self._central, self._beside = evaluator, central, beside
        self._scoring = Beside(here=not beside)
        self._versions = Versions(directory.path, plan, directory.plan_sha256)

    def resume(self, state: ServerState, num_rounds: int) -> None:
        """Tell what was told already, and the round of the checkpoint if a crash came before its score: it is scored now."""
        self._result.rounds = self._directory.load_rounds(state.round)
        if is_stream(self._plan) and not state.round:
            self._versions.add_start(self._evaluator.validation_by_task(state.whole, None))
        if state.round:
            self.tell_privacy(state)
        waiting = self._directory.load_for_operator(state.round) if self._central else state.told
        before = sum(told.seconds or 0.0 for told in self._result.rounds)
        if waiting is not None and all(told.round < waiting.round for told in self._result.rounds):
            # in this thread: an engine may yet fork its workers, which other threads do not survive
            scored = self._is_scored(waiting.round, num_rounds)
            self._score_and_tell(waiting, state.whole, before + (waiting.seconds or 0.0), scored=scored)
        elif self._result.rounds:
            self._sum_up(state.whole, before)

    def keep(self, told: Round, state: ServerState) -> None:
        """Tell what was spent, and have the round's line kept with the checkpoint, until it is told."""
        self.tell_privacy(state)
        self._directory.save_result(self._result, metrics=False)
        told.epsilon = self._result.privacy.max_epsilon
        if self._central:
            self._directory.save_for_operator(told)
        else:
            state.told = told

    def score(self, told: Round, state: ServerState, seconds: float, num_rounds: int) -> None:
        """Have the round's model scored, and then the round told, beside the next round; a round without a score is told at once.

        What the next round spends is computed there too: an accountant that is asked between two rounds holds the next one up.
        No tensor of a state is ever changed in place, so the model that is scored stays what it is.

        Args:
            told: the round's line.
            state: after the round.
            seconds: of the run so far.
            num_rounds: in all; the last is always scored.
        """
        model, delta = state.whole, self._plan.privacy.delta
        foreseen = self._foreseen(told, state) if told.round < num_rounds else []
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

    def settle(self) -> None:
        """Wait for the score that is being made. Raises what it raised."""
        self._scoring.settle()

    def settle_after(self, cause: BaseException) -> None:
        """The same where ``cause`` ends the run: a round that is over is told, however the next one ends."""
        self._scoring.settle_after(cause)

    def tell_privacy(self, state: ServerState) -> None:
        """Bring what was spent up to date."""
        privacy = self._result.privacy
        if self._central:
            privacy.central = self._central.account(state.round, last=state.round == self._plan.rounds)
            privacy.max_epsilon = privacy.central.epsilon
        elif self._plan.private:
            privacy.clients = self._clients(state)
            privacy.max_epsilon = max((client.epsilon for client in privacy.clients.values()), default=0.0)

    def _is_scored(self, round: int, num_rounds: int) -> bool:
        stage = stage_of(self._plan, round)
        ends = round == num_rounds or (stage.task is not None and round == stage.last)
        return self._evaluator.has_validation and (round % self._plan.evaluation.every == 0 or ends)

    def _score_and_tell(self, told: Round, model: State, seconds: float, *, scored: bool) -> None:
        stage = stage_of(self._plan, told.round)
        if scored:
            told.validation = self._evaluator.validation(model, stage)
        if stage.task is not None and told.round == stage.last:
            told.by_task = self._evaluator.validation_by_task(model, stage)
            split: Literal["validation", "hold-outs"] = "validation"
            if is_online(self._plan) or not told.by_task:  # batches are the clients' alone
                told.by_task, split = told.by_task | told.federated_by_task, "hold-outs"
            self._versions.add(stage, model, told.by_task, told.epsilon, split, self._before(stage, told))
        if self._central:
            self._directory.save_for_operator(told)
        self._result.rounds.append(told.without_cohort() if self._central else told)
        self._sum_up(model, seconds)

    def _before(self, stage: Stage, told: Round) -> Metrics | None:
        """How the hold-outs of a batch were scored before its first round, of which the last may be ``told``."""
        first = next((line for line in [*self._result.rounds, told] if line.round == stage.first), told)
        return first.before_by_task.get(stage.task.name) if stage.task else None

    def _sum_up(self, model: State, seconds: float) -> None:
        """Bring `result.json` up to date with its rounds."""
        result = self._result
        result.continual = self._versions.summary()
        result.seconds = None if self._central else round(seconds, 3)
        result.parameters = sum(tensor.numel() for name, tensor in model.items() if part_of(name) not in {MERGED, KEPT, MEMORY})
        if self._central:
            result.transfer = Transfer(uplink_bytes=None, downlink_bytes=None)
        else:
            up, down = (sum(getattr(told, key) for told in result.rounds) for key in ("uplink_bytes", "downlink_bytes"))
            updates = sum(told.participants or 0 for told in result.rounds)
            bits = 8 * up / (updates * result.parameters) if updates else None
            result.transfer = Transfer(
                uplink_bytes=up, downlink_bytes=down, bits_per_parameter=bits, ratio_to_fp32=None if bits is None else bits / 32
            )
        self._directory.save_result(result)

    def _foreseen(self, told: Round, state: ServerState) -> list[list[Segment]]:
        """What clients will have spent if their next training is as their last, where all take part in each round.

        Of many clients few are asked again at once, and where scoring is not beside a round this is not either: then nothing.
        """
        if not self._beside or (told.participants or 0) < len(state.spent):
            return []
        return [[*history, history[-1]] for history in state.spent.values()]

    def _clients(self, state: ServerState) -> dict[str, ClientPrivacy]:
        delta, task = self._plan.privacy.delta, stage_of(self._plan, state.round + 1).task
        found = {}
        for name in sorted({*state.spent, *state.spent_before}):
            by_task = dict(state.spent_before.get(name, {}))
            if name in state.spent:
                by_task[task.name if task else ""] = state.spent[name]
            history = [segment for own in by_task.values() for segment in own]
            if not one_task_each(self._plan):
                by_task = {"": history}
            segments = {f"train:{task}" if task else "train": epsilon(own, delta) for task, own in by_task.items()}
            if name in state.evaluated:
                segments["holdout"] = epsilon(state.evaluated[name], delta)
            found[name] = ClientPrivacy(
                epsilon=max(segments.values()),
                epsilon_sum=sum(segments.values()),
                steps=sum(segment.steps for segment in history),
                noise_multiplier=history[-1].noise_multiplier,
                sample_rate=history[-1].sample_rate,
                segments=segments,
            )
        return found


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
