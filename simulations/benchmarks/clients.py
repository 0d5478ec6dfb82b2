"""R8 dealt to 200 clients: client-level differential privacy by the coordinator against the same without, by seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lichen.common.plan import find_plan, load_plan
from lichen.simulations.benchmarks.kept import run_kept

# Chosen on the validation split (docs/experiments.md). Without a clip the learning rate sets a step's length.
WITHOUT_PRIVACY = (
    "privacy.unit=none",
    "privacy.noise=local",
    "cohort.population=null",
    "local.learning_rate=10",
    "aggregation.momentum=0.7",
)


def bench_clients(seeds: Sequence[int], epsilons: Sequence[float], keep: Path | None = None) -> Iterator[dict[str, Any]]:
    """Run the scenario once for each ε and seed, in-process.

    Args:
        seeds: each changes the partition, the validation split and all draws.
        epsilons: infinity is without differential privacy.
        keep: where to keep the run directories, see `run_kept`; nowhere if None.

    Yields:
        The figures of each run: test accuracy and macro-F1 (the test split is scored once, at the end), and ε by two accountants.

    Raises:
        LichenError: CHECK_FAILED, if a run spent more than its ε.
    """
    for target in epsilons:
        for seed in seeds:
            # only the last round is scored: it takes as long as two rounds
            settings = [f"seed={seed}", "evaluation.every=1000"]
            settings += [f"privacy.epsilon={target}"] if math.isfinite(target) else WITHOUT_PRIVACY
            with TemporaryDirectory() as temporary:
                out = (keep or Path(temporary)) / f"clients-{target:g}-{seed}"
                result = run_kept(load_plan(find_plan("r8-clients"), settings), out, workers=1)
            central, final = result.privacy.central, result.final or {}
            yield {
                "epsilon": target,
                "seed": seed,
                "accuracy": final["accuracy"],
                "macro_f1": final["macro_f1"],
                "validation": (result.rounds[-1].validation or {}).get("accuracy"),
                "spent": central.epsilon if central else None,
                "spent_prv": central.epsilon_prv if central else None,
            }
