"""`lichen bench base`: a frozen base in fewer bits, and gradient checkpointing: memory, time, and how far from 32 bits; R8 by precision."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Precision, find_plan, load_plan
from lichen.simulations.benchmarks.answers import right_answers
from lichen.simulations.benchmarks.kept import run_kept
from lichen.simulations.benchmarks.memory import forget_peak, resident
from lichen.simulations.benchmarks.r8 import variant
from lichen.simulations.benchmarks.simulate import MINILM

if TYPE_CHECKING:
    import numpy as np

    from lichen.client.trainer import Trainer
    from lichen.common.tasks.text_classification import TextClassification

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
TEXTS = 320
TARGETS = {"memory": 0.3, "cpu": 1.3, "lost": 0.01}
"""At most, for int8: resident memory of the base, and a step's CPU time, over those of 32 bits; the bound on lost accuracy on R8."""
ADAPTER = {"kind": "lora", "rank": 8, "alpha": 16}


def bench_base(rows: int, repeats: int) -> Iterator[dict[str, Any]]:
    """MiniLM by precision of the base, and with gradient checkpointing.

    Args:
        rows: of the client that trains LoRA on all layers, batches of 16 × 64, on one thread, without privacy.
        repeats: trainings of each kind, which take turns; the quickest counts, and the most memory.

    Yields:
        Of each way ``memory_mb``, the resident memory of its base when all of it was read, ``mapped_mb``, of that what is mapped from
        the file, ``used_mb``, what texts of R8 read of it, ``grown_mb``, by how much the process grew, and ``peak_mb`` at most while it
        loaded; ``memory`` and ``used``, the first and the third over those of 32 bits; ``step_s``, CPU seconds of a step, and ``cpu``
        over 32 bits; ``training_mb``, what a training adds to resident memory at its peak; ``apart``, the largest difference of a
        trained model's logits from those in 32 bits, and ``scores``, their largest. With ``targets`` where there are any.

    Raises:
        LichenError: CHECK_FAILED, if the process that measures memory fails.
    """
    ways: list[tuple[Precision, bool]] = [(precision, False) for precision in PRECISIONS] + [("float32", True)]
    bases = {precision: _memory(precision) for precision in PRECISIONS}
    trained = _trained(rows, repeats, ways)
    plain, whole = trained["float32", False], bases["float32"]
    for precision, checkpointing in ways:
        found, base = trained[precision, checkpointing], bases[precision]
        row: dict[str, Any] = {"base": precision, "checkpointing": checkpointing}
        if not checkpointing:
            row |= {
                "memory_mb": (base["own"] + base["mapped"]) / 1e6,
                "mapped_mb": base["mapped"] / 1e6,
                "memory": (base["own"] + base["mapped"]) / (whole["own"] + whole["mapped"]),
                "used": base["used"] / whole["used"],
                **{f"{key}_mb": base[key] / 1e6 for key in ("used", "grown", "peak")},
                "load_s": base["load_s"],
            }
        row |= {"cpu": found["step_s"] / plain["step_s"], **found}
        yield row | ({"targets": {key: TARGETS[key] for key in ("memory", "cpu")}} if precision == "int8" else {})


