"""Named tensors as one flat vector, of which codecs read pieces: no second copy of the model is made."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import threading
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State

Floats = NDArray[np.float32]


def room(*shape: int) -> Floats:
    """An array of any content that begins at a cache line, as torch's do: with numpy's, a Hadamard transform took a third longer."""
    return torch.empty(shape).numpy()


class _Scratch(threading.local):
    pair = room(2, 0)


_scratch = _Scratch()


def scratch(count: int) -> tuple[Floats, Floats]:
    """Two arrays that this thread gets again with each call: new ones would be new pages, whose first use costs time."""
    if _scratch.pair.shape[1] < count:
        _scratch.pair = room(2, count)
    return _scratch.pair[0, :count], _scratch.pair[1, :count]


@dataclass(frozen=True)
class Layout:
    """What both ends know of an update from the plan's model: where each tensor lies in the flat vector, in the order of the names."""

    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor]) -> Layout:
        """The layout of tensors like these."""
        return cls(tuple((name, tuple(state[name].shape), state[name].dtype) for name in sorted(state)))

    @cached_property
    def starts(self) -> list[int]:
        """Where each tensor begins, and where the last ends."""
        return [0, *accumulate(math.prod(shape) for _, shape, _ in self.tensors)]

    @property
    def count(self) -> int:
        """The number of values."""
        return self.starts[-1]

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the flat vector: 32-bit floats, or 64-bit ones where a tensor is of them."""
        return functools.reduce(torch.promote_types, (dtype for _, _, dtype in self.tensors), torch.float32)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes of the SHA-256 of all names, shapes and types: a payload has these in place of the names."""
        described = json.dumps([[name, shape, str(dtype)] for name, shape, dtype in self.tensors])
        return hashlib.sha256(described.encode()).digest()[:16]

    def split(self, flat: torch.Tensor) -> State:
        """The named tensors of a flat vector (shape (count)): views of it, where their type is its own."""
        return {
            name: flat[start : start + math.prod(shape)].view(shape).to(dtype)
            for (name, shape, dtype), start in zip(self.tensors, self.starts, strict=False)
        }


class Flat:
    """Named tensors, read as one flat vector of 32-bit floats.

    Args:
        tensors: what is read; it must not change meanwhile.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.layout = Layout.of(tensors)
        self.count = self.layout.count
        flat = (tensors[name].detach().cpu().reshape(-1) for name, _, _ in self.layout.tensors)
        # those of 32 bits as arrays, whose pieces cost less to take; the others become such piece by piece
        self._tensors = [tensor.numpy() if tensor.dtype == torch.float32 else tensor for tensor in flat]

    def read(self, start: int, into: Floats) -> None:
        """Fill ``into`` with the values from ``start`` on, and with zeros beyond the end."""
        done, number = 0, bisect_right(self.layout.starts, start) - 1
        while done < len(into) and number < len(self._tensors):
            begin = start + done - self.layout.starts[number]
            piece = self._tensors[number][begin : begin + len(into) - done]
            into[done : done + len(piece)] = piece if isinstance(piece, np.ndarray) else piece.to(torch.float32).numpy()
            done += len(piece)
            number += 1
        into[done:] = 0


def check_range(largest: float, limit: float) -> None:
    """Refuse to encode values that are not finite, or beyond what the codec can hold.

    Raises:
        LichenError: STATE_MISMATCH.
    """
    if not largest <= limit:  # NaN is not
        raise LichenError(Code.STATE_MISMATCH, f"the update has values that are not finite, or beyond {limit:g}")
