"""GroupWeights of rows in one pass, each through trained weights of its own over the same frozen ones: several clients at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lichen.common.errors import Code, LichenError
from lichen.common.privacy.single_backward.book import Book
from lichen.common.privacy.single_backward.rules import is_lora, replacements

if TYPE_CHECKING:
    from lichen.common.model.adapter import TunedModel
    from lichen.common.model.packing import Packing

Weights = Mapping[str, torch.Tensor]
"""Of each trained tensor one for each group, (G, …), by the names of `TunedModel.trainable`."""


class GroupWeights(Book):
    """A book that keeps nothing: autograd itself gives the gradients, since every group has its own weights.

    Args:
        trainable: as the model has them.
        packing: switched off meanwhile, since groups are told apart by their rows.
    """

    def __init__(self, trainable: Mapping[str, nn.Parameter], packing: Packing) -> None:
        super().__init__(packing)
        self._names = {id(parameter): name for name, parameter in trainable.items()}
        self._weights: Weights | None = None
        self._rows = 0

    @property
    def open(self) -> bool:
        """Whether the groups' weights are in use."""
        return self._weights is not None

    @property
    def rows(self) -> int:
        """Rows of the batch in flight."""
        return self._rows

    @contextmanager
    def use(self, weights: Weights, rows: int) -> Iterator[None]:
        """Use the groups' weights within, for a batch of so many rows: as many of each group, in the groups' order."""
        self._weights, self._rows = weights, rows
        try:
            with self._packing.off():
                yield
        finally:
            self._weights = None

    def linear(self, x: torch.Tensor, layer: Any, transposed: bool) -> torch.Tensor:
        """A trained linear layer: (B, …, d) to (B, …, p)."""
        weight = self._of(layer.weight)
        return _times(x, weight if transposed else weight.mT, None if layer.bias is None else self._of(layer.bias))

    def lora(
        self,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        base: nn.Linear,
        a: nn.Parameter,
        b: nn.Parameter,
        scaling: float,
        transposed: bool,
    ) -> torch.Tensor:
        """LoRA over a frozen linear layer: (B, …, d) to (B, …, p)."""
        up = self._of(b).mT * scaling
        low = _by_group(x if dropped is None else dropped, up) @ self._of(a).mT
        wide = base(x)
        return torch.baddbmm(_by_group(wide, up), low, up).view_as(wide)

    def _of(self, parameter: nn.Parameter) -> torch.Tensor:
        """Each group's weight, (G, …); one that is not trained now is the model's in all groups."""
        if self._weights is None:
            raise LichenError(Code.INTERNAL, "a layer ran after its groups' pass had ended")
        if (own := self._weights.get(self._names.get(id(parameter), ""))) is not None:
            return own
        return parameter.detach().expand(len(next(iter(self._weights.values()))), *parameter.shape)


def group_weights(model: TunedModel, packing: Packing) -> GroupWeights | None:
    """Let the trained layers of a model take one set of weights for each group of rows; that is so within `GroupWeights.use`.

    Args:
        model: whose layers' forward methods are replaced.
        packing: of the model.

    Returns:
        None, and the model as it was, where other layers than LoRA's and linear ones are trained, or dropout would draw for all at once.
    """
    groups = GroupWeights(model.trainable, packing)
    if any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in model.network.modules()):
        return None
    try:
        found = replacements(model.network, groups)
    except LichenError as error:
        if error.code is not Code.MODEL_DP_UNSUPPORTED:
            raise
        return None
    if not all(is_lora(layer) or isinstance(layer, nn.Linear) for layer, _, _ in found):
        return None
    for layer, method, ours in found:
        setattr(layer, method, ours)
    return groups


def _times(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Each group's rows (B, …, d) times its matrix (G, d, p), plus its bias (G, p)."""
    flat = _by_group(x, weight)
    y = torch.bmm(flat, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), flat, weight)
    return y.view(*x.shape[:-1], weight.shape[-1])


def _by_group(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows (B, …, d) as each group's, (G, n, d)."""
    return x.reshape(len(weight), -1, x.shape[-1])
