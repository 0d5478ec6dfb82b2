"""`lichen client`: what a data owner runs. Nothing here imports torch, but `model`, which scores one."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lichen.common.device import AUTO, HELP, VARIABLE, choose_unloaded
from lichen.common.errors import Code, LichenError

app = typer.Typer(help="The agent that data owners run.", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
data_app = typer.Typer(help="Which files this node trains on.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(data_app, name="data")


def _absolute(home: Path) -> Path:
    return home.expanduser().absolute()


Home = Annotated[
    Path,
    typer.Option("--home", envvar="LICHEN_NODE_HOME", help="The node's home directory.", callback=_absolute, show_default="~/.lichen/node"),
]
DEFAULT_HOME = Path("~/.lichen/node")
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
LEAST_MEMORY_MB = 256
"""What the libraries of training take; the policy's memory_mb has the same least."""
Sha = Annotated[str, typer.Argument(help="The plan's digest, or its first 8 digits or more.", show_default=False)]


@app.command()
def join(
    invite: Annotated[str, typer.Argument(help="From the coordinator's operator; - reads it from standard input.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Give up the enrolment that this home has.")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Enrol this node: make its key here and have it certified. Example: lichen client join lichen1.…."""
    from lichen.client.enrolment import join as enrol
    from lichen.client.locks import HomeLocks

    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    locks = HomeLocks(home)
    try:
        identity = enrol(sys.stdin.read().strip() if invite == "-" else invite, home, force=force)
    finally:
        locks.close()
    typer.echo(f"joined as {identity.name}; the certificate is good until {_when(identity.certificate.not_after)} and renews by itself")
    typer.echo("next: lichen client data add FILE --field text=COLUMN --field label=COLUMN --declared-size N, then lichen client run")


@app.command()
def run(
    device: Annotated[str, typer.Option(envvar=VARIABLE, help=f"Where to train: {HELP}")] = AUTO,
    threads: Annotated[int | None, typer.Option(min=1, help="Most threads of training; policy.yaml may permit fewer.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most memory of training, such as 2G or 800M; policy.yaml may permit less.")
    ] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Run the agent until it is interrupted. Example: lichen client run --home /srv/lichen/node --memory 2G."""
    from lichen.client.agent import Agent
    from lichen.client.worker import Limits

    limits = Limits(threads, None if memory is None else _mebibytes(memory))
    choose_unloaded(device)
    logging.getLogger("lichen").setLevel(min(logging.INFO, logging.getLogger().level))
    asyncio.run(Agent(home, limits=limits).run())


@app.command()
def status(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Show what the agent does now. Example: lichen client status --json."""
    import psutil

    from lichen.client.enrolment import load_identity
    from lichen.client.hardware import told_profile
    from lichen.client.status import CLOCK_OFF, read_status

    facts: dict[str, Any] = asdict(read_status(home)) | {"profile": told_profile(home)}
    for key in ("pid", "worker_pid"):
        try:
            found = psutil.Process(facts[key]).memory_info().rss if facts[key] else None
        except psutil.Error:
            found = None
        facts[key.replace("pid", "memory_mb")] = None if found is None else round(found / 1e6, 1)
    try:
        identity = load_identity(home)
        facts |= {"name": identity.name, "coordinator": identity.coordinator, "certificate_until": identity.certificate.not_after}
    except LichenError as error:
        facts |= {"certificate_until": None, "certificate_error": str(error)}
    if as_json:
        _print_json(facts)
        return
    told = {
        "state": f"{facts['state']} since {_when(facts['since'])}",
        "node": facts["name"],
        "coordinator": facts["coordinator"] and f"{facts['coordinator']}, {'connected' if facts['connected'] else 'not connected'}",
        "clock": f"{facts['clock_off']:+d} s against the coordinator's: set it" if abs(facts["clock_off"]) > CLOCK_OFF else None,
        "certificate": facts.get("certificate_error") or f"good until {_when(facts['certificate_until'])}",
        "last work": f"round {facts['round']} of run {facts['run']}" if facts["run"] else None,
        "last error": f"{_when(facts['last_error_at'])}: {facts['last_error']}" if facts["last_error"] else None,
        "memory": f"agent {facts['memory_mb']} MB, worker {facts['worker_memory_mb'] or 0} MB" if facts["memory_mb"] else None,
        "rows at once": f"{facts['rows']}, since memory was not enough for more" if facts["rows"] else None,
        "new rows": f"{facts['new_rows']} declared, told for the online run" if facts["new_rows"] is not None else None,
        "not counted": facts["not_counted"],
        "profile told": _profile(facts["profile"]) if facts["profile"] else None,
    }
    for key, value in told.items():
        if value:
            typer.echo(f"{key:12} {value}")


@app.command()
def profile(
    device: Annotated[str, typer.Option(envvar=VARIABLE, help=f"Where to train: {HELP}")] = AUTO,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Show what the coordinator is told of this machine, or would be. Example: lichen client profile --json > node.json."""
    from lichen.client.hardware import Hardware, is_kept_in
    from lichen.client.policy import load_policy
    from lichen.client.worker import Limits

    _need(home)
    choose_unloaded(device)
    found = Hardware(home, Limits().tightened(load_policy(home))).profile().model_dump(mode="json")
    if as_json:
        _print_json(found)
        return
    typer.echo(_profile(found))
    told = (
        "policy.yaml keeps it in (profile: false)"
        if is_kept_in(home)
        else "the coordinator is told so; profile: false in policy.yaml keeps it in"
    )
    typer.echo(told)


# --- data --------------------------------------------------------------------------------------------------------------------


@data_app.command("add")
def data_add(
    path: Annotated[Path, typer.Argument(help="A file or folder: JSONL, CSV, Parquet or text.", show_default=False)],
    field: Annotated[
        list[str], typer.Option("--field", metavar="FIELD=COLUMN", help="What a column means to the task.", show_default=False)
    ],
    declared_size: Annotated[
        int | None, typer.Option(help="A public constant that stands for the number of rows.", min=1, show_default=False)
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="A folder that new files come to, for online runs; the declared size is each file's.")
    ] = False,
    holdout: Annotated[float, typer.Option(help="Kept for local evaluation: below 1 a share, from 1 a number of rows.", min=0)] = 0.1,
    text_rows: Annotated[str, typer.Option(help="What a row of a text file is: line or document.")] = "line",
    home: Home = DEFAULT_HOME,
) -> None:
    """Add data, or replace an entry. Example: lichen client data add a.csv --field text=BODY --field label=TOPIC --declared-size 512."""
    from lichen.client.data import add_source, check

    if text_rows not in ("line", "document"):
        raise LichenError(Code.DATA_FIELD, f"{text_rows!r} is neither line nor document", where="--text-rows")
    source = add_source(
        home,
        path,
        fields=dict(_field(given) for given in field),
        declared_size=declared_size,
        holdout=holdout,
        text_rows="document" if text_rows == "document" else "line",
        watch=watch,
    )
    typer.echo(f"added {source.path}: {', '.join(f'{name} = {column}' for name, column in source.fields.items())}")
    if declared_size is None and watch:
        typer.echo(
            "No size was declared. Online runs need one, and so do plans with differential privacy: a constant for each file, such as a"
            " power of two near the rows that you expect in one. It may be known to all; the true numbers may not."
            "\n  lichen client data add … --watch --declared-size N"
        )
    elif declared_size is None:
        rows = next(found.train for found in check(home).sources if found.path == source.path)
        typer.echo(
            "No size was declared. Plans with differential privacy need one: a constant that may be known to all, since the true number"
            f" of rows may not.\nOnly you see this: {rows} rows train. The nearest power of two, {_power_of_two(rows)}, is a usual choice:"
            f"\n  lichen client data add … --declared-size {_power_of_two(rows)}"
        )


@data_app.command("remove")
def data_remove(path: Annotated[Path, typer.Argument(help="As it was added.", show_default=False)], home: Home = DEFAULT_HOME) -> None:
    """Train on this data no more; the files stay, and so does what was spent on them. Example: lichen client data remove a.csv."""
    from lichen.client.data import remove_source

    remove_source(home, path)
    typer.echo(f"removed {path}")


@data_app.command("check")
def data_check(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Read all data, and list what cannot be used. For your eyes: it shows true counts. Example: lichen client data check."""
    from lichen.client.data import check

    report = check(home)
    if as_json:
        _print_json({"usable": report.usable, "rows": report.rows, "sources": [asdict(source) for source in report.sources]})
    else:
        for source in report.sources:
            declared = source.declared_size or "none: plans with differential privacy are refused"
            declared = f"{declared} a file" if source.watch else declared
            typer.echo(f"{source.path}: {', '.join(source.kinds)}, files {source.files}, declared size {declared}")
            typer.echo(f"  {source.train} rows to train on, {source.holdout} held out, {source.repeated} repeated, {source.bad_rows} bad")
            if source.labels:
                typer.echo("  labels: " + ", ".join(f"{label} {count}" for label, count in source.labels.items()))
            for name, (least, median, most) in source.characters.items():
                typer.echo(f"  {name}: {least} to {most} characters, median {median}")
            for fault in source.bad_files:
                typer.echo(f"  bad file: {fault}")
            for bad in source.bad:
                typer.echo(f"  bad: {bad.file}, row {bad.row}: {bad.reason}")
    if not report.usable:
        rows, files = (any(getattr(source, key) for source in report.sources) for key in ("bad_rows", "bad_files"))
        raise typer.Exit(int(Code.DATA_ROW if rows else Code.DATA_FORMAT if files else Code.DATA_EMPTY))


@data_app.command("history")
def data_history(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Show how many rows each run has read, and each batch of an online run. For your eyes. Example: lichen client data history."""
    from lichen.client.arrivals import FILE, Arrivals

    _need(home)
    found = list[dict[str, Any]]()
    if (home / FILE).exists():
        with Arrivals(home) as arrivals:
            found = [row if row["batch"] is None else row | {"batch": row["batch"] + 1} for row in arrivals.history()]
    if as_json:
        _print_json(found)
    elif not found:
        typer.echo("no run has read anything here yet")
    else:
        shown = [row if row["begun"] is None else row | {"begun": _when(row["begun"])} for row in found]
        _print_table([{key: "" if value is None else value for key, value in row.items()} for row in shown], {key: key for key in shown[0]})


# --- what the owner permits --------------------------------------------------------------------------------------------------


@app.command()
def policy(
    init: Annotated[bool, typer.Option("--init", help="Write policy.yaml with the defaults, to be edited.")] = False,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Show what any plan may do here, and what each key means. Example: lichen client policy --init."""
    from lichen.client.policy import POLICY, Policy, documented, load_policy, write_default

    if init:
        typer.echo(f"wrote {write_default(home)}")
        return
    try:
        found = load_policy(home)
    except LichenError as error:
        if as_json:
            raise
        typer.secho(str(error), fg="red", err=True)
        typer.echo(f"# The defaults, to mend {home / POLICY} by:\n{documented(Policy()).rstrip()}")
        raise typer.Exit(int(error.code)) from None
    if as_json:
        _print_json(found.model_dump(mode="json"))
        return
    typer.echo(f"# {home / POLICY}" if (home / POLICY).exists() else f"# The defaults: there is no {home / POLICY}; --init writes it.")
    typer.echo(documented(found).rstrip())


@app.command()
def ledger(
    write_off: Annotated[
        bool, typer.Option("--write-off", help="Take all records that are known or there now as spent for life, after a ledger was lost.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Verify the ledger; show the privacy spent, by which run, when, and what is left. Example: lichen client ledger --json."""
    from lichen.client.ledger import FILE, ledger_folder, open_ledger
    from lichen.client.ledger_book import Limit
    from lichen.client.policy import load_policy
    from lichen.client.spending import spending, unspent
    from lichen.common.privacy.statement import bound_text

    _need(home)
    if write_off:
        from lichen.client.witness import write_off as take_as_spent

        if not yes:
            typer.confirm("No record that is there now will ever be trained on again. Go on?", abort=True)
        typer.echo(f"{take_as_spent(home)} data segments are written off; rows that come later can train")
        return
    permitted = load_policy(home).privacy
    limit = Limit(permitted.max_epsilon, permitted.max_delta)
    file = ledger_folder(home, make=False) / FILE
    if not file.exists():
        if as_json:
            _print_json(unspent(file, limit))
        else:
            typer.echo(f"nothing was spent yet in {file}; ε = {limit.epsilon:g} at δ = {limit.delta:g} is left")
        return
    with open_ledger(home) as book:
        facts = spending(book, limit)
    if as_json:
        _print_json(facts)
        return
    typer.echo(f"{facts['ledger']}: {facts['entries']} entries, whose chain of hashes holds")
    if facts["runs"]:
        headings = {"noise_multiplier": "σ", "sample_rate": "q", "epsilon": "ε of the run (PLD)"}
        shown = [row | {key: _when(row[key]) for key in ("first", "last")} for row in facts["runs"]]
        _print_table(shown, {key: headings.get(key, key) for key in shown[0]})
    if any(row["unit"] == "client" for row in facts["runs"]):
        typer.echo(
            "unit client: promised by the coordinator, which adds the noise; this node can't verify it. steps: all rounds of the run"
        )
    for row in facts["segments"]:
        of = f"data segment {row['segment']} ({row['split']}, {row['records']} records first read {_when(row['opened'])})"
        if row["written_off"]:
            typer.echo(f"{of}: written off; nothing is left")
        else:
            by = "PLD: one run, its parameters fixed" if row["bound"] == "pld" else f"RDP filter, {row['runs']} runs"
            typer.echo(f"{of}: ε ≤ {bound_text(row['epsilon'])} ({by}); {math.floor(row['left'] * 1000) / 1000:.3f} is left")
    typer.echo(_in_all(facts))


def _in_all(facts: dict[str, Any]) -> str:
    """The bound of the whole ledger, and whom it is for."""
    from lichen.common.privacy.statement import bound_text

    told = f"ε ≤ {bound_text(facts['record'])} at δ = {facts['delta']:g}"
    units = sorted({row["unit"] for row in facts["runs"]})
    if units in ([], ["example"]):
        return f"{told} for one row; for all rows of a person together it is more"
    return f"{told} for one unit ({', '.join(units)}). Records above are rows, and under entity the entities' names too"


@app.command()
def pending(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """List the plans that wait for your decision. Example: lichen client pending."""
    from lichen.client.policy import pending as waiting
    from lichen.client.policy import promise
    from lichen.common.plan import load_plan

    rows = [
        {
            "sha256": item.plan_sha256,
            "name": item.name,
            "asked": item.at,
            "privacy": promise(load_plan(item.plan)),
            "plan": str(item.plan),
        }
        for item in waiting(home)
    ]
    if as_json:
        _print_json(rows)
    elif rows:
        for row in rows:
            typer.echo(f"{row['sha256'][:12]}  {row['name']}, asked {row['asked']}\n  {row['privacy']}\n  {row['plan']}")
    else:
        typer.echo("no plan waits")


@app.command()
def approve(sha: Sha, home: Home = DEFAULT_HOME) -> None:
    """Permit a plan that waits. Example: lichen client approve 3f2a99c01b7d."""
    from lichen.client.policy import approve as permit

    typer.echo(f"approved {permit(home, sha).name}")


@app.command()
def reject(sha: Sha, home: Home = DEFAULT_HOME) -> None:
    """Forbid a plan that waits. Example: lichen client reject 3f2a99c01b7d."""
    from lichen.client.policy import reject as forbid

    typer.echo(f"rejected {forbid(home, sha).name}")


@app.command()
def pause(
    resume: Annotated[bool, typer.Option("--resume", help="Take work again.")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Take no more work: what is being trained is finished, then the coordinator is told no. Example: lichen client pause --resume."""
    from lichen.client.status import pause as set_pause

    _need(home)
    set_pause(home, resume=resume)
    typer.echo("taking work again" if resume else "paused; lichen client pause --resume takes work again")


@app.command()
def leave(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Leave the federation: key and certificate are removed; data, policy and ledger stay. Example: lichen client leave --yes."""
    from lichen.client.enrolment import leave as forget
    from lichen.client.locks import HomeLocks

    _need(home)
    if not yes:
        typer.confirm(f"Remove this node's key and certificate from {home}?", abort=True)
    locks = HomeLocks(home)
    try:
        forget(home)
    finally:
        locks.close()
    typer.echo("left; data, policy and ledger are kept. Tell the operator, who can run `lichen coordinator revoke NAME`.")


@app.command()
def model(
    run_id: Annotated[int, typer.Option("--run", help="Which run's; 0 is the newest that has a model.", min=0)] = 0,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Fetch a run's model, of a stream what it gives out so far, and score it on the rows held out here, beside the old one.

    Example: lichen client model
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from lichen.client.enrolment import load_identity
    from lichen.client.fetch import fetch_model

    console = Console(stderr=True)
    with Progress(TextColumn("fetching"), BarColumn(), DownloadColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("model", total=None)
        fetched = fetch_model(
            load_identity(home), home / "models", run_id, progress=lambda here, total: progress.update(task, completed=here, total=total)
        )
    from lichen.client.score import score_models

    scored = score_models(home, fetched)
    if as_json:
        _print_json({"run": fetched.run_id, "model": str(fetched.model), "scores": [asdict(item) for item in scored]})
        return
    typer.echo(f"the model of run {fetched.run_id} lies in {fetched.model}; its README.md says how to load it")
    names = dict.fromkeys(name for item in scored for name in item.metrics)
    _print_table(
        [{"model": item.model, "rows": item.rows, **dict.fromkeys(names), **item.metrics} for item in scored],
        {"model": "model", "rows": "held-out rows", **{name: name for name in names}},
    )


# --- parts -------------------------------------------------------------------------------------------------------------------


def _need(home: Path) -> None:
    if not any((home / made).exists() for made in ("pki", "data.yaml", "policy.yaml", "ledger.sqlite")):
        what = "no node's home" if home.is_dir() else "no such home"
        raise LichenError(Code.AGENT_HOME_MISSING, what, where=str(home), fix="Run `lichen client join INVITE` first, or give --home.")


def _field(given: str) -> tuple[str, str]:
    name, equals, column = given.partition("=")
    if not (name and equals and column):
        raise LichenError(Code.DATA_FIELD, f"{given!r} is not FIELD=COLUMN", where="--field", fix="For example --field text=BODY.")
    return name, column


def _profile(found: Mapping[str, Any]) -> str:
    """A profile in one line."""
    told = [found["device"], f"{found['memory_mb']} MiB", f"{found['threads']} threads"]
    if found["tokens_per_s"]:
        told.append(f"{found['tokens_per_s']} tokens/s of the last plan")
    told += [f"{way} {found[f'{way}load_kbit_s']} kbit/s" for way in ("down", "up") if found[f"{way}load_kbit_s"]]
    return ", ".join(told)


def _mebibytes(size: str) -> int:
    """A size such as 2G, 800M or 2147483648, in MiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)i?[bB]?", size.strip())
    mebibytes = int(float(found[1]) * {"": 2**-20, "k": 2**-10, "m": 1, "g": 2**10}[found[2].lower()]) if found else 0
    if mebibytes < LEAST_MEMORY_MB:
        raise typer.BadParameter(f"{size!r} is no size of {LEAST_MEMORY_MB}M or more, such as 2G", param_hint="--memory")
    return mebibytes


def _power_of_two(count: int) -> int:
    """The nearest one, on the logarithmic scale."""
    return int(2 ** round(math.log2(max(count, 1))))


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def _cell(value: object) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Rows as a table, with – for None; ``columns`` are keys and their headings."""
    table = Table(box=None, pad_edge=False)
    for heading in columns.values():
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, (row[key] for key in columns)))
    Console().print(table)
