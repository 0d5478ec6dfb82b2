"""The check at start: does the private step clip and sum as a loop over single examples does? If not, nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lichen.common.device import sent
from lichen.common.errors import Code, LichenError
from lichen.common.privacy.hooks import expected_hooks
from lichen.common.privacy.per_unit import NoisyOptimizer, PerUnitGradients
from lichen.common.tasks.task import CHECKED_ROWS

if TYPE_CHECKING:
    from lichen.common.tasks.task import Batch

TOLERANCE = 1e-4
_TIGHT = 1e-6
"""A clip that all rows are over."""


class _Silent:
    """A source without noise."""

    secret = False

    def uniform(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float64)

    def normal(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64)


def self_check(
    gradients: PerUnitGradients,
    losses: Callable[[nn.Module, Batch], torch.Tensor],
    collate: Callable[[list[int]], Batch],
) -> None:
    """Compare the clipped sum with the loop over single examples, on a made-up batch (a real one would be read outside the accounting).

    Of the parameters that are trained now. All trainable tensors are moved off their start for the check, since at LoRA's start half of
    all gradients are zero, and put back. The adapter's dropout, random as it is, is off meanwhile.

    Args:
        gradients: what is checked.
        losses: `Task.losses`.
        collate: makes a batch of some of `CHECKED_ROWS` made-up rows.

    Raises:
        LichenError: PRIVACY_SELF_CHECK, if they differ, or if the sum, or the adapter's part of it, is zero.
    """
    model = gradients.model
    start = model.state()
    generator = torch.Generator().manual_seed(0)
    dropouts = [module for module in model.network.modules() if isinstance(module, nn.Dropout) and module.training]
    try:
        for module in dropouts:
            module.eval()
        with torch.no_grad():
            for parameter in model.trainable.values():
                parameter.add_(sent(0.02 * torch.randn(parameter.shape, generator=generator), parameter.device))
        one_by_one = [_gradient(model.network, list(model.active.values()), losses, collate([row])) for row in range(CHECKED_ROWS)]
        norms = torch.stack([torch.sqrt(sum((part**2).sum() for part in parts)) for parts in one_by_one])  # type: ignore[arg-type]
        clip = float(norms.median()) or 1.0  # some rows are clipped, some are not
        factors = (clip / norms).clamp(max=1.0)
        expected = [torch.einsum("i,i...", factors, torch.stack(parts)) for parts in zip(*one_by_one, strict=True)]
        got = _clipped_sum(gradients, clip, collate)
    finally:
        model.load(start)
        for module in dropouts:
            module.train()
    size = torch.sqrt(sum((part**2).sum() for part in expected))  # type: ignore[arg-type]
    error = torch.sqrt(sum(((left - right) ** 2).sum() for left, right in zip(got, expected, strict=True)))  # type: ignore[arg-type]
    if not float(size) > 0 or not float(error) <= TOLERANCE * float(size):
        raise LichenError(
            Code.PRIVACY_SELF_CHECK,
            f"the clipped sum differs from the loop over single examples by {float(error):.3g} (its norm is {float(size):.3g})",
            where="model.base",
            fix="This model can't be trained privately as it is; nothing was trained.",
        )
    # noise would move an adapter that learns nothing, so that it moved proves nothing
    body = [part for name, part in zip(model.active, expected, strict=True) if name not in model.head]
    if body and not any(bool(part.any()) for part in body):
        raise LichenError(
            Code.PRIVACY_SELF_CHECK,
            "no gradient reaches the adapter",
            where="model.adapter.targets",
            fix="Name modules that the model's forward pass uses.",
        )


def bound_check(gradients: PerUnitGradients, collate: Callable[[Sequence[int]], Batch]) -> None:
    """Check that no made-up row moves the sum by more than the clip, in passes as they will be: in 16 bits no loop gives the same sum.

    Args:
        gradients: what is checked.
        collate: makes a batch of some of `CHECKED_ROWS` made-up rows.

    Raises:
        LichenError: PRIVACY_SELF_CHECK, if one does.
    """
    for row in range(CHECKED_ROWS):
        parts = gradients.clipped_sum([[row]], collate, _TIGHT)
        norm = float(torch.sqrt(sum(part.double().square().sum() for part in parts.values())))  # type: ignore[arg-type]
        if not norm <= _TIGHT * (1 + TOLERANCE):
            raise LichenError(
                Code.PRIVACY_SELF_CHECK,
                f"in 16 bits a row that is clipped to {_TIGHT:g} moves the sum by {norm:.3g}",
                where="local.precision",
                fix="Set local.precision: float32; nothing was trained.",
            )


def _gradient(
    network: nn.Module,
    parameters: list[nn.Parameter],
    losses: Callable[[nn.Module, Batch], torch.Tensor],
    batch: Batch,
) -> list[torch.Tensor]:
    with expected_hooks():
        found = torch.autograd.grad(losses(network, batch).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _clipped_sum(gradients: PerUnitGradients, clip: float, collate: Callable[[list[int]], Batch]) -> list[torch.Tensor]:
    parameters = list(gradients.model.active.values())
    before = [parameter.detach().clone() for parameter in parameters]
    # the noised sum's grid follows the noise multiplier: a small one rounds nothing away
    optimizer = NoisyOptimizer(
        torch.optim.SGD(parameters, lr=1.0), noise_multiplier=1e-6, max_grad_norm=clip, expected_batch_size=1.0, source=_Silent()
    )
    gradients.step(optimizer, [[row] for row in range(CHECKED_ROWS)], lambda rows: collate(list(rows)))
    return [old - parameter.detach() for old, parameter in zip(before, parameters, strict=True)]
