"""The plan's section `continual`: a stream of tasks, which come one after another."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lichen.common.plan.sections import Number, Section

Bound = float | str
"""Of a window: a number, or a text such as a date, which is compared as text."""


class StreamTask(Section):
    """A task of the stream: which rows it is of, and for how long. A row is of it, if it meets all that is said."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """A short name: figures, data segments and versions of the model bear it."""
    labels: tuple[str, ...] = ()
    """Rows of these labels of `task.labels`. Those that no earlier task had are new here: until then the model chooses among the others."""
    where: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """By data field: rows that have one of these values there, read as text."""
    between: dict[str, tuple[Bound, Bound]] = Field(default_factory=dict)
    """By data field: rows whose value is the first or later, and before the second. Both are numbers, or both texts (ISO dates sort)."""
    rounds: int | None = Field(default=None, ge=1)
    """Rounds of training; left out, an equal share of those that other tasks leave of `rounds`."""
    share: Number | None = Field(default=None, gt=0, le=1)
    """The task's public share of each node's declared size, for the denominator under differential privacy; left out, one in as many tasks
    as there are."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The data fields that tell its rows, besides the label."""
        return (*self.where, *(field for field in self.between if field not in self.where))

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.labels and not self.where and not self.between:
            raise ValueError("a task needs labels, where or between: they tell which rows it is of")
        for field, values in self.where.items():
            if not values:
                raise ValueError(f"where.{field} names no value")
        for field, (first, end) in self.between.items():
            if isinstance(first, str) != isinstance(end, str):
                raise ValueError(f"between.{field} has a number and a text")
            if not first < end:  # type: ignore[operator]
                raise ValueError(f"between.{field}: {first!r} is not before {end!r}")
            if not isinstance(first, str) and not all(map(math.isfinite, (first, float(end)))):
                raise ValueError(f"between.{field} is not finite")
        return self


class Continual(Section):
    """Learning that goes on: tasks and data keep coming, and old ones are not forgotten."""

    method: Literal["sequential"] = "sequential"
    """What keeps the old. `sequential`: nothing; each task is trained from where the last one ended. What the others are held against."""
    stream: Annotated[tuple[StreamTask, ...], Field(max_length=1000)] = ()
    """The tasks, in the order in which they come; empty: all rows from the first round to the last."""
    tolerance: Number = Field(default=0.05, ge=0, le=1)
    """Of accuracy. A version of the model that falls by more than this on an earlier task's validation rows, against the best before, is
    held back: it is kept, and the run goes on from it, but what is exported is the last that was not."""

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        names = [task.name for task in self.stream]
        if len(set(names)) != len(names):
            raise ValueError("two tasks of the stream have one name")
        return self
