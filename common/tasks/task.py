"""What a kind of task must offer, so that the trainer, the privacy code and the coordinator need not know which it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lichen.common.batches import Collate
    from lichen.common.model.adapter import TunedModel
    from lichen.common.result import Metrics

CHECKED_ROWS = 4
"""Made-up rows that are run at a model's start, to see whether it does what it should."""

Batch = dict[str, "torch.Tensor"]
"""Inputs of the model and targets, each with the examples as its first axis."""

Columns = Mapping[str, Sequence[object]]
"""Rows by column, as they were ingested."""


class Encoded(Protocol):
    """Examples that are ready to be batched. One example is one row as ingested."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, shape (N,)."""
        ...

    @property
    def digest(self) -> str:
        """What tells these examples' inputs from others, hexadecimal."""
        ...

    def select(self, indices: Sequence[int]) -> Self:
        """Some of the examples, in that order."""
        ...


E = TypeVar("E", bound=Encoded)


class Task(Protocol[E]):
    """One kind of task."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The data fields it reads."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""
        ...

    def build(self) -> TunedModel:
        """Load the base, attach the adapter, start the head; the model is then where this process computes (`common/device.py`)."""
        ...

    def outline(self) -> TunedModel:
        """The model that `build` would make, without values: its tensors' shapes alone, which take no memory.

        Raises:
            LichenError: MODEL_NOT_FOUND, MODEL_UNSUPPORTED.
        """
        ...

    def fault(self, row: Mapping[str, object]) -> str | None:
        """Why `encode` can't take a row, by that row alone, and without quoting it; None if it can."""
        ...

    def encode(self, columns: Columns) -> E:
        """Turn rows into examples.

        Raises:
            LichenError: DATA_LABEL, DATA_FIELD.
        """
        ...

    def made_up(self, rows: int, key: str = "", *, longest: bool = False) -> E:
        """Examples that nobody wrote, of the shape of real ones, with random targets; the same for the same ``key``.

        For the privacy self-check, and for canaries, which an auditor makes again by their key; the ``longest`` that the plan keeps,
        to measure what a training takes.
        """
        ...

    def join(self, first: E, second: E) -> E:
        """The examples of both, in this order."""
        ...

    def collate(self, data: E, indices: Sequence[int]) -> Batch:
        """A padded batch of the given examples, where the model is."""
        ...

    def choose_among(self, labels: Sequence[str] | None) -> None:
        """Let the model choose among these of the plan's labels only, in training and in scores, until this is called again.

        Args:
            labels: the plan's label names; None: all. Tasks without labels take no notice.
        """
        ...

    def losses(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of each example, shape (B,), that depends on that example alone: their sum is what DP clips by part."""
        ...

    def taught(self, network: nn.Module, data: E, batch_size: int, collate: Collate | None = None) -> E:
        """The same examples with what this model says of them, to which their losses then keep, by `continual.lwf`.

        Args: as of `features`.
        """
        ...

    def features(self, network: nn.Module, data: E, batch_size: int, collate: Collate | None = None) -> torch.Tensor:
        """What the head reads of each example, (N, d), float64 on the CPU, scaled to length 1; zero stays zero.

        Args:
            network: the model's.
            data: the examples.
            batch_size: of a pass.
            collate: makes this data's batches; None: `Task.collate` does.

        Raises:
            LichenError: MODEL_UNSUPPORTED, where there is no such thing.
        """
        ...

    def score(
        self, network: nn.Module, data: E, batch_size: int, rows: Sequence[int] | None = None, collate: Collate | None = None
    ) -> Scores:
        """Score a model.

        Args:
            network: the model's.
            data: the examples.
            batch_size: of a pass.
            rows: which of them; None: all.
            collate: as in `features`.
        """
        ...

    def scores_from(self, counts: Sequence[float], loss_sum: float | None) -> Scores:
        """Scores from flattened counts, perhaps summed over clients, perhaps noised.

        Raises:
            LichenError: FRAME_INVALID, if their number does not fit.
        """
        ...


class Scores(Protocol):
    """Sums from which metrics follow, so that scores of several clients can be added."""

    @property
    def counts(self) -> np.ndarray:
        """What an evaluation releases: one example changes one entry by one, so the ℓ2 sensitivity is 1."""
        ...

    @property
    def loss_sum(self) -> float | None:
        """Loss summed over examples; None where it may not be known."""
        ...

    def metrics(self) -> Metrics:
        """Metrics by their usual names."""
        ...
