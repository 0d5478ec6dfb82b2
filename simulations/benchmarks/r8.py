"""R8 by three seeds: what each way of tuning reaches, with and without differential privacy. Prints the README's table."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lichen.common.errors import Code, LichenError
from lichen.common.plan import load_plan

# Chosen on the validation split (docs/experiments.md). The scenario itself is the private LoRA run.
VARIANTS: dict[str, list[str]] = {
    "lora": [],
    "head": ["model.adapter.kind=head"],
    "full": ["model.adapter.kind=full"],
}
NO_PRIVACY = [
    "privacy.unit=none",
    "rounds=5",
    "local.steps=null",
    "local.epochs=1",
    "local.batch_size=32",
    "local.optimizer=adamw",
    "local.betas=[0.9, 0.999]",
    "local.learning_rate_decay=linear",
    "aggregation={}",
]
NO_PRIVACY_RATES = {
    "lora": ["local.learning_rate=0.002", "local.head_learning_rate=0.005"],
    "head": ["local.learning_rate=0.005", "local.head_learning_rate=0.005"],
    "full": ["local.learning_rate=0.0002", "local.head_learning_rate=0.002"],
}


def bench_r8(
    seeds: Sequence[int], epsilons: Sequence[float], adapters: Sequence[str], keep: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Run the scenario r8 once for each adapter, ε and seed, in-process.

    Args:
        seeds: each changes the partition, the validation split and all draws.
        epsilons: infinity is without differential privacy.
        adapters: of `VARIANTS`.
        keep: where to keep the run directories; nowhere if None.

    Yields:
        The figures of each run: test accuracy and macro-F1 (the test split is scored once, at the end), ε, seconds.

    Raises:
        LichenError: CHECK_FAILED, if a run spent more than its ε.
    """
    from lichen.simulations.cli import find_plan
    from lichen.simulations.simulate import run

    for adapter in adapters:
        for epsilon in epsilons:
            for seed in seeds:
                settings = [f"seed={seed}", *overrides(adapter, epsilon)]
                plan = load_plan(find_plan("r8"), settings)
                with TemporaryDirectory() as temporary:
                    out = (keep or Path(temporary)) / f"{adapter}-{epsilon:g}-{seed}"
                    result = run(plan, out, "inprocess")
                spent = result.privacy.max_epsilon
                if spent is not None and spent > epsilon:
                    raise LichenError(
                        Code.CHECK_FAILED, f"ε = {spent} was spent, {epsilon:g} was the limit", where=f"{adapter}, seed {seed}"
                    )
                final = result.final or {}
                validation = (result.rounds[-1].validation or {}).get("accuracy")
                yield {
                    "adapter": adapter,
                    "epsilon": epsilon,
                    "seed": seed,
                    "accuracy": final["accuracy"],
                    "macro_f1": final["macro_f1"],
                    "validation": validation,
                    "spent": spent,
                    "seconds": result.seconds,
                }


def overrides(adapter: str, epsilon: float) -> list[str]:
    """The settings of a variant at ε."""
    if adapter not in VARIANTS:
        raise LichenError(Code.PLAN_INVALID, f"no variant {adapter!r}", where="--adapter", fix=f"One of {', '.join(VARIANTS)}.")
    if epsilon == float("inf"):
        return [*VARIANTS[adapter], *NO_PRIVACY, *NO_PRIVACY_RATES[adapter]]
    return [*VARIANTS[adapter], f"privacy.epsilon={epsilon}"]


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
