"""Per-unit gradients by Opacus' hooks: slower and larger, an independent way to the same sums."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from torch import nn

from lichen.common.device import sent
from lichen.common.errors import Code, LichenError


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


class HooksModule:
    """Clipped sums of per-unit gradients, which Opacus' `GradSampleModule` makes one by one.

    Args:
        network: what is trained.

    Raises:
        LichenError: MODEL_DP_UNSUPPORTED, if a trainable layer has no rule of Opacus'.
    """

    def __init__(self, network: nn.Module) -> None:
        _register_conv1d()
        _refuse_unsupported(network)
        self._network = network
        self._handles: list[Any] = []
        self._hook()

    def _hook(self) -> None:
        """Put hooks on the layers whose parameters are trained now."""
        self._trained = [parameter for parameter in self._network.parameters() if parameter.requires_grad]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._module = GradSampleModule(self._network, loss_reduction="sum")
            except NotImplementedError as error:
                raise LichenError(Code.MODEL_DP_UNSUPPORTED, str(error), where="model.base") from None
        self._module.disable_hooks()  # outside of `clipped_sum` a layer may be frozen, which they can't follow
        for module in self._network.modules():
            if isinstance(module, nn.Embedding) and module.weight.requires_grad:
                self._handles += _one_row_an_example(self._network, module)

    def clipped_sum(self, sizes: Sequence[int], loss: Callable[[nn.Module], torch.Tensor], clip: float) -> dict[nn.Parameter, torch.Tensor]:
        """One forward and one backward pass; see `Engine.clipped_sum`."""
        self._clear()
        if any(not parameter.requires_grad for parameter in self._trained) or self._others_are_trained():
            self.remove_hooks()
            self._hook()
        self._module.enable_hooks()
        try:
            with expected_hooks():
                torch.autograd.backward(loss(self._module))
        finally:
            self._module.disable_hooks()
        device = self._trained[0].device
        owners = sent(torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)), device)
        gradients = {}
        for parameter in self._trained:
            total = torch.zeros((len(sizes), *parameter.shape), device=device)
            if parameter.grad_sample is not None:  # type: ignore[attr-defined]
                total.index_add_(0, owners, parameter.grad_sample.float())  # type: ignore[attr-defined]
            gradients[parameter] = total
        self._clear()
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)
        bad = ~torch.isfinite(norms)
        factors = (clip / norms.masked_fill(bad, 0)).clamp(max=1.0)
        for gradient in gradients.values():
            gradient[bad] = 0
        return {parameter: torch.einsum("i,i...", factors, gradient) for parameter, gradient in gradients.items()}

    def _others_are_trained(self) -> bool:
        """Whether a parameter is trained that was not when the hooks were put."""
        return sum(parameter.requires_grad for parameter in self._network.parameters()) > len(self._trained)

    def _clear(self) -> None:
        for parameter in self._trained:
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]

    def remove_hooks(self) -> None:
        """Take the hooks off the model."""
        self._module.remove_hooks()
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _refuse_unsupported(network: nn.Module) -> None:
    owners: dict[int, str] = {}
    for name, module in network.named_modules():
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
                    fix="Use adapter kind lora on linear modules, or privacy.gradients: single-backward.",
                )


@contextmanager
def expected_hooks() -> Iterator[None]:
    """Without torch's warning of hooks on layers whose input needs no gradient: the base is frozen, so they are what we want."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def _one_row_an_example(network: nn.Module, embedding: nn.Embedding) -> list[Any]:
    """Hooks that repeat ids which arrive once for a whole batch, as BERT's position ids do: Opacus counts examples by rows."""
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

    return [network.register_forward_pre_hook(remember, with_kwargs=True), embedding.register_forward_pre_hook(repeat)]
