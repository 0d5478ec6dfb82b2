"""Which layers can be trained privately, and by which node: a layer without a rule is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from lichen.common.errors import Code, LichenError
from lichen.common.model.quantized import QuantizedConv1D, QuantizedLinear
from lichen.common.privacy.single_backward.book import Book
from lichen.common.privacy.single_backward.nodes import (
    EmbeddingNode,
    LayerNormNode,
    RmsNormNode,
    SharedBiasNode,
)

Forward = Callable[..., Any]
Replacement = tuple[nn.Module, str, Forward]
"""A layer, one of its methods, and what stands in for it."""

LORA_FIX = "Use plain LoRA on linear modules."
FULL_FIX = "Use adapter kind lora on linear modules, or head."


def replacements(network: nn.Module, book: Book) -> list[Replacement]:
    """What must stand in for which methods so that every trainable parameter's use is booked.

    Raises:
        LichenError: MODEL_DP_UNSUPPORTED, naming the layer that has no rule.
    """
    found: list[Replacement] = []
    covered: set[int] = set()
    left: list[tuple[str, nn.Module]] = []
    inside: set[int] = set()  # layers whose work a layer around them does
    for name, layer in network.named_modules():
        _refuse_coupling(name, layer)
        if is_lora(layer):
            found.append((layer, "forward", _lora(name, layer, book)))
            adapter = layer.active_adapters[0]
            parts = [layer.lora_A[adapter], layer.lora_B[adapter], layer.get_base_layer()]
        elif hasattr(layer, "compute_bias") and type(getattr(layer, "relative_attention_bias", None)) is nn.Embedding:
            found += _shared_bias(layer, book)
            parts = [layer.relative_attention_bias]
        else:
            left.append((name, layer))
            continue
        inside |= {id(part) for part in parts}
        covered |= {id(parameter) for part in parts for parameter in part.parameters(recurse=False)}
    unknown: list[tuple[str, nn.Module]] = []
    for name, layer in left:
        own = [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
        if id(layer) in inside or not own:
            continue
        if forward := _leaf(name, layer, book):
            found.append((layer, "forward", forward))
            covered |= {id(parameter) for parameter in own}
        else:
            unknown.append((name, layer))
    for name, layer in unknown:
        # BERT's language model head keeps a second name for the bias of a layer that has a rule
        if any(parameter.requires_grad and id(parameter) not in covered for parameter in layer.parameters(recurse=False)):
            raise _refusal(f"{name} is a {type(layer).__name__}, for which there is no per-example gradient", FULL_FIX)
    return found


def _refusal(what: str, fix: str) -> LichenError:
    return LichenError(Code.MODEL_DP_UNSUPPORTED, what, where="model.base", fix=fix)


def _refuse_coupling(name: str, layer: nn.Module) -> None:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # frozen or not: its statistics are the batch's
        raise _refusal(f"{name} is a batch norm, which couples examples", FULL_FIX)


def _leaf(name: str, layer: nn.Module, book: Book) -> Forward | None:
    """The forward pass of a layer of its own, None where there is no rule. Types must match: a subclass may do anything."""
    from transformers.pytorch_utils import Conv1D

    if type(layer) in {nn.Linear, Conv1D}:
        return _linear(name, layer, type(layer) is Conv1D, book)
    if isinstance(layer, nn.Embedding):
        return _embedding(name, layer, book)
    if type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1:
        return _layer_norm(name, layer, book)
    if type(layer).__name__.endswith(("RMSNorm", "T5LayerNorm")):
        return _rms_norm(name, layer, book)
    return None


def _linear(name: str, layer: Any, transposed: bool, book: Book) -> Forward:
    original = layer.forward

    def forward(x: torch.Tensor) -> Any:
        if not book.open:
            return original(x)
        return book.linear(book.rows_first(x, name), layer, transposed)

    return forward


def _embedding(name: str, layer: nn.Embedding, book: Book) -> Forward | None:
    original = layer.forward
    scale = getattr(layer, "embed_scale", None)  # Gemma's
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        return None
    if type(layer) is not nn.Embedding:
        ids = torch.arange(min(8, layer.num_embeddings), device=layer.weight.device).view(2, -1)
        ours = F.embedding(ids, layer.weight)
        if not _same(original, ids, ours if scale is None else ours * scale):
            return None

    def forward(ids: torch.Tensor) -> Any:
        if not book.open:
            return original(ids)
        found = EmbeddingNode.apply(book.rows_first(ids, name), book.anchor, layer, book)  # type: ignore[no-untyped-call]
        if scale is None:
            return found
        return found * (scale.to(layer.weight.dtype) if isinstance(scale, torch.Tensor) else scale)

    return forward


def _layer_norm(name: str, layer: nn.LayerNorm, book: Book) -> Forward:
    original = layer.forward

    def forward(x: torch.Tensor) -> Any:
        if not book.open:
            return original(x)
        return LayerNormNode.apply(book.rows_first(x, name), book.anchor, layer, book)  # type: ignore[no-untyped-call]

    return forward


def _rms_norm(name: str, layer: Any, book: Book) -> Forward | None:
    """One name stands for two formulas: which of them is this layer's is tried out."""
    original = layer.forward
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    if eps is None or [key for key, _ in layer.named_parameters()] != ["weight"] or layer.weight.dim() != 1:
        return None
    x = torch.linspace(-2, 3, 3 * len(layer.weight), device=layer.weight.device).view(1, 3, -1).cos().to(layer.weight.dtype)
    fitting = [
        offset
        for offset in (0.0, 1.0)
        if _same(original, x, RmsNormNode.apply(x, x, layer, eps, offset, book))  # type: ignore[no-untyped-call]
    ]
    if len(fitting) != 1:
        return None
    (offset,) = fitting

    def forward(x: torch.Tensor) -> Any:
        if not book.open:
            return original(x)
        return RmsNormNode.apply(book.rows_first(x, name), book.anchor, layer, eps, offset, book)  # type: ignore[no-untyped-call]

    return forward


