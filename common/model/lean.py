"""Less work for the same function: no padding inside the layers, and nothing that the head does not read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lichen.common.device import sent
from lichen.common.model.packing import Packing, Padded
from lichen.common.model.quantized import QuantizedLinear

if TYPE_CHECKING:
    from lichen.common.model.adapter import TunedModel

FAMILIES = ("Bert", "Roberta", "XLMRoberta")
"""Models with layers of the kind that `_layer` writes out, by what transformers calls them."""
PACKED_ON = ("cpu",)
"""Devices where a batch is packed: on a GPU an attention for each length takes longer than padding does."""
FIRST_TOKEN, ALL_TOKENS = "ForSequenceClassification", "ForTokenClassification"
"""Heads that read the first token alone, and all."""


def run_lean(model: TunedModel, *, pack: bool) -> Packing:
    """Let the layers compute real tokens only, and the last one the first token only where the head reads no other.

    That is a sixth of a six-layer model's work. Keys and values are those of all tokens, so outputs are what they were. Whether they
    are, is tried out first.

    Args:
        model: whose layers' forward methods are replaced.
        pack: whether padding is left out.

    Returns:
        What tells how a batch lies in the layers; it is off, too, where the model is of another kind, and left as it was.
    """
    base: Any = model.network
    if hasattr(base, "get_base_model"):  # PEFT's wrapper
        base = base.get_base_model()
    kind, config = type(base).__name__, base.config
    known = {family + head for family in FAMILIES for head in (FIRST_TOKEN, ALL_TOKENS)}
    if kind not in known or config._attn_implementation != "sdpa" or config.is_decoder:
        return Packing(on=False)
    layers = base.base_model.encoder.layer
    ids = sent(torch.arange(1, 19).view(3, 6) % config.vocab_size, model.device)
    mask = sent((torch.arange(6) < torch.tensor([[4], [6], [1]])).long(), model.device)
    before = _logits(model.network, ids, mask)
    packing = Packing(on=pack and model.device.type in PACKED_ON)
    for layer in layers:
        last = layer is layers[-1]
        layer.forward = _layer(layer, packing, last=last, first_token=last and kind.endswith(FIRST_TOKEN))
    if torch.allclose(before, _logits(model.network, ids, mask), rtol=1e-4, atol=1e-5):
        return packing
    for layer in layers:
        del layer.forward
    return Packing(on=False)


@torch.no_grad()
def _logits(network: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of the first token, or of the row: where padding is left out, no other token's need be the same."""
    found: torch.Tensor = network(input_ids=ids, attention_mask=mask).logits
    return found if found.dim() == 2 else found[mask.bool()]


def _layer(layer: Any, packing: Packing, *, last: bool, first_token: bool) -> Any:
    """BERT's layer (Devlin et al. 2019): (B, L, d) or packed (1, T, d) to the same, or with ``first_token`` to (B, 1, d)."""
    attention = layer.attention.self
    heads, key, value = attention.num_attention_heads, attention.key, attention.value
    scale = attention.attention_head_size**-0.5
    frozen = type(key) in {nn.Linear, QuantizedLinear} and not any(parameter.requires_grad for parameter in key.parameters())
    # a dropout draws for each token what it would draw once for a sum of them
    swapped = first_token and frozen and not any(isinstance(part, nn.Dropout) for part in value.modules())

    def of_first(query: torch.Tensor, hidden: torch.Tensor, layout: Padded) -> torch.Tensor:
        """Attention of one query a row, (B, 1, d), whose products are taken in the order that costs least.

        ⟨q, W x + b⟩ is ⟨Wᵀ q, x⟩ and a number that softmax cancels; Σ p (W x + b) is W Σ p x + b, because Σ p = 1. So the linear
        layers work on a vector for each head and row, not for each token.
        """
        weight = (key.dense() if isinstance(key, QuantizedLinear) else key.weight).view(heads, -1, key.in_features)
        asked = torch.einsum("bhw,hwd->bhd", query.view(len(query), heads, -1), weight)
        found: torch.Tensor = value(layout.attention(asked, hidden, hidden, 1, scale))
        return found.view(len(query), heads, heads, -1).diagonal(dim1=1, dim2=2).mT.reshape(query.shape)

    def forward(hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: object, **__: object) -> torch.Tensor:
        layout = packing.of(attention_mask)
        hidden = layout.enter(hidden)
        seen = layout.first(hidden) if first_token else hidden
        query = attention.query(seen)
        context = of_first(query, hidden, layout) if swapped else layout.attention(query, key(hidden), value(hidden), heads)
        found: torch.Tensor = layer.feed_forward_chunk(layer.attention.output(context, seen))
        return layout.leave(found) if last else found

    return forward
