"""Score a fetched model on this node's hold-out, beside what it was trained from and the model fetched before it.

For the owner alone: nothing of it leaves the node, so nothing is noised or charged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lichen.client.data import load
from lichen.client.fetch import FetchedModel
from lichen.client.policy import load_policy
from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, load_plan


@dataclass(frozen=True)
class Scored:
    """Metrics of one model on the hold-out."""

    model: str
    """`run N`, or `start`: the base with the head that the plan begins with."""
    rows: int
    metrics: dict[str, float | None]


def score_models(home: Path, fetched: FetchedModel) -> list[Scored]:
    """The fetched model's metrics, those of its plan's start, and those of the newest model of another run in this home.

    Args:
        home: the node's home.
        fetched: from `fetch_model`, in ``home/models``.

    Raises:
        LichenError: POLICY_REFUSED if the policy does not permit its base model; DATA_EMPTY if nothing is held out; DATA_…, MODEL_…
    """
    plan = load_plan(fetched.plan)
    found = [_score(home, plan, fetched), _score(home, plan, None)]
    if before := _before(fetched):
        found.append(_score(home, load_plan(before.plan), before))
    return found


def _before(fetched: FetchedModel) -> FetchedModel | None:
    """The model fetched last of another run with the same labels: others cannot be compared."""
    task = load_plan(fetched.plan).task
    others = [path for path in fetched.directory.parent.iterdir() if path.name.isdecimal() and path != fetched.directory]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        other = FetchedModel(int(path.name), path)
        if (found := load_plan(other.plan).task).labels == task.labels and found.kind == task.kind:
            return other
    return None


def _score(home: Path, plan: Plan, fetched: FetchedModel | None) -> Scored:
    from lichen.common.model.export import load_saved
    from lichen.common.tasks import make_task

    load_policy(home).check_model(plan.model.base)
    # LoRA that was saved whole is told from the base in 32 bits
    whole = fetched is not None and plan.model.adapter.kind == "lora" and not (fetched.model / "adapter_config.json").exists()
    task = make_task(plan.at_precision("float32") if whole else plan)
    rows = load(home, "holdout", task.fields)
    if len(rows) == 0:
        raise LichenError(Code.DATA_EMPTY, "no rows are held out", where=str(home), fix="Add the data again with --holdout 0.1.")
    model = task.build()
    if fetched is not None:
        task.choose_among(load_saved(fetched.model, model) or None)
    scores = task.score(model.network, task.encode({field: rows.column(field) for field in task.fields}), plan.evaluation.batch_size)
    return Scored("start" if fetched is None else f"run {fetched.run_id}", len(rows), scores.metrics())
