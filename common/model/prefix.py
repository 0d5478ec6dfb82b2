"""The layers below the lowest trained one, computed once for each example: what they give is the same in every step.

It is wrong where something below is random or trained, so it is off there: base dropouts are zero (common/model/base.py), and with
trained embeddings there is no such prefix.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from lichen.common.errors import Code, LichenError

if TYPE_CHECKING:
    from lichen.common.model.adapter import TunedModel
    from lichen.common.model.packing import Packing
    from lichen.common.tasks.task import Batch

MOST_OF_DISK = 0.1
"""Largest share of the free disk that one store may take."""


class _FoundError(Exception):
    """Ends a forward pass at the end of the prefix."""


class FrozenPrefix:
    """The lowest layers of a model, which can be left out of a forward pass where their result is known.

    Args:
        network: the model; the forward methods of its lowest layers are replaced, and call the layers' own but within `use`.
        layers: all layers of its encoder or decoder, in order.
        count: how many of them are frozen, at least 1.
        packing: tells how a batch lies in the layers, where it may be packed.
    """

    def __init__(self, network: nn.Module, layers: Sequence[Any], count: int, packing: Packing | None = None) -> None:
        self._network, self._packing = network, packing
        self.count = count
        self._known: torch.Tensor | None = None
        self._stop = False
        for place, layer in enumerate(layers[:count]):
            layer.forward = self._passing(layer.forward, last=place == count - 1)

    def _passing(self, original: Callable[..., Any], *, last: bool) -> Callable[..., Any]:
        def forward(hidden: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            if self._known is not None:
                return self._known if last else hidden
            found = original(hidden, *arguments, **named)
            if last and self._stop:
                raise _FoundError(found)
            return found

        return forward

    @torch.no_grad()
    def compute(self, batch: Batch) -> torch.Tensor:
        """What the prefix gives for a batch: (B, T, d), or (B, 1, d) where the layer above reads one token alone."""
        self._stop = True
        try:
            self._network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        except _FoundError as stopped:
            found: torch.Tensor = stopped.args[0].float()  # passes may be in 16 bits
            return found if self._packing is None else self._packing.layout.leave(found)
        finally:
            self._stop = False
        raise LichenError(Code.INTERNAL, "the model's forward pass did not call its layers")

    @contextmanager
    def use(self) -> Iterator[Callable[[torch.Tensor | None], None]]:
        """Gives a function that is told what the prefix gives, (B, T, d), for the batch of the next passes within; None: run it."""

        def feed(hidden: torch.Tensor | None) -> None:
            self._known = hidden

        try:
            yield feed
        finally:
            self._known = None


def encoder_layers(model: TunedModel) -> list[nn.Module] | None:
    """All layers of a model's encoder or decoder, in order; None where they can't be told."""
    base: Any = model.network
    if hasattr(base, "get_base_model"):  # PEFT's wrapper
        base = base.get_base_model()
    expected = base.config.get_text_config().num_hidden_layers
    lists = [part for part in base.modules() if isinstance(part, nn.ModuleList) and len(part) == expected]
    return list(lists[0]) if len(lists) == 1 else None


def frozen_prefix(model: TunedModel, packing: Packing | None = None) -> FrozenPrefix | None:
    """The model's frozen prefix, if it has one that can be left out.

    Args:
        model: the forward methods of its lowest layers are replaced.
        packing: tells how a batch lies in the layers, where it may be packed.

    Returns:
        None where a trained parameter lies below the layers (tuned embeddings), where the lowest layer is trained, or where layers
        give something else than one tensor.
    """
    if (layers := encoder_layers(model)) is None:
        return None
    within = [{id(parameter) for parameter in layer.parameters() if parameter.requires_grad} for layer in layers]
    heads = {id(model.trainable[name]) for name in model.head}
    if any(id(parameter) not in heads.union(*within) for parameter in model.trainable.values()):
        return None
    count = next((place for place, trained in enumerate(within) if trained), len(layers))
    if count == 0:
        return None
    kinds: list[bool] = []
    hooks = [layer.register_forward_hook(lambda *found: kinds.append(isinstance(found[2], torch.Tensor))) for layer in layers[:count]]
    try:
        with torch.no_grad():
            ones = torch.ones((1, 4), dtype=torch.int64, device=model.device)
            model.network(input_ids=ones, attention_mask=ones)
    finally:
        for hook in hooks:
            hook.remove()
    return FrozenPrefix(model.network, layers, count, packing) if kinds == [True] * count else None


class PrefixStore:
    """What the prefix gave for the examples of one data set: a memory-mapped file, readable by its owner alone, filled as rows are used.

    Args:
        path: without suffix. The values lie in ``path``.values, which rows are there in ``path``.rows.
        tokens: of each example, at least 1.
        width: d.
        kind: ``float32`` changes nothing; ``float16`` halves the file, and changes updates by some 1e-5 of their size.
    """

    def __init__(self, path: Path, tokens: np.ndarray, width: int, kind: Literal["float32", "float16"]) -> None:
        self._ends = np.concatenate([[0], np.cumsum(tokens)])
        self._values = _mapped(path.with_suffix(".values"), np.dtype(kind), (int(self._ends[-1]), width))
        self._rows = _mapped(path.with_suffix(".rows"), np.dtype(np.int32), (len(tokens),))
        """Tokens that are stored of each row; 0: none yet."""

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows that are not there."""
        return [row for row in dict.fromkeys(rows) if not self._rows[row]]

    def put(self, rows: Sequence[int], hidden: torch.Tensor) -> None:
        """Store what the prefix gave for some rows, (B, T, d)."""
        values = hidden.cpu().numpy()
        for place, row in enumerate(rows):
            start, end = self._ends[row], self._ends[row + 1]
            count = min(int(end - start), hidden.shape[1])
            self._values[start : start + count] = values[place, :count]
            self._rows[row] = count

    def get(self, rows: Sequence[int]) -> torch.Tensor:
        """What the prefix gives for rows that are there, (B, T, d), zero at padding; on the CPU."""
        longest = max(int(self._rows[row]) for row in rows)
        found = np.zeros((len(rows), longest, self._values.shape[1]), dtype=np.float32)
        for place, row in enumerate(rows):
            start, count = self._ends[row], self._rows[row]
            found[place, :count] = self._values[start : start + count]
        return torch.from_numpy(found)


