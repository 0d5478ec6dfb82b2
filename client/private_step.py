"""The private steps of a plan's model. Opacus is imported here, and not by a training without privacy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lichen.common.aggregation import properties
from lichen.common.errors import LichenError
from lichen.common.model.precision import full_precision
from lichen.common.privacy.per_unit import NoisyOptimizer, PerUnitGradients
from lichen.common.privacy.self_check import bound_check, self_check
from lichen.common.tasks.task import CHECKED_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from lichen.common.model.adapter import State, TunedModel
    from lichen.common.model.packing import Packing
    from lichen.common.plan import Plan
    from lichen.common.privacy.accounting import Segment
    from lichen.common.privacy.per_unit import Unit
    from lichen.common.privacy.randomness import RandomSource
    from lichen.common.tasks.task import Batch, Encoded, Task


class PrivateStep:
    """Clips, sums and noises as the plan says.

    Args:
        plan: which.
        task: of the plan.
        model: of the plan, to which the engine is attached.
        packing: tells how a batch lies in the model.

    Raises:
        LichenError: MODEL_DP_UNSUPPORTED; PRIVACY_SELF_CHECK where the step is not what it should be.
    """

    def __init__(self, plan: Plan, task: Task[Any], model: TunedModel, packing: Packing) -> None:
        self._plan, self._task, self._model = plan, task, model
        self._gradients = PerUnitGradients(model, task.losses, plan.local.max_physical_batch_size, plan.privacy.gradients, packing)
        self.pass_cost = self._gradients.pass_cost  # of the whole model: a client's rank may make it smaller later
        made_up = task.made_up(CHECKED_ROWS)
        try:
            with full_precision(model.network):
                for phase in properties(plan).phases:
                    model.train_only(phase)
                    self_check(self._gradients, task.losses, lambda rows: task.collate(made_up, rows))
            if plan.local.precision != "float32":
                for phase in properties(plan).phases:
                    model.train_only(phase)
                    bound_check(self._gradients, lambda rows: task.collate(made_up, rows))
        except LichenError:
            self._gradients.remove()  # another attempt on this model starts from the model as it was
            raise
        finally:
            model.train_only()

    def noisy(self, optimizer: torch.optim.Optimizer, segment: Segment, declared_size: int, source: RandomSource) -> NoisyOptimizer:
        """The optimizer, with noise: its denominator is the sample rate times ``declared_size``."""
        return NoisyOptimizer(
            optimizer,
            noise_multiplier=segment.noise_multiplier,
            max_grad_norm=self._plan.privacy.clip,
            expected_batch_size=segment.sample_rate * declared_size,
            source=source,
        )

    def take(
        self,
        optimizer: NoisyOptimizer,
        drawn: Sequence[Unit],
        collate: Callable[[Sequence[int]], Batch],
        lengths: Sequence[int] | np.ndarray | None,
    ) -> None:
        """One step; see `PerUnitGradients.step`."""
        self._gradients.step(optimizer, drawn, collate, lengths)

    def clipped_sum(self, rows: Sequence[int], data: Encoded, clip: float) -> State:
        """Of rows that are a unit each, for the weights as they are."""
        sums = [self._gradients.clipped_sum([[row]], lambda part: self._task.collate(data, part), clip) for row in rows]
        return {name: torch.stack([found[parameter] for found in sums]).sum(0) for name, parameter in self._model.active.items()}
