"""16-bit floats, and updates that travel as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

import numpy as np
import torch

from lichen.common.codec.codec import PIECE, Array, Codec, Payload, corrupt
from lichen.common.codec.layout import Flat, Layout, check_range


class Half(Codec):
    """16-bit floats, rounded to the nearest: up to 65,504, and by 1/2048 of a value, or 2⁻²⁵ where that is more."""

    name, number = "fp16", 5

    def _body_length(self, count: int) -> int:
        return 2 * count

    def _body(self, source: Flat, seed: int) -> Iterator[Array]:
        limit = float(np.finfo(np.float16).max)
        for start in range(0, source.count, PIECE):
            values = np.empty(min(PIECE, source.count - start), np.float32)
            source.read(start, values)
            check_range(np.abs(values).max(), limit)
            yield values.astype("<f2")

    def _payload(self, body: memoryview, count: int, seed: int) -> HalfPayload:
        return HalfPayload(np.frombuffer(body, "<f2"))


class HalfPayload(Payload):
    """An update by `Half`."""

    def __init__(self, values: Array) -> None:
        super().__init__(len(values))
        self._values = values
        if not all(np.isfinite(values[start : start + PIECE]).all() for start in range(0, self.count, PIECE)):
            raise corrupt("it holds values that are not finite")

    def values(self, part: int) -> torch.Tensor:
        """One piece's values."""
        return torch.from_numpy(self._values[part * PIECE : (part + 1) * PIECE].astype(np.float32))


class Tensors(Payload):
    """Named tensors as they are. Their values are not checked: whether they are finite is seen from a sum.

    A part lies within one tensor, so that nothing is copied.
    """

    piece = 32_000  # 256 kB at 64 bits stay in a core's cache; from 32,768 on torch would wake threads

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        flat = (tensors[name].detach().cpu().reshape(-1) for name, _, _ in Layout.of(tensors).tensors)
        self._values: list[torch.Tensor] = [part for tensor in flat for part in torch.split(tensor, self.piece)]
        self._starts = [0, *accumulate(map(len, self._values))]
        super().__init__(self._starts[-1])
        self.parts = len(self._values)

    def values(self, part: int) -> torch.Tensor:
        """One piece's values."""
        return self._values[part]

    def places(self, flat: torch.Tensor, part: int) -> list[torch.Tensor]:
        """Where it lies."""
        return [flat[self._starts[part] : self._starts[part + 1]]]
