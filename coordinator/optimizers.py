"""Server optimizers: how the mean update moves the global model. State in, state out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from lichen.common.model.adapter import State
    from lichen.common.plan import Aggregation


class Stepped(NamedTuple):
    """What a server step gives."""

    step: State
    """What is to be added to the model."""
    velocity: State
    squares: State


def server_step(update: State, velocity: State, squares: State, settings: Aggregation) -> Stepped:
    """One server step on the tensors that the update has; what is kept of others stays as it is.

    FedAvg adds η Δ to the model. FedAvgM (Hsu et al. 2019, eq. 1): v ← μ v + Δ, adds η v. FedAdam and FedYogi (Reddi et al. 2021,
    algorithm 2): m ← β₁ m + (1 − β₁) Δ, adds η m / (√s + τ), where FedAdam has s ← β₂ s + (1 − β₂) Δ², and FedYogi
    s ← s − (1 − β₂) Δ² sign(s − Δ²). All start at zero, and are not corrected for it, as in the paper.

    Args:
        update: Δ, of some of the model's tensors, as the aggregation rule gives it.
        velocity: v or m; a tensor that is not there is zero.
        squares: s; a tensor that is not there is zero.
        settings: of the plan.
    """
    step = update
    if settings.optimizer == "fedavgm":
        step = {name: settings.momentum * _kept(velocity, name, delta) + delta for name, delta in update.items()}
        velocity = velocity | step
    elif settings.optimizer in {"fedadam", "fedyogi"}:
        first, second = settings.betas
        means = {name: first * _kept(velocity, name, delta) + (1 - first) * delta for name, delta in update.items()}
        found = {}
        for name, delta in update.items():
            kept, square = _kept(squares, name, delta), delta.square()
            toward = square - kept if settings.optimizer == "fedadam" else square * torch.sign(square - kept)
            found[name] = kept + (1 - second) * toward
        velocity, squares = velocity | means, squares | found
        step = {name: mean / (found[name].sqrt() + settings.tau) for name, mean in means.items()}
    if settings.learning_rate != 1:
        step = {name: settings.learning_rate * tensor for name, tensor in step.items()}
    return Stepped(step, velocity, squares)


def _kept(state: State, name: str, like: torch.Tensor) -> torch.Tensor:
    return state[name] if name in state else torch.zeros_like(like)
