"""Codes of 1 to 8 bits, packed without gaps: eight codes of b bits in b bytes, the first code in the lowest bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lichen.common.codec.layout import Floats, room

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
    while bits < 8 and 8 % bits == 0:  # whole codes in a byte: two bytes become one
        pairs = codes.view("<u2")
        codes, bits = (pairs | pairs >> np.uint16(8 - bits)).astype(np.uint8), 2 * bits
    if bits == 8:
        return codes
    words = codes.view("<u8")
    for lane in _LANES:
        width = bits * lane // 8
        low, high = _masks(lane, width)
        words = words & low | (words & high) >> np.uint64(lane - width)
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, :bits]).reshape(-1)


def unpack(packed: Bytes, bits: int, lane: int = 8) -> Bytes | NDArray[np.uint16]:
    """The codes of packed bytes (shape (m·bits)): one in each lane of 8 bits, or two beside each other in one of 16."""
    rows = np.zeros((len(packed) // bits, 8), np.uint8)
    rows[:, :bits] = packed.reshape(-1, bits)
    words = rows.reshape(-1).view("<u8")
    for half in reversed([half for half in _LANES if half >= lane]):
        width = bits * half // 8
        low = _masks(half, width)[0]
        words = words & low | (words & low << np.uint64(width)) << np.uint64(half - width)
    return words.view(f"<u{lane // 8}")


class Lookup:
    """The values that packed codes stand for, several at a time: those of a byte where it has whole codes, else those of two codes.

    Args:
        levels: value by code, shape (2^bits).
        bits: of a code.
    """

    def __init__(self, levels: Floats, bits: int) -> None:
        self._bits, self._whole = bits, 8 % bits == 0
        shifts = bits * np.arange(8 // bits if self._whole else 2)
        self._table = levels[(np.arange(1 << bits * len(shifts))[:, None] >> shifts) & ((1 << bits) - 1)]

    def __call__(self, packed: Bytes, into: Floats | None = None) -> Floats:
        """Shape (8m) from packed bytes (shape (m·bits))."""
        found = room(8 * len(packed) // self._bits) if into is None else into
        codes = packed if self._whole else unpack(packed, self._bits, 16)
        self._table.take(codes, axis=0, out=found.reshape(len(codes), -1), mode="clip")  # none is out of range; other modes copy
        return found
