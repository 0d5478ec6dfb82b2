"""`adapters`: one adapter and head a task, which is never changed later, and a router that finds a row's task.

The task is that of the nearest class centroid, or of the best class by ridge regression, in the feature space of the frozen base. The
first round of a task gathers the sums for that; the others train. The sums are a release: under differential privacy the round is charged
as so many noised steps as any other, of the same noise and sample rate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lichen.common.aggregation import KEPT, MEMORY, SUMS, B, part_of
from lichen.common.continual.method import (
    Learned,
    Learner,
    Method,
    Part,
    Refuse,
    Scored,
    check_features,
    check_one_model,
    check_one_task_each,
    check_stream,
    check_sums,
    head_of,
    together,
)
from lichen.common.continual.ridge import CROSS, GRAM, Sums, one_hot, solved
from lichen.common.continual.stream import Stage, rounds_of_tasks, stage_of

if TYPE_CHECKING:
    import torch

    from lichen.common.model.adapter import State, TunedModel
    from lichen.common.plan import Plan
    from lichen.common.tasks.task import Scores, Task

_GRAM = f"{MEMORY}.{GRAM}"
_OF_TASK = re.compile(rf"{MEMORY}\.(\d+)\.(.+)")


class Adapters(Method):
    """Keeps each task's adapter at the coordinator, and what finds a row's task."""

    alone = True
    gathered_in_words = (
        "sums over rows of their features, by label, and with router: ridge of products of two features (in a task's first round)"
    )

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._known: dict[str, torch.Tensor] = {}  # features of the coordinator's own rows, which never change

    def check(self, refuse: Refuse) -> None:
        """It needs tasks of two rounds and more, and an adapter of one rank."""
        check_stream(self.plan, refuse)
        check_one_model(self.plan, refuse)
        check_one_task_each(self.plan, refuse)
        check_features(self.plan, refuse)
        check_sums(self.plan, refuse)
        if self.plan.evaluation.federated_every:
            refuse(
                "continual.method: adapters with federated evaluation: finished adapters and the router are at the coordinator alone",
                "Set evaluation.federated_every: 0; the coordinator's own validation rows are scored by task.",
            )
        if self.plan.model.adapter.kind == "full":
            refuse("continual.method: adapters keeps one adapter a task, and kind full has none", "Set model.adapter.kind: lora.")
        if 1 in rounds_of_tasks(self.plan):
            refuse("continual.method: adapters needs two rounds a task: the first gathers class centroids", "Raise rounds.")

    def gathers(self, round: int) -> Literal["features", "gradients"] | None:
        """In the first round of each task."""
        return "features" if stage_of(self.plan, round).first == round else None

    def gathered_like(self, stage: Stage, state: Mapping[str, torch.Tensor]) -> State:
        """Sums of the features of each of the task's classes, and where the plan asks for it Σ x xᵀ."""
        return self._sums.like(state[head_of(state)], len(self.own_places(stage.number)))

    def gather(self, features: torch.Tensor, data: Any, weights: torch.Tensor, stage: Stage) -> State:
        """Each row adds its feature to its class' sum: where only directions are compared, counts are not needed."""
        return self._sums.of(features, one_hot(data.labels, self.own_places(stage.number)), weights)

    def gathered(self, sums: State, model: State, memory: State, stage: Stage) -> Learned:
        """Keep the task's sums, and add what is of all tasks."""
        gram, cross = self._sums.read(sums)
        return Learned({}, memory | {_GRAM: gram + memory[_GRAM] if _GRAM in memory else gram, _cross_of(stage.number): cross})

    def ended(self, model: State, memory: State, stage: Stage, start: State) -> Learned:
        """Keep the adapter; the next task's begins as the plan says."""
        own = {f"{MEMORY}.{stage.number}.{name}": tensor.clone() for name, tensor in model.items() if part_of(name) != KEPT}
        fresh = self.plan.continual.adapters.start == "fresh"
        return Learned({name: start[name] - tensor for name, tensor in model.items()} if fresh else {}, memory | own)

    def models(self, state: State, last: int) -> dict[str, Learner]:
        """Each task's."""
        tasks = self.plan.continual.stream
        return {tasks[number].name: Learner(own, self.own_labels(number)) for number, own in self._models(state).items()}

    def router(self, state: State) -> State:
        """What each class' score is made by."""
        return {self.plan.continual.stream[number].name: own.float() for number, own in self._router(state).items()}

    def _router(self, state: State) -> dict[int, torch.Tensor]:
        """By task (from 0) the weights of its classes' scores, (c, d)."""
        from torch.nn import functional as F  # noqa: N812 - torch's own convention

        cross = {number: state[name] for number in range(len(self.plan.continual.stream)) if (name := _cross_of(number)) in state}
        if self.plan.continual.adapters.router == "centroids":
            return {number: F.normalize(own, dim=1) for number, own in cross.items()}
        return {number: solved(state[_GRAM], own, self.plan.continual.adapters.ridge) for number, own in cross.items()}

    def _models(self, state: State) -> dict[int, State]:
        """By task (from 0) the model that it has ended with."""
        by_task: dict[int, State] = {}
        for name, tensor in state.items():
            if (match := _OF_TASK.fullmatch(name)) and part_of(match[2]) != SUMS:
                by_task.setdefault(int(match[1]), {})[match[2]] = tensor
        return by_task

    def score(self, task: Task[Any], model: TunedModel, state: State, parts: Sequence[Part], show: Callable[[State], None]) -> list[Scored]:
        """Each row by the adapter of the task that the router finds; while a task is trained, its own is the one under way."""
        router, by_task = self._router(state), self._models(state)
        if not router:
            return super().score(task, model, state, parts, show)
        plain = {name: tensor for name, tensor in state.items() if part_of(name) != MEMORY}
        found = []
        for part in parts:
            tasks = _routed(self._features(task, model, plain, part, show)[part.rows], router)

            def by(number: int, rows: list[int], part: Part = part) -> Scores:
                show(by_task.get(number) or plain)
                task.choose_among(self.own_labels(number))
                return task.score(model.network, part.data, self.plan.evaluation.batch_size, rows, part.collate)

            rows = {number: [row for row, of in zip(part.rows, tasks, strict=True) if of == number] for number in {*tasks, part.number}}
            pieces = {number: by(number, rows[number]) for number in sorted(rows)}
            known = None
            if part.number in router:
                astray = [row for row, of in zip(part.rows, tasks, strict=True) if of != part.number]
                known = together(task, [pieces[part.number], by(part.number, astray)]).metrics()["accuracy"]
            routed = len(rows[part.number]) / len(tasks)
            found.append(Scored(together(task, [*pieces.values()]), {"routed": routed, "accuracy_task_known": known}))
        return found

    def _features(self, task: Task[Any], model: TunedModel, state: State, part: Part, show: Callable[[State], None]) -> torch.Tensor:
        """Of all rows of a part's data, by the base alone: where B is zero, the adapter does nothing."""
        key = part.data.digest
        if key not in self._known:
            show(without_adapter(state))
            self._known[key] = task.features(model.network, part.data, self.plan.evaluation.batch_size, part.collate)
        return self._known[key]

    @property
    def _sums(self) -> Sums:
        return Sums(1.0 if self.plan.continual.adapters.router == "ridge" else 0.0)


def _routed(features: torch.Tensor, router: Mapping[int, torch.Tensor]) -> list[int]:
    """The task of each row's best class."""
    import torch

    tasks = sorted(router)
    best = torch.stack([(features @ router[number].T).amax(1) for number in tasks])
    return [tasks[place] for place in best.argmax(0).tolist()]


def _cross_of(number: int) -> str:
    return f"{MEMORY}.{number}.{CROSS}"


def without_adapter(state: Mapping[str, torch.Tensor]) -> State:
    """A state of the same model whose adapter does nothing."""
    return {name: tensor.new_zeros(tensor.shape) if part_of(name) == B else tensor for name, tensor in state.items()}
