"""`lichen demo`: a coordinator and its agents as real processes on loopback, over mutual TLS, by the commands that people use."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lichen.common.continual.stream import is_online
from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, find_plan, load_plan
from lichen.common.privacy.statement import bound_text
from lichen.common.result import Result, metric_title, read_result, write_atomically
from lichen.simulations.deliveries import Deliveries

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
LICHEN = (sys.executable, "-m", "lichen.common.cli")
Observer = Callable[[str, list[int]], None]
"""Called with ``idle`` or ``loaded``, and the agents' process ids."""
START_S = 60.0
STOP_S = 20.0


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run directory to write.", show_default=False)],
    plan: Annotated[str, typer.Option(help="A scenario, or a plan file with a simulation section.")] = "r8",
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Replace a key of the plan.")] = None,
) -> None:
    """Run a real federation on this machine. Example: lichen demo --out lichen-demo."""
    from lichen.coordinator.run_directory import open_for

    console = Console()
    found = load_plan(find_plan(plan), settings or ())
    open_for(out, resume=False)
    out.mkdir(parents=True, exist_ok=True)
    result = federate(found, out.resolve(), console)
    tell(result, out, console)
    if result.status != "finished":
        raise LichenError(
            Code.CHECK_FAILED, f"the run ended as {result.status}: {result.error}", where=str(out), fix="Its logs are in logs/."
        )


def federate(
    plan: Plan,
    out: Path,
    console: Console,
    observe: Observer | None = None,
    command: Sequence[str] = LICHEN,
    deliver: Callable[[Plan, Sequence[Path]], Deliveries] = Deliveries,
) -> Result:
    """Deal the plan's data to nodes, enrol them, submit the plan, and follow the run until it ends; online, data come in files meanwhile.

    Args:
        plan: with a `simulation` section, which says what data there is.
        out: where the processes' homes and logs go, and the run directory at the end.
        console: told of what happens.
        observe: shown the agents' processes, once idle and once at the end of the run, their models still loaded.
        command: what starts the coordinator and the agents: `lichen`, or what times it.
        deliver: makes what brings the files of an online run.

    Raises:
        LichenError: what a command failed with.
    """
    from lichen.coordinator.watch import ended, follow
    from lichen.simulations.simulate import deal

    began = time.monotonic()
    privacy = f", {plan.privacy.unit}-level differential privacy at ε ≤ {plan.privacy.epsilon:g}" if plan.private else ", no privacy"
    out.mkdir(parents=True, exist_ok=True)
    console.print(f"{plan.name}: {plan.simulation.clients} agents, {plan.rounds} rounds{privacy}", highlight=False)
    dealt, splits = deal(plan, out / "nodes")
    homes = dealt.write_all()
    if not plan.private or plan.central:
        what = "adds its noise at the coordinator" if plan.central else "has no privacy"
        console.print(f"the plan {what}, which a node refuses by default; the demo's nodes permit it in their policy.yaml")
        permits = "format: 1\nunnoised_updates_to_coordinator: allow\n" + ("privacy: {require: [client]}\n" if plan.central else "")
        for home in homes:
            (home / "policy.yaml").write_text(permits, encoding="utf-8")
    deliveries = deliver(plan, homes) if is_online(plan) else None
    write_atomically(out / "plan.yaml", plan.to_yaml())
    coordinator = out / "coordinator"
    _lichen("coordinator", "init", "--home", coordinator, "--host", "127.0.0.1", "--fleet-port", "0", "--enrol-port", "0")
    (out / "logs").mkdir()
    with _processes(command) as start:
        service = start(out / "logs" / "coordinator.log", "coordinator", "serve", "--home", coordinator)
        _wait_ready(service, out / "logs" / "coordinator.log")
        agents = []
        for home in homes:
            invite = _lichen("coordinator", "invite", home.name, "--home", coordinator).strip().splitlines()[-1]
            _lichen("client", "join", "-", "--home", home, stdin=invite)
            agents.append(start(out / "logs" / f"{home.name}.log", "client", "run", "--home", home).pid)
        console.print(f"coordinator and {len(homes)} agents are up: processes of their own, mutual TLS ({time.monotonic() - began:.0f} s)")
        if observe:
            observe("idle", agents)
        files = [argument for split in splits for argument in (f"--{split}", splits[split])]
        told = json.loads(_lichen("coordinator", "submit", out / "plan.yaml", "--home", coordinator, "--json", *files))
        run = coordinator / "runs" / str(told["run_id"])

        def over() -> bool:
            if deliveries:
                deliveries.go_on(run)
            return ended(run) or service.poll() is not None

        follow(run, stop=over, console=console)
        if observe:
            observe("loaded", agents)
    for batch in deliveries.begun if deliveries else ():
        console.print(f"batch {batch.batch} began {batch.seconds:.1f} s after the files were there that made enough", highlight=False)
    shutil.copytree(run, out, dirs_exist_ok=True)
    return read_result(out)


def tell(result: Result, out: Path, console: Console) -> None:
    """Say what came out, and how to load it."""
    final = result.final or {}
    if final:
        told = [f"{metric_title(key)} {final[key]:.4f}" for key in ("accuracy", "macro_f1", "perplexity") if key in final]
        console.print(f"{final['split']}: {', '.join(told)}")
    privacy = result.privacy
    if privacy.max_epsilon is not None:
        console.print(
            f"ε ≤ {bound_text(privacy.max_epsilon)} for each client at δ = {privacy.delta:g} ({privacy.unit}, {privacy.adjacency})"
        )
    card = out / "model" / "README.md"
    if card.exists():
        snippet = card.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
        console.print(f"\nLoad the model (in {out}):\n")
        console.print(snippet, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {out / 'report.html'}")


def _lichen(*arguments: str | Path, stdin: str | None = None) -> str:
    """One command to its end; its output."""
    done = subprocess.run([*LICHEN, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        code = Code(done.returncode) if done.returncode in set(Code) else Code.INTERNAL
        raise LichenError(code, done.stderr.strip(), where=f"lichen {' '.join(map(str, arguments[:2]))}")
    return done.stdout


@contextmanager
def _processes(lichen: Sequence[str]) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Long-lived processes, all stopped at the end, the youngest first."""
    started: list[subprocess.Popen[bytes]] = []

    def start(log: Path, *arguments: str | Path) -> subprocess.Popen[bytes]:
        # agents train side by side: more threads than cores would only wait for each other. The coordinator scores while they rest
        # and each has a ledger of its own: what a demo spends is not its user's
        own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "LICHEN_LEDGER": "."}
        environment = os.environ | (own if "client" in arguments else {})
        with log.open("wb") as out:
            command = [*lichen, *map(str, arguments)]
            started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment))
        return started[-1]

    try:
        yield start
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in reversed(started):
            try:
                process.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(service: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and service.poll() is None:
        if "ready:" in log.read_text(encoding="utf-8", errors="replace"):
            return
        time.sleep(0.1)
    raise LichenError(Code.SERVICE_UNREACHABLE, log.read_text(encoding="utf-8", errors="replace")[-2000:], where="lichen coordinator serve")
