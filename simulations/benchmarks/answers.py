"""What a run's model answers to each test text: what two runs are compared by, item for item."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import numpy as np

    from lichen.common.plan import Plan
    from lichen.common.tasks.text_classification import TextClassification


def right_answers(plan: Plan, out: Path) -> np.ndarray:
    """Which test texts the model of a run gets right, over a base of the plan's precision."""
    import pyarrow.parquet as pq
    import torch

    from lichen.common.model.export import load_saved
    from lichen.common.tasks import workbench

    bench = workbench(plan)
    task = cast("TextClassification", bench.task)
    task.choose_among(load_saved(out / "model", bench.model))
    table = pq.read_table(out / "simulation" / "test.parquet")
    data = task.encode({field: table.column(field).to_pylist() for field in task.fields})
    order, most = data.lengths.argsort(kind="stable").tolist(), plan.evaluation.batch_size
    right = torch.zeros(len(data), dtype=torch.bool)
    bench.model.network.eval()
    with torch.no_grad():
        for start in range(0, len(order), most):
            batch = task.collate(data, order[start : start + most])
            right[order[start : start + most]] = (task.logits(bench.model.network, batch).argmax(1) == batch["labels"]).cpu()
    bench.model.network.train()
    return right.numpy()
