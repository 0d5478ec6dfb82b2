"""Memory that a training takes at its peak, predicted from the shape of its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lichen.common.errors import Code, LichenError

if TYPE_CHECKING:
    from lichen.common.model.adapter import TunedModel
    from lichen.common.plan import Plan

# Fitted to `lichen bench profile` (docs/design.md has its table): what a process holds of libraries, in bytes, and then factors.
LIBRARIES, PRIVATE_LIBRARIES = 455e6, 515e6
"""Python, torch, transformers, peft, Flower and the rows; under privacy Opacus and the accountant, too."""
STATE, PRIVATE_STATE, CHECKED_STATE = 27.0, 20.0, 41.0
"""Bytes for each trained weight: gradient, optimizer, what came, what leaves; in private steps; in the privacy self-check at the start."""
KEPT, PRIVATE_KEPT, FULL_KEPT, PRIVATE_FULL_KEPT = 2.05, 1.95, 2.1, 3.0
"""What the backward pass needs of a trained layer: so many times the outputs of its linear modules."""
CHECKPOINTED = 0.12
"""The same with gradient checkpointing, which keeps a layer's input; one layer at a time is there whole."""
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.05}
"""Of a weight of the base."""
PASSING, LEAST_PASSING = 1.0, 2.6
"""What one more layer holds while it computes, in the same unit; at least, where no layer keeps anything."""


@dataclass(frozen=True)
class Shape:
    """What of a model its memory follows from."""

    parameters: int
    """Of the base."""
    stored_bytes: int
    """Of a weight, in the file."""
    trainable: int
    trained_layers: int
    """Layers from the lowest trained one up, whose activations are kept for the backward pass."""
    features: int
    """Outputs of all linear modules of a layer, for one token."""
    full: bool
    """Whether all weights are trained."""

    @classmethod
    def of(cls, model: TunedModel) -> Shape:
        """The shape of a model, with values or without.

        Raises:
            LichenError: MODEL_UNSUPPORTED, if its layers are not found.
        """
        from torch import nn  # who only predicts does without

        base: Any = model.network
        if hasattr(base, "get_base_model"):  # PEFT's wrapper
            base = base.get_base_model()
        config = base.config.get_text_config()
        lists = [part for part in base.modules() if isinstance(part, nn.ModuleList) and len(part) == config.num_hidden_layers]
        if len(lists) != 1:
            raise LichenError(Code.MODEL_UNSUPPORTED, f"the layers of {type(base).__name__} are not found", where="model.base")
        layers = list(lists[0])
        trained = {id(parameter) for parameter in model.trainable.values()}
        within = [{id(parameter) for parameter in layer.parameters()} for layer in layers]
        below = trained - {id(model.trainable[name]) for name in model.head} - set[int]().union(*within)
        lowest = 0 if below else next((place for place, own in enumerate(within) if own & trained), len(layers))
        linear = {name: part for name, part in layers[-1].named_modules() if isinstance(part, nn.Linear)}
        return cls(
            parameters=sum(parameter.numel() for name, parameter in base.named_parameters() if "lora_" not in name),
            stored_bytes=getattr(base.config.dtype, "itemsize", 4),
            trainable=sum(parameter.numel() for parameter in model.trainable.values()),
            trained_layers=len(layers) - lowest,
            features=sum(part.out_features for name, part in linear.items() if "lora_" not in name),
            full=bool(below),
        )


def peak_mb(plan: Plan, shape: Shape, *, rows: int | None = None, length: int | None = None, device: str = "cpu") -> float:
    """The largest resident memory of a worker that trains a plan, in MiB; on an accelerator what it takes there.

    Args:
        plan: which; all its rows are as long as it permits.
        shape: of its model.
        rows: at once, in place of the plan's.
        length: tokens of a row, in place of the plan's.
        device: torch's name of its kind.
    """
    private = plan.private and not plan.central
    rows = rows or plan.local.max_physical_batch_size
    if not private:  # a Poisson draw may have more than the expected rows
        rows = min(rows, plan.local.batch_size)
    tokens = rows * (length or plan.task.max_length)
    fixed = (PRIVATE_LIBRARIES if private else LIBRARIES) if device == "cpu" else 0.0
    weights = WEIGHT_BYTES[plan.model.base_precision] * shape.parameters
    layer = (PRIVATE_FULL_KEPT if private else FULL_KEPT) if shape.full else (PRIVATE_KEPT if private else KEPT)
    kept = layer + CHECKPOINTED * shape.trained_layers if plan.local.checkpointing else layer * shape.trained_layers
    activations = 4.0 * tokens * shape.features * max(LEAST_PASSING, kept + PASSING)
    training = (PRIVATE_STATE if private else STATE) * shape.trainable + activations
    # a file of another type is there beside what is made of it
    loading = shape.stored_bytes * shape.parameters if shape.stored_bytes != 4 and device == "cpu" else 0.0
    checking = CHECKED_STATE * shape.trainable if private else 0.0
    return (fixed + weights + max(loading, checking, training)) / 2**20
