"""`lichen plan`: make, check and explain plans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from lichen.common.errors import Code, LichenError
from lichen.common.plan import find_plan, load_plan, parse_plan, schema

if TYPE_CHECKING:
    from lichen.common.fitting import Fit
    from lichen.common.hardware import Profile
    from lichen.common.plan import Plan

app = typer.Typer(help="Make and check plans.", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

TEMPLATE = """\
# A federation of lichen. `lichen plan schema` describes every key, `lichen plan show FILE` fills in the defaults.
name: {name}
seed: 0
rounds: 20

task:
  kind: text-classification
  labels: [negative, positive]   # the class names, in the order of the model's outputs
  # a few public words on each label, from which the head starts; never take them from private rows
  label_descriptions: {{negative: "bad, disappointing", positive: "good, excellent"}}
  max_length: 128

model:
  base: sentence-transformers/all-MiniLM-L6-v2   # a hub name, a local path, or package:DISTRIBUTION/PATH
  adapter: {{kind: head}}   # head, lora or full; under privacy, the fewer weights, the less noise (docs/experiments.md)
  head: {{pooling: mean, init: label-descriptions, scale: 7}}

cohort: {{size: 4, minimum: 2, deadline_s: 600}}

# SGD at a low clip did best under privacy; lower the rate as you lower ε. Without privacy: optimizer adamw, rates near 1.0e-3, epochs
local:
  steps: 2
  optimizer: sgd
  betas: [0.5, 0.999]
  learning_rate: 10
  head_learning_rate: 120

privacy:
  unit: example        # none, example, entity with unit_field, or client with noise: central
  epsilon: 8           # for each client, over all rounds
  delta: 1.0e-5        # below 1 / (number of units)
  clip: 0.1
  sample_rate: 0.1     # each step draws each row with this chance

aggregation: {{average_last: 6}}   # the final model is the mean of the last rounds' models

simulation: {{clients: 4, partition: "dirichlet:0.5", data: {{path: train.csv, fields: {{text: text, label: label}}}}}}
"""

PlanFile = Annotated[str, typer.Argument(help="A plan's file (YAML or JSON), or a scenario's name, such as r8.", show_default=False)]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Replace a key of the plan. May be repeated.")]


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="Where to write it.", show_default=False)],
    name: Annotated[str, typer.Option(help="The federation's name.")] = "federation",
) -> None:
    """Write a plan to start from. Example: lichen plan new plan.yaml."""
    text = TEMPLATE.format(name=name)
    parse_plan(yaml.safe_load(text), where="--name")
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise LichenError(Code.OUTPUT_EXISTS, "there is a file already", where=str(file), fix="Choose another name.") from None
    except OSError as error:
        raise LichenError(Code.OUTPUT_UNUSABLE, str(error), where=str(file)) from None
    typer.echo(f"wrote {file}; check it with: lichen plan validate {file}")


@app.command()
def validate(plan: PlanFile, settings: Settings = None) -> None:
    """Check a plan; say what is wrong with it, where, and what would be right. Example: lichen plan validate plan.yaml."""
    found = load_plan(find_plan(plan), settings or ())
    privacy = f"ε ≤ {found.privacy.epsilon:g} for one {found.privacy.unit}" if found.private else "no differential privacy"
    typer.echo(f"{plan}: valid; {found.name}, {found.rounds} rounds, {privacy}, sha256 {found.sha256()}")


@app.command("schema")
def schema_() -> None:
    """Print the plan's JSON schema, with a description of every key. Example: lichen plan schema > plan.schema.json."""
    typer.echo(json.dumps(schema(), indent=2, ensure_ascii=False))


@app.command()
def show(
    plan: PlanFile,
    settings: Settings = None,
    machine: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="PROFILE",
            help="Say what a node of this profile would be asked: a file of `lichen client profile --json`, or a tier.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As canonical JSON.")] = False,
) -> None:
    """Print a plan with all defaults filled in, or what of it one node would do. Example: lichen plan show r8 --for cpu-4gb."""
    found = load_plan(find_plan(plan), settings or ())
    if machine is not None:
        _explain(found, machine, as_json=as_json)
        return
    typer.echo(found.canonical_json() if as_json else found.to_yaml().rstrip())


def _explain(plan: Plan, machine: str, *, as_json: bool) -> None:
    """What a node of that profile would do of a plan, and why; raises CHECK_FAILED where it can't take part."""
    from dataclasses import asdict

    from lichen.common.fitting import fit
    from lichen.common.hardware import find_profile
    from lichen.common.model.memory import Shape
    from lichen.common.tasks import make_task

    profile = find_profile(machine)
    shape = Shape.of(make_task(plan).outline())
    payload = 4 * shape.trainable
    found = fit(plan, shape, profile, (payload, payload))
    if as_json:
        typer.echo(json.dumps({"profile": profile.model_dump(mode="json"), **asdict(found)}, indent=2))
    else:
        for key, told in _lines(plan, profile, found):
            typer.echo(f"{key:10} {told}")
    if not found.possible:
        raise LichenError(
            Code.CHECK_FAILED,
            "such a node can't take part: " + "; ".join(reason for reason in found.reasons if reason.startswith(("memory", "time"))),
            where=plan.name,
            fix="Let more vary in cohort.assign, ask for less in the plan (local, task.max_length, model), or raise cohort.deadline_s.",
        )


def _lines(plan: Plan, profile: Profile, found: Fit) -> Iterator[tuple[str, str]]:
    speed = f"{profile.tokens_per_s} tokens/s" if profile.tokens_per_s else "speed not measured"
    yield "machine", f"{profile.device}, {profile.memory_mb} MiB free, {profile.threads} threads, {speed}"
    may = ", ".join(plan.cohort.assign) or "nothing"
    yield "may vary", f"{may} (cohort.assign)"
    values = {
        "rank": plan.model.adapter.rank if plan.model.adapter.kind == "lora" else None,
        "max_length": plan.task.max_length,
        "max_physical_batch_size": plan.local.max_physical_batch_size,
        "steps": plan.local.steps or found.steps,
    }
    for name, value in (values | found.changes).items():
        if value is not None:
            yield "asked", f"{name} {value}" + (f", not {values[name]}" if name in found.changes and values[name] != value else "")
    whole = f"; the plan as it is takes {found.whole_mb:.0f}" if found.whole_mb != found.memory_mb else ""
    yield "memory", f"{found.memory_mb:.0f} MiB at its peak{whole}"
    if found.step_s is not None and found.steps is not None:
        yield (
            "time",
            f"{found.step_s * found.steps:.1f} s a round, {found.step_s:.2g} s a step; the deadline is {plan.cohort.deadline_s:g} s",
        )
    elif found.step_s is None:
        yield "time", "not known: this plan's training was not measured on such a machine"
    for reason in found.reasons:
        yield "because", reason
