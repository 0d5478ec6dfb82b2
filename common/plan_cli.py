"""`lichen plan`: make, check and explain plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
import yaml

from lichen.common.errors import Code, LichenError
from lichen.common.plan import find_plan, load_plan, parse_plan, schema

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
    plan: PlanFile, settings: Settings = None, as_json: Annotated[bool, typer.Option("--json", help="As canonical JSON.")] = False
) -> None:
    """Print a plan with all defaults filled in. Example: lichen plan show r8 --set rounds=10."""
    found = load_plan(find_plan(plan), settings or ())
    typer.echo(found.canonical_json() if as_json else found.to_yaml().rstrip())
