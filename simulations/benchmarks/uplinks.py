"""`lichen bench transfer --r8`: what fewer bits cost on R8, and how many bytes it takes to learn it.

For each codec and rule: bytes both ways until the validation split is scored at a target, and the loss of test accuracy against 32-bit
floats, bounded by a paired bootstrap over test texts and seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lichen.common.plan import find_plan, load_plan
from lichen.simulations.benchmarks.answers import right_answers
from lichen.simulations.benchmarks.kept import run_kept
from lichen.simulations.benchmarks.paired_bootstrap import paired_bootstrap

if TYPE_CHECKING:
    import numpy as np

    from lichen.common.result import Result

CODECS = ("none", "eden-4", "eden-2", "eden-1")
"""Of updates; with `none` the model travels whole, too, as 32-bit floats."""
RULES = ("fedavg", "ffa", "rolora")
TARGET = 0.96
"""Validation accuracy that is to be reached."""
LOST = 0.01
"""Of accuracy: what EDEN at 4 bits may lose at most, with 95 % confidence."""


def bench_uplinks(
    scenario: str,
    seeds: Sequence[int],
    codecs: Sequence[str] = CODECS,
    rules: Sequence[str] = RULES,
    settings: Sequence[str] = (),
    keep: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Run R8 once for each rule, codec and seed, in-process.

    Args:
        scenario: `r8-no-privacy`, or `r8`.
        seeds: each changes the partition, the validation split and all draws.
        codecs: of `CODECS`.
        rules: of `RULES`.
        settings: ``key.path=value``, for all runs.
        keep: where to keep the run directories, see `run_kept`; nowhere if None.

    Yields:
        Of each run ``rule``, ``codec``, ``seed``, ``accuracy`` on the test split, ``up_bits`` (of an update, a parameter), ``to_target``
        (bytes up and down until validation is at `TARGET`, None if it never is) and ``rounds_to_target``. Then of each rule and codec the
        means over seeds, without ``seed``; with ``lost`` and ``at_most``, the loss of accuracy against ``none`` of the same rule and its
        one-sided 95 % bound, where that was run; with the ``target`` of that bound for `fedavg` by EDEN at 4 bits.
    """
    runs: list[dict[str, Any]] = []
    right: dict[tuple[str, str], list[np.ndarray]] = {}
    for rule in rules:
        for codec in codecs:
            for seed in seeds:
                plan = load_plan(find_plan(scenario), [f"seed={seed}", f"aggregation.rule={rule}", *_transfer(codec), *settings])
                with TemporaryDirectory(prefix="lichen-bench-") as temporary:
                    out = (keep or Path(temporary)) / f"{rule}-{codec}-{seed}"
                    result = run_kept(plan, out)
                    right.setdefault((rule, codec), []).append(right_answers(plan, out))
                row = {"rule": rule, "codec": codec, "seed": seed, "accuracy": (result.final or {})["accuracy"]}
                row |= {"up_bits": result.transfer.bits_per_parameter, **_to_target(result)}
                runs.append(row)
                yield row
    import numpy as np

    for (rule, codec), answers in right.items():
        group = [row for row in runs if (row["rule"], row["codec"]) == (rule, codec)]
        reached = [row["to_target"] for row in group]
        means: dict[str, Any] = {key: statistics.mean(row[key] for row in group) for key in ("accuracy", "up_bits")}
        means["to_target"] = statistics.mean(reached) if None not in reached else None
        if codec != "none" and (rule, "none") in right:
            lost = paired_bootstrap(np.stack(right[rule, "none"]), np.stack(answers))
            means |= {"lost": lost.mean, "at_most": lost.upper}
            if (rule, codec) == ("fedavg", "eden-4"):
                means["target"] = LOST
        yield {"rule": rule, "codec": codec, "seeds": len(group), **means}


def told(row: dict[str, Any]) -> str:
    """A row for people."""
    which = f"seed {row['seed']}" if "seed" in row else f"mean of {row['seeds']} seeds"
    reached = f"{row['to_target'] / 1e3:.0f} kB to {TARGET:g}" if row["to_target"] is not None else f"never at {TARGET:g}"
    line = (
        f"{row['rule']}, {row['codec']}, {which}: test accuracy {row['accuracy']:.4f}, {row['up_bits']:.2f} bits a parameter up, {reached}"
    )
    if row.get("rounds_to_target"):
        line += f" in round {row['rounds_to_target']}"
    if "lost" in row:
        aim = f", at most {row['target']:g} is wanted" if "target" in row else ""
        line += f"; lost {row['lost']:.4f}, with 95 % confidence at most {row['at_most']:.4f}{aim}"
    return line


def _transfer(codec: str) -> list[str]:
    name, _, bits = codec.partition("-")
    if name == "none":
        return ["transfer.uplink.codec=none", "transfer.downlink.codec=none"]
    return [f"transfer.uplink.codec={name}", f"transfer.uplink.bits={bits}"]


def _to_target(result: Result) -> dict[str, int | None]:
    sent = 0
    for told in result.rounds:
        sent += (told.uplink_bytes or 0) + (told.downlink_bytes or 0)
        if ((told.validation or {}).get("accuracy") or 0.0) >= TARGET:
            return {"to_target": sent, "rounds_to_target": told.round}
    return {"to_target": None, "rounds_to_target": None}
