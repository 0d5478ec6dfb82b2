"""Simulations in which clients have speeds: late ones are late every time alike, whatever computes them, and a killed run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lichen.common.errors import Code, LichenError
from lichen.common.plan import parse_plan
from lichen.common.result import Result
from lichen.simulations.simulate import run as simulate

SPEEDS = [1.0, 1.0, 0.25]
BUFFERED = {"size": 3, "minimum": 1, "mode": "buffered", "buffer": 2, "deadline_s": 1000}


def plan_with(csv_plan: dict[str, Any], **changes: Any) -> dict[str, Any]:
    document = csv_plan | {"rounds": 4, "simulation": csv_plan["simulation"] | {"speeds": SPEEDS}}
    document["local"] = document["local"] | {"steps": 4} | changes.pop("local", {})
    return document | changes


def lines(result: Result) -> list[dict[str, Any]]:
    return [told.model_dump(exclude={"seconds"}) for told in result.rounds]


def same(left: Path, right: Path) -> bool:
    models = [load_file(out / "model" / "adapter_model.safetensors") for out in (left, right)]
    return all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


@pytest.mark.parametrize(
    "changes",
    [
        {"cohort": BUFFERED},
        {"cohort": {"size": 2, "minimum": 2, "oversample": 1.5}},
        {"cohort": {"size": 3, "minimum": 2, "deadline_s": 10}, "local": {"partial": True}},
    ],
    ids=["buffered", "oversample", "partial"],
)
def test_it_is_the_same_every_time(tmp_path: Path, csv_plan: dict[str, Any], changes: dict[str, Any]) -> None:
    """To the bit with as many workers; with others too, but for the rounding of clients that pass through the model together."""
    plan = parse_plan(plan_with(csv_plan, **changes))
    one, two, alone = (simulate(plan, tmp_path / name, "inprocess", workers=count) for name, count in (("a", 2), ("b", 2), ("c", 1)))
    assert lines(one) == lines(two)
    assert same(tmp_path / "a", tmp_path / "b")
    told = [(round.participants, round.failed, round.unneeded, round.staleness) for round in one.rounds]
    assert told == [(round.participants, round.failed, round.unneeded, round.staleness) for round in alone.rounds]


def test_partial_work_is_what_the_speed_allows(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    """At a quarter of the speed two of four steps fit into 9 of 10 seconds."""
    cohort = {"size": 3, "minimum": 2, "deadline_s": 10}
    whole = simulate(parse_plan(plan_with(csv_plan, cohort=cohort)), tmp_path / "whole", "inprocess")
    part = simulate(parse_plan(plan_with(csv_plan, cohort=cohort, local={"partial": True})), tmp_path / "part", "inprocess")
    assert [told.errors for told in whole.rounds] == [{"client-2": None}] * 4
    assert [(told.participants, told.errors) for told in part.rounds] == [(3, {})] * 4


def test_a_buffered_simulation_that_was_killed_goes_on(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    privacy = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "sample_rate": 0.2}
    plan = parse_plan(plan_with(csv_plan, cohort=BUFFERED, privacy=privacy))
    asked = 0

    def kill(kind: str, done: int, of: int) -> None:
        nonlocal asked
        asked += 1
        if asked == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(plan, tmp_path / "run", "inprocess", progress=kill, workers=1)
    result = simulate(plan, tmp_path / "run", "inprocess", resume=True, workers=1)
    assert [told.round for told in result.rounds] == [1, 2, 3, 4]
    assert result.status == "finished"
    assert result.privacy.max_epsilon is not None
    assert result.privacy.max_epsilon <= plan.privacy.epsilon


def test_the_payloads_of_what_is_over_are_freed(tmp_path: Path, csv_plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from lichen.coordinator.buffered import BufferedStrategy

    most = 0
    fill = BufferedStrategy._fill

    def counting(self: BufferedStrategy, *given: Any) -> Any:
        nonlocal most
        most = max(most, len(list((tmp_path / "run" / "simulation" / "spool").iterdir())))
        return fill(self, *given)

    monkeypatch.setattr(BufferedStrategy, "_fill", counting)
    simulate(parse_plan(plan_with(csv_plan, cohort=BUFFERED, rounds=9)), tmp_path / "run", "inprocess", workers=1)
    # the newest model, those of what is under way, their replies, and what the chain names
    assert most <= 1 + 2 * 3 + 9


def test_the_ray_engine_cannot_buffer(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    from flwr.app import Context, RecordDict
    from flwr.serverapp import Grid

    from lichen.coordinator.app import app

    class Flowers(Grid):  # type: ignore[misc]
        """Has Flower's own methods only."""

        def set_run(self, run: Any) -> None: ...

        @property
        def run(self) -> Any: ...

        def create_message(self, *given: Any, **named: Any) -> Any: ...

        def get_node_ids(self) -> list[int]:
            return [1, 2, 3]

        def push_messages(self, messages: Any) -> Any: ...

        def pull_messages(self, message_ids: Any) -> Any: ...

        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any: ...

    plan = parse_plan(plan_with(csv_plan, cohort=BUFFERED))
    config = {"plan": plan.canonical_json(), "directory": str(tmp_path / "run"), "engine": "ray"}
    with pytest.raises(LichenError) as caught:
        app(Flowers(), Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config=config))
    assert caught.value.code is Code.PLAN_UNSOUND


def test_ray_keeps_no_virtual_time(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    with pytest.raises(LichenError) as caught:
        simulate(parse_plan(plan_with(csv_plan)), tmp_path / "run", "ray")
    assert caught.value.code is Code.PLAN_UNSOUND
