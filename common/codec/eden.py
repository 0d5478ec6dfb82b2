"""EDEN (Vargaftik et al. 2022): each block rotated, quantised by the normal distribution's best levels, and scaled so that it is unbiased.

With rotation R, y = R x and the levels ĉ nearest to z = y·√n/‖y‖, a block decodes to R⁻¹ ĉ·‖y‖²/⟨y, ĉ⟩. Its expected squared error is
D/(1 − D) of ‖x‖², where D is the quantiser's on a normal distribution: π/2 − 1 at 1 bit, .0096 at 4.

The whole blocks of the flat vector lie in 64 rows. A group of blocks (`GROUP`, the last has fewer) takes a run of 64 values for each of
its blocks from every row, and deals them to the blocks in turn: each tensor is spread over many blocks, and memory is read in runs. A
group's bytes are one 32-bit scale a block, then the codes, packed. What is left at the end are blocks of 2048, 1024, … 64 values, at most
one of each but the last, which is filled up with zeros: scale and codes of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from lichen.common.codec import levels
from lichen.common.codec.codec import LARGEST, SMALLEST, Array, Codec, Payload, check_scales
from lichen.common.codec.layout import Flat, Floats, check_range, room, scratch
from lichen.common.codec.packing import Bytes, Lookup, pack
from lichen.common.codec.rotation import BLOCK, GROUP, SIDE, hadamard, hadamard_of, hadamard_of_integers, signs, sums


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
        self.lookup = Lookup(levels.levels(bits) * levels.GRID, bits)

    def group_length(self, width: int, size: int = BLOCK) -> int:
        """Bytes of so many blocks of a size."""
        return width * (4 + size * self.bits // 8)

    def _body_length(self, count: int) -> int:
        return self.group_length(count // BLOCK) + sum(self.group_length(1, size) for size in _tail(count))

    def _body(self, source: Flat, seed: int) -> Iterator[Array]:
        blocks = source.count // BLOCK
        sign = signs(seed, max(min(blocks, GROUP), 1))
        buffers = room(2, min(blocks, GROUP) * BLOCK)
        for start in range(0, blocks, GROUP):
            width = min(GROUP, blocks - start)
            values, spare = buffers[:, : width * BLOCK]
            for number, row in enumerate(values.reshape(SIDE, -1)):
                source.read((number * blocks + start) * SIDE, row)
            values *= sign[: len(values)]
            yield from self._quantised(hadamard(values, spare), width, SIDE)
        begin = blocks * BLOCK
        for size in _tail(source.count):
            values = room(size)
            source.read(begin, values)
            begin += size
            yield from self._quantised(hadamard_of(values * sign[:size]), 1, math.sqrt(size))

    def _quantised(self, rotated: Floats, width: int, root: float) -> Iterator[Array]:
        """The scales and codes of so many interleaved blocks, from √n times their rotated values, where ``root`` is √n."""
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused
            norms = np.sqrt(sums(np.square(rotated, dtype=np.float64), width))
            check_range(norms.max() / root, LARGEST)
        used = norms > SMALLEST * root
        gains = np.divide(root, norms, out=np.zeros(width), where=used)
        of_cells = np.tile((gains * levels.CELLS_PER_UNIT).astype(np.float32), len(rotated) // SIDE // width)
        places = rotated.reshape(SIDE, -1) * of_cells
        places += levels.MIDDLE
        cells = places.reshape(-1).astype(np.intp)
        rotated *= self._levels.take(cells, mode="clip")
        along = sums(rotated, width) * gains
        yield np.divide(norms, along, out=np.zeros(width), where=used).astype("<f4")
        yield pack(self._codes.take(cells, mode="clip"), self.bits)

    def _payload(self, body: memoryview, count: int, seed: int) -> EdenPayload:
        return EdenPayload(self, body, count, seed)


class EdenPayload(Payload):
    """An update by `Eden`; see there for the order of its bytes. Its last part is what is left beside whole blocks."""

    def __init__(self, codec: Eden, body: memoryview, count: int, seed: int) -> None:
        super().__init__(count)
        self._codec, self._body = codec, body
        self._blocks = count // BLOCK
        self._groups = -(-self._blocks // GROUP)
        self.parts = self._groups + (count % BLOCK > 0)
        for part in range(self._groups):
            check_scales(self._group(part)[0])
        for scale, _, _ in self._tail():
            check_scales(scale)
        self._signs = signs(seed, max(min(self._blocks, GROUP), 1))

    def values(self, part: int) -> torch.Tensor:
        """One group's values, by rows."""
        if part == self._groups:
            ends = (hadamard_of(self._codec.lookup(packed)) * (scale / (root * levels.GRID)) for scale, packed, root in self._tail())
            return torch.from_numpy(np.concatenate([values * self._signs[: len(values)] for values in ends]))
        scales, packed = self._group(part)
        codes, spare = scratch(len(scales) * BLOCK)
        values = hadamard_of_integers(self._codec.lookup(packed, codes), spare)
        values *= self._signs[: len(values)]
        values.reshape(SIDE, -1)[...] *= np.tile(scales / (SIDE * levels.GRID), SIDE)
        return torch.from_numpy(values)

    def places(self, flat: torch.Tensor, part: int) -> list[torch.Tensor]:
        """A run of each row, or the end."""
        stride, first = self._blocks * SIDE, part * GROUP * SIDE
        if part == self._groups:
            return [flat[self._blocks * BLOCK :]]
        return [flat[: self._blocks * BLOCK].view(SIDE, stride)[:, first : first + GROUP * SIDE]]

    def _group(self, part: int) -> tuple[Floats, Bytes]:
        begin = self._codec.group_length(part * GROUP)
        width = min(GROUP, self._blocks - part * GROUP)
        group = self._body[begin : begin + self._codec.group_length(width)]
        return np.frombuffer(group[: 4 * width], "<f4"), np.frombuffer(group[4 * width :], np.uint8)

    def _tail(self) -> Iterator[tuple[Floats, Bytes, np.float32]]:
        """Scale, packed codes and √n of each block after the whole ones."""
        begin = self._codec.group_length(self._blocks)
        for size in _tail(self.count):
            block = self._body[begin : begin + self._codec.group_length(1, size)]
            begin += len(block)
            yield np.frombuffer(block[:4], "<f4"), np.frombuffer(block[4:], np.uint8), np.float32(math.sqrt(size))


def _tail(count: int) -> list[int]:
    """Sizes of the blocks that hold what is left beside whole ones."""
    left = -(-(count % BLOCK) // SIDE) * SIDE
    return [size for size in (BLOCK >> shift for shift in range(1, 7)) if left & size] if left < BLOCK else [BLOCK]
