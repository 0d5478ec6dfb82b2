"""Batches for a pass: padded, and where the lowest layers are frozen, with what these give for their rows, kept from step to step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lichen.common.batching import pass_cost, passes
from lichen.common.device import sent
from lichen.common.model.checkpointing import checkpoint_layers
from lichen.common.model.lean import run_lean
from lichen.common.model.packing import Packing
from lichen.common.model.precision import compute_in_bfloat16
from lichen.common.model.prefix import FrozenPrefix, PrefixStore, frozen_prefix, store_of
from lichen.common.tasks.task import CHECKED_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from lichen.common.model.adapter import TunedModel
    from lichen.common.plan import Local, Plan
    from lichen.common.tasks.task import Batch, Encoded, Task

_READY = "lichen_ready"
OPEN_STORES = 16
"""Data sets whose stores stay open: a simulated client's is opened anew when its turn comes."""


class Ready(NamedTuple):
    """A model that is ready to compute as a plan says."""

    packing: Packing
    """Tells how a batch lies in it."""
    batches: Batches


def ready(plan: Plan, task: Task[Any], model: TunedModel) -> Ready:
    """Let a plan's model leave out what it can; the same for all who use the model in this process: its layers are changed once."""
    kept = vars(model.network)  # so it goes when the model does
    if _READY not in kept:
        lean = plan.local.compute == "lean"
        packing = run_lean(model, pack=plan.privacy.gradients != "hooks") if lean else Packing(on=False)
        if plan.local.checkpointing:
            checkpoint_layers(model)
        kept[_READY] = Ready(packing, Batches(task, model, plan.local, packing))
        if plan.local.precision == "bfloat16":
            compute_in_bfloat16(model.network, model.device)
    found: Ready = kept[_READY]
    return found


class Batches:
    """Makes the batches of one model.

    Args:
        task: collates.
        model: whose frozen prefix is left out where what it gives is kept.
        local: the plan's section.
        packing: tells how a batch lies in the model.
    """

    def __init__(self, task: Task[Any], model: TunedModel, local: Local, packing: Packing) -> None:
        self._task, self._local = task, local
        self._by_length = local.compute == "lean" and not packing.on
        self._pass_cost, self._device = pass_cost(model), model.device
        self._width = int(model.network.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
        self.prefix = frozen_prefix(model, packing) if local.compute == "lean" and local.prefix_cache != "off" else None
        self._stores: dict[Path, tuple[Encoded, PrefixStore | None]] = {}

    @contextmanager
    def of(self, data: Encoded, folder: Path | None) -> Iterator[Collate]:
        """How a data set's batches are made within.

        Args:
            data: the examples.
            folder: of the node, where what is computed may be kept; None: nothing is kept.
        """
        if self.prefix is None or folder is None or (store := self._store(self.prefix, data, folder)) is None:
            yield Collate(self._task, data)
            return
        with self.prefix.use() as feed:
            yield _CollateKnown(self._task, data, self.prefix, store, feed, self.parts, self._device)

    def parts(self, rows: Sequence[int], data: Encoded) -> list[list[int]]:
        """Rows by pass: by length, but where nothing is padded anyway."""
        most = self._local.max_physical_batch_size
        if not self._by_length:
            return [list(rows[start : start + most]) for start in range(0, len(rows), most)]
        found = passes([1] * len(rows), [int(data.lengths[row]) for row in rows], most, self._pass_cost)
        return [[rows[index] for index in part] for part in found]

    def _store(self, prefix: FrozenPrefix, data: Encoded, folder: Path) -> PrefixStore | None:
        kept = self._stores.pop(folder, None)
        if kept is None or kept[0] is not data:
            # what it gives for rows that nobody wrote tells one set of weights from another
            tells = prefix.compute(self._task.collate(self._task.made_up(CHECKED_ROWS), range(CHECKED_ROWS)))
            key = f"{hashlib.sha256(tells.cpu().numpy().tobytes()).hexdigest()} {data.digest}"
            half = self._local.prefix_cache == "float16"
            kept = data, store_of(folder, prefix, key, data.lengths, self._width, "float16" if half else "float32")
        self._stores[folder] = kept
        if len(self._stores) > OPEN_STORES:
            del self._stores[next(iter(self._stores))]
        return kept[1]


class Collate:
    """Makes batches of a data set."""

    def __init__(self, task: Task[Any], data: Encoded) -> None:
        self._task, self._data = task, data

    def prepare(self, rows: Sequence[int]) -> None:
        """Must be told the rows of a step before the first batch of them is made."""

    def __call__(self, rows: Sequence[int]) -> Batch:
        """The padded batch of the given rows, for the next pass."""
        return self._task.collate(self._data, rows)


class _CollateKnown(Collate):
    """The same, where the passes leave the frozen prefix out."""

    def __init__(
        self,
        task: Task[Any],
        data: Encoded,
        prefix: FrozenPrefix,
        store: PrefixStore,
        feed: Callable[[torch.Tensor | None], None],
        parts: Callable[[Sequence[int], Encoded], list[list[int]]],
        device: torch.device,
    ) -> None:
        super().__init__(task, data)
        self._prefix, self._store, self._feed, self._parts, self._device = prefix, store, feed, parts, device

    def prepare(self, rows: Sequence[int]) -> None:
        self._feed(None)
        for part in self._parts(self._store.missing(rows), self._data):
            self._store.put(part, self._prefix.compute(super().__call__(part)))

    def __call__(self, rows: Sequence[int]) -> Batch:
        self._feed(sent(self._store.get(rows), self._device))
        return super().__call__(rows)
