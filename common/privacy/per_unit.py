"""The private step: one gradient a unit, clipped, summed, noised (Abadi et al. 2016), by Opacus' hooks and optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from opacus.optimizers import DPOptimizer
from torch import nn

from lichen.common.errors import Code, LichenError
from lichen.common.privacy.randomness import noised

if TYPE_CHECKING:
    from lichen.common.model.adapter import TunedModel
    from lichen.common.privacy.randomness import RandomSource
    from lichen.common.tasks.task import Batch

Unit = Sequence[int]
"""The rows that share one clipped gradient: one row for `example`, all of an entity's rows for `entity`."""


def _register_conv1d() -> None:
    # GPT-2's Conv1D is a linear layer with its weight transposed, which Opacus does not know
    from transformers.pytorch_utils import Conv1D

    @register_grad_sampler(Conv1D)  # type: ignore[untyped-decorator]
    def conv1d(layer: Any, activations: list[torch.Tensor], backprops: torch.Tensor) -> dict[nn.Parameter, torch.Tensor]:
        gradients: dict[nn.Parameter, torch.Tensor] = {}
        if layer.weight.requires_grad:
            gradients[layer.weight] = torch.einsum("n...i,n...j->nij", activations[0], backprops)
        if layer.bias.requires_grad:
            gradients[layer.bias] = torch.einsum("n...k->nk", backprops)
        return gradients


class PerUnitGradients:
    """Computes clipped sums of per-unit gradients of a model. Made once for a model; each round's tensors are loaded into it.

    Args:
        model: what is trained.
        losses: the loss of each row of a batch, shape (B,); see `Task.losses`.
        max_rows: rows that pass through the model at once.

    Raises:
        LichenError: MODEL_DP_UNSUPPORTED, if a trainable module has no per-example gradient rule.
    """

    def __init__(
        self,
        model: TunedModel,
        losses: Callable[[nn.Module, Batch], torch.Tensor],
        max_rows: int,
    ) -> None:
        _register_conv1d()
        self.model = model
        self._losses = losses
        self._max_rows = max_rows
        self._parameters = list(model.trainable.values())
        self._refuse_unsupported()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._network = GradSampleModule(model.network, loss_reduction="sum")
            except NotImplementedError as error:
                raise LichenError(Code.MODEL_DP_UNSUPPORTED, str(error), where="model.base") from None
        for module in model.network.modules():
            if isinstance(module, nn.Embedding) and module.weight.requires_grad:
                module.register_forward_pre_hook(_one_row_an_example(model.network))

    def _refuse_unsupported(self) -> None:
        owners: dict[int, str] = {}
        for name, module in self.model.network.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # frozen or not: its statistics are the batch's
                raise LichenError(Code.MODEL_DP_UNSUPPORTED, f"{name} is a batch norm, which couples examples", where="model.base")
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    continue
                if id(parameter) in owners and owners[id(parameter)] != name:
                    raise LichenError(Code.MODEL_DP_UNSUPPORTED, f"{name} and {owners[id(parameter)]} share a weight", where="model.base")
                owners[id(parameter)] = name
                if type(module) not in GradSampleModule.GRAD_SAMPLERS:
                    raise LichenError(
                        Code.MODEL_DP_UNSUPPORTED,
                        f"{name} is a {type(module).__name__}, for which there is no per-example gradient",
                        where="model.base",
                        fix="Use adapter kind lora on linear modules.",
                    )

    def step(self, optimizer: NoisyOptimizer, units: Sequence[Unit], collate: Callable[[Sequence[int]], Batch]) -> None:
        """Clip each unit's gradient, sum, and let the optimizer add its noise and step.

        An empty draw takes a step of noise alone: leaving it out would tell that the draw was empty.
        """
        packs = self._packs(units)
        for number, pack in enumerate(packs):
            optimizer.zero_grad(set_to_none=True)
            self._gradients_of(pack, collate)
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

    def _gradients_of(self, units: Sequence[Unit], collate: Callable[[Sequence[int]], Batch]) -> None:
        """Leave in each parameter's ``grad_sample`` one gradient a unit: the mean over the unit's rows."""
        owners = torch.tensor([number for number, unit in enumerate(units) for _ in unit], dtype=torch.int64)
        weights = torch.tensor([1 / len(unit) for unit in units for _ in unit])
        rows = [row for unit in units for row in unit]
        sums = [torch.zeros((len(units), *parameter.shape)) for parameter in self._parameters]
        for start in range(0, len(rows), self._max_rows):
            part = slice(start, start + self._max_rows)
            for parameter in self._parameters:
                parameter.grad_sample = None  # type: ignore[attr-defined]
            with expected_hooks():
                torch.autograd.backward((self._losses(self._network, collate(rows[part])) * weights[part]).sum())
            for total, parameter in zip(sums, self._parameters, strict=True):
                gradient: torch.Tensor = parameter.grad_sample  # type: ignore[attr-defined]
                total.index_add_(0, owners[part], gradient)
        for total, parameter in zip(sums, self._parameters, strict=True):
            # a gradient that is not finite would end the sum's bound on each unit's influence
            parameter.grad_sample = total.nan_to_num_(0.0, 0.0, 0.0)  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._network.remove_hooks()


class NoisyOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' DPOptimizer with noise from a `RandomSource`."""

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

    def add_noise(self) -> None:
        """Put the clipped sum plus noise of standard deviation σ·C into each ``p.grad``."""
        std = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            parameter.grad = noised(parameter.summed_grad.view_as(parameter), std, self._source).to(parameter.dtype)


@contextmanager
def expected_hooks() -> Iterator[None]:
    """Without torch's warning of hooks on layers whose input needs no gradient: the base is frozen, so they are what we want."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def _one_row_an_example(network: nn.Module) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    """A hook that repeats ids which arrive once for a whole batch, as BERT's position ids do: Opacus counts examples by rows."""
    size = 1

    def remember(_: nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
        nonlocal size
        ids = named.get("input_ids", arguments[0] if arguments else None)
        size = ids.shape[0] if isinstance(ids, torch.Tensor) else 1

    def repeat(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        ids = arguments[0]
        if ids.shape[0] == 1 and size > 1:
            ids = ids.expand(size, *ids.shape[1:])
        return (ids.contiguous(), *arguments[1:])

    network.register_forward_pre_hook(remember, with_kwargs=True)
    return repeat
