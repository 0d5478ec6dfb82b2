"""The book of one backward pass: layers write what they saw, and at its end the clipped sum is made, once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lichen.common.errors import Code, LichenError
from lichen.common.model.packing import Packing
from lichen.common.privacy.single_backward.nodes import LinearNode, LoraNode
from lichen.common.privacy.single_backward.records import Looked, Outer, Record, Units, Whole, squared_norms, wide

WHOLE_BELOW = 1.5
"""A unit's gradient is made at once where it has at most so many times the numbers that would have to be kept to make it later."""

CANCELLED = 2.0**-10
"""Below this part of what a squared norm would be if no token's gradient cancelled another's, 32 bits of a Gram matrix no longer carry it
(an error of a few 2⁻²⁴ of that whole): the unit's gradient is made, and its norm taken of that."""
LEFT = 2.0**-20
"""Of the length that tokens' gradients have together, what can be left where they cancel, in a sum of thousands in 32 bits."""


class Book:
    """Open while a private step is in flight; while it is closed the layers behave as they always did.

    Args:
        packing: tells how a batch lies in the model, where it may be packed.
    """

    def __init__(self, packing: Packing | None = None) -> None:
        self._packing = packing or Packing(on=False)
        self.units: Units | None = None
        self.anchor = torch.zeros(())
        """An input that wants a gradient, so that a layer's backward runs though its own input wants none."""
        self._records: dict[int, list[Record]] = {}

    @property
    def open(self) -> bool:
        """Whether a private step is in flight. So it is in a checkpoint's first pass, which has no gradients and must equal its second."""
        return self.units is not None

    @contextmanager
    def of(self, sizes: Sequence[int], device: torch.device) -> Iterator[None]:
        """Open the book for units of so many rows; whatever happens it is closed and empty afterwards."""
        self.units = Units(sizes, device)
        self._packing.forget()
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        try:
            yield
        finally:
            self.units = None
            self._records = {}

    def rows_first(self, values: torch.Tensor, layer: str) -> torch.Tensor:
        """Values whose first axis is the batch's rows, or packed ones; what comes once for all rows is repeated.

        Raises:
            LichenError: MODEL_DP_UNSUPPORTED, if it is something else: then a unit's part can't be told apart.
        """
        rows = self.rows
        if self._packing.layout.holds(values) or (values.dim() > 1 and values.shape[0] == rows):
            return values
        if values.dim() > 1 and values.shape[0] == 1:
            return values.expand(rows, *values.shape[1:])
        raise LichenError(
            Code.MODEL_DP_UNSUPPORTED, f"{layer} gets a tensor of {tuple(values.shape)} in a batch of {rows} rows", where="model.base"
        )

    @property
    def rows(self) -> int:
        """Rows of the batch in flight."""
        return self._in_flight.rows

    @property
    def _in_flight(self) -> Units:
        if self.units is None:
            raise LichenError(Code.INTERNAL, "a layer's backward ran after its private step had ended")
        return self.units

    def linear(self, x: torch.Tensor, layer: Any, transposed: bool) -> torch.Tensor:
        """A trained linear layer whose backward pass books: (B, …, d) to (B, …, p)."""
        found: torch.Tensor = LinearNode.apply(x, self.anchor, layer, transposed, self)  # type: ignore[no-untyped-call]
        return found

    def lora(
        self,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        base: nn.Linear,
        a: nn.Parameter,
        b: nn.Parameter,
        scaling: float,
        transposed: bool,
    ) -> torch.Tensor:
        """LoRA over a frozen linear layer, the same: (B, …, d) to (B, …, p)."""
        found: torch.Tensor = LoraNode.apply(x, dropped, self.anchor, base, a, b, scaling, transposed, self)  # type: ignore[no-untyped-call]
        return found

    def add(self, parameter: nn.Parameter, gradients: torch.Tensor) -> None:
        """Book each row's gradient, (B, …parameter)."""
        if parameter.requires_grad:
            self._write(parameter, Whole(self._in_flight.of_rows(gradients)))

    def add_tokens(self, parameter: nn.Parameter, gradients: torch.Tensor) -> None:
        """Book the gradient of a vector, given for each token: (B, …, k) or packed."""
        if parameter.requires_grad:
            self.add(parameter, self._packing.layout.by_rows(lambda g: wide(g).sum(1), gradients))

    def add_linear(self, parameter: nn.Parameter, inputs: torch.Tensor, backprops: torch.Tensor, *, transposed: bool = False) -> None:
        """Book a matrix's use: its inputs (B, …, d) and its outputs' gradients (B, …, p), of one type, or both packed."""
        if not parameter.requires_grad:
            return
        rows, layout = self.rows, self._packing.layout
        x, g = inputs.detach(), backprops.detach()
        d, p = x.shape[-1], g.shape[-1]
        if d * p <= WHOLE_BELOW * x.numel() / (rows * d) * (d + p):
            self.add(parameter, layout.by_rows(lambda x, g: torch.bmm(x.mT, g) if transposed else torch.bmm(g.mT, x), x, g))
        else:
            x, g = (layout.leave(tensor).reshape(rows, -1, tensor.shape[-1]) for tensor in (x, g))
            self._write(parameter, Outer(x, g, transposed))

    def add_looked(self, parameter: nn.Parameter, ids: torch.Tensor, backprops: torch.Tensor, padding: int | None) -> None:
        """Book an embedding's use: ids (B, …) and the gradients of what was looked up (B, …, d)."""
        if not parameter.requires_grad:
            return
        ids = ids.reshape(self.rows, -1)
        g = backprops.reshape(*ids.shape, backprops.shape[-1])
        if padding is not None:
            g = g.masked_fill((ids == padding).unsqueeze(2), 0)
        self._write(parameter, Looked(ids, g, parameter.shape[0]))

    def _write(self, parameter: nn.Parameter, record: Record) -> None:
        self._records.setdefault(id(parameter), []).append(record)

    @torch.no_grad()
    def clipped_sum(self, parameters: Sequence[nn.Parameter], clip: float) -> list[torch.Tensor]:
        """The sum of all units' gradients over all parameters, each unit's scaled to a norm of at most ``clip``.

        A unit whose gradient is not finite counts as zero: it would end the bound on every other unit's influence.

        Returns:
            One tensor a parameter, in at least 32 bits.
        """
        units = self._in_flight
        booked = [self._merged(self._records.pop(id(parameter), [])) for parameter in parameters]
        squares = torch.zeros(units.count, device=units.owners.device)
        uncancelled = torch.zeros_like(squares)
        for records in booked:
            if records:
                found, longest = squared_norms(records, units)
                squares, uncancelled = squares + found, uncancelled + longest
        bad = ~torch.isfinite(squares)
        if bool((bad | (squares < CANCELLED * uncancelled)).any()):  # one question, since a GPU's answer must be waited for
            for records in booked:
                for record in records:
                    record.drop(units, bad)
            squares, uncancelled = squares.masked_fill(bad, 0), uncancelled.masked_fill(bad, 0)
            for unit in torch.nonzero(squares < CANCELLED * uncancelled).flatten():
                squares[unit] = self._square_of(unit, booked, units, uncancelled[unit])
        factors = (clip / squares.sqrt()).clamp(max=1.0)  # a unit whose gradient is zero: its infinity becomes 1
        sums = []
        for parameter, records in zip(parameters, booked, strict=True):
            parts = [record.summed(units, factors) for record in records]
            records.clear()  # the next parameter's sum can have its memory
            if not parts:
                parts = [torch.zeros(parameter.shape, dtype=torch.promote_types(parameter.dtype, torch.float32), device=parameter.device)]
            sums.append(functools.reduce(torch.Tensor.add_, parts))
        return sums

    @staticmethod
    def _square_of(unit: torch.Tensor, booked: Sequence[Sequence[Record]], units: Units, uncancelled: torch.Tensor) -> torch.Tensor:
        """One unit's squared norm from its gradient itself, in 64 bits, and what rounding in 32 may leave of it in the sum."""
        alone = torch.zeros(units.count, dtype=torch.float64, device=units.owners.device)
        alone[unit] = 1
        gradients = (sum(record.summed(units, alone) for record in records) for records in booked if records)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
        found: torch.Tensor = (norm + LEFT * uncancelled.sqrt()).square()
        return found

    @staticmethod
    def _merged(records: list[Record]) -> list[Record]:
        looked = [record for record in records if isinstance(record, Looked)]
        rest: list[Record] = [record for record in records if not isinstance(record, Looked)]
        return [*rest, Looked.merged(looked)] if looked else rest
