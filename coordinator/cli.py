"""`lichen coordinator`: the commands of those who run a federation's service."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from lichen.common.continual.stream import is_online, is_stream
from lichen.common.errors import Code, LichenError
from lichen.common.plan import load_plan, plan_from_json
from lichen.common.result import read_result
from lichen.coordinator import operator_cli, versions_cli
from lichen.coordinator.admin import ask, served
from lichen.coordinator.cli_tools import (
    DEFAULT_HOME,
    HomeOption,
    JsonOption,
    OperatorOption,
    RunArgument,
    ask_service,
    do,
    open_home,
    print_json,
    print_table,
    when,
)
from lichen.coordinator.export import ExportFormat, FormatOption, OutOption, VersionOption, export_model, has_version
from lichen.coordinator.home import ENROLMENT_PORT, FLEET_PORT, Home, Runtime
from lichen.coordinator.operations import find_run
from lichen.coordinator.versions import scores_hold_outs

_UNSCORED = (
    "no task of this stream is scored before the run is over, so no version is ever held back{}. "
    "Submit it with --validation; or set evaluation.federated_every to a task's rounds, for R of the clients' hold-outs alone."
)

app = typer.Typer(help="The service that operators run.", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(operator_cli.app, name="operator")
app.add_typer(versions_cli.app)


@app.command()
def init(
    home: HomeOption = DEFAULT_HOME,
    host: Annotated[
        list[str] | None,
        typer.Option(help="A name or IP address by which agents reach this machine; the first goes into invites. May be repeated."),
    ] = None,
    bind: Annotated[str | None, typer.Option(help="The address to listen at; by default all, or loopback if every --host is.")] = None,
    fleet_port: Annotated[int, typer.Option(min=0, max=65535, help="For enrolled agents; 0: a free one at each start.")] = FLEET_PORT,
    enrol_port: Annotated[int, typer.Option(min=0, max=65535, help="For agents that join; 0: a free one at each start.")] = ENROLMENT_PORT,
    as_json: JsonOption = False,
) -> None:
    """Make a coordinator's home: certificate authority, configuration, store.

    Example: lichen coordinator init --host fl.example.org
    """
    made = Home.create(home.expanduser(), host or [socket.gethostname()], bind=bind, fleet_port=fleet_port, enrolment_port=enrol_port)
    config = made.config.model_dump(mode="json")
    if as_json:
        print_json({"home": str(made.path), **config})
        return
    typer.echo(f"made {made.path}; agents reach it as {made.config.hosts[0]}, ports {fleet_port} and {enrol_port} (config.yaml)")
    typer.echo(f"start it with: lichen coordinator serve --home {made.path}")


@app.command()
def serve(home: HomeOption = DEFAULT_HOME) -> None:
    """Serve until SIGTERM or Ctrl-C; a run that was under way goes on.

    Example: lichen coordinator serve --home /var/lib/lichen
    """
    from lichen.coordinator.service import serve as run_service

    def ready(at: Runtime) -> None:
        print(f"ready: fleet {at.fleet}, enrolment {at.enrolment}", flush=True)

    run_service(open_home(home), ready)


@app.command()
def invite(
    name: Annotated[str, typer.Argument(help="The node's name: a-z, 0-9, '.', '_', '-'.", show_default=False)],
    home: HomeOption = DEFAULT_HOME,
    operator: OperatorOption = None,
    hours: Annotated[float, typer.Option(help="How long it is good.")] = 24,
    as_json: JsonOption = False,
) -> None:
    """Print an invite for a node: hand it over as you would a password; it is good once.

    Example: lichen coordinator invite clinic-a --hours 2
    """
    made = do(home, "invite", operator, name=name, hours=hours)
    if as_json:
        print_json(made)
    else:
        typer.echo(made["invite"])


@app.command()
def nodes(home: HomeOption = DEFAULT_HOME, operator: OperatorOption = None, as_json: JsonOption = False) -> None:
    """List the enrolled nodes.

    Example: lichen coordinator nodes --json
    """
    found = do(home, "nodes", operator)
    if as_json:
        print_json(found)
        return
    states = {True: "connected", False: "away", None: "service not running"}
    print_table(
        ("name", "state", "last seen", "enrolled", "certificate until", "machine"),
        [
            (
                node["name"],
                states[node["connected"]] if node["active"] else f"revoked {when(node['revoked_at'])}",
                when(node["last_seen"]),
                when(node["enrolled_at"]),
                when(node["certificate_ends"]),
                _machine(node["profile"]),
            )
            for node in found
        ],
    )


def _machine(profile: dict[str, Any] | None) -> str:
    """What a node tells of its machine, in short."""
    if profile is None:
        return ""
    speed = f", {profile['tokens_per_s']} tokens/s" if profile["tokens_per_s"] else ""
    return f"{profile['device']}, {profile['memory_mb']} MiB{speed}"


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="The node's name.", show_default=False)],
    home: HomeOption = DEFAULT_HOME,
    operator: OperatorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Shut a node out for good: its stream ends at once, and its certificate counts no more.

    Example: lichen coordinator revoke clinic-a
    """
    node = do(home, "revoke", operator, name=name)
    if as_json:
        print_json(node)
    else:
        typer.echo(f"revoked {name}; to let it in again: lichen coordinator invite {name}")


