"""A guard on what a step computes, in multiply-adds rather than seconds: `lean` does less, and privacy adds next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from lichen.client.gate import Gate
from lichen.client.jobs import Job, Private
from lichen.client.trainer import Trainer
from lichen.common import tasks
from lichen.common.plan import parse_plan
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.randomness import SeededSource
from lichen.common.tasks import workbench

STEPS, ROWS = 3, 24


@pytest.fixture
def work(tiny_plan: dict[str, Any], tiny_rows: Callable[..., list[dict[str, str]]]) -> Callable[..., int]:
    """Multiply-adds of a training whose steps take all rows."""

    def count(compute: str, *, private: bool = False, kind: str = "lora") -> int:
        document = tiny_plan | {
            "model": tiny_plan["model"] | {"adapter": {"kind": kind}, "head": {"pooling": "pooler"}},
            "local": {"steps": STEPS, "batch_size": ROWS, "compute": compute},
        }
        if private:
            document["privacy"] = {"unit": "example", "epsilon": 8.0, "sample_rate": 1.0}
        tasks.workbench.cache_clear()
        trainer = Trainer(parse_plan(document))
        # of two lengths, far apart
        rows = [row | {"text": row["text"] * (1 + 3 * (index % 2))} for index, row in enumerate(tiny_rows(ROWS))]
        data = trainer.task.encode({field: [row[field] for row in rows] for field in trainer.task.fields})
        segment = Segment(1.0, 1.0, STEPS)
        noise = Private([[row] for row in range(ROWS)], segment, ROWS, Gate(segment)) if private else None
        job = Job(workbench(trainer.plan).start, data, 1, SeededSource("order"), private=noise)
        with FlopCounterMode(display=False) as counted:
            trainer.run(job)
        tasks.workbench.cache_clear()
        return counted.get_total_flops()

    return count


def test_lean_computes_less(work: Callable[..., int]) -> None:
    assert work("lean") < 0.65 * work("plain")


def test_privacy_adds_little(work: Callable[..., int]) -> None:
    assert work("lean", private=True) < 1.05 * work("lean")
    assert work("lean", private=True, kind="full") < 1.4 * work("lean", kind="full")
