"""Which rows pass through a model together: neighbours in length, so that little is computed for padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lichen.common.model.adapter import TunedModel

LAYER_OVERHEAD = 5e7
"""Multiply-adds that a layer's forward and backward pass could have done in the time that calling it takes: 1 to 2 ms of one CPU core."""
GPU_LAYER_OVERHEAD = 1e10
"""The same on a GPU, where kernels of a small batch are over before the next is called. On an H100 it was three times that."""
LEAST_PASS = 16
"""Tokens below which the products of matrices themselves get slower."""
MOST_AT_ONCE, GPU_MOST_AT_ONCE = 16, 64
"""Clients whose batches pass together at most: their calls cost a sixteenth each, and what more would save is little."""
GPU_BYTES = 4 * 2**30
"""What a pass of several clients may take of a GPU's memory, about; one of a single client takes what the plan says."""
WORTH = 0.25
"""The part of a batch's work that its calls must take before clients are put together."""
GRADIENT_TOKENS = 60
"""Tokens whose passes take as long as adding one gradient of all weights to another."""


def pass_cost(model: TunedModel) -> float:
    """What one more pass costs beside its tokens, in tokens.

    It follows from the model's shape and the kind of device alone, so that runs repeat bit for bit.
    """
    network = model.network
    overhead = LAYER_OVERHEAD if model.device.type == "cpu" else GPU_LAYER_OVERHEAD
    embedded = {id(parameter) for layer in network.modules() if hasattr(layer, "num_embeddings") for parameter in layer.parameters()}
    sizes = {id(parameter): parameter.numel() for parameter in network.parameters()}
    computed = max(1, sum(size for key, size in sizes.items() if key not in embedded))
    trained = sum(parameter.numel() for parameter in model.trainable.values())
    layers = network.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    return max(LEAST_PASS, overhead * float(layers) / computed) + GRADIENT_TOKENS * trained / sum(sizes.values())


def clients_at_once(cost: float, tokens: int, most: int = MOST_AT_ONCE) -> int:
    """How many clients' batches should pass together (cohort batching); one where that saves little.

    Args:
        cost: of a pass, in tokens: `pass_cost`.
        tokens: of a client's batch, about.
        most: of clients, at least 1: `most_at_once`.
    """
    return min(most, math.ceil(MOST_AT_ONCE * cost / tokens)) if cost > WORTH * tokens else 1


def most_at_once(model: TunedModel, rows: int, length: int, *, private: bool) -> int:
    """How many clients' batches may pass together, at least 1. On a GPU that follows from their memory, by the model's shape.

    Args:
        model: which.
        rows: of a client in a pass.
        length: tokens of each.
        private: whether each row has trained weights of its own.
    """
    if model.device.type == "cpu":
        return MOST_AT_ONCE
    config = model.network.config.get_text_config()  # type: ignore[union-attr, operator]
    # of a layer autograd keeps some twelve vectors of its width for each token; of weights there is a copy, and two of their gradient
    kept = 4 * 12 * length * int(config.hidden_size) * int(config.num_hidden_layers)
    own = 4 * 3 * sum(parameter.numel() for parameter in model.trainable.values())
    return max(1, min(GPU_MOST_AT_ONCE, GPU_BYTES // (rows * (kept + own) if private else rows * kept + own)))


def passes(rows: Sequence[int], lengths: Sequence[int], most: int, cost: float) -> list[list[int]]:
    """Deal items to passes so that padded tokens, and ``cost`` for each pass, are fewest in all (dynamic programming).

    Args:
        rows: of each item, at least 1; an item is not divided.
        lengths: tokens of each item's longest row.
        most: rows of a pass; an item with more has one of its own.
        cost: of a pass, in tokens.

    Returns:
        The items' indices by pass, the longest items first; no pass for no items.
    """
    order = sorted(range(len(rows)), key=lambda item: (-lengths[item], item))
    best, cut = [0.0], [0]
    for end in range(1, len(order) + 1):
        least, at, held = float("inf"), end - 1, 0
        for start in range(end - 1, -1, -1):
            held += rows[order[start]]
            if held > most and start < end - 1:
                break
            if (found := best[start] + cost + held * lengths[order[start]]) < least:
                least, at = found, start
        best.append(least)
        cut.append(at)
    found_passes: list[list[int]] = []
    end = len(order)
    while end:
        found_passes.append(order[cut[end] : end])
        end = cut[end]
    return found_passes[::-1]
