"""`ewc`, elastic weight consolidation: weights that mattered to old tasks are held where those left them (Kirkpatrick et al. 2017).

How much a weight mattered is the diagonal of the Fisher matrix, summed over tasks, with one anchor, the newest model (Schwarz et al. 2018,
section 3.2). A task's last round estimates it and trains nothing: of a batch of B rows at weights near a minimum, B times the square of the
mean gradient is about the mean of the squares of single rows' gradients. Under differential privacy that gradient is clipped and noised as
in any other step, and what the noise adds to its square is taken off: the release is the noised sum, and is charged as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from lichen.common.aggregation import KEPT, SUMS, part_of, properties
from lichen.common.continual.method import Learned, Method, Pull, Refuse, Squares, check_one_model, check_stream, check_sums
from lichen.common.continual.stream import Stage, is_online, rounds_of_tasks, stage_of

if TYPE_CHECKING:
    import torch

    from lichen.common.model.adapter import State

_ANCHOR, _FISHER, _SUMS = f"{KEPT}.anchor.", f"{KEPT}.fisher.", f"{SUMS}.fisher."


class EWC(Method):
    """Keeps an anchor and a weight for each trained number."""

    alone = True
    gathered_in_words = "squares of summed gradients (in a task's last round, in place of an update)"

    def check(self, refuse: Refuse) -> None:
        """It needs tasks of two rounds and more, one model, and all of it trained at once."""
        check_stream(self.plan, refuse)
        check_one_model(self.plan, refuse)
        check_sums(self.plan, refuse)
        if 1 in rounds_of_tasks(self.plan):
            refuse(
                "continual.method: ewc needs two rounds a task: the last tells which weights matter",
                "Set continual.online.rounds: 2, or more." if is_online(self.plan) else "Raise rounds.",
            )
        if len(properties(self.plan).phases) > 1:
            refuse(
                f"continual.method: ewc with aggregation.rule: {self.plan.aggregation.rule}, which trains one factor at a time",
                "Nearest valid: aggregation.rule: fedavg, or ffa.",
            )

    def gathers(self, round: int) -> Literal["features", "gradients"] | None:
        """In the last round of each task."""
        return "gradients" if stage_of(self.plan, round).last == round else None

    def gathered_like(self, stage: Stage, state: Mapping[str, torch.Tensor]) -> State:
        """One number for each that is trained."""
        return {_SUMS + name: tensor for name, tensor in state.items() if part_of(name) != KEPT}

    def kept_like(self, trained: Mapping[str, torch.Tensor]) -> State:
        """Room for the anchor and the Fisher."""
        import torch

        names = [(prefix + name, tensor) for prefix in (_ANCHOR, _FISHER) for name, tensor in trained.items()]
        return {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in names}

    def fisher(self, squares: Squares) -> State:
        """The sum over a client's rows."""
        return {_SUMS + name: squares.rows * (mean - squares.noise) for name, mean in squares.mean.items()}

    def pulls(self, kept: State, trained: Mapping[str, torch.Tensor]) -> list[Pull]:
        """Each weight towards its anchor, λ F / 2 its cost; F is scaled so that its mean over all that is trained is one."""
        fisher = {name.removeprefix(_FISHER): tensor for name, tensor in kept.items() if name.startswith(_FISHER)}
        whole = sum(float(tensor.sum()) for tensor in fisher.values())
        if not whole:  # in the first task
            return []
        scale = self.plan.continual.ewc.weight * sum(tensor.numel() for tensor in fisher.values()) / whole
        local = self.plan.local
        most = 1 / max(local.learning_rate, local.head_learning_rate or 0)  # a step of plain SGD then reaches the anchor, and not beyond it
        found = []
        for name, tensor in trained.items():
            anchor, strength = (part.to(tensor.device) for part in (kept[_ANCHOR + name], (scale * fisher[name]).clamp(max=most)))
            found.append(Pull(name, partial(_towards, anchor=anchor, strength=strength)))
        return found

    def gathered(self, sums: State, model: State, memory: State, stage: Stage) -> Learned:
        """Add to what mattered before; where noise says less than nothing, it is nothing."""
        return Learned({_FISHER + name.removeprefix(_SUMS): tensor.clamp(min=0) for name, tensor in sums.items()}, memory)

    def ended(self, model: State, memory: State, stage: Stage, start: State) -> Learned:
        """The model as it is becomes the anchor."""
        kept = {name: tensor for name, tensor in model.items() if name.startswith(_ANCHOR)}
        return Learned({name: model[name.removeprefix(_ANCHOR)] - tensor for name, tensor in kept.items()}, memory)


def _towards(tensor: torch.Tensor, anchor: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return strength * (tensor - anchor)
