"""Task kinds: one file each, and one line in this registry."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from lichen.common.model.adapter import State, TunedModel
    from lichen.common.plan import Plan
    from lichen.common.tasks.task import Task


def make_task(plan: Plan) -> Task[Any]:
    """The task of a plan."""
    from lichen.common.tasks.causal_lm import CausalLM
    from lichen.common.tasks.text_classification import TextClassification

    kinds: dict[str, Callable[[Plan], Task[Any]]] = {"text-classification": TextClassification, "causal-lm": CausalLM}
    return kinds[plan.task.kind](plan)


LARGE = 64 << 20
"""Bytes of trained weights above which their start is kept in a file, so that it takes no memory of its own."""


class Workbench(NamedTuple):
    """A plan's task and model, ready to work with."""

    task: Task[Any]
    model: TunedModel
    start: State
    """The trainable tensors as they were built: a run's first round begins with these, whatever the model was used for since."""


@lru_cache(maxsize=1)
def workbench(plan: Plan) -> Workbench:
    """One for a process: in a simulation, all clients and the coordinator share one base model."""
    from lichen.common.tensor_files import in_a_file

    task = make_task(plan)
    model = task.build()
    large = sum(tensor.numel() * tensor.element_size() for tensor in model.trainable.values()) > LARGE
    return Workbench(task, model, in_a_file(model.tensors()) if large else model.state())
