"""What tasks on texts share: token ids, their batches, and passes over many of them."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lichen.common.device import device, sent
from lichen.common.errors import Code, LichenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lichen.common.batches import Collate
    from lichen.common.model.adapter import TunedModel
    from lichen.common.plan import Plan
    from lichen.common.tasks.task import Batch


TEXTS_AT_ONCE = 256  # the tokenizer's own objects of a whole data set would stay in the process's memory
CHARACTERS = 6
"""Of a long text are read for each token that is kept: more than a token of a natural language has."""
_SPACE = re.compile(r"\s")


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of each text, and where texts have labels these as class indices."""

    tokens: list[np.ndarray]
    """Of each text, shape (T,), int32: lists of Python integers would take nine times the memory."""
    labels: torch.Tensor | None = None
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
        labels, teacher = (None if tensor is None else tensor[rows] for tensor in (self.labels, self.teacher))
        return EncodedTexts([self.tokens[row] for row in rows], labels, teacher)


class Texts:
    """Reads texts for one plan's model; a kind of task adds what is learned of them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._device = torch.device("cpu")
        self.fields = plan.task.fields

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""
        if self._tokenizer is None:
            raise LichenError(Code.INTERNAL, "the task's model was not built yet")
        return self._tokenizer

    def _check_length(self, base: PreTrainedModel) -> None:
        """Refuse a plan whose texts are longer than the model takes: one would end in an index error, and tell that there is one."""
        longest = min(getattr(base.config.get_text_config(), "max_position_embeddings", math.inf), self.tokenizer.model_max_length)
        if self.plan.task.max_length > longest:
            raise LichenError(
                Code.MODEL_UNSUPPORTED,
                f"task.max_length ({self.plan.task.max_length}) is above the {longest} tokens that the model takes",
                where="model.base",
                fix=f"Set task.max_length to at most {longest}.",
            )

    def _place(self, model: TunedModel) -> TunedModel:
        """The model where this process computes (see `Task.build`)."""
        self._device = device()
        model.network.to(self._device)
        return model

    def _made_up(self, rows: int, generator: torch.Generator, *, longest: bool) -> list[np.ndarray]:
        """Random tokens of random lengths, or all of the plan's length."""
        most = self.plan.task.max_length
        lengths = [most] * rows if longest else torch.randint(3, min(most, 24) + 1, (rows,), generator=generator).tolist()
        ordinary = sorted(set(range(len(self.tokenizer))) - set(self.tokenizer.all_special_ids))
        picks = [torch.randint(len(ordinary), (length,), generator=generator).tolist() for length in lengths]
        return [np.array([ordinary[pick] for pick in row], dtype=np.int32) for row in picks]

    def fault(self, row: Mapping[str, object]) -> str | None:
        """What the plan says of it (see `Task.fault`)."""
        return self.plan.task.fault(row)

    def collate(self, data: EncodedTexts, indices: Sequence[int]) -> Batch:
        """A batch padded to its longest text, where the model is: ``input_ids``, ``attention_mask`` (B, T), and ``labels`` (B,) if any."""
        batch = self._pad([data.tokens[index] for index in indices])
        rows = torch.as_tensor(indices, dtype=torch.int64)
        batch |= {name: tensor[rows] for name, tensor in (("labels", data.labels), ("teacher", data.teacher)) if tensor is not None}
        return {name: sent(tensor, self._device) for name, tensor in batch.items()}

    def join(self, first: EncodedTexts, second: EncodedTexts) -> EncodedTexts:
        """The examples of both (see `Task.join`)."""
        labels, teacher = (_both(*pair) for pair in ((first.labels, second.labels), (first.teacher, second.teacher)))
        return EncodedTexts([*first.tokens, *second.tokens], labels, teacher)

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


def seeded(key: str) -> torch.Generator:
    """What draws examples that nobody wrote; the same for the same key."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))


def _both(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


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
