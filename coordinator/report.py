"""`report.html`: one self-contained page on a run for a reader who was not there; and `lichen report`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lichen.common.continual.measures import measures
from lichen.common.errors import Code
from lichen.common.plan import Plan, load_plan
from lichen.common.privacy.schedule import sample_rate
from lichen.common.privacy.statement import in_words, make_statement
from lichen.common.result import Result, Round, metric_title, read_result, schema
from lichen.coordinator import charts
from lichen.coordinator.pages import NONE, duration, epsilon, metric, size, write_page

ROWS = 100
"""Longest table; the rest is in the run directory."""
NAMED = 5
"""Failed clients that a row of the table names."""
SEEDED = "Noise was seeded so that the run repeats: these weights are not private."
STATUS = {
    "running": "The run had not ended when this page was written, or it was cut off. It can go on from its last checkpoint.",
    "finished": "All rounds were run.",
    "failed": "The run failed before its end. What was finished is below.",
    "stopped": "The run was stopped before its end. What was finished is below.",
}

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


def write_report(directory: Path) -> Path:
    """Write `report.html` from a run directory's `result.json` and `plan.yaml`.

    Returns:
        Where it lies.

    Raises:
        LichenError: OUTPUT_UNUSABLE, if there is no readable result, or the page can't be written; as `load_plan` raises.
    """
    result, plan = read_result(directory), load_plan(directory / "plan.yaml")
    statement = make_statement(plan, result)
    clients = sorted(result.privacy.clients.items(), key=lambda found: -found[1].epsilon)[:ROWS]
    written = directory / "report.html"
    write_page(
        written,
        "report_template.html",
        result=result,
        plan=plan,
        private=plan.private,
        status=STATUS[result.status],
        scores=scores(result),
        statement=statement,
        words=[part for part in in_words(statement, ROWS) if part[0] in {"What leaves a node", "Assumed", "Not protected"}],
        seeded=SEEDED if result.privacy.noise == "seeded: not private" else None,
        facts=_facts(result, plan),
        charts=_charts(result, plan),
        heat=_heat(result),
        held_back=list(result.continual.held_back.items())[-ROWS:] if result.continual else [],
        rounds=result.rounds[-ROWS:],
        shows_cohort=not plan.central,
        metrics={kind: _keys(getattr(told, kind) for told in result.rounds) for kind in ("validation", "federated")},
        shows_loss=any(told.train_loss is not None for told in result.rounds),
        failures=_failures,
        errors=_errors(result.rounds),
        clients=sorted(clients),
        snippet=_snippet(directory / "model" / "README.md"),
        has_model=(directory / "model").is_dir(),
        at=datetime.fromtimestamp((directory / "result.json").stat().st_mtime, UTC),
    )
    return written


def scores(result: Result) -> tuple[str, dict[str, Any]]:
    """What was scored and its metrics: the final model or, before there is one, the newest round that has a validation."""
    if result.final is not None:
        return f"{result.final.get('split')} split, final model", {key: value for key, value in result.final.items() if key != "split"}
    for told in reversed(result.rounds):
        if told.validation:
            return f"validation split, round {told.round}", dict(told.validation)
    return "not scored", {}


# --- parts of the page ---


def _facts(result: Result, plan: Plan) -> dict[str, str]:
    adapter = plan.model.adapter
    simulated = result.engine in {"inprocess", "ray"}
    targets = ", ".join(adapter.targets) or "query and value projections"
    kinds = {
        "lora": f"LoRA, rank {adapter.rank}, α {adapter.alpha:g}, on {targets}; and the head",
        "full": "none: every weight is trained",
        "head": "none: the head alone is trained, on a frozen base",
    }
    length, what = (plan.local.steps, "step") if plan.local.steps else (plan.local.epochs or 0, "epoch")
    local = f"{length:g} {what}{'s' if length != 1 else ''} of {plan.local.optimizer}"
    sampled = plan.private and plan.privacy.sample_rate is not None
    batch = f"sample rate {plan.privacy.sample_rate:g}" if sampled else f"batch {plan.local.batch_size}"
    clients = f"{plan.cohort.size} asked in each round, at least {plan.cohort.minimum} needed"
    if plan.central:
        clients = f"each of {plan.cohort.population} in a round with chance {sample_rate(plan):g}, drawn in secret"
    if simulated:
        clients = f"{plan.simulation.clients} simulated ({plan.simulation.partition}); {clients}"
    return {
        "Name": plan.name,
        "Run": result.run_id,
        "Status": f"{result.status}, {len(result.rounds):,} of {plan.rounds:,} rounds"
        + (f" in {duration(result.seconds)}" if result.seconds is not None else ""),
        "Engine": {"inprocess": "simulation in one process", "ray": "simulation on Ray", "flower": "stock Flower"}.get(
            result.engine, "coordinator and agents over mutual TLS"
        ),
        "Task": plan.task.kind + (f", {len(plan.task.labels):,} labels" if plan.task.labels else ""),
        "Base model": plan.model.base + (f" at {plan.model.revision}" if plan.model.revision else ""),
        "Adapter": kinds[adapter.kind],
        "Trained parameters": NONE if result.parameters is None else f"{result.parameters:,}",
        "Clients": clients,
        "In a round": f"{local}, {batch}, learning rate {plan.local.learning_rate:g}",
        "Aggregation": f"{plan.aggregation.rule}, server optimizer {plan.aggregation.optimizer}",
        "Seed": str(result.seed),
        "Plan (SHA-256)": result.plan_sha256,
        "Versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
    }


def _charts(result: Result, plan: Plan) -> list[charts.Chart]:
    rounds = result.rounds

    def of(kind: str, key: str) -> list[tuple[int, float]]:
        return [(told.round, found[key]) for told in rounds if (found := getattr(told, kind)) and found.get(key) is not None]

    def told(key: str) -> list[tuple[int, float]]:
        return [(told.round, value) for told in rounds if (value := getattr(told, key)) is not None]

    def summed(key: str) -> list[tuple[int, float]]:
        return list(zip((told.round for told in rounds), accumulate(getattr(told, key) for told in rounds), strict=True))

    def rates(kind: str) -> dict[str, list[tuple[int, float]]]:
        return {metric_title(key): of(kind, key) for key in ("accuracy", "macro_f1") if plan.task.labels or key == "accuracy"}

    budget = (plan.privacy.epsilon, f"the plan's ε = {plan.privacy.epsilon:g}") if plan.private else None
    drawn = [
        charts.chart("Validation: accuracy and macro-F1", rates("validation"), metric),
        charts.chart("Clients' hold-outs: accuracy and macro-F1", rates("federated"), metric),
        charts.chart("Loss", {"training, mean over clients": told("train_loss"), "validation": of("validation", "loss")}, metric),
        charts.chart("ε so far", {"largest client, by its reports": told("epsilon")}, epsilon, from_zero=True, limit=budget),
    ]
    if not plan.central:
        sums = {"up, from clients": summed("uplink_bytes"), "down, to clients": summed("downlink_bytes")}
        drawn.append(charts.chart("Bytes so far, all clients", sums, size, tick=size, from_zero=True))
    if result.continual:
        matrix = list(enumerate(result.continual.matrix, 1))
        means = [(number, measures([row for _, row in matrix[:number]]).acc) for number, _ in matrix]
        learned = [(number, row[number - 1]) for number, row in matrix]
        series = {"mean over tasks so far": means, "the task just learned": learned}
        known = {label: [(x, y) for x, y in points if y is not None] for label, points in series.items()}
        drawn.append(charts.chart("Accuracy after each task", known, metric, axis="task"))
    return [found for found in drawn if found]


def _heat(result: Result) -> list[tuple[str, list[tuple[float | None, int]]]]:
    """R by row: after which task, and each score with how much of a colour it has, in percent."""
    if (told := result.continual) is None:
        return []
    rows = [("the start", told.start), *zip(told.tasks, told.matrix, strict=False)]
    return [(name, [(value, round(60 * (value or 0))) for value in row]) for name, row in rows if row]


def _keys(found: Iterable[dict[str, float] | None]) -> list[str]:
    return list(dict.fromkeys(key for metrics in found if metrics for key in metrics))


def _failures(told: Round) -> str:
    named = [f"{name} ({'no answer' if number is None else number})" for name, number in list(told.errors.items())[:NAMED]]
    if (more := len(told.errors) - NAMED) > 0:
        named.append(f"and {more:,} more")
    return ", ".join(named)


def _errors(rounds: list[Round]) -> list[tuple[str, int]]:
    """Each error of any client, in words, and how often it was met."""
    names = {int(code): code.name.lower().replace("_", "-") for code in Code}
    counts = Counter(number for told in rounds for number in told.errors.values())
    return [
        ("no answer within the deadline" if number is None else f"error {number} ({names.get(number, 'of another version')})", times)
        for number, times in counts.most_common()
    ]


def _snippet(card: Path) -> str | None:
    """The Python code of a model card."""
    try:
        found = re.search(r"^```python\n(.*?)^```", card.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return found[1] if found else None


# --- the command ---


@app.command()
def report(
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="The run directory.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print result.json, and write nothing.")] = False,
    as_schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of result.json; needs no DIR.")] = False,
) -> None:
    """Show what a run did, and write its report.html again. Example: lichen report lichen-demo."""
    if as_schema:
        typer.echo(schema())
        return
    if directory is None:
        raise typer.BadParameter("give a run directory", param_hint="DIR")
    result = read_result(directory)
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
        return
    written = write_report(directory)
    _print(result, load_plan(directory / "plan.yaml"))
    typer.echo(f"\nwrote {written}")


def _print(result: Result, plan: Plan) -> None:
    facts = _facts(result, plan)
    where, found = scores(result)
    table = Table.grid(padding=(0, 2))
    rows = {key: facts[key] for key in ("Name", "Status", "Engine", "Base model", "Adapter", "Clients", "Plan (SHA-256)")}
    told = ", ".join(f"{metric_title(key)} {metric(value)}" for key, value in found.items())
    rows["Scores"] = f"{where}: {told}" if told else where
    statement = make_statement(plan, result)
    rows["Privacy"] = statement.summary
    if statement.worst:
        rows["ε, every client" if plan.central else "ε, largest client"] = epsilon(statement.worst.epsilon)
    if result.privacy.noise == "seeded: not private":
        rows["Not private"] = SEEDED
    transfer = result.transfer
    bits = "" if transfer.bits_per_parameter is None else f", {transfer.bits_per_parameter:.3g} bits a parameter up"
    if not plan.central:
        rows["Bytes"] = f"up {size(transfer.uplink_bytes)}, down {size(transfer.downlink_bytes)}{bits}"
    if tasks := result.continual:
        told = f"ACC {metric(tasks.acc)}, BWT {metric(tasks.bwt)}, FWT {metric(tasks.fwt)}, forgetting {metric(tasks.forgetting)}"
        rows["Tasks"] = told if tasks.split else "not scored, so what was forgotten is not known"
        if tasks.given_out:
            rows["Given out"] = tasks.given_out
        for version, why in list(tasks.held_back.items())[-ROWS:]:
            rows[f"Held back: {version}"] = why
    if errors := _errors(result.rounds):
        rows["Failures"] = ", ".join(f"{what} × {times:,}" for what, times in errors)
    if result.error:
        rows["Error"] = result.error
    for key, value in rows.items():
        table.add_row(Text(key, style="bold"), _plain(value))
    console = Console()
    console.print(table)
    for heading, sentences in in_words(statement)[1:]:
        console.print("\n", Text(heading, style="bold"), sep="")
        for sentence in sentences:
            console.print(Padding(_plain(f"- {sentence}"), (0, 2)))


def _plain(value: str) -> Text:
    # names and errors come from others: no markup, and no character that steers a terminal
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in value), overflow="fold")
