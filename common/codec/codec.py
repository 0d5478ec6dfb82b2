"""What every codec is: an update to bytes, and bytes to values, a part at a time.

A payload is a header, the codec's body, and 16 bytes of the SHA-256 of both. Its length follows from the plan's codec and model alone, so
a payload is refused by its length before any number in it is used. Names and shapes are not in it, but their digest: both ends have them
from the plan's model.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import chain
from mmap import mmap
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch

from lichen.common.codec.layout import Flat, Floats, Layout
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State

MAGIC, VERSION = b"lich", 1
_HEADER = struct.Struct("<4sBBHQQ16s")  # magic, version, codec, its parameter, seed, count, layout's digest
Array = np.ndarray[tuple[int], np.dtype[Any]]
_DIGEST = 16  # bytes of the SHA-256: against damage; where a payload travels beside its message, its name has all of them
OVERHEAD = _HEADER.size + _DIGEST
LARGEST = 1e30
"""A value, or norm of a block, above this is no model's; up to it, what is decoded is finite in 32-bit floats."""
SMALLEST = 1e-30
"""A block whose norm, or largest value, is not above this is sent as zeros."""
PIECE = 65_536
"""Values at a time where the codec has no blocks of its own: 256 kB stay in a core's cache."""


class Payload(ABC):
    """An update that others can be added to: checked, so that reading it can't fail.

    Attributes:
        count: values in it.
        parts: pieces that it is read in; as many for every payload of the same codec and count.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.parts = -(-count // PIECE)

    @abstractmethod
    def values(self, part: int) -> torch.Tensor:
        """One part's values, in 32-bit floats (one dimension), in the order of `places`; there may be more than these take.

        They may lie where the next call in this thread, of any payload, puts its own.
        """

    def places(self, flat: torch.Tensor, part: int) -> list[torch.Tensor]:
        """Where a part's values lie in a flat vector (shape (count)): views of it."""
        return [flat[part * PIECE : (part + 1) * PIECE]]

    def decoded(self, layout: Layout, into: torch.Tensor | None = None) -> State:
        """The update as named tensors, which are views of ``into`` (shape (count), 32-bit floats), where that is given."""
        flat = torch.empty(self.count, dtype=layout.dtype) if into is None else into
        for part in range(self.parts):
            for view, values in placed(self, flat, part, self.values(part)):
                view.copy_(values)
        return layout.split(flat)


