"""`lichen simulate` as people run it: real processes, killed and resumed; what it prints; and the number of every error."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from lichen.client.ledger import Ledger
from lichen.common import cli
from lichen.common.errors import Code
from lichen.common.plan import find_plan, load_plan
from lichen.common.result import read_result
from lichen.coordinator.watch import follow
from lichen.simulations.simulate import deal, run
from streams import STREAM, same, states, told_of

PRIVATE = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "sample_rate": 0.2}
MODEL = Path("model", "adapter_model.safetensors")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan_file(tmp_path: Path, csv_plan: dict[str, Any]) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump(csv_plan | changes), encoding="utf-8")
        return path

    return write


@pytest.fixture
def lichen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process: its exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lichen", "simulate", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return call


@contextmanager
def process(*arguments: object, cwd: Path, seed: int = 0) -> Iterator[subprocess.Popen[str]]:
    """`lichen simulate` as a process of its own, in its own hash order; killed at the end if it still runs."""
    command = [sys.executable, "-m", "lichen.common.cli", "simulate", *map(str, arguments)]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it, children too
    with subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


def until_in_round(out: Path, round: int, running: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until a client has reserved the steps of a round, hence trains, and the round before, scored beside it, is told."""
    until, trains = time.monotonic() + seconds, False
    while time.monotonic() < until:
        for path in () if trains else out.glob("simulation/*/ledger.sqlite"):
            with Ledger(path.parent) as ledger:
                trains = trains or any(entry.round == round for entry in ledger.entries())
        if trains and len(read_result(out).rounds) >= round - 1:
            return
        assert running.poll() is None, running.communicate()
        time.sleep(0.005)
    raise AssertionError(f"round {round} did not begin")


def test_killed_and_interrupted_in_mid_round_it_goes_on_to_the_same_model_at_the_same_cost(
    tmp_path: Path, plan_file: Callable[..., Path], csv_plan: dict[str, Any]
) -> None:
    changes = {
        "rounds": 4,
        "privacy": PRIVATE,
        "local": csv_plan["local"] | {"steps": 20},
        "evaluation": {"federated_every": 1},
        "aggregation": {"optimizer": "fedavgm", "momentum": 0.5, "average_last": 3},
    }
    plan = plan_file(**changes)
    undisturbed = run(load_plan(plan), tmp_path / "undisturbed", "inprocess", workers=None)  # as the command does
    out = tmp_path / "out"

    with process("plan.yaml", "--out", "out", cwd=tmp_path, seed=1) as first:
        until_in_round(out, 2, first)
        first.send_signal(signal.SIGKILL)
        assert first.wait(30) == -signal.SIGKILL
    result = read_result(out)
    assert (result.status, [told.round for told in result.rounds]) == ("running", [1])
    assert result.privacy.max_epsilon == undisturbed.rounds[0].epsilon

    with process("plan.yaml", "--out", "out", "--resume", cwd=tmp_path, seed=2) as second:
        until_in_round(out, 3, second)
        second.send_signal(signal.SIGINT)
        _, errors = second.communicate(timeout=60)
    assert second.returncode == Code.INTERRUPTED, errors
    assert "error 11 (interrupted)" in errors
    result = read_result(out)
    assert (result.status, result.error, [told.round for told in result.rounds]) == ("stopped", "interrupted", [1, 2])

    with process("plan.yaml", "--out", "out", "--resume", cwd=tmp_path, seed=3) as third:
        output, errors = third.communicate(timeout=120)
    assert (third.returncode, errors) == (0, "")
    lines = output.splitlines()
    for number, line in enumerate(lines[:4], 1):
        assert re.fullmatch(
            rf"round {number}/4, 2 participants, 0 failed, accuracy [\d.]+, macro-F1 [\d.]+, ε [\d.]+, up .*, down .*, [\d.]+ s", line
        )
    assert [line.split(" ")[0] for line in lines[4:]] == ["test:", "ε", "model"]
    assert lines[-1] == "model and report: out/model, out/report.html"
    result = read_result(out)
    assert (out / MODEL).read_bytes() == (tmp_path / "undisturbed" / MODEL).read_bytes()
    assert (result.status, result.error, result.final) == ("finished", None, undisturbed.final)
    assert result.privacy == undisturbed.privacy
    assert result.transfer == undisturbed.transfer
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(("method", "told"), [("ewc", 1), ("adapters", 2)])
def test_killed_in_mid_task_a_stream_goes_on_to_the_same_matrix_and_models(
    tmp_path: Path, plan_file: Callable[..., Path], csv_plan: dict[str, Any], method: str, told: int
) -> None:
    """In the first task's second round, or in its last, in which `adapters` has clients send sums."""
    changes = {
        "rounds": 6,
        "local": csv_plan["local"] | {"steps": 20},
        "aggregation": {"optimizer": "fedavgm", "momentum": 0.5},
        "continual": {"method": method, "stream": STREAM, "tolerance": 1.0},
    }
    plan = load_plan(plan_file(**changes))
    undisturbed = run(plan, tmp_path / "undisturbed", "inprocess")
    out = tmp_path / "out"
    with process("plan.yaml", "--out", "out", "--workers", 1, cwd=tmp_path, seed=1) as first:
        until_told(out, told, first)
        first.send_signal(signal.SIGKILL)
        assert first.wait(30) == -signal.SIGKILL
    assert lines_of(out) == told
    assert [version["number"] for version in told_of(out, plan)] == [0], "no task was over"

    result = run(plan, out, "inprocess", resume=True)
    assert (result.continual, result.final) == (undisturbed.continual, undisturbed.final)
    assert result.continual is not None
    assert len(result.continual.matrix) == 2
    assert [line.by_task for line in result.rounds] == [line.by_task for line in undisturbed.rounds]
    assert all(map(same, states(out, plan), states(tmp_path / "undisturbed", plan)))
    assert told_of(out, plan) == told_of(tmp_path / "undisturbed", plan)
    assert models(out) == models(tmp_path / "undisturbed")


