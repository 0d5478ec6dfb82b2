"""Text classification: a linear head over pooled features, per-example cross-entropy, accuracy and macro-F1."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from lichen.common.continual.stream import labels_until
from lichen.common.device import device, sent
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import TunedModel, attach
from lichen.common.model.base import HEADS, load_base, outline_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lichen.common.batches import Collate
    from lichen.common.plan import Plan
    from lichen.common.result import Metrics
    from lichen.common.tasks.task import Batch, Columns


TEXTS_AT_ONCE = 256  # the tokenizer's own objects of a whole data set would stay in the process's memory
CHARACTERS = 6
"""Of a long text are read for each token that is kept: more than a token of a natural language has."""
_SPACE = re.compile(r"\s")
_NONE = -1e4  # of a class that is not to choose among: softmax gives it nothing, and zero times its logarithm is a number


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of each text, and labels as class indices."""

    tokens: list[np.ndarray]
    """Of each text, shape (T,), int32: lists of Python integers would take nine times the memory."""
    labels: torch.Tensor
    """Shape (N,), int64."""
    teacher: torch.Tensor | None = None
    """What another model says of them: class scores (N, C), float32, minus infinity for a class that it does not choose among."""

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, shape (N,)."""
        return np.array([len(ids) for ids in self.tokens], dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokens, hexadecimal."""
        found = hashlib.sha256(self.lengths.tobytes())
        for ids in self.tokens:
            found.update(ids.tobytes())
        return found.hexdigest()

    def select(self, indices: Sequence[int]) -> EncodedTexts:
        """Some of the examples, in that order."""
        rows = list(indices)
        teacher = None if self.teacher is None else self.teacher[rows]
        return EncodedTexts([self.tokens[row] for row in rows], self.labels[rows], teacher)


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
        return found if self.loss_sum is None else found | {"loss": float(self.loss_sum / total)}


