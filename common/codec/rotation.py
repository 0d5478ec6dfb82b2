"""A rotation after which the values of a block look normally distributed: random signs, then a Hadamard transform.

The sums are the same bits on every machine: additions of two arrays, in an order that is written here, or of integers that are so small
that they are exact in any order, and a matrix product may add them.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from lichen.common.codec.layout import Floats, room

SIDE = 64
BLOCK = SIDE * SIDE
GROUP = 32
"""Blocks that are rotated together, interleaved, so that all additions run over long rows. Arrays of so many fit in a core's cache."""


def signs(seed: int, blocks: int) -> Floats:
    """A sign for each value of a group of so many blocks (shape (BLOCK·blocks)), from SHAKE-128 of the seed; of fewer, the first of them.

    All groups use the same: what must be independent is the error of one value from client to client.
    """
    drawn = hashlib.shake_128(b"lichen.eden" + seed.to_bytes(8, "little")).digest(blocks * BLOCK // 8)
    found = room(blocks * BLOCK)
    found[:] = np.unpackbits(np.frombuffer(drawn, np.uint8))
    return np.subtract(found * 2, 1, out=found)


def hadamard(values: Floats, spare: Floats) -> Floats:
    """√BLOCK = 64 times the orthonormal Hadamard transform of each block; it is its own inverse, but for 64².

    A transform of 4096 is one of 64 over rows and one of 64 over columns. Its result comes with rows and columns exchanged, as does that
    of the second call.

    Args:
        values: blocks of 64 × 64, interleaved: shape (64·64·blocks). They are overwritten.
        spare: as large.

    Returns:
        ``spare``, with the result.
    """
    width = len(values) // BLOCK
    _over_rows(values, spare)
    spare.reshape(SIDE, SIDE, width)[...] = values.reshape(SIDE, SIDE, width).transpose(1, 0, 2)
    _over_rows(spare, values)
    return spare


def hadamard_of_integers(values: Floats, spare: Floats) -> Floats:
    """`hadamard` of integers whose magnitudes add up to less than 2^24 in each block: the same, in half the time.

    Args:
        values: as there; they are overwritten.
        spare: as large.

    Returns:
        ``spare``, with the result.
    """
    width = len(values) // BLOCK
    here, there = torch.from_numpy(values), torch.from_numpy(spare)
    rows, other = here.view(SIDE, -1), there.view(SIDE, -1)
    torch.mm(_MATRIX, rows, out=other)
    here.view(SIDE, SIDE, width).copy_(there.view(SIDE, SIDE, width).transpose(0, 1))
    torch.mm(_MATRIX, rows, out=other)
    return spare


def _over_rows(values: Floats, spare: Floats) -> None:
    for stride in (32, 16, 8, 4, 2, 1):  # six steps: the result is in ``values`` again
        source, target = values.reshape(32 // stride, 2, -1), spare.reshape(32 // stride, 2, -1)
        np.add(source[:, 0], source[:, 1], out=target[:, 0])
        np.subtract(source[:, 0], source[:, 1], out=target[:, 1])
        values, spare = spare, values


def hadamard_of(block: Floats) -> Floats:
    """√n times the orthonormal Hadamard transform of one block of n values, a power of two; it is its own inverse, but for n."""
    stride = len(block) // 2
    while stride:
        pairs = block.reshape(-1, 2, stride)
        block = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
        stride //= 2
    return block


def sums(terms: Floats, width: int) -> Floats:
    """The sum over each of so many interleaved blocks, by halves: shape (width) from (width·2^k)."""
    while len(terms) > width:
        half = len(terms) // 2
        terms = terms[:half] + terms[half:]
    return terms


_MATRIX = torch.from_numpy(np.stack([hadamard_of(row) for row in np.eye(SIDE, dtype=np.float32)]))
