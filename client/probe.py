"""How fast this machine trains a plan's model: some steps on made-up text of the plan's length, of which nothing is kept."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lichen.client.gate import Gate
from lichen.client.jobs import Job, Private
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.randomness import SeededSource

if TYPE_CHECKING:
    from lichen.client.trainer import Trainer

STEPS = 10
SECONDS = 3.0
"""No further step is begun after that."""


def tokens_per_s(trainer: Trainer, steps: int = STEPS, seconds: float = SECONDS) -> float:
    """Tokens that pass forward and backward in a second, in steps of one physical batch, with their noise where the plan is private.

    A first step is not counted, since it does what is done once. What is known of frozen layers is not used, so that a plan with such
    layers is faster from its second pass over the data on.

    Args:
        trainer: of the plan; its model is left as the last step made it, and the next work loads its own.
        steps: at most.
        seconds: after which no step is begun; one is taken whatever it takes.

    Raises:
        LichenError: MODEL_NOT_TRAINED, as any training.
    """
    plan = trainer.plan
    rows = min(plan.local.batch_size, plan.local.max_physical_batch_size)
    data, start = trainer.task.made_up(rows, longest=True), trainer.model.state()
    segment = Segment(1.0, 1.0, 1)

    def step() -> None:
        private = Private([[row] for row in range(rows)], segment, rows, Gate(segment)) if plan.private and not plan.central else None
        trainer.run(Job(start, data, 1, SeededSource("probe"), private=private, most_steps=1))

    step()
    began, taken, passed = time.perf_counter(), 0, 0.0
    while taken < max(1, steps) and (not taken or passed < seconds):
        step()
        taken += 1
        passed = time.perf_counter() - began
    return float(data.lengths.sum()) * taken / passed
