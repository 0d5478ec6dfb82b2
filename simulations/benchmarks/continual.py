"""Continual methods side by side on one stream of tasks, between what nothing keeps (sequential) and joint training on all at once."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lichen.common.continual.stream import stages
from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, find_plan, load_plan
from lichen.simulations.benchmarks.kept import run_kept

SCENARIOS = ("20news-incremental", "tweets-incremental")
JOINT = "joint"
"""All rows from the first round to the last: the ceiling."""
STORES = ("replay",)
"""Methods that train on old examples again."""
METHODS = (JOINT, "sequential", "lwf", "adapters", "analytic", "ewc", "olora", *STORES)
SHORT = ("task.max_length=48", "rounds=15", "local.batch_size=16")
"""What the short setting changes, besides the rows."""
SHORT_ROWS = (3000, 1500)
"""Training and test rows of the short setting: the first of a shuffle that is always the same."""
VALIDATION, VALIDATION_SEED = 0.15, 1
"""The share of training rows on which settings are chosen, and the seed of their draw."""
PRIVATE = (
    *("privacy.unit=example", "privacy.clip=0.1", "privacy.sample_rate=0.25", "local.steps=2", "local.optimizer=sgd"),
    *("local.betas=[0.5, 0.999]", "local.learning_rate=10.0", "local.head_learning_rate=120.0", "local.learning_rate_decay=none"),
)
"""What all runs with differential privacy change; the rates are those of the scenario `r8`, not tuned here."""
STEADY = -0.01
"""BWT of a method that has lost nothing to speak of."""
AIMS = {"gap": 0.9, "gap without stored examples": 0.85, "forgetting": 0.2, "private loss": 0.05, "routed": 0.85, "below joint": 0.02}


def bench_continual(
    scenario: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    epsilons: Sequence[float],
    *,
    full: bool = False,
    validation: bool = False,
    settings: Sequence[str] = (),
    keep: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Run each method once for each ε and seed, in-process.

    Args:
        scenario: of `SCENARIOS`.
        methods: of `METHODS`.
        seeds: each changes the partition, the validation split and all draws.
        epsilons: infinity is without differential privacy.
        full: all rows, at the scenario's length.
        validation: score on a part of the training rows, which is then not trained on: for the choice of settings.
        settings: ``key.path=value``, for all runs.
        keep: where to keep the run directories, see `run_kept`; nowhere if None.

    Yields:
        ACC, BWT, FWT and forgetting on the rows that are scored, what is told of the router, bytes up, seconds.

    Raises:
        LichenError: CHECK_FAILED, if a run spent more than its ε.
    """
    with TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary)).resolve()
        data = [*(() if full else SHORT), *data_of(scenario, folder, full=full, validation=validation)]
        for epsilon, method, seed in product(epsilons, methods, seeds):
            plan = plan_of(scenario, method, epsilon, (f"seed={seed}", *data, *settings))
            found = _run(plan, scenario, folder / f"{scenario}{'-validation' if validation else ''}-{method}-{epsilon:g}-{seed}")
            yield {"method": method, "epsilon": epsilon, "seed": seed} | found


def plan_of(scenario: str, method: str, epsilon: float, settings: Sequence[str] = ()) -> Plan:
    """The plan of one run."""
    path, private = find_plan(scenario), math.isfinite(epsilon)
    changes = [f"privacy.epsilon={epsilon}", *PRIVATE] if private else []
    if method == JOINT:
        changes += ["continual.method=sequential", "continual.stream=[]"]
    elif method == "analytic":
        settings = [setting for setting in settings if not setting.startswith("rounds=")]
        tasks = len(load_plan(path).continual.stream)
        changes += ["continual.method=analytic", "model.adapter={kind: head}", f"rounds={tasks}", "aggregation.average_last=1"]
        changes.append("transfer.downlink.codec=none")
        changes += ["local.steps=1", "privacy.sample_rate=1.0"] if private else []
    else:
        changes.append(f"continual.method={method}")
    return load_plan(path, [*changes, *settings])


def _run(plan: Plan, scenario: str, out: Path) -> dict[str, Any]:
    result = run_kept(plan, out)
    final, told = result.final or {}, result.continual
    return {
        "acc": told.acc if told else _acc_of_joint(plan, scenario, out),
        "bwt": told and told.bwt,
        "fwt": told and told.fwt,
        "forgetting": told and told.forgetting,
        "routed": final.get("routed"),
        "task_known": final.get("accuracy_task_known"),
        "max_epsilon": result.privacy.max_epsilon,
        "uplink_bytes": result.transfer.uplink_bytes,
        "seconds": result.seconds,
    }


