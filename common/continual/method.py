"""What a continual method is: what it keeps of old tasks, what it adds to a client's training, and what it does as a task ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lichen.common.aggregation import MEMORY, RULES, part_of
from lichen.common.continual.stream import Stage, is_stream, labels_until, rows_of

if TYPE_CHECKING:
    import torch

    from lichen.common.batches import Collate
    from lichen.common.model.adapter import State, TunedModel
    from lichen.common.plan import Plan
    from lichen.common.result import Metrics
    from lichen.common.tasks.task import Encoded, Scores, Task


Refuse = Callable[[str, str], None]


class Learned(NamedTuple):
    """What the coordinator does beside a round's own step."""

    step: State
    """What is added to some of the model's tensors, past the server optimizer."""
    memory: State
    """What it keeps from then on; all names begin with `MEMORY`."""


class Squares(NamedTuple):
    """What a client's steps tell of gradients at the weights that a round starts from."""

    mean: State
    """By trained tensor, over the steps: the rows of a step, under privacy those expected, times the square of their mean gradient."""
    rows: float
    """The client's; under privacy what stands for it."""
    noise: float = 0.0
    """What the noise of a step adds to each of these numbers."""


class Pull(NamedTuple):
    """A cost of a trained tensor that depends on no row."""

    name: str
    """Of the tensor."""
    gradient: Callable[[torch.Tensor], torch.Tensor]
    """At a value of it, or of several clients' at once, (S, …)."""


class Method:
    """`sequential`: nothing is done for the old. The others change what they must.

    One object serves both ends; what it keeps travels as tensors, so that any process that has the plan and the state can go on.

    Args:
        plan: whose method it is.
    """

    holds = False
    """Whether each adapted layer adds what is kept by the names of `HELD_A` and `HELD_B`."""
    alone = False
    """Whether a task's labels compete with each other alone: else new rows say of old classes only that they are others, and that is all
    that is learned of them."""
    gathered_in_words = ""
    """What a round sends in place of an update, if it gathers; for the privacy statement."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def check(self, refuse: Refuse) -> None:
        """Refuse what the method can't go with in its plan.

        Args:
            refuse: raises PLAN_UNSOUND, with what is wrong and the way out.
        """

    # --- what both ends must know ---

    def gathers(self, round: int) -> Literal["features", "gradients"] | None:
        """What a round (from 1) gathers sums of, over rows, if it trains nothing: `gather` or `fisher` makes them."""
        return None

    def gathered_like(self, stage: Stage, state: Mapping[str, torch.Tensor]) -> State:
        """Tensors of the names, shapes and types of what such a round of a stage gathers of each client, from the model's state."""
        return {}

    def kept_like(self, trained: Mapping[str, torch.Tensor]) -> State:
        """What the state holds for clients beside the model, as it is before the first round; all names begin with `KEPT`.

        Args:
            trained: the model's trainable tensors.
        """
        return {}

    def choices(self, number: int) -> tuple[str, ...]:
        """The labels among which the model chooses while a task (its number, from 0) is trained."""
        own = self.own_labels(number)
        return own if self.alone and len(own) > 1 else labels_until(self.plan, number)  # of one label nothing would be learned

    def moved_labels(self, number: int) -> tuple[str, ...]:
        """The labels on whose rows of the head a task's losses depend (its number, from 0)."""
        return self.choices(number)

    def own_labels(self, number: int) -> tuple[str, ...]:
        """Those of a task alone, in the plan's order; all, where it names none."""
        tasks = self.plan.continual.stream
        own = tasks[number].labels if tasks else ()
        return tuple(label for label in self.plan.task.labels if label in own) if own else self.plan.task.labels

    def own_places(self, number: int) -> list[int]:
        """Where these are among the plan's."""
        return [self.plan.task.labels.index(label) for label in self.own_labels(number)]

    def added_share(self, stage: Stage) -> float:
        """How many rows of other tasks are expected in a stage, as a share of all that a client declares."""
        return 0.0

    # --- a client's ---

    def rows(self, stage: Stage, columns: Mapping[str, Sequence[object]]) -> list[int]:
        """The numbers of the rows that a client trains on in a stage of a stream, ascending; ``columns`` as in `rows_of`."""
        return rows_of(self.plan, stage.task, columns) if stage.task else list(range(len(next(iter(columns.values()), ()))))

    def examples(
        self, task: Task[Any], model: TunedModel, data: Encoded, stage: Stage, collates: Callable[[], AbstractContextManager[Collate]]
    ) -> Encoded:
        """A client's examples, with what its losses need beside them.

        Args:
            task: of the plan.
            model: with the state that the round starts from; it is left so.
            data: of the stage.
            stage: the round's.
            collates: what makes the data's batches, while it is open.
        """
        return data

    def gather(self, features: torch.Tensor, data: Encoded, weights: torch.Tensor, stage: Stage) -> State:
        """Sums over rows, of which each moves them by at most its weight in ℓ2 norm, all sums together.

        Args:
            features: of each row, (N, d), float64, of length 1 or zero.
            data: the same rows.
            weights: (N,), float64.
            stage: the round's.
        """
        raise NotImplementedError

    def fisher(self, squares: Squares) -> State:
        """The sums of a round that gathers gradients."""
        raise NotImplementedError

    def pulls(self, kept: State, trained: Mapping[str, torch.Tensor]) -> list[Pull]:
        """What else moves weights in a step: after clipping and noise, since it depends on no row.

        Args:
            kept: what the state holds for clients.
            trained: the tensors as a round begins, where they are trained.
        """
        return []

    # --- the coordinator's ---

    def gathered(self, sums: State, model: State, memory: State, stage: Stage) -> Learned:
        """What follows from the clients' sums, added.

        Args:
            sums: as `gathered_like`, in 64 bits.
            model: the model that the round began with.
            memory: what was kept.
            stage: the round's.
        """
        raise NotImplementedError

    def ended(self, model: State, memory: State, stage: Stage, start: State) -> Learned:
        """What follows from a task's end.

        Args:
            model: after its last round.
            memory: what was kept.
            stage: that has ended.
            start: the model before the run's first round.
        """
        return Learned({}, memory)

    def models(self, state: State, last: int) -> dict[str, Learner]:
        """What is saved of a state with all that is kept: the model by the name "", or one for each task by its name.

        Args:
            state: after a task's end.
            last: the task's number (from 0).
        """
        own = {name: tensor for name, tensor in state.items() if part_of(name) != MEMORY}
        return {"": Learner(own, labels_until(self.plan, last))}

    def router(self, state: State) -> State:
        """By task's name the weights, (c, d), of its classes' scores, of which the best finds a row's task; empty for one model."""
        return {}

    def score(self, task: Task[Any], model: TunedModel, state: State, parts: Sequence[Part], show: Callable[[State], None]) -> list[Scored]:
        """Scores of several sets of rows.

        Args:
            task: of the plan.
            model: is shown the state, or another of its kind.
            state: of the model, with what the coordinator keeps.
            parts: the sets.
            show: gives the model a state.
        """
        show(state)
        found = []
        for part in parts:
            task.choose_among(part.choices)
            scores = task.score(model.network, part.data, self.plan.evaluation.batch_size, part.rows, part.collate)
            found.append(Scored(scores))
        return found


