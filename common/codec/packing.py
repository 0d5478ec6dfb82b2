"""Codes of 1 to 8 bits, packed without gaps: eight codes of b bits in b bytes, the first code in the lowest bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lichen.common.codec.layout import Floats

Bytes = NDArray[np.uint8]
_ALL = 0xFFFF_FFFF_FFFF_FFFF
_LANES = (8, 16, 32)
"""Widths of the lanes that are joined in pairs, within words of 64 bits."""


def _masks(lane: int, width: int) -> tuple[np.uint64, np.uint64]:
    """The lowest ``width`` bits of every second lane, and those of the lanes between them."""
    low = sum(((1 << width) - 1) << at for at in range(0, 64, 2 * lane))
    return np.uint64(low), np.uint64(low << lane & _ALL)


def pack(codes: Bytes, bits: int) -> Bytes:
    """Pack codes below 2^bits (shape (8m), contiguous) into bytes (shape (m·bits))."""
    words = codes.view("<u8")
    for lane in _LANES:
        width = bits * lane // 8
        low, high = _masks(lane, width)
        words = words & low | (words & high) >> np.uint64(lane - width)
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, :bits]).reshape(-1)


def unpack(packed: Bytes, bits: int) -> Bytes:
    """The codes (shape (8m)) of packed bytes (shape (m·bits))."""
    rows = np.zeros((len(packed) // bits, 8), np.uint8)
    rows[:, :bits] = packed.reshape(-1, bits)
    words = rows.reshape(-1).view("<u8")
    for lane in reversed(_LANES):
        width = bits * lane // 8
        low = _masks(lane, width)[0]
        words = words & low | (words & low << np.uint64(width)) << np.uint64(lane - width)
    return words.view(np.uint8)


class Lookup:
    """The values that packed codes stand for.

    Args:
        levels: value by code, shape (2^bits).
        bits: of a code.
    """

    def __init__(self, levels: Floats, bits: int) -> None:
        self._bits = bits
        self._whole = 8 % bits == 0
        if self._whole:  # a byte has whole codes: all its values come by one look-up
            shifts = np.arange(0, 8, bits)
            self._table = levels[(np.arange(256)[:, None] >> shifts) & ((1 << bits) - 1)]
        else:
            self._table = levels[:, None]

    def __call__(self, packed: Bytes) -> Floats:
        """Shape (8m) from packed bytes (shape (m·bits))."""
        found: Floats = self._table.take(packed if self._whole else unpack(packed, self._bits), axis=0)
        return found.reshape(-1)
