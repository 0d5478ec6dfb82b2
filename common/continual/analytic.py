"""`analytic`: the head is a ridge regression on the frozen base's features, solved from sums (Zhuang et al. 2022, ACIL; 2025, AFL).

A client sends Σ x xᵀ and Σ x yᵀ of a task's rows, once, where x is a row's mean-pooled feature, of length 1, and y its label, one-hot.
The coordinator adds them to those of all tasks before and solves (Σ x xᵀ + λ I) W = Σ x yᵀ: the head is that of joint training on all
rows, whatever the order of tasks and clients, so nothing is forgotten. Under differential privacy each client's sums are one release.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from lichen.common.aggregation import MEMORY
from lichen.common.continual.method import Learned, Method, Refuse, check_features, check_sums, head_of
from lichen.common.continual.ridge import CROSS, GRAM, Sums, one_hot, solved
from lichen.common.continual.stream import Stage, is_online, rounds_of_tasks

if TYPE_CHECKING:
    import torch

    from lichen.common.model.adapter import State

_GRAM, _CROSS = f"{MEMORY}.{GRAM}", f"{MEMORY}.{CROSS}"


class Analytic(Method):
    """Adds sums, and solves."""

    gathered_in_words = "sums over rows of their features, by label, and of products of two features (in place of an update)"

    def check(self, refuse: Refuse) -> None:
        """It solves for a head, once a task, and exactly."""
        check_features(self.plan, refuse)
        check_sums(self.plan, refuse)
        kind = self.plan.model.adapter.kind
        if kind != "head":
            refuse(f"continual.method: analytic solves for the head, and model.adapter.kind is {kind}", "Set model.adapter.kind: head.")
        if set(rounds_of_tasks(self.plan)) - {1}:
            refuse(
                "continual.method: analytic has one round a task: a second would count rows twice",
                "Set continual.online.rounds: 1." if is_online(self.plan) else "Set rounds to the number of tasks.",
            )
        if self.plan.model.head.init == "base":
            refuse("continual.method: analytic solves for the whole head, and keeps nothing of the base's", "Set model.head.init: zeros.")
        if self.plan.transfer.downlink.codec != "none":
            refuse("continual.method: analytic is exact, and codecs round what travels", "Set transfer.downlink.codec: none.")

    def gathers(self, round: int) -> Literal["features", "gradients"] | None:
        """Always."""
        return "features"

    def gathered_like(self, stage: Stage, state: Mapping[str, torch.Tensor]) -> State:
        """Sums with those of the task's own labels."""
        return self._sums.like(state[head_of(state)], len(self.own_places(stage.number)))

    def gather(self, features: torch.Tensor, data: Any, weights: torch.Tensor, stage: Stage) -> State:
        """The sums of labels that the task has not are zero, and nobody need add noise to tell that."""
        return self._sums.of(features, one_hot(data.labels, self.own_places(stage.number)), weights)

    def gathered(self, sums: State, model: State, memory: State, stage: Stage) -> Learned:
        """Add the sums to those before, and solve for the head."""
        import torch

        name, (gram, own) = head_of(model), self._sums.read(sums)
        weight = model[name]
        cross = memory[_CROSS].clone() if memory else torch.zeros(weight.shape, dtype=torch.float64)
        cross[self.own_places(stage.number)] += own
        gram = gram + memory[_GRAM] if memory else gram
        step = {name: solved(gram, cross, self.plan.continual.analytic.ridge).to(weight.dtype) - weight}
        bias = {other: -tensor for other, tensor in model.items() if other.endswith(".bias")}  # the head has none
        return Learned(step | bias, {_GRAM: gram, _CROSS: cross})

    @property
    def _sums(self) -> Sums:
        return Sums(self.plan.continual.analytic.gram_weight)
