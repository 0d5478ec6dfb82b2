"""What continual methods promise, of runs on real rows and a real (tiny) model: what is kept, to the bit, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lichen.client.ledger import open_ledger
from lichen.client.ledger_book import Limit
from lichen.common.aggregation import HELD_A, KEPT, MEMORY, A, B, beside, part_of, phase_of
from lichen.common.batches import CHECKED_ROWS, ready
from lichen.common.continual import make_method
from lichen.common.continual.lwf import LwF
from lichen.common.continual.stream import stage_size, stages
from lichen.common.errors import LichenError
from lichen.common.model.adapter import State
from lichen.common.model.export import load_saved
from lichen.common.plan import Plan, parse_plan
from lichen.common.tasks import make_task
from lichen.coordinator.export import export_model
from lichen.coordinator.run_directory import RunDirectory, ServerState
from lichen.simulations.benchmarks.reload import bench_reload
from lichen.simulations.datasets import load_spec
from lichen.simulations.simulate import run
from streams import EXACT, PRIVATE, STREAM, same, states, told, told_of

OVER = [
    {"name": "a", "labels": ["crop", "metal"], "where": {"site": ["a"]}},
    {"name": "b", "labels": ["money", "metal"], "where": {"site": ["b"]}},
]
SITES = [{"name": "a", "where": {"site": ["a"]}}, {"name": "b", "where": {"site": ["b"]}}]
HEAD = {"kind": "head"}


@pytest.fixture
def plan_of(csv_plan: dict[str, Any]) -> Callable[..., Plan]:
    def make(method: str, stream: list[dict[str, Any]] = STREAM, settings: dict[str, Any] | None = None, **changes: Any) -> Plan:
        continual = {"method": method, "stream": stream, "tolerance": 1.0} | ({method: settings} if settings else {})
        document = csv_plan | {"rounds": 3 * len(stream), "cohort": {"size": 3}, "continual": continual}
        if method == "analytic":
            model = csv_plan["model"] | {"adapter": HEAD}
            document |= {"rounds": len(stream), "model": model, "transfer": EXACT}
        return parse_plan(document | changes)

    return make


def without(state: State, part: str) -> State:
    return {name: tensor for name, tensor in state.items() if part_of(name) != part}


@pytest.mark.parametrize("method", ["lwf", "ewc", "olora", "replay"])
@pytest.mark.parametrize("version", [1, 2])
def test_what_is_saved_comes_back(tmp_path: Path, plan_of: Callable[..., Plan], method: str, version: int) -> None:
    plan = plan_of(method)
    run(plan, tmp_path / "run", "inprocess")
    export_model(tmp_path / "run", tmp_path / "model", version=version)
    task, fresh = make_task(plan), make_task(plan).build()
    assert load_saved(tmp_path / "model", fresh) == tuple(plan.task.labels if version == 2 else STREAM[0]["labels"])
    model = task.build()
    model.load({name: tensor for name, tensor in states(tmp_path / "run", plan)[version - 1].items() if part_of(name) != MEMORY})
    batch = task.collate(task.made_up(8), range(8))
    with torch.no_grad():
        torch.testing.assert_close(task.losses(fresh.network, batch), task.losses(model.network, batch), rtol=1e-4, atol=1e-5)


# --- lwf ---


def test_lwf_forgets_less_than_nothing_does(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    kept = told(run(plan_of("lwf", OVER), tmp_path / "lwf", "inprocess"))
    lost = told(run(plan_of("sequential", OVER), tmp_path / "sequential", "inprocess"))
    assert kept.forgetting < lost.forgetting


def test_lwf_without_weight_is_sequential(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    found = []
    for method, settings in (("lwf", {"weight": 0.0}), ("sequential", None)):
        plan = plan_of(method, SITES, settings, transfer=EXACT)
        run(plan, tmp_path / method, "inprocess")
        found.append(
            [{name: tensor for name, tensor in state.items() if part_of(name) != KEPT} for state in states(tmp_path / method, plan)]
        )
    assert all(torch.allclose(left[name], right[name], atol=1e-6) for left, right in zip(*found, strict=True) for name in right)


def test_the_teacher_is_the_model_as_the_last_task_left_it(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("lwf")
    run(plan, tmp_path, "inprocess")
    first, second = states(tmp_path, plan)
    for name, tensor in second.items():
        if part_of(name) != KEPT:
            assert torch.allclose(second[f"kept.before.{name}"], tensor, atol=1e-6)
            assert torch.allclose(first[f"kept.before.{name}"], first[name], atol=1e-6)
            assert not torch.equal(first[name], tensor) or not tensor.any()


# --- analytic ---


def features_of(plan: Plan, rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    task = make_task(plan)
    model = task.build()
    encoded = task.encode({field: [row[field] for row in rows] for field in task.fields})
    return task.features(model.network, encoded, 32).numpy(), encoded.labels.numpy()


@pytest.mark.parametrize(("order", "clients"), [((0, 1, 2), 3), ((2, 0, 1), 5)])
def test_analytic_is_joint_ridge_regression_whatever_the_order(
    tmp_path: Path, plan_of: Callable[..., Plan], csv_plan: dict[str, Any], order: tuple[int, ...], clients: int
) -> None:
    tasks = [{"name": "one", "labels": ["crop", "metal"]}, {"name": "two", "labels": ["money"], "where": {"site": ["a"]}}]
    tasks = [[*tasks, {"name": "three", "labels": ["money"], "where": {"site": ["b"]}}][place] for place in order]
    if len(tasks[0]["labels"]) == 1:  # the first task must have something to choose among
        tasks = [tasks[1], tasks[0], tasks[2]]
    simulation = csv_plan["simulation"] | {"clients": clients}
    plan = plan_of(
        "analytic", tasks, {"ridge": 0.5}, simulation=simulation, cohort={"size": clients}, evaluation={"validation_fraction": 0.0}
    )
    run(plan, tmp_path / "run", "inprocess")
    rows, _ = load_spec(csv_plan["simulation"]["data"], tmp_path / "rows.arrow")
    x, y = features_of(plan, [rows[number] for number in range(len(rows))])
    joint = np.linalg.solve(x.T @ x + 0.5 * np.eye(x.shape[1]), x.T @ np.eye(3)[y]).T
    state = states(tmp_path / "run", plan)[-1]
    (weight,) = (tensor for name, tensor in state.items() if part_of(name) is None and tensor.dim() == 2)
    assert np.abs(weight.numpy() - joint).max() < 1e-4 * np.abs(joint).max()
    assert all(not tensor.any() for name, tensor in state.items() if name.endswith(".bias"))


def test_without_a_stream_one_round_is_all(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    result = run(plan_of("analytic", [], rounds=1), tmp_path, "inprocess")
    assert result.final is not None
    assert result.final["accuracy"] > 0.9
    assert (len(result.rounds), result.continual) == (1, None)
    assert (tmp_path / "model" / "config.json").exists()


def test_analytic_learns_and_each_row_moves_its_sums_by_one(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("analytic", settings={"gram_weight": 0.7})
    found = told(run(plan, tmp_path, "inprocess"))
    assert found.acc > 0.9
    method, generator = make_method(plan), torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(40, 16, dtype=torch.float64, generator=generator), dim=1)
    data = type("Rows", (), {"labels": torch.tensor([0, 1] * 20)})
    alone = [
        method.gather(x[[row]], type("Row", (), {"labels": data.labels[[row]]}), torch.ones(1, dtype=torch.float64), stages(plan)[0])
        for row in range(40)
    ]
    for sums in alone:
        assert sum(float(tensor.square().sum()) for tensor in sums.values()) == pytest.approx(1.0, abs=1e-12)
    whole = method.gather(x, data, torch.ones(40, dtype=torch.float64), stages(plan)[0])
    assert all(torch.allclose(tensor, sum(one[name] for one in alone)) for name, tensor in whole.items())


@pytest.mark.parametrize("method", ["analytic", "adapters", "lwf", "ewc", "olora"])
def test_under_privacy_a_record_pays_for_one_task(
    tmp_path: Path, plan_of: Callable[..., Plan], csv_plan: dict[str, Any], method: str
) -> None:
    changes: dict[str, Any] = {"privacy": PRIVATE}
    if method == "analytic":
        changes = {"privacy": PRIVATE | {"sample_rate": 1.0}, "local": csv_plan["local"] | {"steps": 1}}
    plan = plan_of(method, **changes)
    result = run(plan, tmp_path, "inprocess")
    for client in result.privacy.clients.values():
        assert client.segments.keys() == {"train:fields", "train:banks"}
        assert 7.0 < client.epsilon == max(client.segments.values()) <= 8.0
        assert client.epsilon_sum == pytest.approx(sum(client.segments.values()))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in states(tmp_path, plan)[-1].values())


def test_the_noise_of_sums_is_the_plans(plan_of: Callable[..., Plan], csv_plan: dict[str, Any], tiny_rows: Callable[..., Any]) -> None:
    from lichen.client.gate import Gate
    from lichen.client.jobs import Job, Private
    from lichen.client.trainer import Trainer
    from lichen.common.privacy.accounting import Segment
    from lichen.common.privacy.randomness import SeededSource
    from lichen.common.tasks import workbench

    plan = plan_of("analytic", privacy=PRIVATE, local=csv_plan["local"] | {"steps": 4})
    trainer = Trainer(plan)
    rows = [row for row in tiny_rows(60, 0) if row["label"] in {"crop", "metal"}]
    data = trainer.task.encode({field: [row[field] for row in rows] for field in trainer.task.fields})
    units = [[row, row + 1] for row in range(0, len(rows) - 1, 2)]
    segment = Segment(2.0, 0.5, 4)
    start = workbench(plan).start

    def gathered(units: list[list[int]]) -> torch.Tensor:
        sums = [
            trainer.run(Job(start, data, 1, SeededSource(number), private=Private(units, segment, 40, Gate(segment)))).delta
            for number in range(30)
        ]
        return torch.stack([torch.cat([tensor.flatten() for tensor in one.values()]) for one in sums]).double()

    # σ = 2 for each of 4 sums, over 0.5 · 4 draws that a unit is expected in: 2 · √4 / 2
    assert float(gathered([]).std()) == pytest.approx(2.0, rel=0.02)
    assert float((gathered(units).mean(0) - gathered([]).mean(0)).norm()) > 1
    faint = Segment(1e-3, 1.0, 1)  # of all rows as one unit, with hardly any noise
    alone = Private([list(range(len(rows)))], faint, 40, Gate(faint))
    sums = trainer.run(Job(start, data, 1, SeededSource(0), private=alone)).delta
    assert 0.3 < sum(float(tensor.square().sum()) for tensor in sums.values()) ** 0.5 < 1.1, "a unit of many rows moves no more than one"
    with pytest.raises(Exception, match="beyond what was reserved"):
        trainer.run(Job(start, data, 1, SeededSource(0), private=Private(units, segment, 40, Gate(segment._replace(steps=3)))))


# --- adapters ---


@pytest.mark.parametrize("router", ["ridge", "centroids"])
def test_a_finished_adapter_is_never_changed_and_rows_find_their_own(tmp_path: Path, plan_of: Callable[..., Plan], router: str) -> None:
    plan = plan_of("adapters", settings={"router": router})
    result = run(plan, tmp_path / "run", "inprocess")
    first, second = states(tmp_path / "run", plan)
    own = {name: tensor for name, tensor in first.items() if name.startswith(f"{MEMORY}.0.")}
    assert len(own) > 2
    assert same(own, {name: second[name] for name in own})
    found = told(result)
    assert found.acc > 0.7
    assert found.forgetting < 0.2
    assert result.final is not None
    assert 0.8 < result.final["routed"] <= 1.0
    assert result.final["accuracy_task_known"] >= result.final["accuracy"]


def test_where_the_task_is_known_nothing_is_forgotten(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    result = run(plan_of("adapters"), tmp_path, "inprocess")
    ends = [line.by_task for line in result.rounds if line.by_task]
    for number, task in enumerate(told(result).tasks):
        lines = [metrics for end in ends if (metrics := end[task])]
        assert len({line["accuracy_task_known"] for line in lines[number:]}) == 1
        assert all((line["accuracy_task_known"] or 0) >= (line["accuracy"] or 0) for line in lines[number:])
    assert ends[0]["banks"] is not None
    assert ends[0]["banks"]["accuracy_task_known"] is None, "it was not learned yet"


def test_an_adapter_of_which_one_factor_a_round_is_trained_begins_with_b(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("adapters", aggregation={"rule": "rolora"})
    assert [sorted(phase_of(plan, round)) for round in range(2, 7)] == [[B], [A], [B], [B], [A]]
    assert told(run(plan, tmp_path, "inprocess")).acc > 0.6


@pytest.mark.parametrize("start", ["fresh", "last"])
def test_the_next_adapter_begins_as_the_plan_says(tmp_path: Path, plan_of: Callable[..., Plan], start: str) -> None:
    plan = plan_of("adapters", settings={"start": start})
    run(plan, tmp_path, "inprocess")
    state = states(tmp_path, plan)[0]
    begun, own = (
        without(state, MEMORY),
        {name.removeprefix(f"{MEMORY}.0."): tensor for name, tensor in state.items() if name.startswith(f"{MEMORY}.0.")},
    )
    assert all(torch.equal(tensor, own[name]) for name, tensor in begun.items()) == (start == "last")


def test_the_models_of_tasks_and_their_router_are_what_was_scored(
    tmp_path: Path, plan_of: Callable[..., Plan], csv_plan: dict[str, Any]
) -> None:
    plan = plan_of("adapters")
    result = run(plan, tmp_path / "run", "inprocess")
    export_model(tmp_path / "run", tmp_path / "model")
    export_model(tmp_path / "run", tmp_path / "merged", "merged")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"fields", "banks", "router.safetensors", "README.md"}
    assert (tmp_path / "merged" / "banks" / "model.safetensors").exists()
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "model" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    snippet = snippet.replace('"model/', f'"{tmp_path}/model/')
    _, test = load_spec(csv_plan["simulation"]["data"], tmp_path / "rows.arrow")
    assert test is not None
    right = 0
    for row in test:
        told_of: list[str] = []
        exec(snippet.replace('["a text"]', "[text]"), {"text": row["text"], "print": told_of.append})  # noqa: S102 - our own card
        right += told_of == ["banks" if row["label"] == "money" else "fields"]
    assert result.final is not None
    assert right / len(test) == pytest.approx(result.final["routed"])
    router = load_file(tmp_path / "model" / "router.safetensors")
    assert {name: len(own) for name, own in router.items()} == {"fields": 2, "banks": 1}


# --- all ---


@pytest.mark.parametrize("method", ["analytic", "lwf", "adapters", "ewc", "olora", "replay"])
def test_a_run_that_goes_on_in_mid_task_is_as_one_that_was_not_broken(tmp_path: Path, plan_of: Callable[..., Plan], method: str) -> None:
    plan = plan_of(method)
    whole = run(plan, tmp_path, "inprocess")
    expected = states(tmp_path, plan)
    (tmp_path / "checkpoints" / f"round-{plan.rounds:05d}.safetensors").unlink()
    again = run(plan, tmp_path, "inprocess", resume=True)
    assert all(map(same, states(tmp_path, plan), expected))
    assert again.continual == whole.continual
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("method", ["analytic", "adapters", "ewc"])
def test_a_run_that_is_stopped_after_each_of_its_rounds_is_as_one_that_was_not(
    tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    plan, save = plan_of(method), RunDirectory.save_state
    whole = run(plan, tmp_path / "whole", "inprocess")

    def killed(self: RunDirectory, state: ServerState) -> None:
        save(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_state", killed)
        for number in range(plan.rounds):
            with pytest.raises(KeyboardInterrupt):
                run(plan, tmp_path / "again", "inprocess", resume=number > 0)
    again = run(plan, tmp_path / "again", "inprocess", resume=True)
    assert (again.continual, again.final) == (whole.continual, whole.final)
    assert [line.by_task for line in again.rounds] == [line.by_task for line in whole.rounds]
    assert all(map(same, states(tmp_path / "again", plan), states(tmp_path / "whole", plan)))
    assert told_of(tmp_path / "again", plan) == told_of(tmp_path / "whole", plan)


def test_rows_are_scored_the_same_with_what_frozen_layers_give(
    tmp_path: Path, plan_of: Callable[..., Plan], csv_plan: dict[str, Any]
) -> None:
    model = csv_plan["model"] | {"adapter": {"kind": "lora", "rank": 2, "last_layers": 1}}
    found = []
    for cache in ("off", "float32"):
        plan = plan_of("adapters", model=model, local=csv_plan["local"] | {"prefix_cache": cache})
        found.append(told(run(plan, tmp_path / cache, "inprocess")))
    assert found[0].matrix == found[1].matrix


# --- replay ---


def test_replay_forgets_less_than_nothing_does(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    kept = told(run(plan_of("replay", settings={"rows": 8}), tmp_path / "replay", "inprocess"))
    lost = told(run(plan_of("sequential"), tmp_path / "sequential", "inprocess"))
    assert kept.forgetting < lost.forgetting / 2
    assert kept.acc > lost.acc


def test_rows_that_are_replayed_are_so_many_of_each_label_or_each_by_its_own_coin(plan_of: Callable[..., Plan]) -> None:
    tasks = [{"name": name, "labels": [name, *(["metal"] if name == "crop" else [])]} for name in ("crop", "money")]
    labels = [("crop", "metal", "money")[number % 3] for number in range(300)]
    columns = {"text": [f"row {number}" for number in range(300)], "label": labels}
    balanced, by_coin = (make_method(plan) for plan in (plan_of("replay", tasks, {"rows": 5}), plan_of("replay", tasks, {"share": 0.2})))
    first, second = stages(balanced.plan)
    assert balanced.rows(first, columns) == [row for row in range(300) if labels[row] != "money"]
    kept = [labels[row] for row in balanced.rows(second, columns)]
    assert {label: kept.count(label) for label in set(kept)} == {"crop": 5, "metal": 5, "money": 100}
    found = set(by_coin.rows(second, columns))
    assert 20 < len(found) - 100 < 60
    half = {name: values[::2] for name, values in columns.items()}
    assert {2 * row for row in by_coin.rows(second, half)} == {row for row in found if row % 2 == 0}, "others change nothing"
    assert stage_size(by_coin.plan, first, 100) == 50
    assert stage_size(by_coin.plan, second, 100) == 60


def test_a_row_that_is_replayed_pays_for_each_round_and_the_others_do_not(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("replay", settings={"share": 0.3}, privacy=PRIVATE, cohort={"size": 3, "minimum": 3})
    result = run(plan, tmp_path, "inprocess")
    spent = []
    for home in sorted((tmp_path / "simulation").glob("client-*")):
        with open_ledger(home, own=True) as ledger:
            rounds = {
                segment.number: [entry.round for entry in ledger.entries() if segment.number in entry.charged]
                for segment in ledger.segments()
            }
            kinds = sorted(map(tuple, rounds.values()))
            assert kinds == [(1, 2, 3), (1, 2, 3, 4, 5, 6), (4, 5, 6)], "kept aside, replayed, and new in the second task"
            limit = Limit(8.0, 1e-3)
            spent.append({tuple(found): ledger.spent(number, limit).epsilon for number, found in rounds.items()})
    assert spent
    for of in spent:
        assert of[1, 2, 3] == of[4, 5, 6] < of[1, 2, 3, 4, 5, 6] <= 8.0
    assert result.privacy.max_epsilon == pytest.approx(max(max(of.values()) for of in spent))


def test_so_many_rows_a_label_are_refused_under_privacy(plan_of: Callable[..., Plan]) -> None:
    with pytest.raises(LichenError) as caught:
        plan_of("replay", settings={"rows": 5}, privacy=PRIVATE)
    assert "tells of others" in caught.value.what


# --- ewc ---


def test_weights_that_mattered_stay_where_old_tasks_left_them(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    moved = {}
    for weight in (0.0, 100.0):
        plan = plan_of("ewc", OVER, {"weight": weight})
        run(plan, tmp_path / str(weight), "inprocess")
        first, second = states(tmp_path / str(weight), plan)
        fisher = {name.removeprefix("kept.fisher."): tensor for name, tensor in first.items() if name.startswith("kept.fisher.")}
        assert fisher.keys() == without(first, KEPT).keys()
        assert all(bool((tensor >= 0).all()) for tensor in fisher.values())
        assert all(torch.allclose(first[f"kept.anchor.{name}"], first[name], atol=1e-6) for name in fisher)
        assert sum(float(tensor.sum()) for name, tensor in second.items() if "fisher" in name) > sum(
            map(float, map(torch.sum, fisher.values()))
        )
        change = torch.cat([(second[name] - first[name]).flatten() for name in fisher])
        strong = torch.cat([tensor.flatten() for tensor in fisher.values()])
        top = strong >= strong.quantile(0.9)
        moved[weight] = float(change[top].norm()), float(change.norm())
    assert moved[100.0][0] < moved[0.0][0] / 5, "those that mattered most"
    assert moved[100.0][1] > moved[100.0][0] > 0


def test_a_batch_that_is_not_full_tells_no_more_of_a_row_than_a_full_one(
    plan_of: Callable[..., Plan], tiny_rows: Callable[..., Any]
) -> None:
    from lichen.client.jobs import Job
    from lichen.client.trainer import Trainer
    from lichen.common import tasks
    from lichen.common.privacy.randomness import SeededSource

    tasks.workbench.cache_clear()
    plan = plan_of("ewc", local={"epochs": 1, "batch_size": 16})
    trainer, start = Trainer(plan), tasks.workbench(plan).start
    rows = [row for row in tiny_rows(60, 0) if row["label"] in {"crop", "metal"}]

    def told(count: int) -> float:
        data = trainer.task.encode({field: [row[field] for row in rows[:count]] for field in trainer.task.fields})
        draws = [trainer.run(Job(start, data, 3, SeededSource("order", seed), None)).delta for seed in range(5)]
        return sum(float(tensor.sum()) for found in draws for tensor in found.values()) / count

    assert told(17) < 6 * told(16), "single rows differ more than the means of sixteen, but not by forty times"
    tasks.workbench.cache_clear()


def test_what_noise_adds_to_squares_is_taken_off(plan_of: Callable[..., Plan], tiny_rows: Callable[..., Any]) -> None:
    from lichen.client.gate import Gate
    from lichen.client.jobs import Job, Private
    from lichen.client.trainer import Trainer
    from lichen.common import tasks
    from lichen.common.privacy.accounting import Segment
    from lichen.common.privacy.randomness import SeededSource

    tasks.workbench.cache_clear()
    plan = plan_of("ewc", privacy=PRIVATE | {"clip": 1.0})
    trainer, start = Trainer(plan), tasks.workbench(plan).start
    rows = [row for row in tiny_rows(120, 0) if row["label"] in {"crop", "metal"}]
    data = trainer.task.encode({field: [row[field] for row in rows] for field in trainer.task.fields})
    segment, size = Segment(0.5, 0.4, 50), 40

    def told(count: int) -> torch.Tensor:
        private = Private([[row] for row in range(count)], segment, size, Gate(segment))
        found = trainer.run(Job(start, data, 3, SeededSource(count), private=private)).delta
        return torch.cat([tensor.flatten() for tensor in found.values()]).double()

    # σ² / B of each number's square is noise: of no rows, nothing is left in the mean
    noise = size * 0.5**2 / (0.4 * size)
    none = told(0)
    assert abs(float(none.mean())) < 4 * noise * (2 / 50 / len(none)) ** 0.5
    assert float(told(40).mean()) > 3 * abs(float(none.mean()))
    tasks.workbench.cache_clear()


# --- olora ---


@pytest.mark.parametrize("rule", ["fedavg", "rolora"])
def test_each_task_has_an_adapter_beside_the_earlier_ones(tmp_path: Path, plan_of: Callable[..., Plan], rule: str) -> None:
    overlaps = {}
    for weight in (0.0, 50.0):
        plan = plan_of("olora", OVER, {"weight": weight}, aggregation={"rule": rule})
        run(plan, tmp_path / str(weight), "inprocess")
        first, second = states(tmp_path / str(weight), plan)
        for name in first:
            if part_of(name) == B:
                assert not first[name].any(), "the next begins at zero"
                assert second[name].any()
        kept = {name: tensor for name, tensor in first.items() if part_of(name) == KEPT}
        assert all(tensor.any() for tensor in kept.values())
        assert same(kept, {name: second[name] for name in kept}), "what was learned stays as it is"
        overlaps[weight] = max(
            float((tensor @ second[f"kept.{beside(name, HELD_A)}"].T).norm()) for name, tensor in second.items() if part_of(name) == A
        )
    assert overlaps[50.0] < overlaps[0.0] / 3


@pytest.mark.parametrize("rate", [0.01, 10.0])
def test_no_step_goes_beyond_the_orthogonal(plan_of: Callable[..., Plan], csv_plan: dict[str, Any], rate: float) -> None:
    plan = plan_of("olora", OVER, {"weight": 100.0}, local=csv_plan["local"] | {"learning_rate": rate})
    generator, name = torch.Generator().manual_seed(0), "layer.lora_A.weight"
    tensor, earlier = (torch.randn(4, 32, generator=generator) for _ in range(2))
    (pull,) = make_method(plan).pulls({f"{KEPT}.{beside(name, HELD_A)}": earlier}, {name: tensor})
    before = (tensor @ earlier.T).norm()
    for _ in range(50):
        tensor = tensor - rate * pull.gradient(tensor)
    assert (tensor @ earlier.T).norm() < before / 10


def test_what_is_saved_holds_all_adapters(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("olora")
    result = run(plan, tmp_path, "inprocess")
    assert (tmp_path / "model" / "model.safetensors").exists()
    bench_reload(tmp_path)  # which refuses another accuracy
    assert told(result).matrix[1][1] > 0.6


def test_a_task_that_has_ended_scores_the_same_with_its_adapter_kept(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    """The end moves the adapter to what is kept, which changes no output."""
    plan = plan_of("olora", OVER)
    run(plan, tmp_path, "inprocess")
    first = states(tmp_path, plan)[0]
    checkpoint = load_file(tmp_path / "checkpoints" / "round-00006.safetensors")
    assert same(states(tmp_path, plan)[1], {name.removeprefix("model/"): tensor for name, tensor in checkpoint.items() if "model/" in name})
    name = next(name for name in first if part_of(name) == A)
    assert first[f"kept.{beside(name, HELD_A)}"].shape == first[name].shape, "of two tasks one is earlier"


def test_the_mean_of_the_last_rounds_is_of_those_that_train(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("adapters", aggregation={"average_last": 2})
    run(plan, tmp_path, "inprocess")
    second = load_file(tmp_path / "checkpoints" / "round-00005.safetensors")
    kept = states(tmp_path, plan)[1]
    (name,) = (name for name in second if name.startswith("average/") and name.endswith("classifier.weight"))
    # the sum's first summand is round 5's model, since round 4 gathered; the mean is with round 6's
    model = name.removeprefix("average/")
    assert torch.equal(second[name], second[f"model/{model}"])
    assert not torch.allclose(kept[f"{MEMORY}.1.{model}"], second[name], atol=1e-4)


def with_a_teacher(plan: Plan) -> Any:
    """The plan's task and model, which keeps another than its start as the model before."""
    from lichen.common import tasks

    tasks.workbench.cache_clear()
    task, model, start = tasks.workbench(plan)
    before = f"{KEPT}.before."
    model.load({name: start[name.removeprefix(before)] + (0.1 if name.startswith(before) else 0) for name in start})
    return task, model