def _acc_of_joint(plan: Plan, scenario: str, out: Path) -> float:
    """The mean over the stream's tasks of a model that was trained on all at once."""
    from lichen.coordinator.app import OwnData
    from lichen.coordinator.run_directory import RunDirectory

    state = RunDirectory(out, plan).load_state()
    if state is None:
        raise LichenError(Code.NO_MODEL, "no checkpoint", where=str(out))
    # but for the stream the plan is the same, and so is the model
    stream = load_plan(find_plan(scenario)).continual.stream
    asked = plan.model_copy(update={"continual": plan.continual.model_copy(update={"stream": stream})})
    own = OwnData(asked, None, out / "simulation" / "test.parquet")
    count = plan.aggregation.average_last
    model = {name: tensor / count for name, tensor in state.average.items()} if count > 1 else state.model
    scores = own.test_by_task(model, stages(asked)[-1]).values()
    return statistics.fmean(float(metrics["accuracy"] or 0) for metrics in scores if metrics)


def data_of(scenario: str, folder: Path, *, full: bool, validation: bool) -> list[str]:
    """Settings by which a plan of the scenario has a part of its data, which is written to a folder."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lichen.simulations.datasets import hold_out, load_named

    if full and not validation:
        return []
    plan = load_plan(find_plan(scenario))
    found = load_named(str(plan.simulation.data))
    train, test = found.train, found.test
    label = plan.task.label_field
    if validation:
        if test is None:
            train = [train[row] for row in hold_out(train, plan.evaluation.test_fraction, label=label)[0]]
        # not the draw of a run's own validation split
        kept, held = hold_out(train, VALIDATION, VALIDATION_SEED, label=label)
        train, test = [train[row] for row in kept], [train[row] for row in held]
    source = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, count in zip(("path", "test"), (train, test), SHORT_ROWS, strict=True):
        if rows:
            chosen = rows if full else [rows[row] for row in np.random.default_rng(0).permutation(len(rows))[:count]]
            source[name] = str(folder / f"{scenario}-{'validation-' if validation else ''}{name}.parquet")
            pq.write_table(pa.Table.from_pylist(chosen), source[name])
    return [f"simulation.data={json.dumps(source)}", *(["evaluation.test_fraction=0"] if validation else [])]


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of each method at each ε, with the spread of ACC."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for found in runs:
        groups.setdefault((found["epsilon"], found["method"]), []).append(found)
    return [
        {"method": method, "epsilon": epsilon, "seeds": len(group)}
        | {
            key: statistics.mean(found[key] for found in group) if all(found[key] is not None for found in group) else None
            for key in ("acc", "bwt", "fwt", "forgetting", "routed", "task_known", "max_epsilon", "uplink_bytes", "seconds")
        }
        | {"least": min(found["acc"] for found in group), "most": max(found["acc"] for found in group)}
        for (epsilon, method), group in groups.items()
    ]


def figures(means: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the means say of `AIMS`, as far as they have it: each method is held against runs of the same ε, or against itself without."""
    clean = {row["method"]: row for row in means if math.isinf(row["epsilon"])}
    found: dict[str, float] = {}
    kept = {method: row for method, row in clean.items() if method not in {JOINT, "sequential"}}
    if not kept or not {JOINT, "sequential"} <= clean.keys():
        return found
    floor, gap = clean["sequential"]["acc"], clean[JOINT]["acc"] - clean["sequential"]["acc"]
    found["gap"] = (max(row["acc"] for row in kept.values()) - floor) / gap
    if steady := [row["acc"] for row in kept.values() if row["bwt"] >= STEADY]:
        found["below joint"] = clean[JOINT]["acc"] - max(steady)
    storeless = [row for row in kept.values() if row["method"] not in STORES]
    if not storeless:
        return found
    best = max(storeless, key=lambda row: float(row["acc"]))
    found["gap without stored examples"] = (best["acc"] - floor) / gap
    found["forgetting"] = best["forgetting"] / clean["sequential"]["forgetting"]
    if "adapters" in kept:
        found["routed"] = kept["adapters"]["routed"]
    private = [kept[row["method"]]["acc"] - row["acc"] for row in means if row["epsilon"] == 8 and row["method"] == best["method"]]
    return found | ({"private loss": private[0]} if private else {})
