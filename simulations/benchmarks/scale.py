"""`lichen simulate` with few and with very many clients, the same cohort and rows of each: what a population costs that is not asked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, parse_plan
from lichen.common.result import read_result
from lichen.coordinator.run_directory import COHORT
from lichen.simulations.benchmarks.memory import of_trees
from lichen.simulations.benchmarks.simulate import MINILM

TARGET = 1.2
"""Peak memory, over that of the smallest population."""
ROWS = 20
"""Of each client."""
POLL_S = 0.05


def plan_of(clients: int, cohort: int, rounds: int) -> Plan:
    """Made-up rows dealt to so many clients; MiniLM with LoRA r = 8 on query and value, two steps of 8 × 32."""
    return parse_plan(
        {
            "name": "bench-scale",
            "rounds": rounds,
            "task": {"kind": "text-classification", "labels": ["crop", "metal", "money"], "max_length": 32},
            "model": {
                "base": MINILM.base,
                "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
                "head": {"pooling": "pooler", "init": "random"},
            },
            "cohort": {"size": cohort, "minimum": cohort, "deadline_s": 3600},
            "local": {"steps": 2, "batch_size": 8, "optimizer": "adamw", "learning_rate": 3e-4},
            "evaluation": {"validation_fraction": 0},
            "simulation": {"clients": clients, "partition": "iid", "data": f"made-up:{ROWS * clients}"},
        }
    )


def bench_scale(clients: Sequence[int], cohort: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Run the simulation once for each population, in processes of its own, one after another.

    Args:
        clients: populations; the first is what the others are held against.
        cohort: clients of a round.
        rounds: of each run.

    Yields:
        ``clients``, ``cohort``, ``peak`` (bytes, of all processes together: `of_trees`), ``first_round_s`` (from the command's
        start until the first client is asked), ``seconds`` (whole command), ``homes`` (written); from the second on ``over`` (its peak
        to the first one's) and ``target``.

    Raises:
        LichenError: CHECK_FAILED, if a run fails.
    """
    least = 0
    for count in clients:
        with TemporaryDirectory(prefix="lichen-bench-") as name:
            found = _measure(plan_of(count, cohort, rounds), Path(name))
        yield {"clients": count, "cohort": cohort, **found, **({"over": found["peak"] / least, "target": TARGET} if least else {})}
        least = least or found["peak"]


def _measure(plan: Plan, folder: Path) -> dict[str, Any]:
    document, out, log = folder / "plan.yaml", folder / "out", folder / "log"
    document.write_text(plan.canonical_json())
    peak, asked = 0, 0.0
    began = time.monotonic()
    with log.open("wb") as printed:
        command = [sys.executable, "-m", "lichen.common.cli", "simulate", str(document), "--out", str(out)]
        running = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        while running.poll() is None:
            peak = max(peak, of_trees([running.pid]))
            if not asked and (out / COHORT).exists():
                asked = time.monotonic() - began
            time.sleep(POLL_S)
    seconds = time.monotonic() - began
    if running.returncode or read_result(out).status != "finished":
        raise LichenError(
            Code.CHECK_FAILED, f"lichen simulate failed: {log.read_text()[-500:]}", where=f"{plan.simulation.clients} clients"
        )
    homes = sum(1 for _ in (out / "simulation").glob("client-*"))
    return {"peak": peak, "first_round_s": asked, "seconds": seconds, "homes": homes}
