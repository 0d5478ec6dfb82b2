"""Gradient checkpointing (Chen et al. 2016): of each layer only its input is kept, and the layer runs again in the backward pass.

transformers' own is a wrapper around a class's forward method, which ours (`lean.py`, `prefix.py`) stand in for; so each layer is wrapped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from lichen.common.errors import Code, LichenError
from lichen.common.model.prefix import encoder_layers

if TYPE_CHECKING:
    from lichen.common.model.adapter import TunedModel


def checkpoint_layers(model: TunedModel) -> None:
    """Let each layer of the encoder or decoder run again in the backward pass.

    A pass and its backward pass must see the model in the same state: what is switched on for the one must be on in the other.

    Args:
        model: whose layers' forward methods are replaced.

    Raises:
        LichenError: MODEL_UNSUPPORTED, if its layers are not found.
    """
    layers = encoder_layers(model)
    if layers is None:
        raise LichenError(
            Code.MODEL_UNSUPPORTED,
            f"the layers of {type(model.network).__name__} are not found",
            where="local.checkpointing",
            fix="Set local.checkpointing: false.",
        )
    for layer in layers:
        layer.forward = _again(layer, layer.forward)


def _again(layer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*arguments: Any, **named: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return original(*arguments, **named)
        # a decoder's cache would be filled twice, and training reads none
        kept = [None if isinstance(value, Cache) else value for value in arguments]
        options = {name: None if isinstance(value, Cache) else value for name, value in named.items()}
        return checkpoint(functools.partial(original, **options), *kept, use_reentrant=False)

    return forward
