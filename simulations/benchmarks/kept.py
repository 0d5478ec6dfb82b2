"""Runs of a bench that lie in a directory, so that a bench that was stopped goes on, and its table can be printed again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lichen.common.errors import Code, LichenError
from lichen.common.result import Result, read_result
from lichen.coordinator.run_directory import DIGEST, open_for

if TYPE_CHECKING:
    from lichen.common.plan import Plan


def run_kept(plan: Plan, out: Path, workers: int | None = None) -> Result:
    """Simulate a plan; a run of it that was begun in ``out`` goes on, and one that is finished is read.

    Args:
        plan: what to run.
        out: the run directory.
        workers: as of `lichen.simulations.simulate.run`.

    Raises:
        LichenError: OUTPUT_UNUSABLE, if ``out`` holds something else; CHECK_FAILED, if the run spent more than its plan's ε; as `run`.
    """
    from lichen.simulations.simulate import run

    open_for(out, resume=True, plan=plan)
    begun = (out / DIGEST).exists()
    result = read_result(out) if begun and (out / "result.json").exists() else None
    if result is None or result.status != "finished":
        result = run(plan, out, "inprocess", resume=begun, workers=workers)
    spent = result.privacy.central.epsilon if result.privacy.central else result.privacy.max_epsilon
    if spent is not None and spent > plan.privacy.epsilon:
        raise LichenError(Code.CHECK_FAILED, f"ε = {spent} was spent, {plan.privacy.epsilon:g} was the limit", where=str(out))
    return result
