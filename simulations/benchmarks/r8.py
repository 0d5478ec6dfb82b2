"""R8 by three seeds: what each way of tuning reaches, with and without differential privacy. Prints the README's table."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lichen.common.errors import Code, LichenError
from lichen.common.plan import find_plan, load_plan
from lichen.simulations.benchmarks.kept import run_kept

# Chosen on the validation split (docs/experiments.md). The less noise, the larger a step may be: from each ε on, the head's rate.
PRIVATE_HEAD_RATES = {8.0: 120, 4.0: 80, 2.0: 80, 0.0: 50}
ADAPTERS = ("lora", "head", "full")
# every weight moves, so each moves less
FULL_RATES = ["local.learning_rate=0.0002", "local.head_learning_rate=0.002"]


def bench_r8(
    seeds: Sequence[int], epsilons: Sequence[float], adapters: Sequence[str], keep: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Run R8 once for each adapter, ε and seed, in-process.

    Args:
        seeds: each changes the partition, the validation split and all draws.
        epsilons: infinity is without differential privacy.
        adapters: of `ADAPTERS`.
        keep: where to keep the run directories, see `run_kept`; nowhere if None.

    Yields:
        The figures of each run: test accuracy and macro-F1 (the test split is scored once, at the end), ε, seconds.

    Raises:
        LichenError: CHECK_FAILED, if a run spent more than its ε.
    """
    for adapter in adapters:
        for epsilon in epsilons:
            for seed in seeds:
                scenario, settings = variant(adapter, epsilon)
                plan = load_plan(find_plan(scenario), [f"seed={seed}", *settings])
                with TemporaryDirectory() as temporary:
                    out = (keep or Path(temporary)) / f"{adapter}-{epsilon:g}-{seed}"
                    result = run_kept(plan, out, workers=1)
                final = result.final or {}
                validation = (result.rounds[-1].validation or {}).get("accuracy")
                yield {
                    "adapter": adapter,
                    "epsilon": epsilon,
                    "seed": seed,
                    "accuracy": final["accuracy"],
                    "macro_f1": final["macro_f1"],
                    "validation": validation,
                    "spent": result.privacy.max_epsilon,
                    "seconds": result.seconds,
                }


def variant(adapter: str, epsilon: float) -> tuple[str, list[str]]:
    """The scenario of an adapter at ε, and the keys that differ from it.

    Raises:
        LichenError: PLAN_INVALID, if there is no such adapter.
    """
    if adapter not in ADAPTERS:
        raise LichenError(Code.PLAN_INVALID, f"no adapter {adapter!r}", where="--adapter", fix=f"One of {', '.join(ADAPTERS)}.")
    # only the last round is scored: the others would take a third of the time
    common = [f"model.adapter.kind={adapter}", "evaluation.every=1000"]
    if epsilon == float("inf"):
        return "r8-no-privacy", common + (FULL_RATES if adapter == "full" else [])
    rate = next(rate for least, rate in PRIVATE_HEAD_RATES.items() if epsilon >= least)
    return "r8", [*common, f"privacy.epsilon={epsilon}", f"local.head_learning_rate={rate}"]


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of each adapter and ε."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for found in runs:
        groups.setdefault((found["adapter"], found["epsilon"]), []).append(found)
    return [
        {"adapter": adapter, "epsilon": epsilon, "seeds": len(group)}
        | {key: statistics.mean(found[key] for found in group) for key in ("accuracy", "macro_f1", "seconds")}
        for (adapter, epsilon), group in groups.items()
    ]