def store_of(
    folder: Path, prefix: FrozenPrefix, key: str, tokens: np.ndarray, width: int, kind: Literal["float32", "float16"]
) -> PrefixStore | None:
    """The store for a data set, in ``folder``, where another process may have filled it; None where it would take much of the disk.

    A power cut could leave rows marked that never reached the disk: so a store is one boot's, and another's are removed.

    Args:
        folder: of one node.
        prefix: whose layers.
        key: what tells the base model's weights and the examples' tokens.
        tokens: of each example.
        width: of the model.
        kind: see `PrefixStore`.
    """
    size = int(tokens.sum()) * width * np.dtype(kind).itemsize
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = hashlib.sha256(f"{key} {prefix.count} {kind} {_boot()}".encode()).hexdigest()[:16]
    path = folder / f"prefix-{name}"
    if not path.with_suffix(".rows").exists():
        for old in folder.glob("prefix-*"):
            old.unlink(missing_ok=True)
        if size > MOST_OF_DISK * shutil.disk_usage(folder).free:
            return None
    return PrefixStore(path, np.maximum(tokens, 1), width, kind)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        import os

        return f"process {os.getpid()}"


def _mapped(path: Path, kind: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape)) * kind.itemsize
    path.touch(mode=0o600)
    with path.open("r+b") as file:
        file.truncate(max(size, 1))
    return np.memmap(path, dtype=kind, mode="r+", shape=shape)
