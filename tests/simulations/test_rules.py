"""Every aggregation rule, played in this process on real rows and a real (tiny) model: it learns, goes on after a crash, and is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lichen.common.aggregation import MERGED, A, B, part_of, properties
from lichen.common.aggregation import RULES as PROPERTIES
from lichen.common.model.adapter import State
from lichen.common.model.export import load_saved
from lichen.common.model.prefix import FrozenPrefix
from lichen.common.plan import Plan, parse_plan
from lichen.common.tasks import make_task, workbench
from lichen.coordinator.export import export_model
from lichen.coordinator.run_directory import RunDirectory
from lichen.simulations.benchmarks.reload import bench_reload
from lichen.simulations.simulate import run

MAJORITY = 1 / 3
PRIVATE = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "sample_rate": 0.2}
EXACT = {"uplink": {"codec": "none"}, "downlink": {"codec": "none"}}
CASES = [(rule, ranks) for rule, needs in PROPERTIES.items() for ranks in ([[], [2, 4, 1]] if needs.mixed_ranks else [[]])]
every_case = pytest.mark.parametrize(("rule", "ranks"), CASES, ids=[f"{rule}{'-mixed' if ranks else ''}" for rule, ranks in CASES])


def plan_of(document: dict[str, Any], rule: str, ranks: list[int], **changes: Any) -> Plan:
    found = document | {"rounds": 4, "aggregation": {"rule": rule} | changes.pop("aggregation", {})}
    found["model"] = document["model"] | {"adapter": {"kind": "lora", "rank": 4} | changes.pop("adapter", {})}
    found["local"] = document["local"] | changes.pop("local", {})
    found["simulation"] = document["simulation"] | {"ranks": ranks}
    found["cohort"] = document["cohort"] | {"size": 3}
    return parse_plan(found | changes)


def models(out: Path, plan: Plan) -> State:
    state = RunDirectory(out, plan).load_state()
    assert state is not None
    return state.model


@every_case
@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE], ids=["plain", "private"])
def test_it_learns_and_what_is_saved_scores_the_same_elsewhere(
    tmp_path: Path, csv_plan: dict[str, Any], rule: str, ranks: list[int], privacy: dict[str, Any]
) -> None:
    plan = plan_of(csv_plan, rule, ranks, privacy=privacy)
    result = run(plan, tmp_path / "run", "inprocess")
    assert result.final is not None
    assert result.final["accuracy"] > MAJORITY + (0.1 if plan.private else 0.25)
    assert [told.participants for told in result.rounds] == [3] * 4
    assert result.privacy.max_epsilon is None or 0 < result.privacy.max_epsilon <= 8.0
    bench_reload(tmp_path / "run")  # which refuses another accuracy
    assert (tmp_path / "run" / "model" / "adapter_config.json").exists() != properties(plan).changes_base
    export_model(tmp_path / "run", tmp_path / "merged", "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("rule", [rule for rule, needs in PROPERTIES.items() if needs.changes_base])
def test_a_model_whose_base_changed_comes_back_from_its_files(tmp_path: Path, csv_plan: dict[str, Any], rule: str) -> None:
    plan = plan_of(csv_plan, rule, [])
    run(plan, tmp_path, "inprocess")
    bench = workbench(plan)
    batch = bench.task.collate(bench.task.made_up(4), range(4))
    bench.model.load(models(tmp_path, plan))
    with torch.no_grad():
        expected = bench.task.losses(bench.model.network, batch)
        other = make_task(plan).build()
        load_saved(tmp_path / "model", other)
        found = bench.task.losses(other.network, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert any(tensor.any() for name, tensor in other.state().items() if part_of(name) == MERGED)


@pytest.mark.parametrize("rule", [rule for rule, needs in PROPERTIES.items() if needs.changes_base])
def test_what_the_layers_below_gave_may_be_kept_though_the_base_changes(
    tmp_path: Path, csv_plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    fed: list[bool] = []
    original = FrozenPrefix.compute

    def compute(self: FrozenPrefix, batch: Any) -> torch.Tensor:
        fed.append(True)
        return original(self, batch)

    monkeypatch.setattr(FrozenPrefix, "compute", compute)
    found = []
    for cache in ("off", "float32"):
        local = {"prefix_cache": cache, "optimizer": "sgd", "learning_rate": 0.5}  # AdamW makes much of a rounding error
        plan = plan_of(csv_plan, rule, [], adapter={"last_layers": 1}, local=local, transfer=EXACT)
        run(plan, tmp_path / cache, "inprocess")
        found.append(models(tmp_path / cache, plan))
        assert any(fed) == (cache != "off")
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5)
    assert any(tensor.any() for name, tensor in found[0].items() if part_of(name) == MERGED)


@every_case
@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE], ids=["plain", "private"])
def test_a_run_that_goes_on_is_as_one_that_was_not_broken(
    tmp_path: Path, csv_plan: dict[str, Any], rule: str, ranks: list[int], privacy: dict[str, Any]
) -> None:
    optimizer = {} if rule == "fedex" else {"optimizer": "fedyogi", "learning_rate": 0.02}
    plan = plan_of(csv_plan, rule, ranks, privacy=privacy, aggregation=optimizer)
    run(plan, tmp_path, "inprocess")
    whole = models(tmp_path, plan)
    saved = {path.name: load_file(path) for path in (tmp_path / "model").glob("*.safetensors")}
    (tmp_path / "checkpoints" / "round-00004.safetensors").unlink()
    result = run(plan, tmp_path, "inprocess", resume=True)
    assert len(result.rounds) == 4
    again = models(tmp_path, plan)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    for name, tensors in saved.items():
        found = load_file(tmp_path / "model" / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_a_factor_that_is_not_trained_is_the_same_to_the_bit_in_every_other_round(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    plan = plan_of(csv_plan, "rolora", [], privacy=PRIVATE)
    run(plan, tmp_path, "inprocess")
    checkpoints = [load_file(tmp_path / "checkpoints" / f"round-{round:05d}.safetensors") for round in (3, 4)]
    before, after = ({name: tensor for name, tensor in one.items() if name.startswith("model/")} for one in checkpoints)
    for name, tensor in before.items():  # round 4 trains A
        assert torch.equal(tensor, after[name]) == (part_of(name) == B)
    assert any(part_of(name) == A for name in before)


@pytest.mark.parametrize(("rule", "share"), [("ffa", 0.5), ("rolora", 0.5)])
def test_one_factor_travels_up(tmp_path: Path, csv_plan: dict[str, Any], rule: str, share: float) -> None:
    sizes = []
    for name in ("fedavg", rule):
        plan = plan_of(csv_plan, name, [], transfer={"uplink": {"codec": "none"}})
        run(plan, tmp_path / name, "inprocess")
        head = sum(tensor.numel() for name, tensor in models(tmp_path / name, plan).items() if part_of(name) is None)
        report = run(plan, tmp_path / name, "inprocess", resume=True)
        sizes.append([4 * 3 * head, *(told.uplink_bytes for told in report.rounds)])
    (head, *both), (_, *one) = sizes
    for whole, half in zip(both, one, strict=True):
        assert whole
        assert half == pytest.approx(head + share * (whole - head), rel=0.15)  # a few names less


@pytest.mark.parametrize("rule", ["ffa", "rolora"])
def test_rules_of_sums_under_the_coordinators_noise(tmp_path: Path, csv_plan: dict[str, Any], rule: str) -> None:
    privacy = {"unit": "client", "noise": "central", "epsilon": 8.0, "delta": 1e-3, "clip": 1.0}
    document = csv_plan | {"cohort": {"size": 2, "population": 3}}
    plan = parse_plan(plan_of(csv_plan, rule, []).model_dump(mode="json") | {"privacy": privacy, "cohort": document["cohort"]})
    result = run(plan, tmp_path, "inprocess")
    assert result.status == "finished"
    checkpoints = [load_file(tmp_path / "checkpoints" / f"round-{round:05d}.safetensors") for round in (3, 4)]
    moved = {
        part_of(name)
        for name, tensor in checkpoints[1].items()
        if name.startswith("model/") and not torch.equal(tensor, checkpoints[0][name])
    }
    assert moved == {None, B if rule == "ffa" else A}


def test_clients_of_several_ranks_in_several_processes_give_the_bytes_of_one(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    plan = plan_of(csv_plan, "flora", [2, 4, 1])
    plan = parse_plan(plan.model_dump(mode="json") | {"local": plan.local.model_dump(mode="json") | {"compute": "plain"}})
    for workers in (1, 2):
        run(plan, tmp_path / str(workers), "inprocess", workers=workers)
    one, two = (models(tmp_path / str(workers), plan) for workers in (1, 2))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
