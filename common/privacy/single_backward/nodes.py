"""Autograd nodes whose backward returns the input's gradient only, and books what clipping needs of the weight's.

A weight goes in detached, so none of them can write ``.grad``. Each takes the book's anchor, which makes it run in the backward pass
though no input wants a gradient. Under autocast the gradients arrive in 16 bits: the products are made in them, as autograd does, and
what is booked of them is summed in 32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from lichen.common.model.held import add_held, add_held_gradient
from lichen.common.model.linear import linear, times_weight
from lichen.common.model.quantized import passing_weight
from lichen.common.privacy.single_backward.records import dot

if TYPE_CHECKING:
    from lichen.common.privacy.single_backward.book import Book

Gradients = tuple[torch.Tensor | None, ...]


class LinearNode(torch.autograd.Function):
    """y = x Wᵀ + b; with ``transposed``, y = x W + b."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, layer: nn.Linear, transposed: bool, book: Book) -> torch.Tensor:
        """Input (B, …, d), output (B, …, p)."""
        weight = layer.weight.detach()
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.transposed, ctx.book = layer, transposed, book
        return linear(x, weight, layer.bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Gradients:
        """Book weight and bias."""
        x, weight = ctx.saved_tensors
        gx = None
        if ctx.needs_input_grad[0]:
            gx = times_weight(g, weight, ctx.transposed).to(x.dtype)
        ctx.book.add_linear(ctx.layer.weight, x.to(g.dtype), g, transposed=ctx.transposed)
        if ctx.layer.bias is not None:
            ctx.book.add_tokens(ctx.layer.bias, g)
        return gx, None, None, None, None


class LoraNode(torch.autograd.Function):
    """y = W x + b + s B A dropout(x) (Hu et al. 2021) with W and b frozen, in one node."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        anchor: torch.Tensor,
        base: nn.Linear,
        a: nn.Parameter,
        b: nn.Parameter,
        scaling: float,
        transposed: bool,
        book: Book,
    ) -> torch.Tensor:
        """Input (B, …, d), output (B, …, p). ``dropped`` is what the adapter sees, None where that is ``x``."""
        down, up = a.detach(), b.detach()
        y = add_held(base, x, linear(x, passing_weight(base), base.bias, transposed))
        low = F.linear(x if dropped is None else dropped, down)
        low = low.mul_(scaling)
        if low.dtype == y.dtype == up.dtype:
            y = y.contiguous()
            y.view(-1, y.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up.t())
        else:
            y = (y + F.linear(low, up)).to(y.dtype)
        ctx.save_for_backward(x, dropped, low, down, up)
        ctx.base, ctx.parameters, ctx.scaling, ctx.transposed, ctx.book = base, (a, b), scaling, transposed, book
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Gradients:
        """Book A and B."""
        x, dropped, low, down, up = ctx.saved_tensors
        a, b = ctx.parameters
        seen = x if dropped is None else dropped
        gradients = g.to(low.dtype)
        back = times_weight(gradients, up, False).mul_(ctx.scaling)
        gx = gd = None
        if ctx.needs_input_grad[0]:
            gx = add_held_gradient(ctx.base, g, times_weight(g, passing_weight(ctx.base), ctx.transposed)).contiguous()
            if dropped is None:
                if gx.dtype == back.dtype == down.dtype:
                    gx.view(-1, gx.shape[-1]).addmm_(back.view(-1, back.shape[-1]), down)
                else:
                    gx = gx + times_weight(back, down, False)
            gx = gx.to(x.dtype)
        if dropped is not None and ctx.needs_input_grad[1]:
            gd = times_weight(back, down, False).to(dropped.dtype)
        ctx.book.add_linear(b, low, gradients)
        ctx.book.add_linear(a, seen.to(back.dtype), back)
        return gx, gd, None, None, None, None, None, None, None


class EmbeddingNode(torch.autograd.Function):
    """Rows of a table."""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, anchor: torch.Tensor, layer: nn.Embedding, book: Book) -> torch.Tensor:
        """Ids (B, …), output (B, …, d)."""
        ctx.save_for_backward(ids)
        ctx.layer, ctx.book = layer, book
        return F.embedding(ids, layer.weight.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Gradients:
        """Book the table."""
        (ids,) = ctx.saved_tensors
        ctx.book.add_looked(ctx.layer.weight, ids, g, ctx.layer.padding_idx)
        return None, None, None, None


class SharedBiasNode(torch.autograd.Function):
    """T5's position bias, looked up once and added to the scores of every row: each row gets its own copy, so its gradient is known."""

    @staticmethod
    def forward(
        ctx: Any, bias: torch.Tensor, ids: torch.Tensor, anchor: torch.Tensor, table: nn.Parameter, rows: int, book: Book
    ) -> torch.Tensor:
        """Bias (1, H, S, T) that was looked up by ids (S, T); output (B, H, S, T)."""
        ctx.save_for_backward(ids)
        ctx.table, ctx.book = table, book
        return bias.expand(rows, -1, -1, -1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Gradients:
        """Book the table, (entries, H)."""
        (ids,) = ctx.saved_tensors
        if ctx.table.requires_grad:
            backprops = g.float().permute(0, 2, 3, 1).flatten(1, 2)
            gradients = backprops.new_zeros((g.shape[0], *ctx.table.shape)).index_add_(1, ids.flatten(), backprops)
            ctx.book.add(ctx.table, gradients)
        return None, None, None, None, None, None


class LayerNormNode(torch.autograd.Function):
    """y = w ⊙ (x - mean) / deviation + b (Ba et al. 2016), over the last axis."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, layer: nn.LayerNorm, book: Book) -> torch.Tensor:
        """Input and output (B, …, d)."""
        bias = None if layer.bias is None else layer.bias.detach()
        y, mean, scale = torch.native_layer_norm(x, layer.normalized_shape, layer.weight.detach(), bias, layer.eps)
        ctx.save_for_backward(x, mean, scale, layer.weight.detach())
        ctx.layer, ctx.book = layer, book
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Gradients:
        """Book weight and bias."""
        x, mean, scale, weight = ctx.saved_tensors
        gx = None
        if ctx.needs_input_grad[0]:
            shape, mask = ctx.layer.normalized_shape, [True, False, False]
            gx = torch.ops.aten.native_layer_norm_backward(g.to(x.dtype), x, shape, mean, scale, weight, ctx.layer.bias, mask)[0]
        if ctx.layer.weight.requires_grad:
            ctx.book.add_tokens(ctx.layer.weight, (x - mean).mul_(scale).mul_(g))
        if ctx.layer.bias is not None:
            ctx.book.add_tokens(ctx.layer.bias, g)
        return gx, None, None, None


class RmsNormNode(torch.autograd.Function):
    """y = w ⊙ x / √(mean x² + ε) (Zhang and Sennrich 2019), over the last axis; ``offset`` 1 where the weight is stored less one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, layer: nn.RMSNorm, eps: float, offset: float, book: Book) -> torch.Tensor:
        """Input and output (B, …, d)."""
        weight = layer.weight.detach()
        high = x.float()
        scale = dot(high, high).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, scale, weight)
        ctx.layer, ctx.offset, ctx.book = layer, offset, book
        normed = high * scale
        # the casts are the models' own: Gemma's before the last one, the others' before the weight
        y: torch.Tensor = (normed * (weight.float() + offset)).to(x.dtype) if offset else normed.to(x.dtype) * weight
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Gradients:
        """Book the weight."""
        x, scale, weight = ctx.saved_tensors
        normed, g = x.float() * scale, g.float()
        gx = None
        if ctx.needs_input_grad[0]:
            scaled = g * (weight.float() + ctx.offset) if ctx.offset else g * weight
            gx = scaled.addcmul(normed, dot(scaled, normed).div_(-x.shape[-1]).unsqueeze(-1)).mul_(scale).to(x.dtype)
        if ctx.layer.weight.requires_grad:
            ctx.book.add_tokens(ctx.layer.weight, normed.mul_(g))
        return gx, None, None, None, None, None