def test_a_teacher_reads_what_frozen_layers_gave(
    tmp_path: Path, csv_plan: dict[str, Any], plan_of: Callable[..., Plan], tiny_rows: Any
) -> None:
    from lichen.common import tasks

    plan = plan_of("lwf", SITES, model=csv_plan["model"] | {"adapter": HEAD}, local=csv_plan["local"] | {"prefix_cache": "float32"})
    task, model = with_a_teacher(plan)
    rows = tiny_rows(12, 0)
    data = task.encode({"text": [row["text"] for row in rows], "label": [row["label"] for row in rows]})
    batches, stage, ran = ready(plan, task, model).batches, stages(plan)[1], list[int]()
    assert batches.prefix is not None
    compute = batches.prefix.compute
    batches.prefix.compute = lambda batch: ran.append(len(batch["input_ids"])) or compute(batch)  # type: ignore[method-assign]
    whole, first, again = (
        LwF(plan).examples(task, model, data, stage, lambda cache=cache: batches.of(data, cache)).teacher
        for cache in (None, tmp_path, tmp_path)
    )
    assert sum(ran) - CHECKED_ROWS == len(rows), "each row once, and what tells the weights"
    assert torch.allclose(whole, first, atol=1e-5)
    assert torch.equal(first, again)
    tasks.workbench.cache_clear()


def test_labels_that_were_put_right_are_trained_on(plan_of: Callable[..., Plan], tiny_rows: Callable[..., Any]) -> None:
    from lichen.common import tasks

    plan = plan_of("lwf", SITES)
    task, model = with_a_teacher(plan)
    rows = tiny_rows(12, 0)
    first, other = (
        task.encode({"text": [row["text"] for row in rows], "label": labels})
        for labels in ([row["label"] for row in rows], ["crop"] * len(rows))
    )
    method, stage = make_method(plan), stages(plan)[1]
    batches = ready(plan, task, model).batches

    def examples(data: Any, cache: Path | None = None) -> Any:
        return method.examples(task, model, data, stage, lambda: batches.of(data, cache))

    taught = examples(first)
    assert examples(first) is taught, "else what frozen layers gave would be computed again"
    assert taught.teacher is not None
    assert examples(other).labels.tolist() == other.labels.tolist()
    model.load(tasks.workbench(plan).start)
    assert examples(first) is first, "no task has taught anything"
    tasks.workbench.cache_clear()
