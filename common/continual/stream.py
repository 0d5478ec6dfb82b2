"""A plan's stream of tasks: which task a round is of, which rows are a task's, and among which labels the model chooses."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from lichen.common.continual import make_method

if TYPE_CHECKING:
    from lichen.common.plan import Plan
    from lichen.common.plan.continual import StreamTask


class Stage(NamedTuple):
    """A part of a run: the rounds of one task of the stream, or the whole run where there is no stream."""

    number: int
    """From 0."""
    first: int
    """Its first round."""
    last: int
    """Its last round."""
    task: StreamTask | None
    """None without a stream."""

    @property
    def rounds(self) -> int:
        """How many it has."""
        return self.last - self.first + 1


def is_stream(plan: Plan) -> bool:
    """Whether the run has tasks, one after another: the plan's, or batches of what comes."""
    return bool(plan.continual.stream) or is_online(plan)


def is_online(plan: Plan) -> bool:
    """Whether its tasks are batches of what comes."""
    return plan.continual.mode == "online"


def tasks_of(plan: Plan) -> tuple[StreamTask, ...]:
    """The tasks of the run, in order; batches bear numbers from 1. None without a stream."""
    return _batches(plan.rounds // plan.continual.online.rounds) if is_online(plan) else plan.continual.stream


@lru_cache(maxsize=8)
def stages(plan: Plan) -> tuple[Stage, ...]:
    """The parts of a run, in order; one, where the plan has no stream. Of an online run they may be 10,000, all of one length."""
    if not (tasks := tasks_of(plan)):
        return (Stage(0, 1, plan.rounds, None),)
    ends = list(accumulate(rounds_of_tasks(plan)))
    return tuple(Stage(number, end - length + 1, end, task) for number, (task, end, length) in enumerate(_with_lengths(tasks, ends)))


def stage_of(plan: Plan, round: int) -> Stage:
    """That of a round (from 1); of one after the last, the last."""
    if is_online(plan):  # without the others, of which there may be many
        each = plan.continual.online.rounds
        number = (min(round, plan.rounds) - 1) // each
        return Stage(number, number * each + 1, (number + 1) * each, _batch(number))
    found = stages(plan)
    return found[min(bisect_left(found, round, key=lambda stage: stage.last), len(found) - 1)]


def rounds_of_tasks(plan: Plan) -> list[int]:
    """Rounds of each task: its own, or an equal share of what the others leave, of which the first tasks have one more if need be."""
    if is_online(plan):
        return [plan.continual.online.rounds] * (plan.rounds // plan.continual.online.rounds)
    tasks = plan.continual.stream
    open_ = [number for number, task in enumerate(tasks) if task.rounds is None]
    left = plan.rounds - sum(task.rounds or 0 for task in tasks)
    shares = {number: left // len(open_) + (place < left % len(open_)) for place, number in enumerate(open_)}
    return [task.rounds or shares[number] for number, task in enumerate(tasks)]


def stage_size(plan: Plan, stage: Stage, declared_size: int) -> int:
    """What stands for a node's number of rows in a stage: a public share of the size that the owner declares, or a batch's own."""
    if stage.task is None or is_online(plan):
        return declared_size
    own = stage.task.share or 1 / len(plan.continual.stream)
    return max(1, round(declared_size * (own + make_method(plan).added_share(stage))))


def fields_of(plan: Plan) -> tuple[str, ...]:
    """The data fields by which rows are dealt to tasks, besides the label."""
    return tuple(dict.fromkeys(field for task in plan.continual.stream for field in task.fields))


def fields_read(plan: Plan) -> tuple[str, ...]:
    """The data fields that a node reads: the task's, the unit of privacy's, and those by which rows are dealt to tasks."""
    unit = (plan.privacy.unit_field,) if plan.privacy.unit_field else ()
    return tuple(dict.fromkeys((*plan.task.fields, *unit, *fields_of(plan))))


def rows_of(plan: Plan, task: StreamTask, columns: Mapping[str, Sequence[object]]) -> list[int]:
    """The numbers of the rows that are of a task.

    Args:
        plan: whose label field it is.
        task: of its stream.
        columns: the values of each field that tells (`fields_of`), and of the label where a task names labels.

    Returns:
        Ascending. A row whose value can't be compared with a window's bounds is not of it.
    """
    kept = set(range(len(next(iter(columns.values()), ()))))
    for field, names in ((plan.task.label_field, task.labels), *task.where.items()):
        if names:
            wanted = set(names)
            kept = {row for row in kept if str(columns[field][row]) in wanted}
    for field, (first, end) in task.between.items():
        kept = {row for row in kept if _within(columns[field][row], first, end)}
    return sorted(kept)


def rows_by_task(plan: Plan, last: int, columns: Mapping[str, Sequence[object]]) -> tuple[list[int], list[list[int]]]:
    """The rows of all tasks until one, ascending, and for each task the places among them of its own; a row is of its first task alone.

    Args:
        plan: one with a stream.
        last: the number of the task (from 0).
        columns: as in `rows_of`.
    """
    of_tasks = [rows_of(plan, task, columns) for task in plan.continual.stream[: last + 1]]
    kept = sorted(set().union(*of_tasks))
    place, seen, found = {row: number for number, row in enumerate(kept)}, set[int](), []
    for rows in of_tasks:
        found.append([place[row] for row in rows if row not in seen])
        seen.update(rows)
    return kept, found


def labels_until(plan: Plan, number: int) -> tuple[str, ...]:
    """The labels among which the model chooses after a task (its number, from 0): those of all tasks so far, in the plan's order.

    All labels, where a task so far names none.
    """
    tasks = plan.continual.stream[: number + 1]
    if not tasks or not all(task.labels for task in tasks):
        return plan.task.labels
    seen = {label for task in tasks for label in task.labels}
    return tuple(label for label in plan.task.labels if label in seen)


@lru_cache(maxsize=8)
def _batches(count: int) -> tuple[StreamTask, ...]:
    return tuple(map(_batch, range(count)))


def _batch(number: int) -> StreamTask:
    from lichen.common.plan.continual import StreamTask

    return StreamTask(name=f"batch-{number + 1}")


def _with_lengths(tasks: Sequence[StreamTask], ends: Sequence[int]) -> list[tuple[StreamTask, int, int]]:
    return [(task, end, end - start) for task, start, end in zip(tasks, [0, *ends], ends, strict=False)]


def _within(value: object, first: float | str, end: float | str) -> bool:
    if isinstance(first, str) or isinstance(end, str):
        return str(first) <= str(value) < str(end)
    try:
        number = float(str(value))
    except ValueError:
        return False
    return math.isfinite(number) and first <= number < end
