"""The private step: one gradient a unit, clipped, summed, noised (Abadi et al. 2016), on Opacus' optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from lichen.common.batching import pass_cost, passes
from lichen.common.device import sent
from lichen.common.errors import Code, LichenError
from lichen.common.privacy.randomness import Noise, SecretSource, add_noises

if TYPE_CHECKING:
    import numpy as np

    from lichen.common.model.adapter import TunedModel
    from lichen.common.model.packing import Packing
    from lichen.common.privacy.randomness import RandomSource
    from lichen.common.tasks.task import Batch

Unit = Sequence[int]
"""The rows that share one clipped gradient: one row for `example`, all of an entity's rows for `entity`."""


class Engine(Protocol):
    """Computes the clipped sum of one batch."""

    def clipped_sum(self, sizes: Sequence[int], loss: Callable[[nn.Module], torch.Tensor], clip: float) -> dict[nn.Parameter, torch.Tensor]:
        """The sum over units of their gradients, each scaled to a norm of at most ``clip``; what is not finite counts as zero.

        Args:
            sizes: rows of each unit, in the order of the batch.
            loss: the batch's scalar loss by a network; a sum of terms of single rows.
            clip: the bound; ``inf`` leaves the gradients as they are.
        """
        ...

    def remove_hooks(self) -> None:
        """Leave the network as it was."""
        ...


def _engine(name: str, network: nn.Module, packing: Packing | None) -> Engine:
    if name == "hooks":
        from lichen.common.privacy.hooks import HooksModule

        return HooksModule(network)
    from lichen.common.privacy.single_backward.module import SingleBackwardModule

    return SingleBackwardModule(network, packing)


