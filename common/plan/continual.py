"""The plan's section `continual`: a stream of tasks, which come one after another."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lichen.common.plan.sections import Number, Section

Bound = float | str
"""Of a window: a number, or a text such as a date, which is compared as text."""

Value = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""A text, for which a whole number may stand, such as a year."""


class StreamTask(Section):
    """A task of the stream: which rows it is of, and for how long. A row is of it, if it meets all that is said."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """A short name: figures, data segments and versions of the model bear it."""
    labels: tuple[str, ...] = ()
    """Rows of these labels of `task.labels`. Those that no earlier task had are new here: until then the model chooses among the others."""
    where: dict[str, tuple[Value, ...]] = Field(default_factory=dict)
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
    def _bounds_are_bounds(self) -> Self:
        for field, values in self.where.items():
            if not values:
                raise ValueError(f"where.{field} names no value")
        for field, (first, end) in self.between.items():
            if isinstance(first, str) != isinstance(end, str):
                raise ValueError(f"between.{field} has a number and a text")
            if not first < end:  # type: ignore[operator]
                raise ValueError(f"between.{field}: {first!r} is not before {end!r}, which is the end and not in it")
            if not isinstance(first, str) and not all(map(math.isfinite, (first, float(end)))):
                raise ValueError(f"between.{field} is not finite")
        return self


class Analytic(Section):
    """Of `method: analytic`."""

    ridge: Number = Field(default=1.0, gt=0)
    """λ, added to the diagonal of the sum of all rows' x xᵀ, where x is a row's feature of length 1."""
    gram_weight: Number = Field(default=1.0, gt=0)
    """Under differential privacy: a row's x xᵀ has this length, where its x yᵀ has length 1; both are released as one, with noise in
    proportion to the length of both."""


class LwF(Section):
    """Of `method: lwf`."""

    weight: Number = Field(default=1.0, ge=0)
    """λ, of the distance to what the model before said; with 0 nothing is kept, and a task is trained among its own labels all the same."""
    temperature: Number = Field(default=2.0, gt=0)
    """T: both models' scores are divided by it first."""


class Adapters(Section):
    """Of `method: adapters`."""

    start: Literal["fresh", "last"] = "fresh"
    """What a task's adapter begins with: what a run's first one does, or the task's before it."""
    router: Literal["centroids", "ridge"] = "ridge"
    """What a row's task is found by: the nearest class centroid, or the best class by ridge regression, which needs Σ x xᵀ from clients as
    `analytic` does, and is righter without noise, or with little of it."""
    ridge: Number = Field(default=1.0, gt=0)
    """λ of that regression."""


class EWC(Section):
    """Of `method: ewc`."""

    weight: Number = Field(default=1.0, ge=0)
    """λ: how strongly a weight of mean importance is pulled to where the old tasks left it, against the mean gradient of a batch."""


class OLoRA(Section):
    """Of `method: olora`."""

    weight: Number = Field(default=0.5, ge=0)
    """λ, of the squared products of a new adapter's directions and the earlier ones'."""


class Replay(Section):
    """Of `method: replay`."""

    share: Number = Field(default=0.1, gt=0, le=1)
    """Chance of each row of an earlier task to be trained on again, in all tasks after it or in none."""
    rows: int | None = Field(default=None, ge=1)
    """In place of that: so many rows of each label of an earlier task, fewer where a client has no more; not under differential privacy."""


class Online(Section):
    """Of `mode: online`."""

    rounds: int = Field(default=1, ge=1)
    """Rounds of training on each batch; the plan's `rounds` are those of all batches."""
    clients: int = Field(default=2, ge=1)
    """A batch begins when so many clients have enough new data."""
    rows: int = Field(default=1, ge=1)
    """What is enough: new rows, as many as their owner declares."""
    drift: Number | None = Field(default=None, ge=-1, le=1)
    """A batch begins only where the model's accuracy on the new data's hold-outs is lower by this or more than on those before, if there
    are any; else more data is waited for. Needs `evaluation.federated_every`. In a simulation every batch begins."""
    looks: int = Field(default=3, ge=1, le=100)
    """How often at most that is measured for a batch, with as much more data each time; when as much has come again, the batch begins
    whatever the last look has found. Under differential privacy the noise of hold-outs is for all looks, made or not."""
    read_again: bool = False
    """Whether rows are new that another run has trained on. No row is ever in two batches of one run."""


class Continual(Section):
    """Learning that goes on: tasks and data keep coming, and old ones are not forgotten."""

    mode: Literal["planned", "online"] = "planned"
    """`planned`: the tasks are those of `stream`.
    `online`: a task is a batch of what has come to the clients since the last one, and begins when enough of them have enough."""
    online: Online = Online()
    method: Literal["sequential", "analytic", "lwf", "adapters", "ewc", "olora", "replay"] = "sequential"
    """What keeps the old.
    `sequential`: nothing; each task is trained from where the last one ended. What the others are held against.
    `analytic`: the base is frozen, and the head is the ridge regression on all rows of all tasks, from sums that each client sends once a
    task (Zhuang et al. 2022).
    `lwf`: on new rows the model keeps to what the one before said of them (Li and Hoiem 2016).
    `adapters`: one adapter a task, which is never changed later; a row's task is found in the feature space of the base.
    `ewc`: weights that mattered to old tasks are held where those left them (Kirkpatrick et al. 2017).
    `olora`: each task has a LoRA of its own beside the earlier ones, and learns in directions orthogonal to theirs (Wang et al. 2023).
    `replay`: with new rows a client trains on some of its old ones, which under differential privacy pay for it (Chaudhry et al. 2019)."""
    analytic: Analytic = Analytic()
    lwf: LwF = LwF()
    adapters: Adapters = Adapters()
    ewc: EWC = EWC()
    olora: OLoRA = OLoRA()
    replay: Replay = Replay()
    stream: Annotated[tuple[StreamTask, ...], Field(max_length=1000)] = ()
    """The tasks, in the order in which they come; empty: all rows from the first round to the last."""
    tolerance: Number = Field(default=0.05, ge=0, le=1)
    """Of accuracy. A version of the model that falls by more than this on an earlier task's validation rows, against the best before, is
    held back: it is kept, and the run goes on from it, but what is exported is the last that was not."""
    keep: int | None = Field(default=None, ge=1)
    """Of how many versions, the newest, the model is kept, beside the one that is given out; of older ones their scores are, and R on test
    rows, which are scored in the end, lacks theirs. Left out, all: a run without an end then fills the disk."""

    @model_validator(mode="after")
    def _tasks_are_told_apart(self) -> Self:
        for task in self.stream:
            if not task.labels and not task.where and not task.between:
                raise ValueError(f"task {task.name} needs labels, where or between: they tell which rows it is of")
        names = [task.name for task in self.stream]
        if len(set(names)) != len(names):
            raise ValueError(f"two tasks of the stream have one name: {next(name for name in names if names.count(name) > 1)}")
        return self
