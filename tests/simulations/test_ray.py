"""The same two apps on Flower's Ray simulation: the same model as in one process, private runs, and errors by their number."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lichen.common.errors import Code, LichenError
from lichen.common.plan import parse_plan
from lichen.common.result import read_result
from lichen.simulations.simulate import run

pytest.importorskip("ray")

# Flower's use of Ray, and Ray itself, leave sockets to the collector
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
EVERYBODY = {"size": 2, "minimum": 2, "deadline_s": 120}
PRIVATE = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "sample_rate": 0.2}


@pytest.fixture(autouse=True)
def _flowers_log_level() -> Iterator[None]:
    logger = logging.getLogger("flwr")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture
def plan_of_all(csv_plan: dict[str, Any]) -> dict[str, Any]:
    """All clients in each round, one after another: Ray's nodes have other ids in each run, so who is left out of fewer differs."""
    local = csv_plan["local"] | {"compute": "plain"}  # else so small a model's clients pass together in one process, which Ray's don't
    return csv_plan | {"cohort": EVERYBODY, "local": local, "simulation": csv_plan["simulation"] | {"clients": 2}}


def test_ray_gives_the_model_of_one_process(tmp_path: Path, plan_of_all: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    plan = parse_plan(plan_of_all)
    ours, rays = run(plan, tmp_path / "one", "inprocess"), run(plan, tmp_path / "ray", "ray")
    assert (rays.engine, rays.status) == ("ray", "finished")
    assert [told.participants for told in rays.rounds] == [2, 2]
    left, right = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("one", "ray"))
    assert left.keys() == right.keys()
    worst = max(float(((left[name] - right[name]).abs() / left[name].abs().clamp(min=1e-6)).max()) for name in left)
    assert worst <= 1e-5, worst
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-7)
    assert rays.final == ours.final
    assert (rays.plan_sha256, rays.parameters) == (ours.plan_sha256, ours.parameters)
    assert rays.transfer.uplink_bytes == ours.transfer.uplink_bytes
    assert (rays.transfer.downlink_bytes or 0) > (ours.transfer.downlink_bytes or 0), "stock Flower sends the model whole"
    printed = capfd.readouterr()
    assert "DEPRECATED" not in printed.out + printed.err
    print(f"largest relative difference: {worst:.2g}")


@pytest.mark.long
def test_private_clients_on_ray_keep_to_the_plans_epsilon_and_a_run_goes_on(tmp_path: Path, plan_of_all: dict[str, Any]) -> None:
    plan = parse_plan(plan_of_all | {"privacy": PRIVATE, "evaluation": {"federated_every": 1}})
    ours, rays = run(plan, tmp_path / "one", "inprocess"), run(plan, tmp_path / "ray", "ray")
    assert rays.privacy == ours.privacy
    assert rays.privacy.max_epsilon is not None
    assert 0 < rays.privacy.max_epsilon <= 8.0
    left, right = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("one", "ray"))
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5)

    # a run that stopped after a round of Ray goes on in one process, and the other way round: node ids are not those of before
    for first, then in (("ray", "inprocess"), ("inprocess", "ray")):
        out = tmp_path / f"{first}-{then}"
        run(plan, out, first)
        (out / "checkpoints" / "round-00002.safetensors").unlink()  # as if it had been killed before the second checkpoint
        again = run(plan, out, then, resume=True)
        assert (again.status, again.privacy, len(again.rounds)) == ("finished", ours.privacy, 2)


@pytest.mark.long
def test_an_error_keeps_its_number_through_ray(tmp_path: Path, plan_of_all: dict[str, Any]) -> None:
    plan = parse_plan(plan_of_all | {"local": plan_of_all["local"] | {"learning_rate": 1e30}})
    with pytest.raises(LichenError) as caught:
        run(plan, tmp_path / "out", "ray")
    assert caught.value.code is Code.COHORT_TOO_SMALL
    result = read_result(tmp_path / "out")
    assert result.status == "failed"
    assert str(int(Code.MODEL_NOT_TRAINED)) in (result.error or "")
