"""A frozen base in fewer bits, which trains what lies over it: weights in int8 or bfloat16, everything computed in 32 bits.

A layer makes its weight in 32 bits when it is called, and again in the backward pass, in memory that the next layer uses again: what it
computes is to the bit what a layer in 32 bits computes that holds the same rounded weights.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - torch's own convention
from transformers.pytorch_utils import Conv1D

from lichen.common.errors import Code, LichenError
from lichen.common.model.linear import linear, times_weight

if TYPE_CHECKING:
    from collections.abc import Collection

LEVELS = 127
AT_ONCE = 1 << 18
"""Numbers that are rounded at once, so that little is in memory twice."""


class _Scratch(threading.local):
    """A thread's memory for one weight in 32 bits. With memory of its own for each, a step of one text took a tenth longer."""

    buffer = torch.empty(0)

    def like(self, weight: torch.Tensor) -> torch.Tensor:
        if self.buffer.numel() < weight.numel() or self.buffer.device != weight.device:
            self.buffer = torch.empty(weight.numel(), device=weight.device)
        return self.buffer[: weight.numel()].view(weight.shape)


_scratch = _Scratch()


class Quantized:
    """A layer whose weight is kept in fewer bits."""

    weight: torch.Tensor
    """int8 or bfloat16, not trained."""
    scale: torch.Tensor | None
    """Of each output channel, or row of a table, 32 bits: (p, 1), or (1, p) where the weight is transposed; None for bfloat16."""

    def dense(self) -> torch.Tensor:
        """The weight in 32 bits, in memory of its own."""
        return self._write(torch.empty_like(self.weight, dtype=torch.float32))

    def passing(self) -> torch.Tensor:
        """The weight in 32 bits, until the thread asks a layer for its own again; autograd refuses what kept it for longer."""
        return self._write(_scratch.like(self.weight))

    @torch.no_grad()
    def _write(self, found: torch.Tensor) -> torch.Tensor:
        found.copy_(self.weight)
        return found if self.scale is None else found.mul_(self.scale)


class QuantizedLinear(Quantized, nn.Linear):
    """y = W x + b with W in fewer bits and b in 32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Input (…, d), output (…, p)."""
        found: torch.Tensor = _Product.apply(input, self, False)  # type: ignore[no-untyped-call]
        return found


class QuantizedConv1D(Quantized, Conv1D):  # type: ignore[misc]
    """GPT-2's linear layer, whose weight is (d, p)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input (…, d), output (…, p)."""
        found: torch.Tensor = _Product.apply(x, self, True)  # type: ignore[no-untyped-call]
        return found


class QuantizedEmbedding(Quantized, nn.Embedding):
    """Rows of a table in fewer bits; only those that are looked up are made in 32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Ids (…), output (…, d)."""
        found = F.embedding(input, self.weight).float()
        return found if self.scale is None else found.mul_(F.embedding(input, self.scale))


KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: QuantizedLinear, Conv1D: QuantizedConv1D, nn.Embedding: QuantizedEmbedding}
"""What stands in for a layer. Types must match: a subclass may do anything with its weight."""


class _Product(torch.autograd.Function):
    """A quantised linear layer. Nothing is kept for the backward pass but the layer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any, transposed: bool) -> torch.Tensor:
        """Input (…, d), output (…, p)."""
        ctx.layer, ctx.transposed, ctx.kind = layer, transposed, x.dtype
        return linear(x.float(), layer.passing(), layer.bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        """The gradient of the input."""
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return times_weight(g, ctx.layer.passing(), ctx.transposed).to(ctx.kind), None, None


def passing_weight(layer: Any) -> torch.Tensor:
    """A frozen layer's weight in the type that it computes in, to be used before another layer's."""
    found: torch.Tensor = layer.passing() if isinstance(layer, Quantized) else layer.weight.detach()
    return found


def is_quantized(network: nn.Module) -> bool:
    """Whether some layer's weight is kept in fewer bits."""
    return any(isinstance(layer, Quantized) for layer in network.modules())


def quantize(network: nn.Module, precision: Literal["bfloat16", "int8"], skip: Collection[str] = ()) -> None:
    """Keep the weights of linear layers and embeddings in fewer bits, layer by layer; all else stays in 32, or comes there.

    Memory grows by what is kept: a weight that is mapped from its file is read as it is rounded, and the file is let go of at the end.

    Args:
        network: as loaded, in any type of 16 or 32 bits; its layers become others in place, so that names and ties stay.
        precision: of the weights.
        skip: names of the network's own parts that stay as they are.

    Raises:
        LichenError: MODEL_UNSUPPORTED, if a weight is not finite.
    """
    done: dict[int, tuple[nn.Parameter, torch.Tensor | None]] = {}
    before: list[nn.Parameter] = []  # what was replaced lives as long as its identity is asked for
    for name, layer in network.named_modules():
        if type(layer) not in KINDS or name.split(".")[0] in skip or getattr(layer, "max_norm", None) is not None:
            continue
        weight: Any = layer.weight
        if id(weight) not in done:
            try:
                done[id(weight)] = _kept(weight.detach(), precision, transposed=type(layer) is Conv1D)
            except ValueError:
                raise LichenError(Code.MODEL_UNSUPPORTED, f"{name} has weights that are not finite", where="model.base") from None
            before.append(weight)
        layer.weight, scale = done[id(weight)]
        layer.register_buffer("scale", scale)
        layer.__class__ = KINDS[type(layer)]
    kept = {id(parameter) for parameter, _ in done.values()}
    for parameter in network.parameters():
        if id(parameter) not in kept:  # a copy: a view of the file would keep it mapped whole
            parameter.data = parameter.detach().to(torch.float32, copy=True)


def _kept(weight: torch.Tensor, precision: Literal["bfloat16", "int8"], *, transposed: bool) -> tuple[nn.Parameter, torch.Tensor | None]:
    if precision == "bfloat16":
        if not bool(torch.isfinite(weight.sum(dtype=torch.float32))):
            raise ValueError
        return nn.Parameter(weight.to(torch.bfloat16), requires_grad=False), None
    values, scale = to_int8(weight.t() if transposed else weight)
    if transposed:
        values, scale = values.t().contiguous(), scale.t().contiguous()
    return nn.Parameter(values, requires_grad=False), scale


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest of 255 levels, symmetric around zero, with a scale for each row: ŵ = scale · q.

    A maximum, two divisions and rounding to even, which IEEE 754 defines to the bit: the same integers on every machine.

    Args:
        weight: (p, d), of any floating type.

    Returns:
        Integers within ±127, (p, d), and scales in 32 bits, (p, 1): of a weight w of its row |ŵ − w| ≤ scale / 2, but for rounding.

    Raises:
        ValueError: if one is not finite.
    """
    values = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty((len(weight), 1))
    step = max(1, AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        part = weight[start : start + step].float()
        own = scale[start : start + step]
        torch.div(part.abs().amax(1, keepdim=True), LEVELS, out=own).clamp_(min=torch.finfo(torch.float32).tiny)
        if not bool(torch.isfinite(own).all()):
            raise ValueError("a weight is not finite")
        values[start : start + step] = torch.div(part, own).round_()
    return values, scale
