"""Aggregation rules for LoRA side by side: MiniLM on R8 or the airline silos, clients of one rank and of several, at equal bytes up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from lichen.common.aggregation import RULES, rank_of, update_like
from lichen.common.plan import Plan, find_plan, load_plan
from lichen.simulations.benchmarks.kept import run_kept

DATA = {"r8": ("r8", "r8-no-privacy"), "airlines": ("airlines", "airlines-no-privacy")}
"""The scenario with privacy, and that without."""
TOP = 2
"""Layers that have LoRA, as in private scenarios: what the frozen ones below give is kept, which saves most of the time."""
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
    data: Sequence[str],
    ranks: Sequence[str],
    rules: Sequence[str],
    seeds: Sequence[int],
    epsilons: Sequence[float],
    rounds: int | None = None,
    *,
    equal_bytes: bool = True,
    full: bool = False,
    settings: Sequence[str] = (),
    keep: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Run each rule once for each data set, kind of ranks, ε and seed, in-process.

    Args:
        data: of `DATA`.
        ranks: of `RANKS`.
        rules: those of `OF_RANKS` that are wanted; empty: all.
        seeds: each changes the partition, the validation split and all draws.
        epsilons: infinity is without differential privacy.
        rounds: of `fedavg`; None: the scenario's.
        equal_bytes: let a rule that sends less a round have more rounds, so that all clients together send as much as by `fedavg` at the
            scenario's rank, or, where ranks are mixed, as by `zero-padding`; those that send more have fewer. Else all have as many.
        full: LoRA where the scenario has it, in place of the last `TOP` layers.
        settings: ``key.path=value``, for all runs.
        keep: where to keep the run directories, see `run_kept`; nowhere if None.

    Yields:
        The figures of each run: rounds, bytes, test accuracy and macro-F1 (the test split is scored once, at the end), the last round's
        validation accuracy, by which rules are to be tuned, seconds.

    Raises:
        LichenError: CHECK_FAILED, if a run spent more than its ε.
    """
    for name, kind, epsilon in product(data, ranks, epsilons):
        for rule, seed in product([rule for rule in OF_RANKS[kind] if not rules or rule in rules], seeds):
            asked = Asked(name, kind, rule, epsilon, full, (f"seed={seed}", *settings))
            plan = plan_of(asked, rounds, equal_bytes=equal_bytes)
            with TemporaryDirectory() as temporary:
                result = run_kept(plan, (keep or Path(temporary)) / f"{name}-{kind}-{rule}-{epsilon:g}-{seed}")
            final = result.final or {}
            yield {
                "data": name,
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


class Asked(NamedTuple):
    """What a run is of, but for its rounds: see `bench_aggregation`."""

    data: str
    ranks: str
    rule: str
    epsilon: float
    full: bool = False
    settings: tuple[str, ...] = ()


def plan_of(asked: Asked, rounds: int | None, *, equal_bytes: bool) -> Plan:
    """The plan of one run, with as many rounds as it has bytes for."""
    plan = _plan(asked, rounds)
    if not equal_bytes:
        return plan
    paid = _sent(_plan(asked._replace(rule="fedavg" if asked.ranks == "same" else "zero-padding"), rounds))
    return _plan(asked, max(1, round(plan.rounds * paid / _sent(plan))))


def _plan(asked: Asked, rounds: int | None) -> Plan:
    # only the last round is scored: the others would take a third of the time
    private = math.isfinite(asked.epsilon)
    scenario = find_plan(DATA[asked.data][not private])
    changes = ["evaluation.every=1000"]
    if private:
        changes.append(f"privacy.epsilon={asked.epsilon}")
    elif not asked.full:
        changes.append(f"model.adapter.last_layers={TOP}")
    if asked.ranks == "mixed":
        adapter = load_plan(scenario).model.adapter
        most = max(RANKS["mixed"])
        # α / r stays the scenario's
        changes += [f"model.adapter.rank={most}", f"model.adapter.alpha={most * adapter.alpha / adapter.rank}"]
        if asked.rule != WIDEST:
            changes.append(f"simulation.ranks={list(RANKS['mixed'])}")
    changes.append(f"aggregation.rule={'fedavg' if asked.rule == WIDEST else asked.rule}")
    plan = load_plan(scenario, [*changes, *asked.settings])
    if rounds is None:
        return plan
    last = min(plan.aggregation.average_last, rounds)
    return load_plan(scenario, [*changes, *asked.settings, f"rounds={rounds}", f"aggregation.average_last={last}"])


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
    groups: dict[tuple[str, str, str, float], list[dict[str, Any]]] = {}
    for found in runs:
        groups.setdefault((found["data"], found["ranks"], found["rule"], found["epsilon"]), []).append(found)
    means = ("rounds", "uplink_bytes", "downlink_bytes", "accuracy", "macro_f1", "validation", "seconds")
    return [
        {"data": data, "ranks": kind, "rule": rule, "epsilon": epsilon, "seeds": len(group)}
        | {key: statistics.mean(found[key] for found in group) for key in means}
        | {"least": min(found["accuracy"] for found in group), "most": max(found["accuracy"] for found in group)}
        for (data, kind, rule, epsilon), group in groups.items()
    ]
