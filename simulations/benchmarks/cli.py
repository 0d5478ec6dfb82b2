"""`lichen bench`: figures of this machine, each by the command that prints it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help="Measure this machine.", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
T = TypeVar("T")


def _list(given: str, of: Callable[[str], T], known: Collection[T] | None = None) -> list[T]:
    """An option's values, between commas.

    Raises:
        typer.BadParameter: for a value that is none, or not ``known``.
    """
    try:
        values = [of(value.strip()) for value in given.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{given!r} is no list of numbers with commas between them") from None
    if known is not None and (odd := [value for value in values if value not in known]):
        raise typer.BadParameter(f"{odd[0]!r} is none of {', '.join(map(str, known))}")
    return values


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Keep = Annotated[Path | None, typer.Option(help="Keep the run directories here; what is finished there is not run again.")]


@app.command()
def channel(
    rounds: Annotated[int, typer.Option(min=1, help="Round trips of an empty task.")] = 200,
    megabytes: Annotated[int, typer.Option(min=1, help="Payload to each agent, and back from each.")] = 100,
    bad_link: Annotated[bool, typer.Option("--bad-link", help="Instead: a round at 64 kbit/s with loss, and what cuts cost.")] = False,
    as_json: AsJson = False,
) -> None:
    """Round trip, transfer and memory of the channel, over mutual TLS. Example: lichen bench channel --megabytes 100."""
    if bad_link:
        from lichen.simulations.benchmarks.bad_link import bench_bad_link

        bench_bad_link(as_json)
        return
    from lichen.simulations.benchmarks.channel import bench_channel

    bench_channel(rounds, megabytes, json=as_json)


@app.command()
def aggregate(
    updates: Annotated[int, typer.Option(min=1, help="How many; beyond 8 the same files again, which spares the disk.")] = 100,
    megabytes: Annotated[int, typer.Option(min=1, help="Size of each.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Speed of the mean of many updates, beside a memory copy. Example: lichen bench aggregate --updates 100."""
    from lichen.simulations.benchmarks.aggregate import bench_aggregate, told

    figures = bench_aggregate(updates, megabytes)
    typer.echo(json.dumps(figures) if as_json else told(figures))


