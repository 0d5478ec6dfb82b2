"""Floats as they are, of 32 or 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch

from lichen.common.codec.codec import PIECE, Array, Codec, Payload, corrupt
from lichen.common.codec.layout import Flat, check_range


class Plain(Codec):
    """32-bit floats: nothing is lost."""

    name, number, biased = "none", 4, False
    dtype: ClassVar[str] = "<f4"

    def _body_length(self, count: int) -> int:
        return count * np.dtype(self.dtype).itemsize

    def _body(self, source: Flat, seed: int) -> Iterator[Array]:
        limit = float(np.finfo(self.dtype).max)
        for start in range(0, source.count, PIECE):
            values = np.empty(min(PIECE, source.count - start), np.float32)
            source.read(start, values)
            check_range(np.abs(values).max(), limit)
            yield values.astype(self.dtype)

    def _payload(self, body: memoryview, count: int, seed: int) -> PlainPayload:
        return PlainPayload(np.frombuffer(body, self.dtype))


class Half(Plain):
    """16-bit floats, rounded to the nearest: up to 65,504, and by 1/2048 of a value, or 2⁻²⁵ where that is more."""

    name, number, biased = "fp16", 5, True
    dtype = "<f2"


class PlainPayload(Payload):
    """An update by `Plain` or `Half`."""

    def __init__(self, values: Array) -> None:
        self._values, self.count = values, len(values)
        self.parts = -(-self.count // PIECE)
        if not all(np.isfinite(values[start : start + PIECE]).all() for start in range(0, self.count, PIECE)):
            raise corrupt("it holds values that are not finite")

    def add_part(self, total: torch.Tensor, weight: float, part: int) -> None:
        """Add weight × one piece."""
        here = slice(part * PIECE, (part + 1) * PIECE)
        total[here].add_(torch.from_numpy(self._values[here].astype(np.float32)), alpha=weight)
