"""`lichen audit`: try to refute a finished run's ε, by its canaries, and by a membership attack on its rows."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import typer
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, digest_of, load_plan, text_of
from lichen.common.privacy.statement import make_statement, unit_in_words
from lichen.common.result import read_result, write_atomically
from lichen.coordinator.pages import epsilon as upper

if TYPE_CHECKING:
    from lichen.common.tasks import Workbench
    from lichen.common.tasks.task import Encoded
    from lichen.coordinator.charts import Chart

ROWS = 2000
"""Most rows of each kind that the membership attack looks at, about."""
BINS = 30
FALSIFIER = (
    "An audit can show that a claim is false. It cannot show that it is true: a leak that it does not find may be there all the same."
)

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Guessed(_Section):
    """What one number of guesses proves."""

    guesses: int
    correct: int
    epsilon: float
    """Lower bound on ε."""


class Membership(_Section):
    """The loss-threshold attack of Yeom et al. 2018."""

    members: int
    """Training rows looked at."""
    others: int
    """Rows looked at that were not trained on."""
    auc: float
    auc_interval: tuple[float, float]
    tpr_at_1_percent_fpr: float
    tpr_interval: tuple[float, float]


class Audit(_Section):
    """The document `audit.json`."""

    format: Literal[1] = 1
    run_id: str
    plan_sha256: str
    confidence: float
    """Of the lower bound, and of each interval."""
    unit: str
    """What the claim protects, in words."""
    claimed_epsilon: float | None
    """Upper bound that the run tells of; null where it protects nothing."""
    delta: float | None
    canaries: int
    """Over all clients whose homes were there."""
    clients: int
    guesses: list[Guessed] = Field(default_factory=list)
    epsilon_at_least: float | None = None
    """The largest of the guesses' bounds (Steinke et al. 2023); null without canaries."""
    refuted: bool = False
    """Whether the lower bound is above the claimed ε."""
    membership: Membership | None = None
    note: str = FALSIFIER


@dataclass(frozen=True)
class _Scored:
    """What the audit's figures are made of."""

    scores: np.ndarray
    included: np.ndarray
    curve: tuple[tuple[float, float], ...]


def run_audit(directory: Path, homes: list[Path], confidence: float = 0.95) -> Audit:
    """Audit a finished run, and write `audit.json` and `audit.html` beside its plan.

    Args:
        directory: a run directory, or what `lichen client model` fetched.
        homes: node homes that took part; empty: those of a simulation's run directory.
        confidence: of the lower bound on ε.

    Raises:
        LichenError: OUTPUT_UNUSABLE, NO_MODEL, DATA_NOT_FOUND if there is no home to audit by; PRIVACY_HISTORY, DATA_…, MODEL_…
    """
    from lichen.common.model.export import load_saved
    from lichen.common.privacy.audit import audit_canaries, membership
    from lichen.common.tasks import workbench

    if not (directory / "plan.yaml").is_file():
        raise LichenError(Code.OUTPUT_UNUSABLE, "no run directory", where=str(directory), fix="Give the directory of a run that ended.")
    plan = load_plan(directory / "plan.yaml")
    run_id, claimed = _claim(directory, plan)
    if not (directory / "model").is_dir():
        raise LichenError(Code.NO_MODEL, "this run has no model: only a run that ended can be audited", where=str(directory))
    homes = homes or sorted((directory / "simulation").glob("client-*"))
    if not homes:
        fix = "Give the homes of nodes that took part: --home DIR. Only their owners have them."
        raise LichenError(Code.DATA_NOT_FOUND, "no node home to audit by", where=str(directory), fix=fix)
    bench = workbench(plan.at_precision("float32"))
    bench.model.load(bench.start)
    canaries, included, clients = _canaries(plan, run_id, homes, bench)
    before = [_losses(plan, bench, rows) for rows in canaries]
    load_saved(directory / "model", bench.model)
    scores = np.concatenate([old - _losses(plan, bench, rows) for old, rows in zip(before, canaries, strict=True)] or [np.zeros(0)])
    truth = np.concatenate(included or [np.zeros(0, dtype=bool)])
    found = Audit(
        run_id=run_id,
        plan_sha256=digest_of(text_of(directory / "plan.yaml")),
        confidence=confidence,
        unit=unit_in_words(plan),
        claimed_epsilon=claimed,
        delta=plan.privacy.delta if plan.private else None,
        canaries=len(scores),
        clients=clients,
    )
    if len(scores) > 1:
        guesses = audit_canaries(scores.tolist(), truth.tolist(), found.delta or 0.0, confidence)
        found.guesses = [Guessed(**guess._asdict()) for guess in guesses]
        found.epsilon_at_least = max(guess.epsilon for guess in guesses)
        found.refuted = claimed is not None and found.epsilon_at_least > claimed
    curve: tuple[tuple[float, float], ...] = ()
    members, others = _rows(plan, homes, directory, bench)
    if members is not None and others is not None:
        attack = membership(_losses(plan, bench, members).tolist(), _losses(plan, bench, others).tolist(), confidence)
        curve = attack.curve
        found.membership = Membership(
            members=attack.members,
            others=attack.others,
            auc=attack.auc,
            auc_interval=attack.auc_interval,
            tpr_at_1_percent_fpr=attack.tpr,
            tpr_interval=attack.tpr_interval,
        )
    write_atomically(directory / "audit.json", found.model_dump_json(indent=2) + "\n")
    _write_page(directory, plan, found, _Scored(scores, truth, curve))
    return found


