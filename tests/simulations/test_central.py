"""Client-level privacy in whole runs: what they tell and what they don't, crashes on either side of the noise, both engines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from lichen.common import records
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State
from lichen.common.plan import Plan, parse_plan
from lichen.common.result import Result, read_result
from lichen.common.tasks import workbench
from lichen.coordinator.aggregation.central_dp import CentralDP
from lichen.coordinator.app import OwnData
from lichen.coordinator.app import app as server_app
from lichen.coordinator.run_directory import RunDirectory
from lichen.simulations.engine import InProcessGrid
from lichen.simulations.simulate import run

NAMES = [f"client-{number}" for number in range(6)]
CENTRAL = {"unit": "client", "noise": "central", "epsilon": 8.0, "delta": 1e-3, "clip": 0.5}
COHORT = {"size": 3, "population": 6, "deadline_s": 60}
SECRET_KEYS = ("participants", "failed", "train_loss", "federated", "uplink_bytes", "downlink_bytes", "seconds")


class Federation:
    """Six clients that send what they are told to, on the real grid and the real ServerApp."""

    def __init__(self, out: Path, plan: Plan, engine: str = "deployed", send: Callable[[str, State], State] | None = None) -> None:
        self.out, self.plan, self.engine, self.send = out, plan, engine, send
        self.failing: set[str] = set()
        self.asked: list[tuple[int, str]] = []
        self.clips: list[float | None] = []
        app = ClientApp()
        app.train()(self._answer)
        self.grid = InProcessGrid(app, [out / name for name in NAMES], 7)

    def _answer(self, message: Message, context: Context) -> Message:
        name = str(context.node_config["name"])
        assignment = records.from_config(records.Assignment, message.content.config_records["assignment"])
        self.asked.append((assignment.round, name))
        self.clips.append(assignment.clip)
        if name in self.failing:
            return records.error_reply(message, int(Code.DATA_ROW))
        start = records.get_tensors(message.content, None)
        update = self.send(name, start) if self.send else {key: torch.zeros_like(tensor) for key, tensor in start.items()}
        content = RecordDict({"report": ConfigRecord({"format": 1, "client": name, "round": assignment.round, "steps": 1})})
        records.put_tensors(content, update, None)
        return records.reply(message, content)

    def run(self) -> Result:
        config = {"plan": self.plan.canonical_json(), "directory": str(self.out), "engine": self.engine}
        server_app(self.grid, Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config=config))
        return read_result(self.out)

    def model(self) -> State:
        state = RunDirectory(self.out, self.plan).load_state()
        assert state is not None
        return state.model

    def for_operator(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "operator.jsonl").read_text().splitlines()]


@pytest.fixture
def plan_of(tiny_plan: dict[str, Any]) -> Callable[..., Plan]:
    def make(rounds: int = 2, cohort: dict[str, Any] | None = None, **privacy: Any) -> Plan:
        as_they_are = {"uplink": {"codec": "none"}, "downlink": {"codec": "none"}}
        sections = {"rounds": rounds, "cohort": COHORT | (cohort or {}), "privacy": CENTRAL | privacy, "transfer": as_they_are}
        return parse_plan(tiny_plan | sections)

    return make


# --- what is told ---


def test_the_result_tells_one_epsilon_and_nothing_of_the_cohort(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    federation = Federation(tmp_path, plan_of())
    result = federation.run()
    assert (result.status, result.privacy.unit, result.privacy.noise, result.privacy.clients) == ("finished", "client", "secret", {})
    central = result.privacy.central
    assert central is not None
    assert (central.releases, central.sample_rate) == (2, 0.5)
    assert 7.9 < central.epsilon <= 8
    assert result.privacy.max_epsilon == central.epsilon == result.rounds[-1].epsilon
    assert central.epsilon_prv == pytest.approx(central.epsilon, rel=5e-3)
    assert (result.seconds, result.transfer.uplink_bytes, result.transfer.bits_per_parameter) == (None, None, None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in [*lines, *(told.model_dump() for told in result.rounds)]:
        assert [line[key] for key in SECRET_KEYS] == [None] * len(SECRET_KEYS)
        assert line["errors"] == {}
    kept = federation.for_operator()
    assert [line["participants"] for line in kept] == [sum(asked == n for asked, _ in federation.asked) for n in (1, 2)]
    assert (tmp_path / "operator.jsonl").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "checkpoints" / "cohort.json").stat().st_mode & 0o777 == 0o600
    report = (tmp_path / "report.html").read_text()
    assert "the coordinator (promised)" in report
    assert "updates used" not in report


def test_absent_failed_and_idle_clients_look_alike(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    """All three add zero; in a seeded simulation what is told is then the same to the last byte, but for the time of writing."""
    told = []
    for number, failing in enumerate(([], NAMES, ["client-1"])):
        federation = Federation(tmp_path / str(number), plan_of(), "inprocess")
        federation.failing = set(failing)
        federation.run()
        files = ("result.json", "metrics.jsonl", "report.html", "plan.yaml")
        texts = [(federation.out / name).read_text() for name in files]
        told.append([re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "", text) for text in texts])
    assert told[0] == told[1] == told[2]
    assert sum(line["failed"] for line in federation.for_operator()) == [name for _, name in federation.asked].count("client-1")


def test_a_cohort_of_nobody_releases_noise_alone(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(1, {"size": 1, "population": 900}, epsilon=2.0)
    federation = Federation(tmp_path, plan, "inprocess")  # seeded, because one draw in 150 has somebody
    result = federation.run()
    assert federation.asked == []
    assert federation.for_operator()[0]["participants"] == 0
    start = workbench(plan).start
    moved = torch.cat([(federation.model()[name] - start[name]).flatten() for name in start]).double()
    std = CentralDP(plan, secret=True).noise.update * 0.5 / 1
    assert abs(float(moved.std()) / std - 1) < 4.5 / (2 * moved.numel()) ** 0.5
    assert result.status == "finished"


def test_one_update_however_large_moves_the_model_by_the_clip(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    everybody = {"size": 6, "population": 6}
    models = []
    for number, factor in enumerate((0.0, 1e20)):

        def send(name: str, start: State, factor: float = factor) -> State:
            return {key: torch.full_like(tensor, factor if name == "client-3" else 1.0) for key, tensor in start.items()}

        federation = Federation(tmp_path / str(number), plan_of(1, everybody), "inprocess", send)
        federation.run()
        models.append(federation.model())
    apart = sum(float((models[0][name] - models[1][name]).double().square().sum()) for name in models[0]) ** 0.5
    assert apart == pytest.approx(0.5 / 6, rel=1e-3)


def test_the_clip_travels_and_adapts(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(6, {"size": 6, "population": 6}, adaptive_clip={"learning_rate": 0.5}, epsilon=50.0)
    federation = Federation(tmp_path, plan)  # zeros lie within any clip, so it falls
    federation.run()
    clips = list(dict.fromkeys(federation.clips))
    assert clips[0] == 0.5
    assert len(clips) == 6
    assert clips[-1] is not None
    assert clips[-1] < 0.3


# --- crashes ---


class KilledError(Exception):
    """Stands in for a kill."""


def killed(*_: Any) -> None:
    raise KilledError


def test_a_crash_after_the_noise_releases_the_same_sum(
    tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a second noise on the sum, nor the same noise on another sum: both would take it off."""
    drawn: list[int] = []
    original = CentralDP.release
    monkeypatch.setattr(CentralDP, "release", lambda self, total, round: drawn.append(round) or original(self, total, round))
    federation = Federation(tmp_path, plan_of(adaptive_clip={}))
    monkeypatch.setattr(RunDirectory, "save_state", killed)
    with pytest.raises(KilledError):
        federation.run()
    monkeypatch.undo()
    monkeypatch.setattr(CentralDP, "release", lambda self, total, round: drawn.append(round) or original(self, total, round))
    left = RunDirectory(tmp_path, federation.plan).load_release(1)
    assert left is not None
    assert drawn == [1]
    assert (read_result(tmp_path).privacy.max_epsilon or 0) > 0, "it may have left, so it is told as spent"

    before = list(federation.asked)
    federation.send = lambda name, start: {
        key: torch.ones_like(tensor) for key, tensor in start.items()
    }  # who is asked again answers otherwise
    result = federation.run()
    assert (result.status, drawn) == ("finished", [1, 2])
    assert [asked for asked in federation.asked[len(before) :] if asked[0] == 1] == []
    assert result.privacy.central is not None
    assert result.privacy.central.releases == 2

    first = sorted((tmp_path / "checkpoints").glob("round-*.safetensors"))[0]
    start = workbench(federation.plan).start
    stored = load_file(first)
    for name, tensor in left.update.items():
        torch.testing.assert_close(stored[f"model/{name}"], start[name] + tensor)


