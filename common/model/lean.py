"""Less work for the same function: what a model computes that nothing reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

if TYPE_CHECKING:
    from lichen.common.model.adapter import TunedModel

FIRST_TOKEN = {"BertForSequenceClassification", "RobertaForSequenceClassification", "XLMRobertaForSequenceClassification"}
"""Models whose own head reads the first token alone, and whose last layer is of the kind that `_first_token` writes out."""


def skip_unread(model: TunedModel) -> bool:
    """Let the last layer compute the first token only, where the head reads no other: a sixth of a six-layer model's work.

    Keys and values are those of all tokens, so the first token's output is what it was. Whether it is, is tried out first.

    Returns:
        Whether that is so; else the model is left as it was.
    """
    base: Any = model.network
    if hasattr(base, "get_base_model"):  # PEFT's wrapper
        base = base.get_base_model()
    if type(base).__name__ not in FIRST_TOKEN or base.config._attn_implementation != "sdpa":
        return False
    layer = base.base_model.encoder.layer[-1]
    ids = torch.arange(1, 13).view(2, 6) % base.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    before = _logits(model.network, ids, mask)
    layer.forward = _first_token(layer)
    if torch.allclose(before, _logits(model.network, ids, mask), rtol=1e-4, atol=1e-5):
        return True
    del layer.forward
    return False


@torch.no_grad()
def _logits(network: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = network(input_ids=ids, attention_mask=mask).logits
    return found


def _first_token(layer: Any) -> Any:
    """BERT's layer (Devlin et al. 2019) for the queries of the first token: (B, T, d) to (B, 1, d)."""
    attention = layer.attention.self
    heads, width = attention.num_attention_heads, attention.attention_head_size

    def split(values: torch.Tensor) -> torch.Tensor:
        return values.view(*values.shape[:-1], heads, width).transpose(1, 2)

    def forward(hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: object, **__: object) -> torch.Tensor:
        first = hidden[:, :1]
        query, key, value = split(attention.query(first)), split(attention.key(hidden)), split(attention.value(hidden))
        mask = None if attention_mask is None else attention_mask[..., :1, :]
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        found: torch.Tensor = layer.feed_forward_chunk(layer.attention.output(context, first))
        return found

    return forward
