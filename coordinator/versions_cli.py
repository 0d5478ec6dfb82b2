"""The versions of a stream's model, for operators: `lichen coordinator versions`, `diff` and `rollback`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lichen.common.continual.stream import is_online
from lichen.common.plan import Plan, load_plan
from lichen.coordinator.cli_tools import DEFAULT_HOME, HomeOption, JsonOption, RunArgument, do, print_json, print_table
from lichen.coordinator.versions import Version, Versions, measured, scored_tasks

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

Number = Annotated[int, typer.Argument(min=0, help="A version's number; 0 is the model before the first round.", show_default=False)]
Made = Annotated[int | None, typer.Argument(metavar="VERSION", min=1, help="A version's number.", show_default=False)]


@app.command()
def versions(run: RunArgument, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """List the versions of a stream's model: where each came from, what it cost, how it scores.

    Example: lichen coordinator versions latest
    """
    found, directory = _versions(run, home)
    every = found.all()
    if as_json:
        print_json([version.model_dump(mode="json") for version in every])
        return
    tasks = _tasks(load_plan(directory / "plan.yaml"), every)
    given_out = found.given_out()
    print_table(
        ("version", "parent", "round", "ε", *tasks, ""),
        [
            (
                version.name,
                _told(version.parent),
                str(version.round),
                "–" if version.epsilon is None else f"{version.epsilon:.3f}",
                *(_score(version, task) for task in tasks),
                "given out" if version.name == given_out else version.held_back or _kept(found, version),
            )
            for version in every
        ],
    )


@app.command()
def diff(
    run: RunArgument,
    first: Number,
    second: Number,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """How two versions' scores differ, by task, on the coordinator's validation rows, or where it has none on the clients' hold-outs.

    Example: lichen coordinator diff latest 1 2
    """
    found, directory = _versions(run, home)
    by_number = {version.number: version for version in found.all()}
    for number in (first, second):
        if number not in by_number:
            found.find(number)  # which tells what there is
    before, after = by_number[first], by_number[second]
    tasks = _tasks(load_plan(directory / "plan.yaml"), [before, after])
    rows = {task: _pairs(before, after, task) for task in tasks}
    if as_json:
        print_json({task: {key: {"first": a, "second": b} for key, (a, b) in metrics.items()} for task, metrics in rows.items()})
        return
    if not any(rows.values()):
        typer.echo("nothing was scored: the coordinator has no validation rows, and the plan no evaluation.federated_every at a task's end")
        return
    print_table(
        ("task", "metric", before.name, after.name, "change"),
        [(task, key, _told(a), _told(b), _change(a, b)) for task, metrics in rows.items() for key, (a, b) in metrics.items()],
    )


@app.command()
def rollback(
    run: RunArgument,
    version: Made = None,
    newest: Annotated[bool, typer.Option("--newest", help="In place of VERSION: the newest that is not held back, as it was.")] = False,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Give out an earlier version, or one that was held back, also of a run that goes on: those after it, and yet to come, are held back.

    Nothing is deleted, and training goes on from the newest version all the same. To take it back: --newest, or name a later version.

    Example: lichen coordinator rollback latest 1
    """
    from lichen.coordinator.export import give_out

    if (version is None) != newest:
        raise typer.BadParameter("give a version, or --newest", param_hint="VERSION")
    run = do(home, "run", run=run)["run_id"]

    def is_over() -> bool:
        return do(home, "run", run=run)["status"] not in {"queued", "running"}

    found, directory = _versions(run, home)
    if not is_over():
        found.choose(version)
    if over := is_over():  # by now: it may have ended without a look at what was chosen
        give_out(directory, version)
    typer.echo(f"{found.current().name} is given out{'' if over else '; training goes on from the newest version'}")


def _versions(run: str, home: Path) -> tuple[Versions, Path]:
    """Those of a run, and its directory.

    Raises:
        LichenError: RUN_UNKNOWN; NO_MODEL, if its plan has no stream.
    """
    from lichen.coordinator.export import versions_of

    directory = Path(do(home, "run", run=run)["directory"])
    return versions_of(directory), directory


def _kept(found: Versions, version: Version) -> str:
    return "" if not version.number or found.has_state(version) else "its scores alone are left"


def _tasks(plan: Plan, every: list[Version]) -> list[str]:
    """What versions were scored on: the plan's tasks, or of an online run the batches until then."""
    scored = dict.fromkeys(task for version in every for task in version.validation)
    return list(scored) if is_online(plan) else scored_tasks(plan)


def _pairs(before: Version, after: Version, task: str) -> dict[str, tuple[float | None, float | None]]:
    """By metric what two versions have."""
    first, second = (version.validation.get(task) or {} for version in (before, after))
    return {key: (first.get(key), second.get(key)) for key in sorted({*first, *second})}


def _score(version: Version, task: str) -> str:
    return _told(measured(version.validation.get(task)))


def _told(value: float | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def _change(first: float | None, second: float | None) -> str:
    return "–" if first is None or second is None else f"{second - first:+.3f}"
