"""`lichen simulate`: a plan's whole federation on this machine."""

from __future__ import annotations

import json
import threading
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lichen.common.device import AUTO, HELP, VARIABLE, choose
from lichen.common.plan import Plan, find_plan, load_plan

if TYPE_CHECKING:
    from lichen.common.result import Result

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


class Engine(Enum):
    """What runs the clients."""

    INPROCESS = "inprocess"
    RAY = "ray"


@app.command()
def simulate(
    plan: Annotated[str, typer.Argument(help="A plan file, or the name of a scenario that lichen brings, such as r8.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The run directory to write.", show_default=False)],
    clients: Annotated[int | None, typer.Option(help="Simulated clients; sets simulation.clients.")] = None,
    partition: Annotated[str | None, typer.Option(help="iid, dirichlet:ALPHA or by:FIELD; sets simulation.partition.")] = None,
    engine: Annotated[Engine, typer.Option(help="In this process, or on Flower's Ray (the extra `ray`).")] = Engine.INPROCESS,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Replace a key of the plan.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that train clients side by side; by default one a core (in-process, on the CPU only)."),
    ] = None,
    device: Annotated[str, typer.Option(envvar=VARIABLE, help=f"Where to compute: {HELP} Ray's clients take no GPU unasked.")] = AUTO,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print result.json at the end.")] = False,
) -> None:
    """Run a plan on this machine. Example: lichen simulate r8 --out runs/r8 --set privacy.epsilon=2."""
    from lichen.common.privacy.statement import bound_text
    from lichen.common.result import metric_title
    from lichen.coordinator.run_directory import open_for

    overrides = list(settings or ())
    if clients is not None:
        overrides.append(f"simulation.clients={clients}")
    if partition is not None:
        overrides.append(f"simulation.partition={json.dumps(partition)}")
    found = load_plan(find_plan(plan), overrides)
    open_for(out, resume=resume, plan=found)  # before the rounds of another run are shown as this one's
    choose("cpu" if engine is Engine.RAY and device == AUTO else device)
    result = run_shown(found, out, engine.value, Console(stderr=as_json), resume=resume, workers=workers)
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
        return
    final: dict[str, Any] = result.final or {}
    told = ", ".join(f"{metric_title(name)} {value:.4f}" for name, value in final.items() if isinstance(value, float))
    typer.echo(f"{final.get('split', 'no split')}: {told}" if final else "no evaluation data, so no score")
    if result.continual and (withheld := result.continual.not_given_out()):
        typer.echo(withheld)
    if result.privacy.unit == "none":
        typer.echo("no differential privacy (privacy.unit: none): updates and model may reveal rows")
    elif result.privacy.max_epsilon is not None:
        typer.echo(
            f"ε ≤ {bound_text(result.privacy.max_epsilon)} for each client at δ = {result.privacy.delta:g}, noise {result.privacy.noise}"
        )
    typer.echo(f"model and report: {out}/model, {out}/report.html")


def run_shown(plan: Plan, out: Path, engine: str, console: Console, *, resume: bool, workers: int | None = None) -> Result:
    """Run, and show the rounds as they end."""
    from lichen.coordinator.watch import follow
    from lichen.simulations.simulate import run

    done, now = threading.Event(), {"within": ""}

    def tell(kind: str, number: int, asked: int) -> None:
        now["within"] = f"{number} of {asked} clients done ({kind})" if number < asked else ""

    shown = {"stop": done, "console": console, "within": lambda: now["within"]}
    watcher = threading.Thread(target=follow, args=(out,), kwargs=shown, daemon=True)
    watcher.start()
    try:
        return run(plan, out, engine, resume=resume, progress=tell, workers=workers)
    finally:
        done.set()
        watcher.join(timeout=10)
