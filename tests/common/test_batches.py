"""What is kept of a model that is ready goes when the model does."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from lichen.common.batches import ready
from lichen.common.plan import parse_plan
from lichen.common.tasks import workbench


def test_a_process_with_several_plans_has_the_model_of_the_last(tiny_plan: dict[str, Any]) -> None:
    lora = {"adapter": {"kind": "lora", "rank": 2, "last_layers": 1}}
    plan = parse_plan(tiny_plan | {"model": tiny_plan["model"] | lora})
    task, model, _ = workbench(plan)
    assert ready(plan, task, model).batches.prefix is not None
    assert ready(plan, task, model) is ready(plan, task, model)
    before = weakref.ref(model.network)
    del task, model
    workbench(parse_plan(tiny_plan | {"seed": 12345}))
    gc.collect()
    assert before() is None
    workbench.cache_clear()