class PerUnitGradients:
    """Computes clipped sums of per-unit gradients of a model. Made once for a model; each round's tensors are loaded into it.

    Args:
        model: what is trained.
        losses: the loss of each row of a batch, shape (B,); see `Task.losses`.
        max_rows: rows that pass through the model at once.
        engine: ``single-backward``, our own, or ``hooks``, Opacus', which can't follow packed batches.
        packing: tells how a batch lies in the model, where it may be packed.

    Raises:
        LichenError: MODEL_DP_UNSUPPORTED, if a trainable module has no per-example gradient rule.
    """

    def __init__(
        self,
        model: TunedModel,
        losses: Callable[[nn.Module, Batch], torch.Tensor],
        max_rows: int,
        engine: Literal["single-backward", "hooks"] = "single-backward",
        packing: Packing | None = None,
    ) -> None:
        self.model = model
        self._losses = losses
        self._max_rows = max_rows
        self._engine = _engine(engine, model.network, packing)

    @cached_property
    def pass_cost(self) -> float:
        """What one more pass costs, in tokens, by the model's shape when it is first asked for."""
        return pass_cost(self.model)

    def step(
        self,
        optimizer: NoisyOptimizer,
        units: Sequence[Unit],
        collate: Callable[[Sequence[int]], Batch],
        lengths: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Clip each unit's gradient, sum, and let the optimizer add its noise and step.

        An empty draw takes a step of noise alone: leaving it out would tell that the draw was empty.

        Args:
            optimizer: steps once.
            units: what was drawn.
            collate: a batch of the given rows.
            lengths: tokens of each row of the data, by which units are dealt to passes; None: in their order.

        Raises:
            LichenError: MODEL_DP_UNSUPPORTED, if the forward pass does what the engine can't follow.
        """
        packs = self._packs(units) if lengths is None else self._packs_by_length(units, lengths)
        for number, pack in enumerate(packs):
            optimizer.zero_grad(set_to_none=True)
            optimizer.take(self.clipped_sum(pack, collate, optimizer.max_grad_norm))
            optimizer.signal_skip_step(do_skip=number + 1 < len(packs))
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _packs(self, units: Sequence[Unit]) -> list[list[Unit]]:
        """Whole units, so many that their rows fit; a unit that does not fit alone has a pack of its own. At least one pack."""
        packs: list[list[Unit]] = [[]]
        rows = 0
        for unit in units:
            if packs[-1] and rows + len(unit) > self._max_rows:
                packs.append([])
                rows = 0
            packs[-1].append(unit)
            rows += len(unit)
        return packs

    def _packs_by_length(self, units: Sequence[Unit], lengths: Sequence[int] | np.ndarray) -> list[list[Unit]]:
        """Units of about one length together: of `_packs`' bounds, those that pad least."""
        longest = [max(int(lengths[row]) for row in unit) for unit in units]
        found = passes([len(unit) for unit in units], longest, self._max_rows, self.pass_cost)
        return [[units[index] for index in pack] for pack in found] or [[]]

    def clipped_sum(
        self, units: Sequence[Unit], collate: Callable[[Sequence[int]], Batch], clip: float
    ) -> dict[nn.Parameter, torch.Tensor]:
        """The clipped sum of a pack's gradients, where a unit's gradient is the mean over its rows."""
        rows = [row for unit in units for row in unit]
        weights = sent(torch.tensor([1 / len(unit) for unit in units for _ in unit]), self.model.device)
        sizes = [len(unit) for unit in units]
        if not rows:
            return {}

        def loss_of(part: slice) -> Callable[[nn.Module], torch.Tensor]:
            return lambda network: (self._losses(network, collate(rows[part])) * weights[part]).sum()

        if len(rows) <= self._max_rows:
            return self._engine.clipped_sum(sizes, loss_of(slice(None)), clip)
        # one unit in several passes: it is summed whole, then clipped once
        total: dict[nn.Parameter, torch.Tensor] = {}
        for start in range(0, len(rows), self._max_rows):
            part = slice(start, min(start + self._max_rows, len(rows)))
            for parameter, gradient in self._engine.clipped_sum([part.stop - start], loss_of(part), math.inf).items():
                total[parameter] = total[parameter].add_(gradient) if parameter in total else gradient
        norm = torch.stack([gradient.norm() for gradient in total.values()]).norm()
        if not torch.isfinite(norm):
            return {}
        factor = (clip / norm).clamp(max=1.0)
        return {parameter: gradient.mul_(factor) for parameter, gradient in total.items()}

    def remove(self) -> None:
        """Leave the model as it was."""
        self._engine.remove_hooks()


class NoisyOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' DPOptimizer over sums that were clipped already, with noise from a `RandomSource`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        source: RandomSource,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self._source = source
        self._clipped: dict[nn.Parameter, torch.Tensor] | None = None
        if isinstance(source, SecretSource):
            here = self.params[0].device.type == "cpu"
            source.draw_ahead(sum(parameter.numel() for parameter in self.params), busy=None if here else 1)

    def take(self, clipped: dict[nn.Parameter, torch.Tensor]) -> None:
        """Give the clipped sum of a physical batch for the next `step`; a parameter that it lacks has a sum of zero."""
        self._clipped = clipped

    @property
    def grad_samples(self) -> list[torch.Tensor]:
        """The parameters: Opacus asks only whether there are any."""
        return list(self.params)

    @property
    def accumulated_iterations(self) -> int:
        """The denominator is the expected batch, in however many physical batches it came."""
        return 1

    def clip_and_accumulate(self) -> None:
        """Add the clipped sum that was given to what earlier physical batches of this step left; each is added once.

        Raises:
            LichenError: INTERNAL, if none was given: a gradient that nobody clipped must not pass.
        """
        if self._clipped is None:
            raise LichenError(Code.INTERNAL, "a private step was asked for without clipped gradients")
        for parameter in self.params:
            clipped = self._clipped.get(parameter)
            if clipped is None:
                clipped = torch.zeros(parameter.shape, device=parameter.device)
            parameter.summed_grad = clipped if parameter.summed_grad is None else parameter.summed_grad.add_(clipped)
        self._clipped = None

    def add_noise(self) -> None:
        """Put the clipped sum plus noise of standard deviation σ·C, over the expected batch size, into each ``p.grad``."""
        noise = Noise(self.noise_multiplier * self.max_grad_norm, self._source, self.expected_batch_size)
        totals = [parameter.summed_grad.contiguous().unsqueeze(0) for parameter in self.params]
        add_noises(totals, [noise])
        for parameter, total in zip(self.params, totals, strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype)

    def scale_grad(self) -> None:
        """Nothing: `add_noise` has divided already, on its way."""
