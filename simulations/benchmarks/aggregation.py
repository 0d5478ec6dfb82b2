"""Aggregation rules for LoRA side by side: MiniLM on R8, clients of one rank and of several, at equal bytes up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lichen.common.aggregation import RULES, rank_of, update_like
from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, find_plan, load_plan

RANKS = {"same": (), "mixed": (2, 4, 8, 16)}
"""Of the clients in turn; none: the scenario's own for all."""
WIDEST = "fedavg-at-16"
"""What mixed ranks are held against: every client has the largest."""
OF_RANKS = {
    "same": ("fedavg", "ffa", "rolora", "flora", "fedex"),
    "mixed": ("flora", "nested", "zero-padding", WIDEST),
}
"""The rules that are run by default."""


def bench_aggregation(
    ranks: Sequence[str],
    rules: Sequence[str],
    seeds: Sequence[int],
    epsilons: Sequence[float],
    rounds: int | None = None,
    *,
    equal_bytes: bool = True,
    settings: Sequence[str] = (),
    keep: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Run each rule once for each kind of ranks, ε and seed, in-process.

    Args:
        ranks: of `RANKS`.
        rules: those of `OF_RANKS` that are wanted; empty: all.
        seeds: each changes the partition, the validation split and all draws.
        epsilons: infinity is without differential privacy.
        rounds: of `fedavg`; None: the scenario's.
        equal_bytes: let a rule that sends less a round have more rounds, so that all clients together send as much as by `fedavg` at the
            scenario's rank, or, where ranks are mixed, as by `zero-padding`; those that send more have fewer. Else all have as many.
        settings: ``key.path=value``, for all runs.
        keep: where to keep the run directories; nowhere if None.

    Yields:
        The figures of each run: rounds, bytes, test accuracy and macro-F1 (the test split is scored once, at the end), the last round's
        validation accuracy, by which rules are to be tuned, seconds.

    Raises:
        LichenError: CHECK_FAILED, if a run spent more than its ε.
    """
    from lichen.simulations.simulate import run

    for kind in ranks:
        for rule in [rule for rule in OF_RANKS[kind] if not rules or rule in rules]:
            for epsilon in epsilons:
                for seed in seeds:
                    plan = plan_of(kind, rule, epsilon, rounds, [f"seed={seed}", *settings], equal_bytes=equal_bytes)
                    with TemporaryDirectory() as temporary:
                        result = run(plan, (keep or Path(temporary)) / f"{kind}-{rule}-{epsilon:g}-{seed}", "inprocess")
                    spent = result.privacy.max_epsilon
                    if spent is not None and spent > epsilon:
                        raise LichenError(
                            Code.CHECK_FAILED, f"ε = {spent} was spent, {epsilon:g} was the limit", where=f"{rule}, seed {seed}"
                        )
                    final = result.final or {}
                    yield {
                        "ranks": kind,
                        "rule": rule,
                        "epsilon": epsilon,
                        "seed": seed,
                        "rounds": plan.rounds,
                        "uplink_bytes": result.transfer.uplink_bytes,
                        "downlink_bytes": result.transfer.downlink_bytes,
                        "accuracy": final["accuracy"],
                        "macro_f1": final["macro_f1"],
                        "validation": (result.rounds[-1].validation or {}).get("accuracy"),
                        "seconds": result.seconds,
                    }


def plan_of(kind: str, rule: str, epsilon: float, rounds: int | None, settings: Sequence[str], *, equal_bytes: bool) -> Plan:
    """The plan of one run, with as many rounds as it has bytes for."""
    plan = _plan(kind, rule, epsilon, rounds, settings)
    if not equal_bytes:
        return plan
    paid = _sent(_plan(kind, "fedavg" if kind == "same" else "zero-padding", epsilon, rounds, settings))
    count = max(1, round(plan.rounds * paid / _sent(plan)))
    return _plan(kind, rule, epsilon, count, [*settings, f"aggregation.average_last={min(plan.aggregation.average_last, count)}"])


def _plan(kind: str, rule: str, epsilon: float, rounds: int | None, settings: Sequence[str]) -> Plan:
    # only the last round is scored: the others would take a third of the time
    scenario = find_plan("r8" if math.isfinite(epsilon) else "r8-no-privacy")
    changes = ["evaluation.every=1000"]
    if math.isfinite(epsilon):
        changes.append(f"privacy.epsilon={epsilon}")
    if kind == "mixed":
        adapter = load_plan(scenario).model.adapter
        # α / r stays the scenario's
        changes += [f"model.adapter.rank={max(RANKS[kind])}", f"model.adapter.alpha={max(RANKS[kind]) * adapter.alpha / adapter.rank}"]
        if rule != WIDEST:
            changes.append(f"simulation.ranks={list(RANKS[kind])}")
    name = "fedavg" if rule == WIDEST else rule
    changes.append(f"aggregation.rule={name}")
    if rounds is not None:
        changes += [f"rounds={rounds}", f"aggregation.average_last={min(rounds, load_plan(scenario).aggregation.average_last)}"]
    return load_plan(scenario, [*changes, *settings])


def _sent(plan: Plan) -> float:
    """Parameters that all clients together send in a round, in the mean over the phases."""
    from lichen.common.tasks import workbench

    phases, start = len(RULES[plan.aggregation.rule].phases), workbench(plan).start
    sent = 0
    for number in range(plan.simulation.clients):
        rank = rank_of(plan, f"client-{number}", simulated=True)
        sent += sum(tensor.numel() for round in range(1, phases + 1) for tensor in update_like(plan, round, rank, start).values())
    return sent / phases


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of each rule, with the spread of the accuracy."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for found in runs:
        groups.setdefault((found["ranks"], found["rule"], found["epsilon"]), []).append(found)
    means = ("rounds", "uplink_bytes", "downlink_bytes", "accuracy", "macro_f1", "validation", "seconds")
    return [
        {"ranks": kind, "rule": rule, "epsilon": epsilon, "seeds": len(group)}
        | {key: statistics.mean(found[key] for found in group) for key in means}
        | {"least": min(found["accuracy"] for found in group), "most": max(found["accuracy"] for found in group)}
        for (kind, rule, epsilon), group in groups.items()
    ]
