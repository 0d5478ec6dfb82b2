"""What one node does of a plan: the plan, with what its assignment changes for this node's hardware.

Policy, approval and ledger go by the plan itself; only the model and the training follow the node's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lichen.common.errors import Code, LichenError

if TYPE_CHECKING:
    from lichen.common.plan import Plan
    from lichen.common.records import Assignment

ASSIGNED = ("max_physical_batch_size", "checkpointing", "steps", "rank", "max_length", "precision")
"""What may vary from node to node: the names of `cohort.assign`, and of an assignment's fields."""


def own_plan(plan: Plan, assignment: Assignment, most_rows: int | None = None) -> Plan:
    """The plan that a node's model and training follow; the plan itself where the assignment leaves all to it.

    Nothing that privacy rests on is among what changes: unit, clip, sample rate and rounds stay, and the noise is calibrated by the
    plan itself, for all its steps (`capped_steps`).

    Args:
        plan: as it was approved.
        assignment: of one round. Its rank is not in the plan: the model has the plan's, and its tensors are cut (`aggregation.cut`).
        most_rows: rows at once that this node's memory is known to be enough for.

    Raises:
        LichenError: POLICY_REFUSED, if `cohort.assign` does not permit what varies, or it is more than the plan's.
    """
    given = {name: value for name in ASSIGNED if (value := getattr(assignment, name)) is not None}
    for name in given.keys() - set(plan.cohort.assign):
        raise _refused(f"the coordinator asks for another {name}, which cohort.assign does not permit")
    adapter, local, task = plan.model.adapter, plan.local, plan.task
    most = {
        "rank": adapter.rank if adapter.kind == "lora" else 0,
        "max_length": task.max_length,
        "max_physical_batch_size": local.max_physical_batch_size,
    }
    if most_rows is not None and most_rows < given.get("max_physical_batch_size", local.max_physical_batch_size):
        given["max_physical_batch_size"] = most_rows
    if not given:
        return plan
    for name in given.keys() & most.keys():
        if given[name] > most[name]:
            raise _refused(f"{name} {given[name]} is above the plan's {most[name]}")
    rows = given.get("max_physical_batch_size", local.max_physical_batch_size)
    checkpointing = given.get("checkpointing", local.checkpointing)
    found = plan.model_copy(
        update={
            "task": task.model_copy(update={"max_length": given.get("max_length", task.max_length)}),
            "local": local.model_copy(update={"max_physical_batch_size": rows, "checkpointing": checkpointing}),
            "evaluation": plan.evaluation.model_copy(update={"batch_size": min(plan.evaluation.batch_size, rows)})
            if "max_physical_batch_size" in given
            else plan.evaluation,
        }
    )
    return found.at_precision(given["precision"]) if "precision" in given else found


def capped_steps(planned: int, assignment: Assignment) -> int:
    """The steps of one round: the plan's, or the assignment's if they are fewer."""
    return planned if assignment.steps is None else min(planned, assignment.steps)


def _refused(what: str) -> LichenError:
    return LichenError(Code.POLICY_REFUSED, what, where="Assignment")