def _claim(directory: Path, plan: Plan) -> tuple[str, float | None]:
    """The run's id and the ε that it claims; of a fetched model the plan's, which no client's ledger lets it pass."""
    if not (directory / "result.json").exists():
        return directory.resolve().name, plan.privacy.epsilon if plan.private else None
    result = read_result(directory)
    worst = make_statement(plan, result).worst
    return result.run_id, worst.epsilon if worst else None


def _canaries(plan: Plan, run_id: str, homes: list[Path], bench: Workbench) -> tuple[list[Encoded], list[np.ndarray], int]:
    """Each home's canaries and which of them were in; a home that this run never reached has none."""
    from lichen.client import canaries

    encoded: list[Encoded] = []
    included: list[np.ndarray] = []
    for home in homes:
        kept = canaries.read(home, run_id)
        if kept is None:
            continue
        encoded.append(bench.task.made_up(kept.count, canaries.key(plan, kept.client)))
        included.append(np.isin(np.arange(kept.count), kept.included))
    if plan.privacy.audit.canaries and not encoded:
        raise LichenError(
            Code.DATA_NOT_FOUND,
            f"no home has canaries of run {run_id}",
            where=", ".join(map(str, homes)),
            fix="Give the homes of nodes that took part in this run: --home DIR.",
        )
    return encoded, included, len(encoded)


def _rows(plan: Plan, homes: list[Path], directory: Path, bench: Workbench) -> tuple[Encoded | None, Encoded | None]:
    """Training rows and rows that were never trained on: the homes' hold-outs, and a simulation's validation and test rows."""
    import pyarrow.parquet as pq

    from lichen.client.data import load

    fields = bench.task.fields
    train: dict[str, list[object]] = {field: [] for field in fields}
    held_out: dict[str, list[object]] = {field: [] for field in fields}
    for home in homes:
        for split in ("train", "holdout"):
            data = load(home, split, fields, lenient=plan.private)
            rows = zip(*map(data.column, fields), strict=True)
            usable = [row for row in rows if bench.task.fault(dict(zip(fields, row, strict=True))) is None]
            for field, values in zip(fields, zip(*usable, strict=True), strict=False):
                (train if split == "train" else held_out)[field] += values
    for name in ("validation", "test"):
        if (path := directory / "simulation" / f"{name}.parquet").exists():
            table = pq.read_table(path)
            for field in fields:
                held_out[field] += table.column(field).to_pylist()
    counts = [Counter(columns[plan.task.label_field]) for columns in (train, held_out)]
    # of each label as many of both: where a client's labels are skewed, a label's loss would else pass for membership
    alike = {label: min(count, counts[1][label]) for label, count in counts[0].items() if counts[1][label]}
    share = min(1.0, ROWS / max(1, sum(alike.values())))
    take = {label: max(1, round(share * count)) for label, count in alike.items()}
    return _some(train, take, plan, bench), _some(held_out, take, plan, bench)


def _some(columns: dict[str, list[object]], take: Mapping[object, int], plan: Plan, bench: Workbench) -> Encoded | None:
    """Of each label as many rows as ``take`` says, encoded; None of no rows."""
    of_label: dict[object, list[int]] = defaultdict(list)
    for index, label in enumerate(columns[plan.task.label_field]):
        of_label[label].append(index)
    draw = random.Random(0)  # noqa: S311 - which rows are looked at is no secret
    picked = sorted(index for label, count in take.items() for index in draw.sample(of_label[label], count))
    if not picked:
        return None
    rows: Encoded = bench.task.encode({field: [values[index] for index in picked] for field, values in columns.items()})
    return rows


def _losses(plan: Plan, bench: Workbench, rows: Encoded) -> np.ndarray:
    """The loss of each row, shape (N,), float64."""
    import torch

    network = bench.model.network
    order = np.argsort(rows.lengths, kind="stable").tolist()
    losses = np.zeros(len(order))
    network.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), plan.evaluation.batch_size):
                part = order[start : start + plan.evaluation.batch_size]
                losses[part] = bench.task.losses(network, bench.task.collate(rows, part)).cpu().double().numpy()
    finally:
        network.train()
    return losses


# --- the page ----------------------------------------------------------------------------------------------------------------


