"""Causal language modelling: each text's tokens from those before them; the share told right, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import TunedModel, attach
from lichen.common.model.base import load_base, outline_base
from lichen.common.tasks.texts import EncodedTexts, Texts, seeded

if TYPE_CHECKING:
    from lichen.common.batches import Collate
    from lichen.common.result import Metrics
    from lichen.common.tasks.task import Batch, Columns

BINS = 51
"""Of the share of a text's tokens that are told right, two hundredths apart: one text changes one count by one."""
MOST_NATS = 20.0
"""Above it a mean loss has no perplexity that says anything."""


@dataclass(frozen=True)
class LanguageScores:
    """How many texts had which share of their tokens told right, and the summed loss.

    Args:
        counts: shape (51,), by share; noised ones may be fractional or negative.
        loss_sum: each text's mean cross-entropy in nats, summed over texts; None where it may not be known.
    """

    counts: np.ndarray
    loss_sum: float | None

    def metrics(self) -> Metrics:
        """`accuracy` (mean over texts of the share of tokens told right) and, where they are known, `loss` and `perplexity`."""
        total = max(float(self.counts.sum()), 1.0)
        # noise is not cut off at zero: over so many counts that would add up
        share = float(self.counts @ np.linspace(0, 1, BINS)) / total
        found: Metrics = {"accuracy": min(max(share, 0.0), 1.0)}
        if self.loss_sum is None:
            return found
        loss = float(self.loss_sum / total)
        return found | {"loss": loss, "perplexity": math.exp(min(loss, MOST_NATS))}


class CausalLM(Texts):
    """Texts of the plan's field, each cut at its length; `AutoModelForCausalLM` as it is.

    A text's loss is the mean over its tokens but the first, so that it depends on that text alone, and no long text outweighs others. Under
    differential privacy the model's own mean over a batch's tokens would break the sensitivity.
    """

    def build(self) -> TunedModel:
        """Load the base, attach the adapter, go to the device (see `Task.build`)."""
        from transformers import AutoModelForCausalLM

        base, self._tokenizer = load_base(self.plan.model, AutoModelForCausalLM)
        self._check_length(base)
        model = attach(base, self.plan, "CAUSAL_LM")
        model.network.train()
        return self._place(model)

    def outline(self) -> TunedModel:
        """Shapes alone (see `Task.outline`)."""
        from transformers import AutoModelForCausalLM

        base = outline_base(self.plan.model, AutoModelForCausalLM)
        with torch.device("meta"):
            return attach(base, self.plan, "CAUSAL_LM")

    def encode(self, columns: Columns) -> EncodedTexts:
        """Tokenise texts (see `Task.encode`)."""
        return EncodedTexts(self._tokens([str(text) for text in columns[self.plan.task.text_field]]))

    def made_up(self, rows: int, key: str = "", *, longest: bool = False) -> EncodedTexts:
        """Random tokens (see `Task.made_up`)."""
        return EncodedTexts(self._made_up(rows, seeded(key), longest=longest))

    def choose_among(self, labels: Sequence[str] | None) -> None:
        """There are none (see `Task.choose_among`)."""

    def losses(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy of each text's tokens but the first, shape (B,); zero for a text of one token."""
        return self._told(network, batch)[0]

    def taught(self, network: nn.Module, data: EncodedTexts, batch_size: int, collate: Collate | None = None) -> EncodedTexts:
        """Not built (see `Task.taught`): scores of all tokens would take a vocabulary for each token."""
        raise LichenError(Code.MODEL_UNSUPPORTED, "a language model teaches none here", where="continual.method")

    def features(self, network: nn.Module, data: EncodedTexts, batch_size: int, collate: Collate | None = None) -> torch.Tensor:
        """There is no head to read them (see `Task.features`)."""
        raise LichenError(Code.MODEL_UNSUPPORTED, "a language model has no head that reads features", where="task.kind")

    @torch.no_grad()
    def score(
        self,
        network: nn.Module,
        data: EncodedTexts,
        batch_size: int,
        rows: Sequence[int] | None = None,
        collate: Collate | None = None,
    ) -> LanguageScores:
        """Score a model (see `Task.score`)."""
        counts = np.zeros(BINS, dtype=np.float64)
        if not len(data if rows is None else rows):
            return LanguageScores(counts, 0.0)

        def of(batch: Batch) -> torch.Tensor:
            return torch.stack(self._told(network, batch)).double()

        losses, shares = self._by_length(network, data, batch_size, of, axis=1, rows=rows, collate=collate)
        np.add.at(counts, (shares * (BINS - 1)).round().long().numpy(), 1)
        return LanguageScores(counts, float(losses.sum()))

    def scores_from(self, counts: Sequence[float], loss_sum: float | None) -> LanguageScores:
        """Scores from counts by share (see `Task.scores_from`)."""
        if len(counts) != BINS or not all(math.isfinite(count) for count in counts):
            raise LichenError(Code.FRAME_INVALID, f"{len(counts)} counts are not those of {BINS} shares")
        return LanguageScores(np.array(counts, dtype=np.float64), loss_sum)

    def _told(self, network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each text the mean loss of its tokens but the first, and the share of them that are told right, each (B,)."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = network(input_ids=ids, attention_mask=mask).logits[:, :-1]
        weights = mask[:, 1:].to(logits.dtype)
        count = weights.sum(1).clamp(min=1)
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        right = (logits.detach().argmax(-1) == ids[:, 1:]).to(logits.dtype)
        return (losses * weights).sum(1) / count, (right * weights).sum(1) / count
