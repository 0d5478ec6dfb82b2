"""`lichen coordinator operator`: operators on other machines, and their certificates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lichen.common.errors import Code, LichenError
from lichen.coordinator.cli_tools import DEFAULT_HOME, HomeOption, JsonOption, do, print_json, print_table, when

app = typer.Typer(help="Operators on other machines: their certificates.", no_args_is_help=True)
DirOption = Annotated[
    Path, typer.Option("--dir", help="Where the operator's key and certificate are kept.", metavar="DIR", show_default=False)
]


@app.command()
def request(name: Annotated[str, typer.Argument(help="The operator's name.", show_default=False)], directory: DirOption) -> None:
    """On the operator's machine: make a key, which stays there, and print a request for its certificate.

    Example: lichen coordinator operator request ann --dir ~/.lichen/operator > ann.csr
    """
    from lichen.coordinator.operators import request_certificate

    typer.echo(request_certificate(directory.expanduser(), name).strip())


@app.command()
def add(
    file: Annotated[Path, typer.Argument(help="The request.", show_default=False)],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """On the coordinator's machine: sign a request whose sender you know, and print the answer.

    Example: lichen coordinator operator add ann.csr > ann.json
    """
    print_json(do(home, "add_operator", request=_read(file)))


@app.command()
def accept(file: Annotated[Path, typer.Argument(help="The answer.", show_default=False)], directory: DirOption) -> None:
    """On the operator's machine: keep the answer; from then on `--operator DIR` reaches the coordinator.

    Example: lichen coordinator operator accept ann.json --dir ~/.lichen/operator
    """
    from lichen.coordinator.operators import accept_certificate

    name = accept_certificate(directory.expanduser(), _read(file))
    typer.echo(f"operator {name}; try: lichen coordinator nodes --operator {directory}")


@app.command("list")
def list_(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """List the operators' certificates.

    Example: lichen coordinator operator list
    """
    found = do(home, "operators")
    if as_json:
        print_json(found)
        return
    rows = [
        (item["name"], "active" if item["active"] else f"revoked {when(item['revoked_at'])}", when(item["certificate_ends"]))
        for item in found
    ]
    print_table(("name", "state", "certificate until"), rows)


@app.command("revoke")
def revoke_operator(
    name: Annotated[str, typer.Argument(help="The operator's name.", show_default=False)], home: HomeOption = DEFAULT_HOME
) -> None:
    """Shut an operator out.

    Example: lichen coordinator operator revoke ann
    """
    do(home, "revoke_operator", name=name)
    typer.echo(f"revoked {name}")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LichenError(Code.CERTIFICATE_INVALID, f"can't read it: {error}", where=str(file)) from None
