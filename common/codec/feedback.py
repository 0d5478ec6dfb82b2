"""Error feedback (Seide et al. 2014; Karimireddy et al. 2019): what a biased codec lost is added to the next update.

Not under differential privacy, unless an update is clipped after the residual was added: it carries one round's rows into another.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lichen.common.codec.codec import Payload
from lichen.common.codec.layout import Layout
from lichen.common.model.adapter import State, check_fits


def corrected(update: Mapping[str, torch.Tensor], residual: Mapping[str, torch.Tensor] | None) -> State:
    """What is to be encoded: the update, and what was lost before.

    Raises:
        LichenError: STATE_MISMATCH, if the residual is another model's.
    """
    if residual is None:
        return dict(update)
    check_fits(residual, update)
    return {name: tensor + residual[name] for name, tensor in update.items()}


def lost(update: Mapping[str, torch.Tensor], sent: Payload) -> State:
    """The next residual: what was to be encoded, less what its payload decodes to."""
    decoded = sent.decoded(Layout.of(update))
    return {name: tensor - decoded[name] for name, tensor in update.items()}
