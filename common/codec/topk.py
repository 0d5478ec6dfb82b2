"""The largest values with their places; all others are zero. Biased: for use with error feedback."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from lichen.common.codec.codec import LARGEST, PIECE, Array, Codec, Payload, corrupt
from lichen.common.codec.layout import Flat, check_range

_SHARES = 10_000
_HALF = 16  # bits: half of a float's, whose order as an integer is that of its magnitude


class TopK(Codec):
    """Places ascending, in 32 bits (so of a model below 2^32 parameters), then their values in 32 bits.

    Of equal magnitudes at the limit the first are kept.

    Args:
        share: of the values that is kept, from .0001 to 1, rounded to .0001.
    """

    name, number = "topk", 3

    def __init__(self, share: float = 0.1) -> None:
        self._set_parameter(round(share * _SHARES), 1, _SHARES)

    def kept(self, count: int) -> int:
        """How many of so many values are kept."""
        return -(-count * self.parameter // _SHARES)

    def _body_length(self, count: int) -> int:
        return 8 * self.kept(count)

    def _body(self, source: Flat, seed: int) -> Iterator[Array]:
        limit, ties = self._limit(source)
        places: list[Array] = []
        values: list[Array] = []
        for start, piece in _pieces(source):
            size = _magnitudes(piece)
            equal = np.flatnonzero(size == limit)[:ties]
            ties -= len(equal)
            found = np.union1d(np.flatnonzero(size > limit), equal)
            places.append((found + start).astype("<u4"))
            values.append(piece[found].astype("<f4"))
        yield from places
        yield from values

    def _limit(self, source: Flat) -> tuple[int, int]:
        """The magnitude of the last value that is kept, as an integer, and how many of that magnitude are kept."""
        counts = np.zeros(1 << _HALF, np.int64)
        for _, piece in _pieces(source):
            check_range(float(np.abs(piece).max()), LARGEST)
            counts += np.bincount(_magnitudes(piece) >> _HALF, minlength=1 << _HALF)
        above, left = _last(counts, self.kept(source.count))
        counts[:] = 0
        for _, piece in _pieces(source):
            size = _magnitudes(piece)
            counts += np.bincount(size[size >> _HALF == above] & 0xFFFF, minlength=1 << _HALF)
        below, left = _last(counts, left)
        return above << _HALF | below, left

    def _payload(self, body: memoryview, count: int, seed: int) -> TopKPayload:
        kept = self.kept(count)
        return TopKPayload(np.frombuffer(body[: 4 * kept], "<u4"), np.frombuffer(body[4 * kept :], "<f4"), count)


class TopKPayload(Payload):
    """An update by `TopK`."""

    def __init__(self, places: NDArray[np.uint32], values: NDArray[np.float32], count: int) -> None:
        super().__init__(count)
        self._places, self._values = places, values
        if len(places) and (places[-1] >= count or not (places[1:] > places[:-1]).all()):
            raise corrupt("its places are not ascending, or not in the model")
        if not np.isfinite(values).all():
            raise corrupt("it holds values that are not finite")

    def values(self, part: int) -> torch.Tensor:
        """The values of a piece, most of them zero."""
        limits = np.array([part * PIECE, min((part + 1) * PIECE, self.count)], np.uint32)  # of another type, all places would be copied
        begin, end = np.searchsorted(self._places, limits)
        found = np.zeros(min(PIECE, self.count - part * PIECE), np.float32)
        found[self._places[begin:end].astype(np.int64) - part * PIECE] = self._values[begin:end]
        return torch.from_numpy(found)


def _pieces(source: Flat) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for start in range(0, source.count, PIECE):
        piece = np.empty(min(PIECE, source.count - start), np.float32)
        source.read(start, piece)
        yield start, piece


def _magnitudes(values: NDArray[np.float32]) -> NDArray[np.int32]:
    return np.abs(values).view(np.int32)


def _last(counts: NDArray[np.int64], left: int) -> tuple[int, int]:
    """The bin that holds the left-th value from above, and how many are wanted of it."""
    over = np.cumsum(counts[::-1])
    bin_from_above = int(np.searchsorted(over, left))
    before = int(over[bin_from_above - 1]) if bin_from_above else 0
    return len(counts) - 1 - bin_from_above, left - before