class TextClassification:
    """Texts to one of the plan's labels.

    With mean pooling the network is `AutoModelForTokenClassification`, and a text's logits are the mean of its real tokens' logits.
    Since the head is linear, that equals the head on mean-pooled features (Reimers and Gurevych 2019), and the model stays one that
    plain transformers and peft load. With `pooler` it is `AutoModelForSequenceClassification` as it is.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.fields = plan.task.fields
        self._index = {label: index for index, label in enumerate(plan.task.labels)}
        self._first = torch.tensor([self._index[label] for label in labels_until(plan, 0)])  # the model may always choose among these
        self._mean = plan.model.head.pooling == "mean"
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._device = torch.device("cpu")
        self._left_out: torch.Tensor | None = None  # of the classes, shape (C,): those that are not to choose among

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""
        if self._tokenizer is None:
            raise LichenError(Code.INTERNAL, "the task's model was not built yet")
        return self._tokenizer

    def build(self) -> TunedModel:
        """Load the base, attach the adapter, start the head, go to the device (see `Task.build`)."""
        from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

        labels = self.plan.task.labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.plan.seed)  # a random head is the same in every run of the plan
            base, self._tokenizer = load_base(
                self.plan.model,
                AutoModelForTokenClassification if self._mean else AutoModelForSequenceClassification,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id=self._index,
            )
        longest = min(getattr(base.config.get_text_config(), "max_position_embeddings", math.inf), self._tokenizer.model_max_length)
        if self.plan.task.max_length > longest:  # a longer text would end in an index error, and tell that there is one
            raise LichenError(
                Code.MODEL_UNSUPPORTED,
                f"task.max_length ({self.plan.task.max_length}) is above the {longest} tokens that the model takes",
                where="model.base",
                fix=f"Set task.max_length to at most {longest}.",
            )
        model = attach(base, self.plan, "TOKEN_CLS" if self._mean else "SEQ_CLS")
        model.network.train()
        self._start_head(base, model)
        self._device = device()
        model.network.to(self._device)
        return model

    def outline(self) -> TunedModel:
        """Shapes alone (see `Task.outline`)."""
        from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

        kind = AutoModelForTokenClassification if self._mean else AutoModelForSequenceClassification
        base = outline_base(self.plan.model, kind, num_labels=len(self.plan.task.labels))
        with torch.device("meta"):
            return attach(base, self.plan, "TOKEN_CLS" if self._mean else "SEQ_CLS")

    def fault(self, row: Mapping[str, object]) -> str | None:
        """Whether its label is none of the plan's (see `Task.fault`)."""
        return self.plan.task.fault(row)

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
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
        most = self.plan.task.max_length
        lengths = [most] * rows if longest else torch.randint(3, min(most, 24) + 1, (rows,), generator=generator).tolist()
        ordinary = sorted(set(range(len(self.tokenizer))) - set(self.tokenizer.all_special_ids))
        picks = [torch.randint(len(ordinary), (length,), generator=generator).tolist() for length in lengths]
        labels = self._first[torch.randint(len(self._first), (rows,), generator=generator)]
        return EncodedTexts([np.array([ordinary[pick] for pick in row], dtype=np.int32) for row in picks], labels)

    def join(self, first: EncodedTexts, second: EncodedTexts) -> EncodedTexts:
        """The examples of both (see `Task.join`)."""
        teachers = [one.teacher for one in (first, second) if one.teacher is not None]
        teacher = torch.cat(teachers) if len(teachers) == 2 else None
        return EncodedTexts([*first.tokens, *second.tokens], torch.cat([first.labels, second.labels]), teacher)

    def collate(self, data: EncodedTexts, indices: Sequence[int]) -> Batch:
        """A batch padded to its longest text, where the model is: ``input_ids`` and ``attention_mask`` (B, T), ``labels`` (B,)."""
        batch = self._pad([data.tokens[index] for index in indices])
        rows = torch.as_tensor(indices, dtype=torch.int64)
        batch["labels"] = data.labels[rows]
        if data.teacher is not None:
            batch["teacher"] = data.teacher[rows]
        return {name: sent(tensor, self._device) for name, tensor in batch.items()}

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
    def taught(self, network: nn.Module, data: EncodedTexts, batch_size: int) -> EncodedTexts:
        """The examples with this model's scores (see `Task.taught`)."""
        return replace(data, teacher=self._by_length(network, data, batch_size, lambda batch: self.logits(network, batch)).float())

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

    def _by_length(
        self,
        network: nn.Module,
        data: EncodedTexts,
        batch_size: int,
        of: Callable[[Batch], torch.Tensor],
        *,
        axis: int = 0,
        rows: Sequence[int] | None = None,
        collate: Collate | None = None,
    ) -> torch.Tensor:
        """What a function of a batch gives for each row, at least one, on the CPU; in order of length so that little is padded."""
        found: list[torch.Tensor] = []
        chosen = np.arange(len(data)) if rows is None else np.asarray(rows, dtype=np.int64)
        order = np.argsort(data.lengths[chosen], kind="stable")
        network.eval()
        try:
            for start in range(0, len(order), batch_size):
                batch = chosen[order[start : start + batch_size]].tolist()
                if collate is not None:
                    collate.prepare(batch)
                    found.append(of(collate(batch)))
                else:
                    found.append(of(self.collate(data, batch)))
        finally:
            network.train()
        return torch.cat(found, axis).cpu().index_select(axis, torch.from_numpy(np.argsort(order)))

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

    def _tokens(self, texts: list[str]) -> list[np.ndarray]:
        """Of each text, cut at the plan's length. What follows that much of a text is not read, where words are tokenised one by one."""
        most = self.plan.task.max_length
        tokens: list[np.ndarray] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            part = texts[start : start + TEXTS_AT_ONCE]
            begun = [_words(text, CHARACTERS * most) for text in part] if _word_by_word(self.tokenizer) else part
            found = self._cut(begun)
            short = [place for place, ids in enumerate(found) if len(ids) < most and len(begun[place]) < len(part[place])]
            for place, ids in zip(short, self._cut([part[place] for place in short]), strict=True):
                found[place] = ids
            tokens += found
        return tokens

    def _cut(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        encoded: Any = self.tokenizer(texts, truncation=True, max_length=self.plan.task.max_length)
        return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def _pad(self, rows: list[np.ndarray]) -> Batch:
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        length = max(lengths, default=0) or 1  # an empty text has no token in some tokenizers
        if self.plan.local.compute == "plain":
            length = self.plan.task.max_length
        real = np.arange(length) < lengths[:, None]
        ids = np.full(real.shape, int(self.tokenizer.pad_token_id), dtype=np.int64)
        if rows:
            ids[real] = np.concatenate(rows)
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(real.astype(np.int64))}

    @torch.no_grad()
    def _start_head(self, base: PreTrainedModel, model: TunedModel) -> None:
        head = self.plan.model.head
        if head.init == "random":
            return
        # only the last layer: in a head of several, zeros all through would pass no gradient on, ever
        last = [name for name in model.trainable if name in model.head][-1].rpartition(".")[0]
        for name in model.head:
            if name.rpartition(".")[0] == last:
                model.trainable[name].zero_()
        if head.init == "zeros":
            return
        batch = self._pad(self._tokens([self.plan.task.label_descriptions[label] for label in self.plan.task.labels]))
        hidden = base.base_model(**batch).last_hidden_state
        embedding = F.normalize(_mean_over_tokens(hidden, batch["attention_mask"]), dim=1)
        # what all descriptions share says nothing of the class
        weight = head.scale * (embedding - embedding.mean(0))
        (name,) = (name for name in model.head if model.trainable[name].shape == weight.shape)
        model.trainable[name].copy_(weight)


def _word_by_word(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text's first tokens are kept, and what stands before a space gives the same whatever comes after: BERT's are such."""
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # a tokenizer in Python has none
    if backend is None or tokenizer.truncation_side != "right" or any(map(_SPACE.search, tokenizer.get_added_vocab())):
        return False
    return isinstance(backend.pre_tokenizer, BertPreTokenizer) and isinstance(backend.normalizer, BertNormalizer)


def _words(text: str, characters: int) -> str:
    """The words in at most so many characters; the whole text if its first word is longer."""
    end = text.rfind(" ", 0, characters) if len(text) > characters else 0
    return text[:end] if end > 0 else text


def _mean_over_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of ``values`` (B, T, D) over real tokens (``mask`` (B, T)): (B, D)."""
    weights = mask.to(values.dtype).unsqueeze(-1)
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1)
