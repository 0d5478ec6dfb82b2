"""What the coordinator's commands share: their options, whom they ask, and how they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lichen.coordinator.admin import ask
from lichen.coordinator.home import Home
from lichen.coordinator.operations import NotServedError, Operations

HomeOption = Annotated[
    Path, typer.Option("--home", envvar="LICHEN_COORDINATOR_HOME", help="The coordinator's home directory.", metavar="DIR")
]
OperatorOption = Annotated[
    Path | None,
    typer.Option(
        "--operator",
        envvar="LICHEN_OPERATOR",
        metavar="DIR",
        help="Ask a coordinator on another machine, with the operator's certificate in this directory.",
    ),
]
RunArgument = Annotated[str, typer.Argument(help="A run's id, a beginning of it, or `latest`.", metavar="RUN", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]
DEFAULT_HOME = Path("~/.lichen/coordinator")


def open_home(path: Path) -> Home:
    """The home that `--home` names."""
    return Home(path.expanduser())


def ask_service(home: Path, call: str, operator: Path | None = None, **arguments: Any) -> Any:
    """Ask the running service, here or on another machine; errors as `ask` and `ask_remote`."""
    if operator is None:
        return ask(open_home(home).socket, call, arguments)
    from lichen.coordinator.operators import ask_remote

    return ask_remote(operator.expanduser(), call, arguments)


def do(home: Path, call: str, operator: Path | None = None, **arguments: Any) -> Any:
    """Ask the running service; without one on this machine, work on the home itself."""
    try:
        return ask_service(home, call, operator, **arguments)
    except NotServedError:
        found = open_home(home)
    store = found.open_store()
    try:
        return Operations(found, store, None).calls()[call](**arguments)
    finally:
        store.close()


def when(moment: str | None) -> str:
    """A moment (ISO 8601, UTC) for a table."""
    return "–" if moment is None else moment.replace("+00:00", "Z")


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal, lines of tab-separated values elsewhere."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            typer.echo("\t".join(row))
        return
    table = Table(*columns, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