def _write_page(directory: Path, plan: Plan, found: Audit, scored: _Scored) -> None:
    from lichen.coordinator.pages import write_page

    write_page(
        directory / "audit.html", "audit_template.html", plan=plan, found=found, words=in_words(found), charts=_charts(found, scored)
    )


def _charts(found: Audit, scored: _Scored) -> list[Chart]:
    from lichen.coordinator.charts import chart

    claimed = None if found.claimed_epsilon is None else (found.claimed_epsilon, f"claimed: ε ≤ {upper(found.claimed_epsilon)}")
    proven = sorted((float(guess.guesses), guess.epsilon) for guess in found.guesses)
    title = "ε at least, by number of guesses"
    drawn = [
        chart(title, {"lower bound": proven}, "{:.3f}".format, from_zero=True, limit=claimed, axis="guesses"),
    ]
    if len(scored.scores):
        low, high = np.quantile(scored.scores, [0.005, 0.995]).tolist()
        edges = np.linspace(low, high, BINS + 1)
        middles = ((edges[1:] + edges[:-1]) / 2).tolist()
        shares = {
            label: np.histogram(scored.scores[which], edges)[0] / max(1, int(which.sum()))
            for label, which in (("trained on", scored.included), ("left out", ~scored.included))
        }
        series = {label: list(zip(middles, share.tolist(), strict=True)) for label, share in shares.items()}
        title = "Canaries: share by score (loss before less loss after)"
        drawn.append(chart(title, series, "{:.3f}".format, from_zero=True, axis="score", whole=False))
    if scored.curve:
        lines = {"attack": list(scored.curve)}
        if found.claimed_epsilon is not None:
            most = [(rate, _ceiling(rate, found.claimed_epsilon, found.delta or 0.0)) for rate, _ in scored.curve]
            lines["at most, if the claim holds"] = most
        title = "Membership: training rows found, of all"
        drawn.append(chart(title, lines, "{:.3f}".format, from_zero=True, axis="share of other rows taken for training rows", whole=False))
    return [one for one in drawn if one]


def _ceiling(rate: float, epsilon: float, delta: float) -> float:
    """The largest true positive rate at a false positive rate under (ε, δ) (Kairouz et al. 2015, Theorem 2.1)."""
    return min(1.0, math.exp(min(epsilon, 700)) * rate + delta, 1 - math.exp(-epsilon) * (1 - delta - rate))


def in_words(found: Audit) -> list[str]:
    """What was found, a sentence each."""
    told = []
    sure = f"{100 * found.confidence:g} %"
    if found.epsilon_at_least is None:
        told.append("There are fewer than two canaries (the plan's privacy.audit.canaries), so there is no lower bound on ε.")
    else:
        told.append(
            f"With {sure} confidence ε ≥ {found.epsilon_at_least:.3f}"
            + (f" at δ = {found.delta:g}" if found.delta else "")
            + f", from {found.canaries:,} canaries of {found.clients:,} client(s): the best of {len(found.guesses)} numbers of guesses."
        )
        if found.claimed_epsilon is None:
            told.append("The run claims no privacy.")
        elif found.refuted:
            told.append(f"Refuted: the run claims ε ≤ {upper(found.claimed_epsilon)} for {found.unit}.")
        else:
            told.append(f"Not refuted: the run claims ε ≤ {upper(found.claimed_epsilon)} for {found.unit}.")
    if (attack := found.membership) is not None:
        low, high = attack.auc_interval
        least, most = attack.tpr_interval
        told.append(
            f"Membership attack on {attack.members:,} training rows and {attack.others:,} others of the same labels: AUC {attack.auc:.3f} "
            f"({sure}: {low:.3f} to {high:.3f}), training rows found at 1 % false alarms {attack.tpr_at_1_percent_fpr:.3f} "
            f"({least:.3f} to {most:.3f}). A coin has .5 and .01."
        )
    return [*told, found.note]


# --- the command -------------------------------------------------------------------------------------------------------------


@app.command()
def audit(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory of a run that ended.", show_default=False)],
    homes: Annotated[list[Path] | None, typer.Option("--home", help="A node's home that took part; by default a simulation's.")] = None,
    confidence: Annotated[float, typer.Option(help="Of the lower bound on ε.", min=0.5, max=0.9999)] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print audit.json.")] = False,
) -> None:
    """Try to refute a finished run's ε: canaries and a membership attack. Example: lichen audit runs/r8."""
    with Console(stderr=True).status("scoring canaries and rows"):
        found = run_audit(directory, list(homes or ()), confidence)
    if as_json:
        typer.echo(json.dumps(found.model_dump(mode="json"), indent=2, ensure_ascii=False))
    else:
        for sentence in in_words(found):
            typer.echo(sentence)
        typer.echo(f"wrote {directory / 'audit.json'} and {directory / 'audit.html'}")
    if found.refuted:
        raise LichenError(
            Code.PRIVACY_REFUTED,
            " ".join(in_words(found)[:2]),
            where=str(directory),
            fix="Don't release this model.",
        )
