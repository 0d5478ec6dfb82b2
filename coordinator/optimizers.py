"""Server optimizers: how the mean update moves the global model. State in, state out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lichen.common.model.adapter import State
    from lichen.common.plan import Aggregation


def server_step(update: State, velocity: State, settings: Aggregation) -> tuple[State, State]:
    """One server step: v ← μ v + Δ, and η v is to be added to the model. FedAvg has μ = 0; FedAvgM (Hsu et al. 2019, eq. 1) has μ > 0.

    Args:
        update: the mean update Δ.
        velocity: v, or empty at the start and for FedAvg.
        settings: μ is its momentum, η its learning rate.

    Returns:
        What is to be added to the model, and the new v.
    """
    if settings.optimizer == "fedavgm":
        velocity = {name: settings.momentum * velocity.get(name, torch.zeros_like(delta)) + delta for name, delta in update.items()}
        update = velocity
    if settings.learning_rate == 1:
        return update, velocity
    return {name: settings.learning_rate * tensor for name, tensor in update.items()}, velocity