@app.command()
def transfer(
    parameters: Annotated[int, typer.Option(min=1, help="Of the update that speed is measured with.")] = 1 << 24,
    repeats: Annotated[int, typer.Option(min=1, help="The best of so many is told.")] = 3,
    large: Annotated[
        bool, typer.Option("--large", help="The coordinator's memory, with a model of 1 GB tuned whole by two agents.")
    ] = False,
    r8: Annotated[bool, typer.Option("--r8", help="R8 by codec and rule: bytes to .96 validation accuracy, and accuracy lost.")] = False,
    scenario: Annotated[str, typer.Option(help="With --r8: r8-no-privacy or r8.")] = "r8-no-privacy",
    codecs: Annotated[str, typer.Option(help="With --r8, commas between them.")] = "none,eden-4,eden-2,eden-1",
    rules: Annotated[str, typer.Option(help="With --r8, commas between them.")] = "fedavg,ffa,rolora",
    seeds: Annotated[str, typer.Option(help="With --r8, commas between them.")] = "0,1,2",
    settings: Annotated[list[str] | None, typer.Option("--set", help="With --r8: key.path=value, for all runs; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Bits, error and speed of each codec of updates, on one core. Example: lichen bench transfer."""
    from lichen.simulations.benchmarks import large_update, uplinks
    from lichen.simulations.benchmarks.transfer import bench_transfer

    if r8:
        wanted = (_list(codecs, str, uplinks.CODECS), _list(rules, str, uplinks.RULES))
        for row in uplinks.bench_uplinks(scenario, _list(seeds, int), *wanted, settings or ()):
            typer.echo(json.dumps(row) if as_json else uplinks.told(row))
        return
    if large:
        for row in large_update.bench_large_update():
            typer.echo(json.dumps(row) if as_json else large_update.told(row))
        return

    table = Table(title="an update by each codec (at most, at least)")
    for column in ("codec", "bits a parameter", "NMSE", "NMSE, heavy tails", "encode, M/s", "check and add, M/s", "memory, MB"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    found = []
    for row in bench_transfer(parameters, repeats):
        found.append(row)
        aims = {key: f" ({aim:g})" for key, aim in row.get("targets", {}).items()}
        cells = {"bits": ".3f", "nmse": ".3g", "heavy_nmse": ".3g", "encode": ".0f", "add": ".0f", "peak_mb": ".0f"}
        table.add_row(row["codec"], *(f"{row[key]:{form}}{aims.get(key, '')}" for key, form in cells.items()))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(table)


@app.command()
def agent(as_json: AsJson = False) -> None:
    """Resident memory of an agent, idle and with MiniLM loaded. Example: lichen bench agent."""
    from lichen.simulations.benchmarks.agent import bench_agent

    figures = bench_agent()
    told = f"agent: idle {figures['idle_mb']:.0f} MB, with MiniLM loaded {figures['loaded_mb']:.0f} MB resident"
    typer.echo(json.dumps(figures) if as_json else told)


@app.command()
def base(
    rows: Annotated[int, typer.Option(min=32, help="Rows of the client that trains.")] = 160,
    repeats: Annotated[int, typer.Option(min=1, help="Trainings of each kind.")] = 3,
    r8: Annotated[bool, typer.Option("--r8", help="Instead: accuracy on Reuters R8 by precision, with a paired bootstrap.")] = False,
    seeds: Annotated[str, typer.Option(help="For --r8; commas between them.")] = "0,1,2",
    precisions: Annotated[str, typer.Option(help="For --r8: bfloat16, int8; commas between them.")] = "int8",
    epsilon: Annotated[float, typer.Option(help="For --r8; inf is without privacy.")] = float("inf"),
    set_: Annotated[list[str] | None, typer.Option("--set", help="For --r8: KEY.PATH=VALUE of the plan.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="For --r8: keep the run directories here; what is finished there is not run again.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """A base in fewer bits, and gradient checkpointing: memory, time, accuracy. Example: lichen bench base --r8."""
    from lichen.simulations.benchmarks.base import PRECISIONS, bench_base, bench_base_r8

    found = []
    if r8:
        given: list[str] = _list(precisions, str)
        if odd := set(given) - set(PRECISIONS[1:]):
            raise typer.BadParameter(f"{odd.pop()!r} is none of {', '.join(PRECISIONS[1:])}")
        asked = [precision for precision in PRECISIONS if precision in given]
        for row in bench_base_r8(_list(seeds, int), asked, epsilon, set_ or [], keep):
            found.append(row)
            if not as_json:
                typer.echo(", ".join(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    else:
        table = Table(title="MiniLM by precision of the base (at most)")
        for column in ("base", "resident, MB", "over 32 bits", "CPU s a step", "over 32 bits", "training adds, MB", "logits apart"):
            table.add_column(column, justify="left" if column == "base" else "right")
        for row in bench_base(rows, repeats):
            found.append(row)
            aims = {key: f" ({aim:g})" for key, aim in row.get("targets", {}).items()}
            memory = [f"{row['memory_mb']:.1f}", f"{row['memory']:.3f}{aims.get('memory', '')}"] if "memory" in row else ["", ""]
            name = row["base"] + (", checkpointing" if row["checkpointing"] else "")
            rest = [f"{row['step_s']:.3f}", f"{row['cpu']:.3f}{aims.get('cpu', '')}", f"{row['training_mb']:.0f}", f"{row['apart']:.2g}"]
            table.add_row(name, *memory, *rest)
        if not as_json:
            Console().print(table)
    if as_json:
        typer.echo(json.dumps(found, indent=2))


@app.command()
def privacy(
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each kind.")] = 7,
    lengths: Annotated[str, typer.Option(help="64, 256; commas between them.")] = "64,256",
    adapter: Annotated[str, typer.Option(help="lora, full; commas between them.")] = "lora,full",
    hooks: Annotated[bool, typer.Option(help="Run Opacus' hooks too.")] = True,
    as_json: AsJson = False,
) -> None:
    """A private step beside the same step without privacy: time and memory. Example: lichen bench privacy --adapter lora."""
    from lichen.simulations.benchmarks.privacy import ROWS, TARGETS, bench_privacy

    asked, adapters = _list(lengths, int, ROWS), _list(adapter, str, TARGETS)

    table = Table(title="a private step over the same step without privacy (at most)")
    for column in ("model", "adapter", "batch", "plain ms", "CPU time", "wall time", "peak memory", "Opacus' hooks, CPU"):
        table.add_column(column, justify="left" if column in {"model", "adapter"} else "right")
    found: list[dict[str, Any]] = []
    for row in bench_privacy(repeats, asked, adapters, hooks):
        found.append(row)
        ratios = [f"{row[key]:.3f} ({row['targets'][key]:g})" for key in ("cpu", "wall", "memory")]
        other = "-" if row["hooks_cpu"] is None else f"{row['hooks_cpu']:.3f}"
        table.add_row(row["family"], row["adapter"], f"{row['rows']} × {row['length']}", f"{row['plain_ms']:.0f}", *ratios, other)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(table)


@app.command()
def simulate(
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of 10 clients.")] = 4,
    small: Annotated[bool, typer.Option("--small", help="A model of a million parameters in place of MiniLM, without peers.")] = False,
    peers: Annotated[
        bool, typer.Option(help="Run pfl-research and Flower on Ray too, where installed (the extra `peers`), on the CPU.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto (a CUDA GPU where there is one), cpu, or another that torch names.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """The simulation beside a plain PyTorch loop of the same steps, and beside its peers. Example: lichen bench simulate --rounds 4."""
    from lichen.common.device import find, name_of
    from lichen.simulations.benchmarks.peers import INSTALL, PEERS
    from lichen.simulations.benchmarks.simulate import bench_simulate

    where = find(device)
    peers = peers and not small and where.type == "cpu"
    for peer in PEERS if peers else ():
        if not peer.installed:
            typer.echo(f"{peer.name} is not installed, and left out: {INSTALL}", err=True)
    rows = list(bench_simulate(rounds, [peer for peer in PEERS if peers and peer.installed], tiny=small, device=str(where)))
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    console = Console()
    what = "a million parameters, batches of 8 × 32" if small else "MiniLM, batches of 16 × 64"
    title = f"R8, LoRA on {what}: client updates a second, {name_of(where)}"
    console.print(_speeds(title, [row for row in rows if "beside" not in row]))
    if theirs := [row for row in rows if "beside" in row]:
        console.print(_beside(theirs))


def _speeds(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    columns = ("what", "processes × threads", "updates/s", "over plain, same layout", "over plain's best", "at least", "apart")
    for column in (*columns, "start-up (at most), s", "over loading (at most)", "memory, MB"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        if "updates_per_s" not in row:
            table.add_row(row["what"], row["layout"], *[""] * 5, f"{row['startup_s']:.1f}")
            continue
        ratios = [f"{row[key]:.3f}" if key in row else "" for key in ("over", "over_best")]
        rest = [f"{row['target']:g}", f"{row['apart']:.1e}"] if "target" in row else ["", ""]
        startup = f"{row['startup_s']:.1f}" + (f" ({row['startup_target']:g})" if "startup_target" in row else "")
        loading = f"{row['startup_over_load']:.2f} ({row['startup_over_load_target']:g})" if "startup_over_load" in row else ""
        memory = f"{row['memory_mb']:.0f}"
        table.add_row(row["what"], row["layout"], f"{row['updates_per_s']:.3f}", *ratios, *rest, startup, loading, memory)
    return table


def _beside(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="the same work elsewhere, and how many times better ours is")
    columns = (
        "what",
        "processes × threads",
        "updates/s",
        "start-up, s",
        "memory, MB",
        "apart",
        "beside",
        "ours: updates/s (at least)",
    )
    for column in (*columns, "10 rounds with start-up", "start-up", "memory (at most)"):
        table.add_column(column, justify="left" if column in {"what", "beside"} else "right")
    for row in rows:
        theirs = [f"{row['updates_per_s']:.3f}", f"{row['startup_s']:.1f}", f"{row['memory_mb']:.0f}"]
        apart = f"{row['apart']:.1e}" if "apart" in row else ""
        most = f" ({row['memory_target']:g})" if "memory_target" in row else ""
        ours = [f"{row['ours_over']:.2f} ({row['ours_target']:g})", *(f"{row[key]:.2f}" for key in ("ten_rounds_over", "startup_over"))]
        table.add_row(row["what"], row["layout"], *theirs, apart, row["beside"], *ours, f"{row['memory_share']:.2f}{most}")
    return table


@app.command()
def scale(
    clients: Annotated[
        str, typer.Option(help="Populations, commas between them; the first is what others are held against.")
    ] = "100,100000",
    cohort: Annotated[int, typer.Option(min=1, help="Clients of a round.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="Of each run.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Memory of a simulation by its population, with the same cohort. Example: lichen bench scale --clients 100,100000."""
    from lichen.simulations.benchmarks.scale import bench_scale

    found = []
    for row in bench_scale(_list(clients, int), cohort, rounds):
        found.append(row)
        if not as_json:
            over = f", {row['over']:.2f} of the first (target {row['target']:g})" if "over" in row else ""
            typer.echo(
                f"{row['clients']:,} clients, {row['cohort']:,} a round: peak {row['peak'] / 2**20:,.0f} MiB{over}; first round after "
                f"{row['first_round_s']:.1f} s, all {row['seconds']:.0f} s; {row['homes']:,} homes written"
            )
    if as_json:
        typer.echo(json.dumps(found, indent=2))


@app.command()
def step(
    rows: Annotated[int, typer.Option(min=32, help="Rows of the client.")] = 160,
    repeats: Annotated[int, typer.Option(min=1, help="Trainings of each kind.")] = 3,
    as_json: AsJson = False,
) -> None:
    """A client's local training: the prefix cache, and what privacy costs. Example: lichen bench step."""
    from lichen.simulations.benchmarks.step import bench_step

    found = []
    for row in bench_step(rows, repeats):
        found.append(row)
        if not as_json:
            apart = f", weights {row['apart']:.1e} apart" if "apart" in row else ""
            typer.echo(f"{row['what']}: {row['ratio']:.3f} (target {row['target']:g}{apart})")
    if as_json:
        typer.echo(json.dumps(found, indent=2))


@app.command(name="round")
def round_(
    rounds: Annotated[int, typer.Option(min=3, help="Of the run; the first and the last are not measured.")] = 6,
    plan: Annotated[str, typer.Option(help="A scenario, or a plan file with a simulation section.")] = "r8",
    as_json: AsJson = False,
) -> None:
    """The demo's federation as deployed: what of a round is not compute, and where it goes. Example: lichen bench round."""
    from lichen.simulations.benchmarks.round import bench_round, told

    rows = list(bench_round(rounds, plan))
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        Console().print(*told(rows), sep="\n")


@app.command()
def online(
    batches: Annotated[int, typer.Option(min=2, help="How many; for each, files come to three of the four agents.")] = 4,
    plan: Annotated[str, typer.Option(help="A scenario, or a plan file with a simulation section.")] = "r8-online",
    settings: Annotated[list[str] | None, typer.Option("--set", help="key.path=value; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """An online run as deployed: how soon a batch begins when files came, and what is read in two. Example: lichen bench online."""
    from lichen.simulations.benchmarks.online import bench_online, told

    figures = bench_online(batches, plan, settings or ())
    typer.echo(json.dumps(figures) if as_json else told(figures))


@app.command()
def fleet(
    rounds: Annotated[
        int, typer.Option(min=2, help="Of the synchronous modes; a buffered step takes fewer updates, and there are more.")
    ] = 20,
    accuracy: Annotated[float, typer.Option(min=0.0, max=1.0, help="On the validation split, to be reached.")] = 0.96,
    modes: Annotated[str, typer.Option(help="deadline, oversample, buffered; commas between them.")] = "deadline,oversample,buffered",
    plan: Annotated[str, typer.Option(help="A scenario, or a plan file whose simulation has four clients.")] = "r8-no-privacy",
    settings: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, for all modes; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time to an accuracy where one agent of four is at a quarter of the speed. Example: lichen bench fleet --modes buffered."""
    from lichen.simulations.benchmarks.fleet import MODES, bench_fleet

    found = []
    for row in bench_fleet(rounds, accuracy, _list(modes, str, MODES), plan, settings or []):
        found.append(row)
        if not as_json:
            reached = f"never reached (best {row['best']:.4f})" if row["seconds"] is None else f"after {row['seconds']:.1f} s"
            over = "" if row["ratio"] is None else f", {row['ratio']:.3f} of plain synchronous (at most {row['target']:g})"
            typer.echo(
                f"{row['mode']}: {accuracy:g} {reached}{over}; {row['rounds']} rounds of {row['round_s']:.2f} s, {row['updates']} updates, "
                f"{row['failed']} failed, {row['unneeded']} called off"
            )
    if as_json:
        typer.echo(json.dumps(found, indent=2))


@app.command()
def report(out: Annotated[Path, typer.Option(help="What to write.")] = Path("BENCHMARKS.md")) -> None:
    """Run a short form of every bench, and write their tables. Example: lichen bench report --out BENCHMARKS.md."""
    from lichen.simulations.benchmarks.report import bench_report

    bench_report(out, typer.echo)
    typer.echo(f"wrote {out}")


@app.command()
def reload(
    directory: Annotated[Path, typer.Argument(help="A finished simulation or demo.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Score a run's model by plain transformers and peft. Example: lichen bench reload lichen-demo."""
    from lichen.simulations.benchmarks.reload import bench_reload

    figures = bench_reload(directory)
    told = f"plain transformers and peft: accuracy {figures['accuracy']:.4f}, macro-F1 {figures['macro_f1']:.4f}"
    typer.echo(json.dumps(figures) if as_json else f"{told}; the run reported accuracy {figures['reported_accuracy']:.4f}")


@app.command()
def r8(
    seeds: Annotated[str, typer.Option(help="Commas between them.")] = "0,1,2",
    epsilon: Annotated[str, typer.Option(help="Commas between them; inf is without privacy.")] = "inf,8,2",
    adapter: Annotated[str, typer.Option(help="lora, head, full; commas between them.")] = "lora,head",
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """Test accuracy on Reuters R8, by seed. Example: lichen bench r8 --epsilon 8 --adapter lora,head."""
    from lichen.simulations.benchmarks.r8 import bench_r8, summary

    console = Console(stderr=as_json)
    runs: list[dict[str, Any]] = []
    for found in bench_r8(_list(seeds, int), _list(epsilon, float), _list(adapter, str, ("lora", "head", "full")), keep):
        runs.append(found)
        console.print(
            f"{found['adapter']}, ε {found['epsilon']:g}, seed {found['seed']}: accuracy {found['accuracy']:.4f}, "
            f"macro-F1 {found['macro_f1']:.4f}, {found['seconds']:.0f} s",
            highlight=False,
        )
    if as_json:
        typer.echo(json.dumps({"runs": runs, "means": summary(runs)}, indent=2))
        return
    table = Table(title="R8, test split, mean over seeds")
    for column in ("adapter", "ε", "seeds", "accuracy", "macro-F1", "seconds"):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for row in summary(runs):
        figures = (f"{row['epsilon']:g}", str(row["seeds"]), f"{row['accuracy']:.4f}", f"{row['macro_f1']:.4f}", f"{row['seconds']:.0f}")
        table.add_row(row["adapter"], *figures)
    console.print(table)


@app.command()
def rules(
    data: Annotated[str, typer.Option(help="r8, airlines; commas between them.")] = "r8",
    ranks: Annotated[str, typer.Option(help="same, mixed; commas between them.")] = "mixed",
    rule: Annotated[str, typer.Option(help="Those to run, commas between them; left out, all that are meant for such ranks.")] = "",
    seeds: Annotated[str, typer.Option(help="Commas between them.")] = "0,1,2",
    epsilon: Annotated[str, typer.Option(help="Commas between them; inf is without privacy.")] = "8",
    rounds: Annotated[int | None, typer.Option(min=1, help="Of fedavg; left out, the scenario's.")] = None,
    equal_bytes: Annotated[
        bool, typer.Option("--equal-bytes/--equal-rounds", help="Rules that send half a round have twice the rounds, or as many.")
    ] = True,
    full: Annotated[bool, typer.Option("--full", help="Without privacy, LoRA on all layers, in place of the last two: slow.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, for all runs; may be repeated.")] = None,
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """Aggregation rules for LoRA by data, at equal bytes. Example: lichen bench rules --ranks mixed --epsilon inf --seeds 0."""
    from lichen.simulations.benchmarks.aggregation import DATA, OF_RANKS, RANKS, bench_aggregation, summary

    kinds = _list(ranks, str, RANKS)
    wanted = _list(rule, str, sorted({name for kind in kinds for name in OF_RANKS[kind]})) if rule else []
    console = Console(stderr=as_json)
    runs: list[dict[str, Any]] = []
    asked = (_list(data, str, DATA), kinds, wanted, _list(seeds, int), _list(epsilon, float), rounds)
    for found in bench_aggregation(*asked, equal_bytes=equal_bytes, full=full, settings=settings or (), keep=keep):
        runs.append(found)
        console.print(
            f"{found['data']}, {found['ranks']} ranks, {found['rule']}, ε {found['epsilon']:g}, seed {found['seed']}: "
            f"accuracy {found['accuracy']:.4f}, {found['rounds']} rounds, {found['uplink_bytes'] / 1e6:.2f} MB up, "
            f"{found['seconds']:.0f} s",
            highlight=False,
        )
    if as_json:
        typer.echo(json.dumps({"runs": runs, "means": summary(runs)}, indent=2))
        return
    table = Table(title="Test split, mean over seeds")
    for column in ("data, ranks, rule", "ε", "rounds", "MB up", "down", "accuracy", "validation"):
        table.add_column(column, justify="left" if column.startswith("data") else "right")
    for row in summary(runs):
        sizes = (f"{row['uplink_bytes'] / 1e6:.2f}", f"{row['downlink_bytes'] / 1e6:.2f}")
        scores = (f"{row['accuracy']:.4f}", f"{row['validation']:.4f}")
        table.add_row(f"{row['data']}, {row['ranks']}, {row['rule']}", f"{row['epsilon']:g}", f"{row['rounds']:.0f}", *sizes, *scores)
    console.print(table)


@app.command()
def continual(
    scenario: Annotated[str, typer.Option(help="Which stream of tasks.")] = "20news-incremental",
    methods: Annotated[str, typer.Option(help="Commas between them; left out, all.")] = "",
    seeds: Annotated[str, typer.Option(help="Commas between them; left out, 0, with --full 0,1,2.")] = "",
    epsilon: Annotated[str, typer.Option(help="Commas between them; inf is without privacy.")] = "inf",
    full: Annotated[bool, typer.Option("--full", help="All rows at their full length, three seeds: hours.")] = False,
    validation: Annotated[bool, typer.Option("--validation", help="Score on a part of the training rows, to choose settings by.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, for all runs; may be repeated.")] = None,
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """Continual methods on one stream of tasks, between sequential and joint training. Example: lichen bench continual."""
    from lichen.simulations.benchmarks import continual as bench

    console, runs = Console(stderr=as_json), list[dict[str, Any]]()
    (stream,) = _list(scenario, str, bench.SCENARIOS)
    wanted = _list(methods, str, bench.METHODS) if methods else bench.METHODS
    chosen = _list(seeds or ("0,1,2" if full else "0"), int)
    grid = (stream, wanted, chosen, _list(epsilon, float))
    for found in bench.bench_continual(*grid, full=full, validation=validation, settings=settings or (), keep=keep):
        runs.append(found)
        console.print(
            f"{found['method']}, ε {found['epsilon']:g}, seed {found['seed']}: ACC {found['acc']:.4f}, {found['seconds']:.0f} s",
            highlight=False,
        )
    means = bench.summary(runs)
    if as_json:
        typer.echo(json.dumps({"runs": runs, "means": means, "figures": bench.figures(means)}, indent=2))
        return
    # without lines, so that it has room on a terminal of 80 columns
    table = Table(title=f"{stream}, {'validation' if validation else 'test'} rows, mean over seeds", box=None, padding=(0, 1, 0, 0))
    keys = {"acc": "ACC", "bwt": "BWT", "fwt": "FWT", "forgetting": "forgot", "routed": "routed", "task_known": "known"}
    for column in ("method", "ε", *keys.values(), "least", "most", "MB up"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in means:
        cells = ("" if row[key] is None else f"{row[key]:.3f}" for key in (*keys, "least", "most"))
        table.add_row(row["method"], f"{row['epsilon']:g}", *cells, f"{row['uplink_bytes'] / 1e6:.2f}")
    table.caption = "routed: rows whose task was found; known: accuracy if it were told"
    console.print(table)
    for name, figure in bench.figures(means).items():
        console.print(f"{name}: {figure:.3f} (aim {bench.AIMS[name]:g})", highlight=False)


@app.command()
def clients(
    seeds: Annotated[str, typer.Option(help="Commas between them.")] = "0",
    epsilon: Annotated[str, typer.Option(help="Commas between them; inf is without privacy.")] = "inf,8",
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """Test accuracy on R8 dealt to 200 clients, client-level privacy, by seed. Example: lichen bench clients --epsilon inf,8."""
    from lichen.common.privacy.statement import bound_text
    from lichen.simulations.benchmarks.clients import bench_clients

    console = Console(stderr=as_json)
    runs: list[dict[str, Any]] = []
    for found in bench_clients(_list(seeds, int), _list(epsilon, float), keep):
        runs.append(found)
        spent = "" if found["spent"] is None else f", ε by PLD ≤ {bound_text(found['spent'])}, by PRV ≤ {bound_text(found['spent_prv'])}"
        console.print(
            f"ε {found['epsilon']:g}, seed {found['seed']}: accuracy {found['accuracy']:.4f}, macro-F1 {found['macro_f1']:.4f}{spent}",
            highlight=False,
        )
    if as_json:
        typer.echo(json.dumps({"runs": runs}, indent=2))


@app.command()
def profile(
    base: Annotated[str | None, typer.Option(help="The base model, as a plan names it; MiniLM where left out.", show_default=False)] = None,
    adapter: Annotated[str, typer.Option(help="lora, top (LoRA on two layers), head, full; commas between them.")] = "lora,top,head,full",
    sizes: Annotated[str, typer.Option(help="Rows at once x tokens, commas between them.")] = "4x64,16x128,64x64,32x256",
    as_json: AsJson = False,
) -> None:
    """A training's peak memory as predicted, beside the measured one. Example: lichen bench profile --adapter lora --sizes 16x128."""
    from lichen.simulations.benchmarks.profile import ADAPTERS, MINILM, WITHIN, bench_profile

    asked = [(int(rows), int(length)) for rows, _, length in (size.partition("x") for size in _list(sizes, str))]
    table = Table(title=f"peak memory of a node's worker, MiB (predicted over measured: within {WITHIN:.0%})")
    for column in ("adapter", "private", "rows × tokens", "measured", "predicted", "ratio"):
        table.add_column(column, justify="left" if column in {"adapter", "private"} else "right")
    found = []
    for row in bench_profile(base or MINILM, _list(adapter, str, ADAPTERS), asked):
        found.append(row)
        figures = (f"{row['measured_mb']:.0f}", f"{row['predicted_mb']:.0f}", f"{row['ratio']:.3f}")
        table.add_row(row["adapter"], "yes" if row["private"] else "no", f"{row['rows']} × {row['length']}", *figures)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(table)