class Learner(NamedTuple):
    """A model, and what it has learned to tell apart."""

    state: State
    labels: tuple[str, ...]


class Part(NamedTuple):
    """Rows to score."""

    data: Encoded
    """Where they are."""
    rows: Sequence[int]
    """Their numbers."""
    number: int
    """Of the task (from 0) that they are of."""
    choices: tuple[str, ...]
    """The labels that the model chooses among, if it does not know itself."""
    collate: Collate | None = None
    """Makes the data's batches; None: the task does."""


class Scored(NamedTuple):
    """How rows were scored."""

    scores: Scores
    shares: Metrics = {}  # noqa: RUF012 - never changed
    """What else is told of the rows, each a share of them: `routed`, for which the method found their own task, and
    `accuracy_task_known`, as if it had for all."""

    def metrics(self) -> Metrics:
        """All together."""
        return self.scores.metrics() | self.shares


def together(task: Task[Any], parts: Sequence[Scores]) -> Scores:
    """The scores of several sets of rows as those of one."""
    losses = [part.loss_sum for part in parts]
    counts = [sum(column) for column in zip(*(part.counts.flatten().tolist() for part in parts), strict=True)]
    return task.scores_from(counts, None if None in losses else sum(loss for loss in losses if loss is not None))


def head_of(state: Mapping[str, torch.Tensor]) -> str:
    """The name of the head's weight, (C, d)."""
    return next(name for name, tensor in state.items() if part_of(name) is None and tensor.dim() == 2)


def check_stream(plan: Plan, refuse: Refuse) -> None:
    """Refuse a plan without tasks, where a method keeps old ones."""
    if not is_stream(plan):
        refuse(f"continual.method: {plan.continual.method} without a continual.stream: there is nothing old", "List its tasks.")


def check_one_model(plan: Plan, refuse: Refuse) -> None:
    """Refuse rules that add to the base, or have clients of several ranks, where a method keeps an adapter of the plan's rank."""
    needs, rule = RULES[plan.aggregation.rule], plan.aggregation.rule
    if needs.changes_base or needs.mixed_ranks:
        why = "adds to the base, of which no second one is kept" if needs.changes_base else "has clients of several ranks"
        refuse(
            f"continual.method: {plan.continual.method} with aggregation.rule: {rule}, which {why}",
            "Nearest valid: aggregation.rule: rolora, or fedavg.",
        )


def check_features(plan: Plan, refuse: Refuse) -> None:
    """Refuse heads whose features are not what sums are made of."""
    if plan.model.head.pooling != "mean":
        refuse(f"continual.method: {plan.continual.method} needs the features of mean pooling", "Set model.head.pooling: mean.")


def check_one_task_each(plan: Plan, refuse: Refuse) -> None:
    """Refuse to add what an update lost to the next one, where that may be of another task's adapter."""
    if plan.transfer.uplink.error_feedback:
        refuse(
            f"transfer.uplink.error_feedback with continual.method: {plan.continual.method}: what is left of one task's adapter is none of"
            " the next one's",
            "Leave it out, and use codec: eden, whose errors average out.",
        )


def check_sums(plan: Plan, refuse: Refuse) -> None:
    """Refuse what a round that gathers sums can't go with."""
    method = plan.continual.method
    if plan.cohort.oversample > 1:
        refuse(
            f"cohort.oversample with continual.method: {method}: the rows of who is called off are in no sum, and none comes after it",
            "Leave cohort.oversample out.",
        )
    if plan.cohort.mode == "buffered":
        refuse(
            f"continual.method: {method} with cohort.mode: buffered, which has no round to gather sums in", "Set cohort.mode: synchronous."
        )
    if plan.central:
        refuse(
            f"continual.method: {method} under unit: client, which is not built: its sums need a clip of their own",
            "Nearest valid: privacy.unit: example.",
        )