def placed(payload: Payload, flat: torch.Tensor, part: int, values: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of a flat vector, each with those of a part's values that belong there, in its shape."""
    begin = 0
    for view in payload.places(flat, part):
        yield view, values[begin : begin + view.numel()].view(view.shape)
        begin += view.numel()


def sums(weighted: Sequence[tuple[Payload, float]]) -> Iterator[tuple[int, torch.Tensor]]:
    """The weighted sum of payloads of one codec and count, a part at a time, in 64 bits; each value is summed in the order given.

    Yields:
        The part's number, and its sum, in the order of `Payload.places`; it may be overwritten, and the next part is summed in its place.
    """
    total = torch.empty(0, dtype=torch.float64)
    (first, own), *others = weighted
    for part in range(first.parts):
        values = first.values(part)
        if len(values) != len(total):
            total = torch.empty(len(values), dtype=torch.float64)  # for many parts: a new one would be new pages, for each
        # with weights that count rows, a product is exact in 64 bits: not even a fused multiply-add makes a difference
        total.copy_(values)
        if own != 1:
            total.mul_(own)
        for payload, weight in others:
            total.add_(payload.values(part), alpha=weight)
        yield part, total


class Codec(ABC):
    """A way to write an update.

    Attributes:
        name: in plans.
        number: in headers.
        biased: whether the mean of many decoded updates has an error that does not average out; error feedback is for these.
        parameter: bits, or what else the length follows from.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    biased: ClassVar[bool] = True
    parameter: int = 0

    def _set_parameter(self, value: int, least: int, most: int) -> int:
        if not least <= value <= most:
            raise LichenError(Code.PLAN_INVALID, f"{value} is not from {least} to {most}", where=f"codec {self.name}")
        self.parameter = value
        return value

    def encode(self, update: Mapping[str, torch.Tensor], into: BinaryIO, *, seed: int = 0) -> None:
        """Write an update, a part at a time.

        Args:
            update: trained minus received tensors.
            into: where to; only written to.
            seed: below 2^64, public, and another for each client and round: errors of a random codec then average out.

        Raises:
            LichenError: STATE_MISMATCH, if a value is not finite or out of the codec's range.
        """
        source, digest = Flat(update), hashlib.sha256()
        header = _HEADER.pack(MAGIC, VERSION, self.number, self.parameter, seed, source.count, source.layout.digest)
        for block in chain([memoryview(header)], (array.data for array in self._body(source, seed))):
            digest.update(block)
            into.write(block)
        into.write(digest.digest()[:_DIGEST])

    def encoded(self, update: Mapping[str, torch.Tensor], *, seed: int = 0) -> bytes:
        """The same as bytes."""
        into = BytesIO()
        self.encode(update, into, seed=seed)
        return into.getvalue()

    def length(self, count: int) -> int:
        """Bytes of a payload of so many values."""
        return OVERHEAD + self._body_length(count)

    def open(self, data: bytes | memoryview | mmap, layout: Layout) -> Payload:
        """Check a payload that a peer sent; nothing is copied.

        Args:
            data: its bytes, such as a memory-mapped file's; they must stay as long as the payload is used.
            layout: of the plan's model.

        Raises:
            LichenError: PAYLOAD_CORRUPT, if it is damaged or holds values that are not finite; PROTOCOL_VERSION, if its format is another
                version's; CODEC_MISMATCH, if it is another codec's; STATE_MISMATCH, if it is an update of another model.
        """
        view = memoryview(data).cast("B")
        if len(view) < OVERHEAD:
            raise corrupt(f"{len(view)} bytes are no encoded update")
        magic, version, number, parameter, seed, count, digest = _HEADER.unpack(view[: _HEADER.size])
        if magic != MAGIC:
            raise corrupt("it is no encoded update")
        if version != VERSION:
            raise LichenError(Code.PROTOCOL_VERSION, f"an update in format {version}, not {VERSION}", fix="Upgrade the older end.")
        if (number, parameter) != (self.number, self.parameter):
            raise LichenError(
                Code.CODEC_MISMATCH,
                f"the update came by codec {number} with parameter {parameter}, not {self.number} ({self.name}) with {self.parameter}",
                fix="Both ends must run the same plan.",
            )
        if (count, digest) != (layout.count, layout.digest):
            raise LichenError(Code.STATE_MISMATCH, f"an update of {count} values for a model of {layout.count}, or of other tensors")
        if len(view) != self.length(count):
            raise corrupt(f"{len(view)} bytes, not {self.length(count)}")
        if hashlib.sha256(view[:-_DIGEST]).digest()[:_DIGEST] != view[-_DIGEST:]:
            raise corrupt("its digest is another")
        return self._payload(view[_HEADER.size : -_DIGEST], count, seed)

    @abstractmethod
    def _body_length(self, count: int) -> int:
        """Bytes of the body."""

    @abstractmethod
    def _body(self, source: Flat, seed: int) -> Iterator[Array]:
        """The body, in contiguous arrays of one dimension."""

    @abstractmethod
    def _payload(self, body: memoryview, count: int, seed: int) -> Payload:
        """The payload of a body of the right length; values that are not finite are refused."""


def corrupt(why: str) -> LichenError:
    """The error of a payload that is not used."""
    return LichenError(Code.PAYLOAD_CORRUPT, why, where="encoded update")


def check_scales(scales: Floats) -> None:
    """Refuse scales that no encoder writes: none is above 1.3 of a block's norm.

    Raises:
        LichenError: PAYLOAD_CORRUPT.
    """
    if not ((scales >= 0) & (scales <= 2 * LARGEST)).all():
        raise corrupt("a block's scale is not finite, negative or too large")
