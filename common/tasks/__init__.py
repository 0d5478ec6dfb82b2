"""Task kinds: one file each, and one line in this registry."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lichen.common.model.adapter import TunedModel
    from lichen.common.plan import Plan
    from lichen.common.tasks.task import Task


def make_task(plan: Plan) -> Task[Any]:
    """The task of a plan."""
    from lichen.common.tasks.text_classification import TextClassification

    kinds = {"text-classification": TextClassification}
    return kinds[plan.task.kind](plan)


@lru_cache(maxsize=1)
def workbench(plan: Plan) -> tuple[Task[Any], TunedModel]:
    """The task and its built model, one for a process: in a simulation, all clients and the coordinator share one base."""
    task = make_task(plan)
    return task, task.build()
