"""EDEN (Vargaftik et al. 2022): each block rotated, quantised by the normal distribution's best levels, and scaled so that it is unbiased.

With rotation R, y = R x and the levels ĉ nearest to z = y·√n/‖y‖, a block decodes to R⁻¹ ĉ·‖y‖²/⟨y, ĉ⟩. Its expected squared error is
D/(1 − D) of ‖x‖², where D is the quantiser's on a normal distribution: π/2 − 1 at 1 bit, .0096 at 4.

The flat vector lies in 64 rows. A group of blocks (`GROUP`, the last has fewer) takes a run of 64 values for each of its blocks from
every row, and deals them to the blocks in turn: each tensor is spread over many blocks, and memory is read in runs. A group's bytes are
one 32-bit scale a block, then the codes, packed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from lichen.common.codec import levels
from lichen.common.codec.codec import LARGEST, SMALLEST, Array, Codec, Payload, check_scales
from lichen.common.codec.layout import Flat, Floats, check_range, room
from lichen.common.codec.packing import Lookup, pack
from lichen.common.codec.rotation import BLOCK, GROUP, SIDE, hadamard, signs, sums


class Eden(Codec):
    """Unbiased, but for blocks that one value outweighs; errors average out over clients where each takes a seed of its own.

    Args:
        bits: of a code, 1 to 8.
    """

    name, number, biased = "eden", 1, False

    def __init__(self, bits: int = 4) -> None:
        self.bits = self._set_parameter(bits, 1, 8)
        self._codes = levels.cells(bits)
        self._levels = levels.levels(bits)[self._codes]
        self.lookup = Lookup(levels.levels(bits), bits)

    def group_length(self, width: int) -> int:
        """Bytes of a group of so many blocks."""
        return width * (4 + BLOCK * self.bits // 8)

    def _body_length(self, count: int) -> int:
        return self.group_length(_blocks(count))

    def _body(self, source: Flat, seed: int) -> Iterator[Array]:
        blocks = _blocks(source.count)
        sign = signs(seed, min(blocks, GROUP))
        buffers = room(2, min(blocks, GROUP) * BLOCK)
        for start in range(0, blocks, GROUP):
            width = min(GROUP, blocks - start)
            values, spare = buffers[:, : width * BLOCK]
            for number, row in enumerate(values.reshape(SIDE, -1)):
                source.read((number * blocks + start) * SIDE, row)
            values *= sign[: len(values)]
            yield from self._quantised(hadamard(values, spare), width)

    def _quantised(self, rotated: Floats, width: int) -> Iterator[Array]:
        """The scales and codes of a group, from 64 times its rotated values."""
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused
            norms = np.sqrt(sums(np.square(rotated, dtype=np.float64)))
            check_range(norms.max() / SIDE, LARGEST)
        used = norms > SMALLEST * SIDE
        gains = np.divide(SIDE, norms, out=np.zeros(width), where=used).astype(np.float32)
        normal = (rotated.reshape(SIDE, -1) * np.tile(gains, SIDE)).reshape(-1)
        cells = (normal * levels.CELLS_PER_UNIT + levels.MIDDLE).astype(np.intp)
        along = sums(normal * self._levels.take(cells, mode="clip"))
        yield np.divide(norms, along, out=np.zeros(width), where=used).astype("<f4")
        yield pack(self._codes.take(cells, mode="clip"), self.bits)

    def _payload(self, body: memoryview, count: int, seed: int) -> EdenPayload:
        return EdenPayload(self, body, count, seed)


class EdenPayload(Payload):
    """An update by `Eden`; see there for the order of its bytes."""

    def __init__(self, codec: Eden, body: memoryview, count: int, seed: int) -> None:
        self._codec, self._body, self.count = codec, body, count
        self._blocks = _blocks(count)
        self.parts = -(-self._blocks // GROUP)
        for part in range(self.parts):
            check_scales(self._group(part)[0])
        self._signs = signs(seed, min(self._blocks, GROUP))

    def add_part(self, total: torch.Tensor, weight: float, part: int) -> None:
        """Add weight × one group."""
        scales, packed = self._group(part)
        values = self._codec.lookup(packed)
        values.reshape(SIDE, -1)[...] *= np.tile(scales / SIDE, SIDE)
        values = hadamard(values, room(len(values)))
        values *= self._signs[: len(values)]
        rows = torch.from_numpy(values).view(SIDE, -1)
        first, stride = part * GROUP * SIDE, self._blocks * SIDE
        last = first + rows.shape[1]
        whole, rest = divmod(self.count, stride)
        total[: whole * stride].view(whole, stride)[:, first:last].add_(rows[:whole], alpha=weight)
        if rest > first:  # the row in which the update ends
            end = total[whole * stride + first : whole * stride + min(last, rest)]
            end.add_(rows[whole, : len(end)], alpha=weight)

    def _group(self, part: int) -> tuple[Floats, np.ndarray[tuple[int], np.dtype[np.uint8]]]:
        begin = self._codec.group_length(part * GROUP)
        width = min(GROUP, self._blocks - part * GROUP)
        group = self._body[begin : begin + self._codec.group_length(width)]
        return np.frombuffer(group[: 4 * width], "<f4"), np.frombuffer(group[4 * width :], np.uint8)


def _blocks(count: int) -> int:
    return -(-count // BLOCK)