def test_a_crash_before_the_score_tells_the_same_afterwards(
    tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the operator alone may see of the round comes from the operator's own file: no checkpoint holds it."""
    monkeypatch.setattr(OwnData, "has_validation", True)
    monkeypatch.setattr(OwnData, "validation", lambda self, state, stage: {"accuracy": 0.5})
    whole = Federation(tmp_path / "whole", plan_of(), engine="inprocess")
    result = whole.run()
    assert [told.validation for told in result.rounds] == [{"accuracy": 0.5}] * 2

    federation = Federation(tmp_path / "killed", plan_of(), engine="inprocess")
    with monkeypatch.context() as patch:
        patch.setattr(OwnData, "validation", killed)
        with pytest.raises(KilledError):
            federation.run()
    (line,) = federation.for_operator()
    assert (line["round"], line["validation"]) == (1, None)
    assert read_result(federation.out).rounds == []
    state = RunDirectory(federation.out, federation.plan).load_state()
    assert state is not None
    assert (state.round, state.told) == (1, None)

    again = federation.run()
    assert again.rounds == result.rounds
    assert again.privacy == result.privacy
    for one, other in zip(federation.for_operator(), whole.for_operator(), strict=True):
        assert one | {"seconds": None} == other | {"seconds": None}


def test_a_crash_before_the_noise_asks_the_same_cohort(
    tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation(tmp_path, plan_of(1))
    monkeypatch.setattr(CentralDP, "release", killed)
    with pytest.raises(KilledError):
        federation.run()
    asked = list(federation.asked)
    assert RunDirectory(tmp_path, federation.plan).load_release(1) is None
    assert read_result(tmp_path).privacy.max_epsilon == 0, "nothing left"
    monkeypatch.undo()
    monkeypatch.setattr(CentralDP, "draw", killed)
    assert federation.run().status == "finished"
    assert federation.asked == asked * 2


def test_a_damaged_release_is_not_drawn_again(tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation(tmp_path, plan_of(1))
    monkeypatch.setattr(RunDirectory, "save_state", killed)
    with pytest.raises(KilledError):
        federation.run()
    monkeypatch.undo()
    (tmp_path / "checkpoints" / "release.safetensors").write_bytes(b"\0" * 30)
    with pytest.raises(LichenError) as caught:
        federation.run()
    assert caught.value.code is Code.OUTPUT_UNUSABLE


def test_a_run_from_a_backup_does_not_go_on(tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounds after the backup left already: their sums may not be noised again."""
    federation = Federation(tmp_path, plan_of(2))
    monkeypatch.setattr(CentralDP, "release", killed)
    with pytest.raises(KilledError):
        federation.run()
    monkeypatch.undo()
    (tmp_path / "checkpoints" / "restored").touch()
    asked = len(federation.asked)
    with pytest.raises(LichenError, match="restored from a backup") as caught:
        federation.run()
    assert (caught.value.code, len(federation.asked)) == (Code.OUTPUT_UNUSABLE, asked)


# --- simulations ---


@pytest.fixture
def simulated(csv_plan: dict[str, Any]) -> dict[str, Any]:
    simulation = csv_plan["simulation"] | {"clients": 6}
    privacy = CENTRAL | {"epsilon": 50.0, "clip": 2.0, "adaptive_clip": {}}
    return csv_plan | {"cohort": COHORT, "privacy": privacy, "simulation": simulation}


def test_a_simulation_repeats_resumes_and_says_that_it_is_not_private(
    tmp_path: Path, simulated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = parse_plan(simulated)
    result = run(plan, tmp_path / "one", "inprocess")
    assert (result.status, result.privacy.noise) == ("finished", "seeded: not private")
    assert result.final is not None
    assert 0 < (result.privacy.max_epsilon or 0) <= 50
    kept = (tmp_path / "one" / "operator.jsonl").read_text()
    assert '"failed":0' in kept
    assert '"errors":{}' in kept

    monkeypatch.setattr(RunDirectory, "save_state", killed)
    with pytest.raises(KilledError):
        run(plan, tmp_path / "two", "inprocess")
    monkeypatch.undo()
    again = run(plan, tmp_path / "two", "inprocess", resume=True)
    assert (again.final, again.privacy) == (result.final, result.privacy)
    one, two = (tmp_path / name / "model" / "adapter_model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_the_population_is_that_of_the_simulation(tmp_path: Path, simulated: dict[str, Any]) -> None:
    plan = parse_plan(simulated | {"cohort": COHORT | {"population": 60}})
    with pytest.raises(LichenError, match=r"cohort\.population is 60, but 6 clients are simulated") as caught:
        run(plan, tmp_path, "inprocess")
    assert caught.value.code is Code.PARTITION_INVALID


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_ray_gives_the_same_model_where_all_are_drawn(tmp_path: Path, simulated: dict[str, Any]) -> None:
    pytest.importorskip("ray")
    plan = parse_plan(simulated | {"cohort": COHORT | {"size": 6}})
    ours, rays = run(plan, tmp_path / "one", "inprocess"), run(plan, tmp_path / "ray", "ray")
    assert rays.privacy == ours.privacy
    assert rays.final == ours.final
    assert [told.without_cohort() for told in rays.rounds] == rays.rounds