def _memory(precision: Precision) -> dict[str, float]:
    command = [sys.executable, "-m", "lichen.simulations.benchmarks.base_process", MINILM.base, precision, str(TEXTS)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise LichenError(Code.CHECK_FAILED, f"the process that measures memory failed: {found.stderr[-500:]}", where="lichen bench base")
    told: dict[str, float] = json.loads(found.stdout)
    return told


def _trained(rows: int, repeats: int, ways: Sequence[tuple[Precision, bool]]) -> dict[tuple[Precision, bool], dict[str, float]]:
    import torch

    from lichen.client.worker import trim
    from lichen.common.privacy.randomness import SeededSource
    from lichen.simulations.benchmarks.step import make_trainer, r8_rows

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainers = {(kind, again): make_trainer(ADAPTER, precision=kind, epochs=1, checkpointing=again) for kind, again in ways}
        plain = trainers["float32", False]
        data, start = r8_rows(plain, rows), plain.model.state()
        found: dict[tuple[Precision, bool], dict[str, float]] = {}
        for trainer in trainers.values():
            _logits(trainer, start, data)  # reads what is mapped
        for _ in range(repeats):
            for way, trainer in trainers.items():
                trim()
                forget_peak()
                before, began = resident("VmRSS"), time.process_time()
                trained = trainer.train(start, data, 1, SeededSource("order"))
                took = (time.process_time() - began) / trained.steps
                peak = (resident("VmHWM") - before) / 1e6
                last = found.get(way, {"step_s": took, "training_mb": peak})
                found[way] = {"step_s": min(took, last["step_s"]), "training_mb": max(peak, last["training_mb"])}
        tuned = {name: tensor + trained.delta[name] for name, tensor in start.items()}
        right = _logits(plain, tuned, data)
        for way, trainer in trainers.items():
            logits = _logits(trainer, tuned, data)
            found[way] |= {"apart": float((logits - right).abs().max()), "scores": float(logits.abs().max())}
    finally:
        torch.set_num_threads(threads)
    return found


def _logits(trainer: Trainer, state: Any, data: Any) -> Any:
    import torch

    trainer.model.load(state)
    task = cast("TextClassification", trainer.task)
    with torch.no_grad():
        return torch.cat([task.logits(trainer.model.network, task.collate(data, [row])) for row in range(len(data))])


def bench_base_r8(
    seeds: Sequence[int], precisions: Sequence[Precision], epsilon: float, settings: Sequence[str] = (), keep: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Run R8 by precision of the nodes' base, and compare what becomes of each test text with 32 bits (`paired_bootstrap`).

    Args:
        seeds: each run once with each precision.
        precisions: that are compared with 32 bits.
        epsilon: infinity is without differential privacy.
        settings: keys of the plan that differ.
        keep: where to keep the run directories, see `run_kept`; nowhere if None.

    Yields:
        Of each run ``base``, ``seed``, ``accuracy`` (of the result, over a base in 32 bits, as the coordinator scores it) and
        ``over_its_base`` (over the base that it was trained on). After the runs, of each precision and either way to score it
        (``scored_over``), ``lost``, the mean loss of accuracy against 32 bits, and ``at_most``, its one-sided 95 % bound over test items
        and seeds, with the ``target``.

    Raises:
        LichenError: CHECK_FAILED, if scoring again does not give a run's own accuracy.
    """
    import numpy as np

    from lichen.simulations.benchmarks.paired_bootstrap import paired_bootstrap

    scenario, own = variant("lora", epsilon)
    right: dict[tuple[Precision, Precision], list[np.ndarray]] = {}
    for seed in seeds:
        for precision in ("float32", *precisions):
            plan = load_plan(find_plan(scenario), [f"seed={seed}", f"model.base_precision={precision}", *own, *settings])
            with TemporaryDirectory(prefix="lichen-bench-") as temporary:
                out = (keep or Path(temporary)) / f"{precision}-{seed}"
                result = run_kept(plan, out)
                found = {over: right_answers(plan.at_precision(over), out) for over in dict.fromkeys(("float32", precision))}
            for over, items in found.items():
                right.setdefault((precision, over), []).append(items)
            accuracy = (result.final or {})["accuracy"]
            if abs(float(found["float32"].mean()) - accuracy) > 1e-9:
                raise LichenError(Code.CHECK_FAILED, f"{found['float32'].mean():.4f} is not the run's {accuracy:.4f}", where=f"seed {seed}")
            yield {"base": precision, "seed": seed, "accuracy": accuracy, "over_its_base": float(found[precision].mean())}
    whole = np.stack(right["float32", "float32"])
    for (precision, over), each in right.items():
        if precision != "float32":
            lost = paired_bootstrap(whole, np.stack(each))
            yield {"base": precision, "scored_over": over, "lost": lost.mean, "at_most": lost.upper, "target": TARGETS["lost"]}