def until_told(out: Path, rounds: int, running: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until so many rounds have their lines in `metrics.jsonl`."""
    until = time.monotonic() + seconds
    while lines_of(out) < rounds:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < until, f"round {rounds} was not told"
        time.sleep(0.002)


def lines_of(out: Path) -> int:
    """How many rounds are told in `metrics.jsonl`."""
    file = out / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def models(out: Path) -> dict[str, bytes]:
    """The weights of what is given out, by file."""
    return {str(path.relative_to(out)): path.read_bytes() for path in (out / "model").rglob("*.safetensors")}


def test_a_private_run_prints_epsilon_and_that_a_simulation_protects_nobody(
    tmp_path: Path, plan_file: Callable[..., Path], lichen: Command
) -> None:
    code, output, errors = lichen(plan_file(rounds=1, privacy=PRIVATE), "--out", tmp_path / "out")
    assert (code, errors) == (0, "")
    (told,) = (line for line in output.splitlines() if line.startswith("ε"))
    assert re.fullmatch(r"ε ≤ [1-8]\.\d{3} for each client at δ = 0.001, noise seeded: not private", told)


def test_options_set_the_plan(tmp_path: Path, plan_file: Callable[..., Path], lichen: Command) -> None:
    out = tmp_path / "out"
    settings = ("--set", "rounds=1", "--set", "cohort.size=4", "--set", "local.learning_rate=1e-2")
    code, output, errors = lichen(plan_file(), "--out", out, "--clients", 5, "--partition", "dirichlet:2.0", *settings, "--json")
    assert code == 0
    assert output == (out / "result.json").read_text()
    assert re.search(r"^round 1/1, 4 participants", errors, re.MULTILINE)  # standard output is for the document alone
    assert json.loads(output)["rounds"][0]["participants"] == 4
    plan = load_plan(out / "plan.yaml")
    assert (plan.simulation.clients, plan.simulation.partition, plan.rounds, plan.local.learning_rate) == (5, "dirichlet:2.0", 1, 0.01)
    assert len(json.loads((out / "simulation.json").read_text())["examples"]) == 5


GOOD = ("--set", "rounds=1")
REFUSED: dict[str, tuple[tuple[str, ...], int | Code, str]] = {
    "no --out": ((), 2, "--out"),
    "an unknown option": (("--out", "OUT", "--nodes", "3"), 2, "--nodes"),
    "an unknown engine": (("--out", "OUT", "--engine", "cloud"), 2, "ray"),
    "a setting without a value": (("--out", "OUT", "--set", "rounds"), Code.PLAN_INVALID, "KEY.PATH=VALUE"),
    "a setting of an unknown key": (("--out", "OUT", "--set", "local.step=3"), Code.PLAN_INVALID, "nearest valid: steps"),
    "no clients": (("--out", "OUT", "--clients", "0"), Code.PLAN_INVALID, "simulation.clients"),
    "an unsound plan": (("--out", "OUT", "--set", "aggregation.average_last=9"), Code.PLAN_UNSOUND, "average_last"),
    "a newer plan": (("--out", "OUT", "--set", "format=2"), Code.PLAN_VERSION, "Upgrade"),
    "an unknown partition": (("--out", "OUT", "--partition", "random"), Code.PARTITION_INVALID, "dirichlet"),
    "a partition by a column that is not": (("--out", "OUT", "--partition", "by:hospital"), Code.PARTITION_INVALID, "hospital"),
    "an unknown data set": (("--out", "OUT", "--set", "simulation.data=mnist"), Code.DATASET_UNKNOWN, "r8"),
    "no data": (("--out", "OUT", "--set", "simulation.data=null"), Code.PLAN_INVALID, "simulation.data"),
    "a file that is not": (("--out", "OUT", "--set", "simulation.data.path=gone.csv"), Code.DATA_NOT_FOUND, "gone.csv"),
    "a column that is not": (("--out", "OUT", "--set", "simulation.data.fields={text: TEXT, label: TOPIC}"), Code.DATA_FIELD, "TEXT"),
    "no label": (("--out", "OUT", "--set", "simulation.data.fields={text: BODY}"), Code.DATA_FIELD, "label"),
    "labels of another task": (("--out", "OUT", "--set", "task.labels=[crop, metal]"), Code.DATA_LABEL, "money"),
    "a model that is not": (("--out", "OUT", "--set", "model.base=/no/such/model"), Code.MODEL_NOT_FOUND, "model.base"),
    "targets that are not": (("--out", "OUT", "--set", "model.adapter.targets=[gates]"), Code.MODEL_UNSUPPORTED, "targets"),
    "more asked than simulated": (("--out", "OUT", "--clients", "1"), Code.PARTITION_INVALID, "cohort.size"),
    "clients that diverge": (("--out", "OUT", *GOOD, "--set", "local.learning_rate=1e30"), Code.COHORT_TOO_SMALL, "usable updates"),
    "a file for --out": (("--out", "FILE"), Code.OUTPUT_UNUSABLE, "not a run directory"),
    "a file above --out": (("--out", "FILE/out"), Code.OUTPUT_UNUSABLE, "cannot write"),
    "a foreign --out": (("--out", "FOREIGN"), Code.OUTPUT_UNUSABLE, "not a run directory"),
    "a foreign --out to resume": (("--out", "FOREIGN", "--resume"), Code.OUTPUT_UNUSABLE, "not a run directory"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_every_refusal_has_its_number_and_says_what_to_look_at(
    tmp_path: Path, plan_file: Callable[..., Path], lichen: Command, what: str
) -> None:
    (tmp_path / "FOREIGN").mkdir()
    (tmp_path / "FOREIGN" / "plan.yaml").write_text("mine")
    (tmp_path / "FILE").write_text("mine")
    arguments, number, words = REFUSED[what]
    places = [str(tmp_path / part) if part.startswith(("OUT", "FILE", "FOREIGN")) else part for part in arguments]
    code, output, errors = lichen(plan_file(), *places)
    assert (code, output) == (int(number), ""), errors
    assert words in errors
    assert "Traceback" not in errors
    if isinstance(number, Code):
        assert f"error {int(number)} ({number.name.lower().replace('_', '-')})" in errors
    assert (tmp_path / "FOREIGN" / "plan.yaml").read_text() == (tmp_path / "FILE").read_text() == "mine"
    assert (tmp_path / "OUT").exists() == (number is Code.COHORT_TOO_SMALL), "only a run that began is in the way of the next"


def test_a_run_that_is_there_is_not_shown_as_this_one_and_not_overwritten(
    tmp_path: Path, plan_file: Callable[..., Path], lichen: Command
) -> None:
    out = tmp_path / "out"
    assert lichen(plan_file(), "--out", out, *GOOD)[0] == 0
    before = (out / "result.json").read_bytes()
    for extra, number in (((), Code.OUTPUT_EXISTS), (("--resume", "--set", "seed=9"), Code.OUTPUT_UNUSABLE)):
        code, output, errors = lichen(plan_file(), "--out", out, *GOOD, *extra)
        assert code == number, errors
        assert "accuracy" not in output or extra
    assert (out / "result.json").read_bytes() == before
    code, output, _ = lichen(plan_file(), "--out", out, *GOOD, "--resume")  # finished already: told again
    assert code == 0
    assert "test: accuracy" in output


def test_entities_at_several_clients_are_told(tmp_path: Path, plan_file: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    entity = PRIVATE | {"unit": "entity", "unit_field": "site"}
    for partition, told in (("iid", "2 of 2 entities (site)"), ("by:site", "")):
        caplog.clear()
        simulation = yaml.safe_load(plan_file().read_text())["simulation"] | {"partition": partition}
        deal(load_plan(plan_file(privacy=entity, simulation=simulation | {"clients": 2})), tmp_path / partition[:2])
        assert told in caplog.text
        assert bool(told) == ("rows at several clients" in caplog.text)


def test_a_failed_run_says_so_in_its_directory(tmp_path: Path, plan_file: Callable[..., Path], lichen: Command) -> None:
    code, _, _ = lichen(plan_file(), "--out", tmp_path / "out", "--set", "local.learning_rate=1e30")
    result = read_result(tmp_path / "out")
    assert (code, result.status, result.final) == (Code.COHORT_TOO_SMALL, "failed", None)
    assert str(int(Code.MODEL_NOT_TRAINED)) in (result.error or "")


def test_scenarios_go_by_name(tmp_path: Path, lichen: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_plan("r8") == find_plan("r8.yaml")
    assert load_plan(find_plan("r8")).name == "r8"
    (tmp_path / "r8").write_text("mine")  # a file that is there goes first
    assert find_plan("r8") == Path("r8")
    for name in ("no-such", "../scenarios/r8", str(tmp_path)):
        code, _, errors = lichen(name, "--out", tmp_path / "out")
        assert code == Code.PLAN_UNREADABLE
        assert "Scenarios:" in errors
    assert not (tmp_path / "out").exists()


def test_all_scenarios_are_sound() -> None:
    for path in find_plan("r8").parent.glob("*.yaml"):
        assert load_plan(path).name == path.stem


def test_help_has_an_example(lichen: Command) -> None:
    code, output, _ = lichen("--help")
    assert code == 0
    assert "lichen simulate r8 --out runs/r8" in output.replace("\n", " ").replace("  ", " ")


def test_a_terminal_shows_how_far_the_round_is(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("rounds: 3\n")
    stop, screen = threading.Event(), io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    shown = {"stop": stop, "console": console, "within": lambda: "2 of 4 clients done (train)"}
    watcher = threading.Thread(target=follow, args=(tmp_path,), kwargs=shown)
    watcher.start()
    until = time.monotonic() + 10
    while "clients done" not in screen.getvalue() and time.monotonic() < until:
        time.sleep(0.02)
    stop.set()
    watcher.join(10)
    assert "round 1 of 3: 2 of 4 clients done (train) …" in screen.getvalue()
