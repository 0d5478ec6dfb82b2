"""Nearest integers by blocks: each block of 256 is scaled by its largest magnitude. Exact to half a step, but biased."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from lichen.common.codec.codec import LARGEST, PIECE, SMALLEST, Array, Codec, Payload, check_scales
from lichen.common.codec.layout import Flat, check_range
from lichen.common.codec.packing import Lookup, pack

BLOCK = 256


class Blockwise(Codec):
    """A piece of `PIECE` values is one 32-bit scale a block, then the codes: integers plus 2^(bits−1), packed by eights.

    Args:
        bits: of a code, 2 to 8: 8 is exact enough for most uses, 4 the least that is.
    """

    name, number = "blockwise", 2

    def __init__(self, bits: int = 8) -> None:
        self.bits = self._set_parameter(bits, 2, 8)
        self._zero = 2 ** (bits - 1)
        self.lookup = Lookup(np.arange(2**bits, dtype=np.float32) - self._zero, bits)

    def values_length(self, count: int) -> int:
        """Bytes of so many values."""
        return 4 * -(-count // BLOCK) + self.bits * -(-count // 8)

    def _body_length(self, count: int) -> int:
        return self.values_length(count)

    def _body(self, source: Flat, seed: int) -> Iterator[Array]:
        most = self._zero - 1
        for start in range(0, source.count, PIECE):
            count = min(PIECE, source.count - start)
            values = np.empty((-(-count // BLOCK), BLOCK), np.float32)
            source.read(start, values.reshape(-1))
            largest = np.maximum(values.max(1), -values.min(1))
            check_range(largest.max(), LARGEST)
            gains = np.divide(most, largest, out=np.zeros_like(largest), where=largest > SMALLEST)
            yield np.where(gains > 0, largest / most, 0).astype("<f4")
            codes = (np.rint(values * gains[:, None]) + self._zero).astype(np.uint8).reshape(-1)
            yield pack(codes[: -(-count // 8) * 8], self.bits)

    def _payload(self, body: memoryview, count: int, seed: int) -> BlockwisePayload:
        return BlockwisePayload(self, body, count)


class BlockwisePayload(Payload):
    """An update by `Blockwise`."""

    def __init__(self, codec: Blockwise, body: memoryview, count: int) -> None:
        super().__init__(count)
        self._codec, self._body = codec, body
        for part in range(self.parts):
            check_scales(np.frombuffer(self._piece(part)[0], "<f4"))

    def values(self, part: int) -> torch.Tensor:
        """One piece's values."""
        piece = self._piece(part)
        scales, values = np.frombuffer(piece[0], "<f4"), self._codec.lookup(np.frombuffer(piece[1], np.uint8))
        whole = len(values) // BLOCK
        values[: whole * BLOCK].reshape(whole, BLOCK)[...] *= scales[:whole, None]
        values[whole * BLOCK :] *= scales[-1]
        return torch.from_numpy(values)

    def _piece(self, part: int) -> tuple[memoryview, memoryview]:
        count = min(PIECE, self.count - part * PIECE)
        begin = self._codec.values_length(part * PIECE)
        piece = self._body[begin : begin + self._codec.values_length(count)]
        scales = 4 * -(-count // BLOCK)
        return piece[:scales], piece[scales:]