@torch.no_grad()
def _same(original: Forward, argument: torch.Tensor, ours: torch.Tensor) -> bool:
    theirs: torch.Tensor = original(argument)
    return theirs.shape == ours.shape and torch.allclose(theirs.float(), ours.float(), rtol=1e-3, atol=1e-5)


def is_lora(layer: nn.Module) -> bool:
    """Whether it is one of PEFT's LoRA layers, of whatever kind."""
    return any(kind.__module__.startswith("peft.tuners.lora") and kind.__name__ == "LoraLayer" for kind in type(layer).__mro__)


def _lora(name: str, layer: Any, book: Book) -> Forward:
    """PEFT's linear LoRA layer, whose base is a frozen linear layer."""
    from peft.tuners.lora.layer import Linear
    from transformers.pytorch_utils import Conv1D

    base, (adapter, *others) = layer.get_base_layer(), layer.active_adapters
    if layer.lora_variant:
        variant = next(iter(layer.lora_variant.values()))
        raise _refusal(f"{name} is LoRA as {type(variant).__name__}, for which there is no per-example gradient", LORA_FIX)
    if type(layer) is not Linear or type(base) not in {nn.Linear, Conv1D, QuantizedLinear, QuantizedConv1D}:
        raise _refusal(f"{name} is a LoRA {type(layer).__name__} on a {type(base).__name__}, which has no rule", LORA_FIX)
    if others or layer.lora_bias[adapter] or layer.base_layer is not base:
        raise _refusal(f"{name} has several adapters, or one with a bias, which has no rule", LORA_FIX)
    if any(parameter.requires_grad for parameter in base.parameters()):
        raise _refusal(f"{name} trains its base layer beside the adapter, which has no rule", LORA_FIX)
    original, transposed = layer.forward, isinstance(base, Conv1D)
    down, up, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]

    def forward(x: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        plain = not arguments and not named and not layer.merged and not layer.disable_adapters and layer.active_adapters == [adapter]
        if not book.open or not plain:
            return original(x, *arguments, **named)
        x = book.rows_first(x, name)
        seen = layer._cast_input_dtype(x, down.weight.dtype)
        if not isinstance(dropout, nn.Identity):
            seen = dropout(seen)
        own = None if seen is x else seen
        return book.lora(x, own, base, down.weight, up.weight, layer.scaling[adapter], transposed)

    return forward


def _shared_bias(attention: Any, book: Book) -> Iterator[Replacement]:
    """T5's attention: `compute_bias` looks up (S, T) ids once for all rows."""
    table = attention.relative_attention_bias
    compute, look_up = attention.compute_bias, table.forward
    seen: list[torch.Tensor] = []

    def forward(ids: torch.Tensor) -> torch.Tensor:
        if not book.open:
            found: torch.Tensor = look_up(ids)
            return found
        seen[:] = [ids]
        return F.embedding(ids, table.weight.detach())

    def compute_bias(*arguments: Any, **named: Any) -> Any:
        bias = compute(*arguments, **named)
        if not book.open or not seen:
            return bias
        return SharedBiasNode.apply(bias, seen.pop(), book.anchor, table.weight, book.rows, book)  # type: ignore[no-untyped-call]

    yield table, "forward", forward
    yield attention, "compute_bias", compute_bias
