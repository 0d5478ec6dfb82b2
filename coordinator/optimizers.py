"""Server optimizers: how the mean update moves the global model. State in, state out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lichen.common.model.adapter import State
    from lichen.common.plan import Aggregation


def apply_update(model: State, update: State, velocity: State, settings: Aggregation) -> tuple[State, State]:
    """One server step: v ← μ v + Δ, x ← x + η v. FedAvg has μ = 0; FedAvgM (Hsu et al. 2019, eq. 1) has μ > 0.

    Args:
        model: the global tensors x.
        update: the mean update Δ, with the same names and shapes.
        velocity: v, or empty at the start and for FedAvg.
        settings: μ is its momentum, η its learning rate.

    Returns:
        The new x and v.
    """
    if settings.optimizer == "fedavgm":
        velocity = {name: settings.momentum * velocity.get(name, torch.zeros_like(delta)) + delta for name, delta in update.items()}
        update = velocity
    return {name: tensor + settings.learning_rate * update[name] for name, tensor in model.items()}, velocity
