"""Error feedback (Seide et al. 2014; Karimireddy et al. 2019): what a biased codec lost is added to the next update."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lichen.common.codec.codec import Codec
from lichen.common.codec.layout import Layout
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import check_finite


class ErrorFeedback:
    """What was lost so far, which its caller keeps from round to round.

    Not under differential privacy, unless an update is clipped after the residual was added: it carries one round's rows into another.

    Args:
        codec: a biased one; an unbiased one's errors average out without this.
        residual: of the rounds before, shape (count), 32-bit floats; zero at first.
    """

    def __init__(self, codec: Codec, residual: torch.Tensor | None = None) -> None:
        if not codec.biased:
            raise LichenError(Code.PLAN_UNSOUND, f"error feedback is for biased codecs, and {codec.name} is not")
        self._codec = codec
        self.residual = residual

    def encoded(self, update: Mapping[str, torch.Tensor], *, seed: int = 0) -> bytes:
        """Encode the update with what was lost before, and keep what is lost now.

        Raises:
            LichenError: STATE_MISMATCH, if a value is not finite, or the residual is another model's; it stays what it was then.
        """
        check_finite(update)
        layout = Layout.of(update)
        flat = torch.cat([update[name].detach().reshape(-1).float() for name, _, _ in layout.tensors])
        if self.residual is not None:
            if self.residual.shape != flat.shape:
                raise LichenError(Code.STATE_MISMATCH, f"a residual of {self.residual.numel()} values for an update of {layout.count}")
            flat += self.residual
        data = self._codec.encoded(layout.split(flat), seed=seed)
        self._codec.open(data, layout).add(flat, -1.0)
        self.residual = flat
        return data
