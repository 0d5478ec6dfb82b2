"""Plan and profile → what of the plan one node is asked: as much as its memory and the deadline permit, and `cohort.assign` lets vary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lichen.common.assignment import own_plan
from lichen.common.hardware import rows_per_step, work_of
from lichen.common.model.memory import Shape, peak_mb
from lichen.common.records import Assignment

if TYPE_CHECKING:
    from lichen.common.hardware import Profile
    from lichen.common.plan import Plan

TIERS = ((4096, 4, 128), (16384, 8, 256), (24576, 16, 512))
"""Below so much memory (MiB) at most this rank, and this many tokens of a row, where the plan lets them vary."""
LEAST_LENGTH = 32
SHARE = 0.8
"""Of the deadline, less what the payloads take on the way, that training may take by prediction."""


@dataclass(frozen=True)
class Fit:
    """What one node is asked, and why."""

    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of its `Assignment`; empty: the plan as it is."""
    whole_mb: float = 0.0
    """Predicted peak memory of the plan as it is, MiB."""
    memory_mb: float = 0.0
    """Of what is asked."""
    step_s: float | None = None
    """Seconds of one step; None where the node has not measured this training."""
    steps: int | None = None
    """Steps of a round; None where they follow from the true size."""
    reasons: tuple[str, ...] = ()
    """For people: what was changed, or should have been, and why."""
    possible: bool = True
    """Whether it can take part, by prediction."""


def fit(plan: Plan, shape: Shape, profile: Profile, payload_bytes: tuple[int, int] = (0, 0)) -> Fit:
    """The assignment of one node.

    Memory: the tier's rank and length where they may vary, then half the rows at once, again and again, until the predicted peak fits;
    then gradient checkpointing; then the base in 8 bits; then half the length. Time: as many steps as fit in `SHARE` of what the payloads
    leave of the deadline.

    Args:
        plan: as approved.
        shape: of its model.
        profile: as the node told it.
        payload_bytes: of the model that goes there, and of the update that comes back.
    """
    may = frozenset(plan.cohort.assign)
    changes: dict[str, Any] = {}
    reasons: list[str] = []
    _by_tier(plan, profile, may, changes, reasons)

    def peak() -> float:
        return peak_mb(own_plan(plan, Assignment(plan="", plan_sha256="", round=1, **changes)), shape, device=profile.device)

    whole = peak_mb(plan, shape, device=profile.device)
    for name, value in _smaller(plan, may, changes):
        if peak() <= profile.memory_mb:
            break
        changes[name] = value
    for name in ("max_physical_batch_size", "checkpointing", "precision", "max_length"):
        if name in changes and not any(reason.startswith(name) for reason in reasons):
            reasons.append(f"{name} {str(changes[name]).lower()}: the plan's would take {whole:.0f} MiB, and {profile.memory_mb} are free")
    memory = peak()
    possible = memory <= profile.memory_mb
    if not possible:
        reasons.append(f"memory: the least that the plan permits takes {memory:.0f} MiB, and {profile.memory_mb} are free")
    step_s, steps = step_seconds(plan, profile, changes.get("max_length")), _planned_steps(plan)
    if step_s is not None:
        left = SHARE * max(0.0, plan.cohort.deadline_s - on_the_way_s(profile, payload_bytes))
        fitting, told = int(left / step_s), f"a step takes {step_s:.2g} s, and {left:.0f} s of the deadline are for training"
        if fitting < 1:
            possible = False
            reasons.append(f"time: {told}")
        elif "steps" in may and (steps is None or fitting < steps):
            changes["steps"] = steps = fitting
            reasons.append(f"steps {fitting}: {told}")
        elif steps is not None and fitting < steps:
            reasons.append(f"time: {told}, too few for {steps} steps, and cohort.assign does not let steps vary")
    return Fit(changes, whole, memory, step_s, steps, tuple(reasons), possible)


def _by_tier(plan: Plan, profile: Profile, may: frozenset[str], changes: dict[str, Any], reasons: list[str]) -> None:
    for below, rank, length in TIERS:
        if profile.memory_mb < below:
            for name, own, most in (("rank", plan.model.adapter.rank, rank), ("max_length", plan.task.max_length, length)):
                if name in may and own > most:
                    changes[name] = most
                    reasons.append(f"{name} {most}: of a machine with less than {below} MiB free")
            return


def _smaller(plan: Plan, may: frozenset[str], changes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Ever smaller settings: those that change no result come first, a quicker one before a slower one."""
    rows = plan.local.max_physical_batch_size
    while "max_physical_batch_size" in may and rows > 1:
        rows //= 2
        yield "max_physical_batch_size", rows
    hooked = plan.private and not plan.central and plan.privacy.gradients == "hooks"
    if "checkpointing" in may and not plan.local.checkpointing and not hooked:
        yield "checkpointing", True
    if "precision" in may and plan.model.base_precision != "int8" and plan.model.adapter.kind != "full":
        yield "precision", "int8"
    length = changes.get("max_length", plan.task.max_length)
    while "max_length" in may and length // 2 >= LEAST_LENGTH:
        length //= 2
        yield "max_length", length


def step_seconds(plan: Plan, profile: Profile, length: int | None = None) -> float | None:
    """Seconds of one step, all rows as long as may be; None where the node has not measured this training."""
    rows = rows_per_step(plan, None) or profile.rows_per_step
    if profile.work != work_of(plan) or profile.tokens_per_s is None or rows is None:
        return None
    return rows * (length or plan.task.max_length) / profile.tokens_per_s


def on_the_way_s(profile: Profile, payload_bytes: tuple[int, int]) -> float:
    """Seconds that payloads take, down and up; none where the link has not been measured."""
    speeds = (profile.download_kbit_s, profile.upload_kbit_s)
    return sum(8 * length / (1000 * speed) for length, speed in zip(payload_bytes, speeds, strict=True) if speed)


def _planned_steps(plan: Plan) -> int | None:
    """Steps of a round; None where they follow from the true size."""
    if plan.local.steps is None and plan.privacy.sample_rate is not None:
        return max(1, round((plan.local.epochs or 1) / plan.privacy.sample_rate))
    return plan.local.steps