@app.command()
def submit(
    plan: Annotated[Path, typer.Argument(help="The plan's file (YAML or JSON).", show_default=False)],
    home: HomeOption = DEFAULT_HOME,
    operator: OperatorOption = None,
    validation: Annotated[Path | None, typer.Option(help="Rows to watch the rounds by: JSONL, CSV or Parquet.")] = None,
    test: Annotated[Path | None, typer.Option(help="Rows to score the final model on, once.")] = None,
    field: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=COLUMN", help="Where a field of the plan is in these files. May be repeated.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Replace a key of the plan. May be repeated.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run until it is over.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Queue a plan on the running service, and print the run's id.

    Example: lichen coordinator submit plan.yaml --validation dev.csv --field text=body --set rounds=10 --wait
    """
    asked = load_plan(plan, settings or ())
    document = yaml.safe_load(asked.to_yaml())
    files = {name: str(file.absolute()) for name, file in (("validation", validation), ("test", test)) if file is not None}
    if operator is not None and (files or wait):
        raise typer.BadParameter("--validation, --test and --wait work on the coordinator's own machine only", param_hint="--operator")
    more = {} if operator is not None else {"fields": _fields(field or ()), **files}
    told = ask_service(home, "submit", operator, plan=document, **more)
    if as_json:
        print_json(told)
    else:
        typer.echo(told["run_id"])
    if is_stream(asked) and validation is None and not scores_hold_outs(asked):
        nothing = "" if test is not None and not is_online(asked) else ", and there is no R: what is forgotten is not known"
        typer.echo(f"note: {_UNSCORED.format(nothing)}", err=True)
    if wait:
        _follow(home, told["run_id"], Console(stderr=True) if as_json else Console())


@app.command()
def runs(home: HomeOption = DEFAULT_HOME, operator: OperatorOption = None, as_json: JsonOption = False) -> None:
    """List the runs, oldest first.

    Example: lichen coordinator runs
    """
    found = do(home, "runs", operator)
    if as_json:
        print_json(found)
        return
    print_table(
        ("run", "plan", "status", "rounds", "submitted", "error"),
        [
            (
                run["run_id"],
                run["name"],
                run["status"],
                f"{run['rounds_done']}/{run['rounds']}",
                when(run["created_at"]),
                " ".join((run["error"] or "").split()),
            )
            for run in found
        ],
    )


@app.command()
def watch(run: RunArgument = "latest", home: HomeOption = DEFAULT_HOME) -> None:
    """Follow a run until it is over: a live table on a terminal, one line a round elsewhere.

    Example: lichen coordinator watch latest
    """
    _follow(home, run, Console())


@app.command()
def stop(run: RunArgument, home: HomeOption = DEFAULT_HOME, operator: OperatorOption = None, as_json: JsonOption = False) -> None:
    """End a run; its checkpoints are kept.

    Example: lichen coordinator stop latest
    """
    told = ask_service(home, "stop", operator, run=run)
    if as_json:
        print_json(told)
    else:
        typer.echo(f"run {told['run_id']}: {told['status']}")


@app.command()
def export(
    run: RunArgument,
    out: OutOption,
    home: HomeOption = DEFAULT_HOME,
    form: FormatOption = ExportFormat.PEFT,
    version: VersionOption = None,
) -> None:
    """Write a run's model, for transformers and peft; of a stream of tasks what is given out, or any version, at any time.

    Example: lichen coordinator export latest --out model --format merged
    """
    found = do(home, "run", run=run)
    if found["status"] != "finished" and version is None and not has_version(Path(found["directory"])):
        raise LichenError(Code.NO_MODEL, f"run {found['run_id']} is {found['status']}: it has no model yet")
    export_model(Path(found["directory"]), out, form.value, version)
    typer.echo(f"wrote {out}")


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="The file to write (mode 0600: it holds private keys).", show_default=False)],
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Write the whole home to one file, while the service runs or not.

    Example: lichen coordinator backup /backup/lichen.tar
    """
    told = do(home, "backup", file=str(file.absolute()))
    if as_json:
        print_json(told)
    else:
        typer.echo(f"wrote {told['file']}: files {told['files']}, bytes {told['bytes']}")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A backup.", show_default=False)],
    home: Annotated[Path, typer.Option(help="The new home directory.", metavar="DIR", show_default=False)],
) -> None:
    """Make a new home from a backup.

    Example: lichen coordinator restore /backup/lichen.tar --home /var/lib/lichen
    """
    from lichen.coordinator.backup import restore_backup

    restored = restore_backup(file, home.expanduser())
    typer.echo(f"restored {restored.path}; start it with: lichen coordinator serve --home {restored.path}")


