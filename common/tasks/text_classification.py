"""Text classification: a linear head over pooled features, per-example cross-entropy, accuracy and macro-F1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from lichen.common.continual.stream import labels_until
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import TunedModel, attach
from lichen.common.model.base import HEADS, WRAPPER, head_of_base, load_base, outline_base, rows_by_class
from lichen.common.tasks.texts import EncodedTexts, Texts, seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lichen.common.batches import Collate
    from lichen.common.plan import Plan
    from lichen.common.result import Metrics
    from lichen.common.tasks.task import Batch, Columns


_NONE = -1e4  # of a class that is not to choose among: softmax gives it nothing, and zero times its logarithm is a number


@dataclass(frozen=True)
class ClassificationScores:
    """A confusion matrix and the summed loss.

    Args:
        counts: shape (C, C), rows are true labels; noised ones may be fractional or negative.
        loss_sum: cross-entropy in nats, summed over examples; None where it may not be known.
    """

    counts: np.ndarray
    loss_sum: float | None

    def metrics(self) -> Metrics:
        """`accuracy`, `macro_f1` (over classes that occur; as scikit-learn's) and, where it is known, `loss` (mean)."""
        counts = np.clip(self.counts, 0, None)
        total = max(counts.sum(), 1.0)
        hits = np.diag(counts)
        seen = counts.sum(0) + counts.sum(1)
        f1 = 2 * hits[seen > 0] / seen[seen > 0]
        found: Metrics = {"accuracy": float(hits.sum() / total), "macro_f1": float(f1.mean()) if f1.size else 0.0}
        # infinite where a row's label was not to choose among: that says nothing
        return found if self.loss_sum is None or math.isinf(self.loss_sum) else found | {"loss": float(self.loss_sum / total)}


class TextClassification(Texts):
    """Texts to one of the plan's labels.

    With mean pooling the network is `AutoModelForTokenClassification`, and a text's logits are the mean of its real tokens' logits.
    Since the head is linear, that equals the head on mean-pooled features (Reimers and Gurevych 2019), and the model stays one that
    plain transformers and peft load. With `pooler` it is `AutoModelForSequenceClassification` as it is.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._index = {label: index for index, label in enumerate(plan.task.labels)}
        self._first = torch.tensor([self._index[label] for label in labels_until(plan, 0)])  # the model may always choose among these
        self._mean = plan.model.head.pooling == "mean"
        self._left_out: torch.Tensor | None = None  # of the classes, shape (C,): those that are not to choose among

    def build(self) -> TunedModel:
        """Load the base, attach the adapter, start the head, go to the device (see `Task.build`)."""
        labels = self.plan.task.labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.plan.seed)  # a random head is the same in every run of the plan
            base, self._tokenizer = load_base(
                self.plan.model,
                self._kind(),
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id=self._index,
            )
        self._check_length(base)
        model = attach(base, self.plan, "TOKEN_CLS" if self._mean else "SEQ_CLS")
        model.network.train()
        self._start_head(base, model)
        return self._place(model)

    def outline(self) -> TunedModel:
        """Shapes alone (see `Task.outline`)."""
        base = outline_base(self.plan.model, self._kind(), num_labels=len(self.plan.task.labels))
        with torch.device("meta"):
            return attach(base, self.plan, "TOKEN_CLS" if self._mean else "SEQ_CLS")

    def encode(self, columns: Columns) -> EncodedTexts:
        """Tokenise texts, and look labels up (see `Task.encode`)."""
        texts, names = (columns[field] for field in self.fields)
        strangers = sorted({str(name) for name in names if str(name) not in self._index})
        if strangers:
            raise LichenError(Code.DATA_LABEL, f"{strangers[:5]} not among the plan's labels", where=self.plan.task.label_field)
        labels = torch.tensor([self._index[str(name)] for name in names], dtype=torch.int64)
        return EncodedTexts(self._tokens([str(text) for text in texts]), labels)

    def made_up(self, rows: int, key: str = "", *, longest: bool = False) -> EncodedTexts:
        """Random tokens of random lengths, or all of the plan's length, and random labels."""
        generator = seeded(key)
        tokens = self._made_up(rows, generator, longest=longest)
        labels = self._first[torch.randint(len(self._first), (rows,), generator=generator)]
        return EncodedTexts(tokens, labels)

    def choose_among(self, labels: Sequence[str] | None) -> None:
        """Which classes take part in the softmax (see `Task.choose_among`)."""
        out = [label not in labels for label in self.plan.task.labels] if labels is not None else []
        self._left_out = torch.tensor(out, device=self._device) if any(out) else None

    def losses(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """Cross-entropy of each text, shape (B,). The model's own mean over the batch is never used: it breaks DP's sensitivity."""
        logits = self._logits_of_all(network, batch)
        losses = F.cross_entropy(self._chosen(logits), batch["labels"], reduction="none")
        return losses if "teacher" not in batch else losses + self._distances(logits, batch["teacher"])

    def _distances(self, logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """λ T² times the cross-entropy of the softened scores over the teacher's classes (Hinton et al. 2015), shape (B,).

        It differs from their Kullback-Leibler divergence by what the model can't change.
        """
        settings = self.plan.continual.lwf
        softened = (teacher / settings.temperature).softmax(1)
        own = (logits / settings.temperature).masked_fill(teacher.isinf(), _NONE).log_softmax(1)
        return -settings.weight * settings.temperature**2 * (softened * own).sum(1)

    @torch.no_grad()
    def taught(self, network: nn.Module, data: EncodedTexts, batch_size: int, collate: Collate | None = None) -> EncodedTexts:
        """The examples with this model's scores (see `Task.taught`)."""
        found = self._by_length(network, data, batch_size, lambda batch: self.logits(network, batch), collate=collate)
        return replace(data, teacher=found.float())

    @torch.no_grad()
    def features(self, network: nn.Module, data: EncodedTexts, batch_size: int, collate: Collate | None = None) -> torch.Tensor:
        """The mean of the last layer's outputs over a text's tokens, scaled to length 1 (see `Task.features`)."""
        if not self._mean:
            raise LichenError(Code.MODEL_UNSUPPORTED, "features are what a head reads that pools by the mean", where="model.head.pooling")
        head = next(module for name, module in network.named_modules() if name.rpartition(".")[2] in HEADS)
        if not len(data):
            return torch.zeros(0, next(head.parameters()).shape[-1], dtype=torch.float64)
        seen: list[torch.Tensor] = []

        def of(batch: Batch) -> torch.Tensor:
            seen.clear()
            self.logits(network, batch)
            return F.normalize(_mean_over_tokens(seen[-1].double(), batch["attention_mask"]), dim=1)

        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            return self._by_length(network, data, batch_size, of, collate=collate).double()
        finally:
            hook.remove()

    @torch.no_grad()
    def score(
        self,
        network: nn.Module,
        data: EncodedTexts,
        batch_size: int,
        rows: Sequence[int] | None = None,
        collate: Collate | None = None,
    ) -> ClassificationScores:
        """Score a model (see `Task.score`)."""
        classes = len(self.plan.task.labels)
        confusion = np.zeros((classes, classes), dtype=np.float64)

        def of(batch: Batch) -> torch.Tensor:
            logits, labels = self.logits(network, batch), batch["labels"]
            losses = F.cross_entropy(logits, labels, reduction="none")
            return torch.stack([losses.double(), labels.double(), logits.argmax(1).double()])

        if not len(data if rows is None else rows):
            return ClassificationScores(confusion, 0.0)
        losses, labels, found = self._by_length(network, data, batch_size, of, axis=1, rows=rows, collate=collate)
        np.add.at(confusion, (labels.long().numpy(), found.long().numpy()), 1)
        return ClassificationScores(confusion, float(losses.sum()))

    def scores_from(self, counts: Sequence[float], loss_sum: float | None) -> ClassificationScores:
        """Scores from a flattened confusion matrix (see `Task.scores_from`)."""
        classes = len(self.plan.task.labels)
        if len(counts) != classes**2 or not all(math.isfinite(count) for count in counts):
            raise LichenError(Code.FRAME_INVALID, f"{len(counts)} counts are no confusion matrix of {classes} classes")
        return ClassificationScores(np.array(counts, dtype=np.float64).reshape(classes, classes), loss_sum)

    def logits(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """The class scores of each text, shape (B, C); minus infinity for a class that is not to choose among."""
        return self._chosen(self._logits_of_all(network, batch))

    def _logits_of_all(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        mask = batch["attention_mask"]
        logits: torch.Tensor = network(input_ids=batch["input_ids"], attention_mask=mask).logits
        return _mean_over_tokens(logits, mask) if self._mean else logits

    def _chosen(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self._left_out is None else logits.masked_fill(self._left_out, -math.inf)

    def _kind(self) -> Any:
        from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

        return AutoModelForTokenClassification if self._mean else AutoModelForSequenceClassification

    @torch.no_grad()
    def _start_head(self, base: PreTrainedModel, model: TunedModel) -> None:
        head = self.plan.model.head
        if head.init == "random":
            return
        # only the last layer: in a head of several, zeros all through would pass no gradient on, ever
        last = rows_by_class(model.trainable, len(self.plan.task.labels))
        for name in last:
            model.trainable[name].zero_()
        if head.init == "zeros":
            return
        if head.init == "base":
            self._take_head(model, last)
            return
        batch = self._pad(self._tokens([self.plan.task.label_descriptions[label] for label in self.plan.task.labels]))
        hidden = base.base_model(**batch).last_hidden_state
        embedding = F.normalize(_mean_over_tokens(hidden, batch["attention_mask"]), dim=1)
        # what all descriptions share says nothing of the class
        weight = head.scale * (embedding - embedding.mean(0))
        (name,) = (name for name in model.head if model.trainable[name].shape == weight.shape)
        model.trainable[name].copy_(weight)

    def _take_head(self, model: TunedModel, last: list[str]) -> None:
        """Each class that the base knows by its label is as it is there; the others stay at zero."""
        found, classes = head_of_base(self.plan.model, self._kind())
        if not (known := [label for label in self.plan.task.labels if label in classes]):
            raise LichenError(
                Code.MODEL_UNSUPPORTED,
                f"the base has none of the plan's labels: its own are {', '.join(list(classes)[:5])}",
                where="model.head.init",
                fix="Name a base that was trained on some of them, or set model.head.init: zeros.",
            )
        ours, theirs = [self._index[label] for label in known], [classes[label] for label in known]
        for name in model.head:
            own = model.trainable[name]
            tensor = found[name.removeprefix(WRAPPER)].to(own.device)
            if name in last:
                own[ours] = tensor[theirs]
            else:
                own.copy_(tensor)


def _mean_over_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of ``values`` (B, T, D) over real tokens (``mask`` (B, T)): (B, D)."""
    weights = mask.to(values.dtype).unsqueeze(-1)
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1)
