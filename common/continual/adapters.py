"""`adapters`: one adapter and head a task, never changed later; a row goes to the task of the nearest class centroid.

The first round of a task gathers its class centroids, in the feature space of the frozen base; the others train. Centroids are a release:
under differential privacy the round is charged as so many noised steps as any other, of the same noise and sample rate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lichen.common.aggregation import KEPT, MEMORY, SUMS, B, part_of
from lichen.common.continual.method import (
    Learned,
    Method,
    Part,
    Refuse,
    Scored,
    check_one_model,
    check_stream,
    check_sums,
    head_of,
    one_hot,
    together,
)
from lichen.common.continual.stream import Stage, stage_of, stages

if TYPE_CHECKING:
    import torch

    from lichen.common.model.adapter import State, TunedModel
    from lichen.common.plan import Plan
    from lichen.common.tasks.task import Task

_CENTROIDS = f"{SUMS}.centroids"
_OF_TASK = re.compile(rf"{MEMORY}\.(\d+)\.(.+)")


class Adapters(Method):
    """Keeps each task's adapter at the coordinator, and its centroids."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._known: dict[str, torch.Tensor] = {}  # features of the coordinator's own rows, which never change

    def check(self, refuse: Refuse) -> None:
        """It needs tasks of two rounds and more, and an adapter of one rank."""
        check_stream(self.plan, refuse)
        check_one_model(self.plan, refuse)
        check_sums(self.plan, refuse)
        if self.plan.model.adapter.kind == "full":
            refuse("continual.method: adapters keeps one adapter a task, and kind full has none", "Set model.adapter.kind: lora.")
        if any(stage.rounds == 1 for stage in stages(self.plan)):
            refuse("continual.method: adapters needs two rounds a task: the first gathers class centroids", "Raise rounds.")

    def gathers(self, round: int) -> bool:
        """In the first round of each task."""
        return stage_of(self.plan, round).first == round

    def gathered_like(self, stage: Stage, state: Mapping[str, torch.Tensor]) -> State:
        """Sums of the features of each of the task's classes, (c, d): where only directions are compared, counts are not needed."""
        weight = state[head_of(state)]
        return {_CENTROIDS: weight.new_empty(len(self.own_labels(stage.number)), weight.shape[1])}

    def choices(self, number: int) -> tuple[str, ...]:
        """The task's own labels: the router decides among tasks."""
        return self.own_labels(number)

    def gather(self, features: torch.Tensor, data: Any, weights: torch.Tensor, stage: Stage) -> State:
        """Each row adds its feature to its class' sum."""
        return {_CENTROIDS: one_hot(data.labels, self.own_places(stage.number)).T @ (features * weights.unsqueeze(1))}

    def gathered(self, sums: State, model: State, memory: State, stage: Stage) -> Learned:
        """Keep the task's centroids."""
        return Learned({}, memory | {f"{MEMORY}.{stage.number}.{_CENTROIDS}": sums[_CENTROIDS].double()})

    def ended(self, model: State, memory: State, stage: Stage, start: State) -> Learned:
        """Keep the adapter; the next task's begins as the plan says."""
        own = {f"{MEMORY}.{stage.number}.{name}": tensor.clone() for name, tensor in model.items() if part_of(name) != KEPT}
        fresh = self.plan.continual.adapters.start == "fresh"
        return Learned({name: start[name] - tensor for name, tensor in model.items()} if fresh else {}, memory | own)

    def models(self, state: State) -> dict[str, State]:
        """Each task's."""
        return {self.plan.continual.stream[number].name: own for number, own in self._parted(state)[1].items() if own}

    def router(self, state: State) -> State:
        """The centroids."""
        from torch.nn import functional as F  # noqa: N812 - torch's own convention

        centroids = self._parted(state)[2]
        return {self.plan.continual.stream[number].name: F.normalize(own, dim=1).float() for number, own in centroids.items()}

    def _parted(self, state: State) -> tuple[State, dict[int, State], dict[int, torch.Tensor]]:
        """The model under way, and by task (from 0) its adapter, once it is there, and its centroids."""
        by_task: dict[int, State] = {}
        for name, tensor in state.items():
            if match := _OF_TASK.fullmatch(name):
                by_task.setdefault(int(match[1]), {})[match[2]] = tensor
        centroids = {number: own.pop(_CENTROIDS) for number, own in by_task.items() if _CENTROIDS in own}
        return {name: tensor for name, tensor in state.items() if part_of(name) != MEMORY}, by_task, centroids

    def score(
        self, task: Task[Any], model: TunedModel, state: State, parts: Sequence[Part], stage: int, show: Callable[[State], None]
    ) -> list[Scored]:
        """Each row by the adapter of the task that the router finds; while a task is trained, its own is the one under way."""
        plain, by_task, centroids = self._parted(state)
        if not centroids:
            return super().score(task, model, state, parts, stage, show)
        found = []
        for part in parts:
            tasks = self._nearest(self._features(task, model, plain, part, show)[part.rows], centroids)
            pieces = []
            for number in sorted(set(tasks)):
                rows = [row for row, of in zip(part.rows, tasks, strict=True) if of == number]
                show(by_task.get(number) or plain)
                task.choose_among(self.choices(number))
                pieces.append(task.score(model.network, part.data, self.plan.evaluation.batch_size, rows, part.collate))
            found.append(Scored(together(task, pieces), sum(of == part.number for of in tasks) / len(tasks)))
        return found

    def _features(self, task: Task[Any], model: TunedModel, state: State, part: Part, show: Callable[[State], None]) -> torch.Tensor:
        """Of all rows of a part's data, by the base alone: where B is zero, the adapter does nothing."""
        key = part.data.digest
        if key not in self._known:
            show(without_adapter(state))
            self._known[key] = task.features(model.network, part.data, self.plan.evaluation.batch_size, part.collate)
        return self._known[key]

    def _nearest(self, features: torch.Tensor, centroids: Mapping[int, torch.Tensor]) -> list[int]:
        """The task of each row's nearest centroid, by the angle."""
        import torch
        from torch.nn import functional as F  # noqa: N812 - torch's own convention

        rows, of = [], []
        for number, own in sorted(centroids.items()):
            rows.append(own)
            of += [number] * len(own)
        nearest = (features @ F.normalize(torch.cat(rows), dim=1).T).argmax(1)
        return [of[place] for place in nearest.tolist()]


def without_adapter(state: Mapping[str, torch.Tensor]) -> State:
    """A state of the same model whose adapter does nothing."""
    return {name: tensor.new_zeros(tensor.shape) if part_of(name) == B else tensor for name, tensor in state.items()}
