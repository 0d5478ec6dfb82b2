"""`lichen bench continual`, on the tiny model: real runs between sequential and joint training, and what their means say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from lichen.common.errors import Code, LichenError
from lichen.common.plan import DataSource, find_plan, load_plan
from lichen.simulations.benchmarks.cli import app
from lichen.simulations.benchmarks.continual import METHODS, SCENARIOS, data_of, figures, plan_of
from lichen.simulations.simulate import deal

STREAM = [{"name": "fields", "labels": ["crop", "metal"]}, {"name": "banks", "labels": ["money"]}]


@pytest.fixture
def small(csv_plan: dict[str, Any]) -> list[str]:
    """The tiny model and its rows in place of MiniLM and 20 Newsgroups."""
    data, labels = (json.dumps(value) for value in (csv_plan["simulation"]["data"], csv_plan["task"]["labels"]))
    model = ["task.max_length=32", f"task.labels={labels}", f"model.base={csv_plan['model']['base']}", "model.adapter.last_layers=null"]
    stream = [f"continual.stream={json.dumps(STREAM)}", "rounds=4", "aggregation.average_last=1"]
    few = ["simulation.partition=iid", "simulation.clients=3", "cohort.size=3", "cohort.minimum=3", "local.steps=3"]
    return [*model, *stream, *few, f"simulation.data={data}"]


@pytest.mark.long
def test_each_method_is_run_and_held_between_sequential_and_joint(small: list[str], tmp_path: Path) -> None:
    options = [word for setting in small for word in ("--set", setting)]
    command = ["continual", "--full", "--methods", "sequential,adapters", "--seeds", "0,1"]
    done = CliRunner().invoke(app, [*command, *options, "--keep", str(tmp_path), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [(row["method"], row["seed"]) for row in told["runs"]] == [
        (method, seed) for method in ("sequential", "adapters") for seed in (0, 1)
    ]
    for mean in told["means"]:
        assert (mean["seeds"], mean["epsilon"]) == (2, float("inf"))
        assert mean["least"] <= mean["acc"] <= mean["most"]
        assert (mean["routed"] is None) == (mean["method"] != "adapters")
    assert told["figures"] == {}, "without joint training there is no ceiling"
    run = tmp_path / "20news-incremental-adapters-inf-1"
    written = (run / "result.json").stat()
    again = CliRunner().invoke(app, [*command, *options, "--keep", str(tmp_path), "--json"], catch_exceptions=False)
    assert json.loads(again.stdout) == told
    assert (run / "result.json").stat() == written
    plans = {data_of(SCENARIOS[0], tmp_path, full=False, validation=validation)[0] for validation in (False, True)}
    assert len(plans) == 2, "what was scored on other rows is not read for these"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epsilon", [float("inf"), 8.0])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_plan_of_a_stream_is_sound(scenario: str, method: str, epsilon: float) -> None:
    plan = plan_of(scenario, method, epsilon, ("rounds=15",))
    assert plan.private == (epsilon == 8.0)
    assert bool(plan.continual.stream) == (method != "joint")
    assert plan.task == load_plan(find_plan(scenario)).task
    if method == "analytic":
        assert plan.rounds == len(plan.continual.stream)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_settings_are_chosen_on_training_rows(scenario: str, tmp_path: Path) -> None:
    plan = load_plan(find_plan(scenario))
    try:
        _, splits = deal(plan, tmp_path / "scored")
    except LichenError as error:
        if error.code is Code.EXTRA_MISSING:
            pytest.skip(str(error))
        raise
    chosen = load_plan(find_plan(scenario), data_of(scenario, tmp_path, full=True, validation=True))
    source = chosen.simulation.data
    assert isinstance(source, DataSource)

    def texts(path: str | None) -> set[str]:
        return set(pq.read_table(path, columns=["text"])["text"].to_pylist())

    held = texts(source.test)
    assert len(held) > 1000
    assert not held & texts(source.path)
    if plan.evaluation.test_fraction:  # the test rows of 20 Newsgroups repeat some of the others
        assert not held & texts(splits["test"])


def test_the_figures_follow_from_the_means() -> None:
    def row(method: str, acc: float, forgetting: float = 0.0, epsilon: float = float("inf"), routed: float | None = None) -> dict[str, Any]:
        return {"method": method, "acc": acc, "bwt": -forgetting, "forgetting": forgetting, "epsilon": epsilon, "routed": routed}

    means = [
        row("sequential", 0.2, 0.8),
        row("joint", 0.8),
        row("lwf", 0.5, 0.3),
        row("adapters", 0.7, 0.1, routed=0.9),
        row("replay", 0.75),
        row("adapters", 0.68, epsilon=8.0),
    ]
    found = figures(means)
    assert found == pytest.approx(
        {"gap": 0.55 / 0.6, "gap without stored examples": 0.5 / 0.6, "forgetting": 0.125, "routed": 0.9, "private loss": 0.02}
        | {"below joint": 0.05}  # of replay, which has lost nothing
    )
    assert figures(means[:1]) == figures(means[2:]) == {}
