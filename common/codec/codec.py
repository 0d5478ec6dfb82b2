"""What every codec is: an update to bytes, and bytes added to a running sum, a part at a time.

A payload is a header, the codec's body, and the SHA-256 of both. Its length follows from the plan's codec and model alone, so a payload
is refused by its length before any number in it is used. Names and shapes are not in it, but their digest: both ends have them from the
plan's model.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
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
_DIGEST = hashlib.sha256().digest_size
OVERHEAD = _HEADER.size + _DIGEST
LARGEST = 1e30
"""A value, or norm of a block, above this is no model's; up to it, what is decoded is finite in 32-bit floats."""
SMALLEST = 1e-30
"""A block whose norm, or largest value, is not above this is sent as zeros."""
PIECE = 65_536
"""Values at a time where the codec has no blocks of its own: 256 kB stay in a core's cache."""


class Payload(ABC):
    """An encoded update, checked: adding it can't fail.

    Attributes:
        count: values in it.
        parts: pieces that it can be added in; as many for every payload of the same codec and count.
    """

    count: int
    parts: int

    @abstractmethod
    def add_part(self, total: torch.Tensor, weight: float, part: int) -> None:
        """Add weight × one part to a running sum: ``total`` has shape (count), in 32- or 64-bit floats."""

    def add(self, total: torch.Tensor, weight: float = 1.0) -> None:
        """Add weight × the update to a running sum."""
        add_all(total, [(self, weight)])

    def decoded(self, layout: Layout) -> State:
        """The update as named tensors."""
        flat = torch.zeros(self.count)
        self.add(flat)
        return layout.split(flat)


def add_all(total: torch.Tensor, weighted: Iterable[tuple[Payload, float]]) -> None:
    """Add payloads of one codec and count: ``total`` passes through memory once for all of them.

    Each value is summed in the order given.

    Raises:
        LichenError: INTERNAL, if their counts differ from the total's.
    """
    weighted = list(weighted)
    if any(payload.count != total.numel() or payload.parts != weighted[0][0].parts for payload, _ in weighted):
        raise LichenError(Code.INTERNAL, "updates of several sizes or codecs can't be added")
    for part in range(weighted[0][0].parts if weighted else 0):
        for payload, weight in weighted:
            payload.add_part(total, weight, part)


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
        into.write(digest.digest())

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
        if hashlib.sha256(view[:-_DIGEST]).digest() != view[-_DIGEST:]:
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
