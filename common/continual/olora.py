"""`olora`: each task has a LoRA of its own, beside those of earlier tasks, which stay as they are (Wang et al. 2023, O-LoRA).

What a new one learns is kept out of the others' way: the rows of its A are pulled towards directions orthogonal to theirs, by the cost
λ ‖A_t Aᵢᵀ‖² for each earlier task i (section 3.2). It depends on no row, so it is added after clipping and noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from lichen.common.aggregation import HELD_A, HELD_B, KEPT, A, B, beside, part_of
from lichen.common.continual.method import Learned, Method, Pull, Refuse, check_one_model, check_one_task_each, check_stream
from lichen.common.continual.stream import Stage

if TYPE_CHECKING:
    import torch

    from lichen.common.model.adapter import State


class OLoRA(Method):
    """Keeps all earlier adapters at all clients, one after another in two matrices a layer."""

    holds = True
    alone = True

    def check(self, refuse: Refuse) -> None:
        """It needs tasks, and a LoRA whose A is trained."""
        check_stream(self.plan, refuse)
        check_one_model(self.plan, refuse)
        check_one_task_each(self.plan, refuse)
        if self.plan.model.adapter.kind != "lora":
            refuse(
                f"continual.method: olora is for LoRA, and model.adapter.kind is {self.plan.model.adapter.kind}",
                "Set model.adapter.kind: lora.",
            )
        if self.plan.aggregation.rule == "ffa":
            refuse("continual.method: olora with aggregation.rule: ffa, which never trains A", "Nearest valid: aggregation.rule: rolora.")

    def kept_like(self, trained: Mapping[str, torch.Tensor]) -> State:
        """Room for each task's factors but the last one's: A (n r, k) and B (d, n r)."""
        import torch

        found, earlier = {}, len(self.plan.continual.stream) - 1
        for name, tensor in trained.items():
            if (part := part_of(name)) in {A, B}:
                shape = list(tensor.shape)
                shape[0 if part == A else 1] *= earlier
                found[_held(name)] = torch.zeros(shape, dtype=tensor.dtype)
        return found

    def pulls(self, kept: State, trained: Mapping[str, torch.Tensor]) -> list[Pull]:
        """Of each A."""
        import torch

        weight, found = 2 * self.plan.continual.olora.weight, []
        for name, tensor in trained.items():
            if part_of(name) == A and bool((earlier := kept[_held(name)].to(tensor.device)).any()):
                # a step of plain SGD, whose rate is large under privacy, then reaches the orthogonal, and not beyond it
                most = 1 / (self.plan.local.learning_rate * float(torch.linalg.matrix_norm(earlier, 2)) ** 2)
                found.append(Pull(name, partial(_towards_orthogonal, earlier=earlier, weight=min(weight, most))))
        return found

    def ended(self, model: State, memory: State, stage: Stage, start: State) -> Learned:
        """Keep the task's adapter; the next begins at another A, and at zero."""
        import torch

        step: State = {}
        if stage.number == len(self.plan.continual.stream) - 1:
            return Learned(step, memory)
        for name, tensor in model.items():
            if (part := part_of(name)) not in {A, B}:
                continue
            rank, axis = tensor.shape[0 if part == A else 1], 0 if part == A else 1
            kept = torch.zeros_like(model[_held(name)])
            kept.narrow(axis, stage.number * rank, rank).copy_(tensor)
            step[_held(name)] = kept
            step[name] = (self._drawn(name, tensor, stage) if part == A else torch.zeros_like(tensor)) - tensor
        return Learned(step, memory)

    def _drawn(self, name: str, like: torch.Tensor, stage: Stage) -> torch.Tensor:
        """A as PEFT draws it, uniformly in ±1/√k, from the plan's seed and the task."""
        import torch

        digest = hashlib.sha256(f"{self.plan.seed}|{stage.number}|{name}".encode()).digest()
        generator, bound = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1), 1 / math.sqrt(like.shape[1])
        return torch.empty_like(like).uniform_(-bound, bound, generator=generator)


def _towards_orthogonal(tensor: torch.Tensor, earlier: torch.Tensor, weight: float) -> torch.Tensor:
    return weight * (tensor @ earlier.T) @ earlier


def _held(name: str) -> str:
    return f"{KEPT}.{beside(name, HELD_A if part_of(name) == A else HELD_B)}"