def _follow(home: Path, run: str, console: Console) -> None:
    from lichen.coordinator.cohort import note_on_draws
    from lichen.coordinator.watch import conclusion, follow

    found = open_home(home)
    store = found.open_store()
    try:
        run_id = find_run(store, run).run_id
        if store.run(run_id).status in {"queued", "running"}:
            told = ask(found.socket, "status")  # without a service nothing would ever come
            plan, connected = plan_from_json(store.run(run_id).plan), len(told["connected"])
            if connected < (size := plan.cohort.size):
                note: str | None = f"{connected} nodes are connected, cohort.size is {size}: a round waits for more until its deadline"
            else:
                note = note_on_draws(plan, connected)
            if note:
                console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
        directory = found.runs / store.run(run_id).directory
        said: list[str | None] = [None]

        def over() -> bool:
            now = store.run(run_id)
            if now.status not in {"queued", "running"}:
                return True
            why = now.error if served(found.socket) else "the service is down; the run goes on when it is back"
            if why and why != said[0]:
                console.print(f"waits: {why}", markup=False, highlight=False, soft_wrap=True)
            said[0] = why
            return False

        follow(directory, stop=over, console=console)
        ended = store.run(run_id)
    finally:
        store.close()
    if ended.status == "failed":
        raise _ended_badly(run_id, ended.error or "")
    summary = conclusion(read_result(directory)) if (directory / "result.json").exists() else ended.status
    console.print(summary, markup=False, highlight=False, soft_wrap=True)
    if ended.status == "finished":
        console.print(f"model: {directory / 'model'}", markup=False, highlight=False, soft_wrap=True)


def _ended_badly(run_id: int, told: str) -> LichenError:
    """A failed run as an error with the number that ended it."""
    number = re.match(r"error (\d+) \([a-z-]+\): ", told)
    code = Code(int(number[1])) if number and int(number[1]) in set(Code) else Code.ROUND_FAILED
    return LichenError(code, told[number.end() :] if number else told, where=f"run {run_id}")


def _fields(settings: Sequence[str]) -> Mapping[str, str]:
    found = {}
    for setting in settings:
        field, equals, column = setting.partition("=")
        if not (field and equals and column):
            raise LichenError(Code.DATA_FIELD, f"{setting!r} is not FIELD=COLUMN", where="--field", fix="For example --field text=body.")
        found[field] = column
    return found
