"""A stream of tasks played in this process on real rows and a real (tiny) model: R, versions, ε by task, and a crash at any point."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from typer.testing import CliRunner

from lichen.client.ledger import Ledger, open_ledger
from lichen.client.ledger_book import Limit
from lichen.client.spending import spending
from lichen.common.aggregation import MERGED, A, B, beside, part_of
from lichen.common.continual.measures import measures
from lichen.common.continual.stream import stages
from lichen.common.disk import disk_failed
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State
from lichen.common.model.base import rows_by_class
from lichen.common.model.export import load_saved
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.accounting import Segment, epsilon
from lichen.common.records import TRAIN, EvaluateReport
from lichen.common.result import read_result
from lichen.common.tasks import make_task
from lichen.coordinator.app import OwnData
from lichen.coordinator.export import app, export_model
from lichen.coordinator.run_directory import RunDirectory
from lichen.coordinator.versions import FOLDER, Versions
from lichen.coordinator.watch import conclusion
from lichen.simulations.benchmarks.reload import bench_reload
from lichen.simulations.simulate import run
from streams import EXACT, PRIVATE, STREAM, same, states, told

MEAN = {"average_last": 2, "optimizer": "fedavgm", "momentum": 0.5}


@pytest.fixture
def plan_of(csv_plan: dict[str, Any]) -> Callable[..., Plan]:
    def make(stream: list[dict[str, Any]] = STREAM, tolerance: float = 1.0, **changes: Any) -> Plan:
        continual = {"stream": stream, "tolerance": tolerance}
        document = csv_plan | {"rounds": 4, "cohort": {"size": 3}, "continual": continual}
        return parse_plan(document | changes)

    return make


def test_a_later_plan_goes_on_from_a_runs_model_with_a_label_that_is_new(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    first, second = STREAM[0]["labels"], STREAM[1]["labels"]
    only = csv_plan | {"rounds": 2, "cohort": {"size": 3}}
    # the data have all labels: what is of no task of the stream is not read
    known = {"task": csv_plan["task"] | {"labels": first}, "continual": {"stream": STREAM[:1]}}
    run(parse_plan(only | known), tmp_path / "old", "inprocess")
    export_model(tmp_path / "old", tmp_path / "model", "merged")
    model = csv_plan["model"] | {"base": str(tmp_path / "model"), "head": {"init": "base"}}
    task = csv_plan["task"] | {"labels": [*second, *first]}
    grown = parse_plan(
        only | {"rounds": 4, "model": model, "task": task, "continual": {"stream": STREAM, "method": "ewc", "tolerance": 1.0}}
    )
    found = told(run(grown, tmp_path / "new", "inprocess"))
    assert found.start[0] == pytest.approx(read_result(tmp_path / "old").final["accuracy"])
    assert found.matrix[1][1] > 0.9
    export_model(tmp_path / "new", tmp_path / "grown", "merged")
    weights = load_file(tmp_path / "grown" / "model.safetensors")
    assert weights["classifier.weight"].shape[0] == 3
    assert bench_reload(tmp_path / "new")["accuracy"] == pytest.approx(read_result(tmp_path / "new").final["accuracy"])


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_model_chooses_among_the_labels_that_it_has_learned(tmp_path: Path, plan_of: Callable[..., Plan], form: Any) -> None:
    plan = plan_of(tolerance=0.0)
    result = run(plan, tmp_path / "run", "inprocess")
    export_model(tmp_path / "run", tmp_path / "model", form, 1)
    assert read_config(tmp_path / "model") == dict(enumerate(STREAM[0]["labels"]))
    found = told(result)
    export_model(tmp_path / "run", tmp_path / "both", form, 2)
    assert read_config(tmp_path / "both") == dict(enumerate(plan.task.labels))
    assert (found.given_out, list(found.held_back)) == ("1-fields", ["2-banks"])
    assert found.not_given_out() in conclusion(result)
    assert found.not_given_out().startswith("2-banks is held back (")
    assert not found.model_copy(update={"given_out": "3-other"}).not_given_out()
    assert read_config(tmp_path / "run" / "model") == dict(enumerate(STREAM[0]["labels"]))
    assert bench_reload(tmp_path / "run")["accuracy"] == pytest.approx(result.final["accuracy"])


@pytest.mark.parametrize("labels", ['{"0": "crop", "1": "strange"}', '{"0": "crop"}', "[]"])
def test_a_saved_model_of_other_labels_is_refused(tmp_path: Path, plan_of: Callable[..., Plan], labels: str) -> None:
    plan = plan_of()
    run(plan, tmp_path / "run", "inprocess")
    export_model(tmp_path / "run", tmp_path / "model", version=1)
    (tmp_path / "model" / "config.json").write_text(f'{{"id2label": {labels}}}')
    with pytest.raises(LichenError) as caught:
        load_saved(tmp_path / "model", make_task(plan).build())
    assert caught.value.code is Code.STATE_MISMATCH


def read_config(folder: Path) -> dict[int, str]:
    return dict(AutoConfig.from_pretrained(folder).id2label)


def test_no_noise_moves_the_head_of_a_label_that_is_not_trained(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(privacy=PRIVATE, transfer=EXACT)
    run(plan, tmp_path, "inprocess")
    start, (first, second) = make_task(plan).build().state(), states(tmp_path, plan)
    learned = torch.tensor([label in STREAM[0]["labels"] for label in plan.task.labels])
    for name in rows_by_class(start, len(plan.task.labels)):
        assert torch.equal(first[name][~learned], start[name][~learned])
        assert not torch.equal(first[name][learned], start[name][learned])
        assert not torch.equal(second[name][~learned], start[name][~learned])


def test_a_task_without_a_row_is_refused_before_the_first_round(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    stream = [{"name": "some", "where": {"site": ["a", "b"]}}, {"name": "none", "between": {"site": ["x", "y"]}}]
    with pytest.raises(LichenError, match="no training row is of task 'none'") as caught:
        run(plan_of(stream), tmp_path, "inprocess")
    assert caught.value.code is Code.DATA_EMPTY


def test_rows_that_no_client_could_read_are_refused_before_the_first_round(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    fields = {key: value for key, value in plan.simulation.data.fields.items() if key != "site"}
    no_site = plan.simulation.model_copy(update={"data": plan.simulation.data.model_copy(update={"fields": fields})})
    stream = [{"name": "some", "where": {"site": ["a"]}}, {"name": "rest", "where": {"site": ["b"]}}]
    with pytest.raises(LichenError, match="have no 'site'") as caught:
        run(plan_of(stream).model_copy(update={"simulation": no_site}), tmp_path / "field", "inprocess")
    assert (caught.value.code, "COLUMN" in caught.value.fix) == (Code.DATA_FIELD, True)
    few = plan.task.model_copy(update={"labels": ("crop", "metal")})
    document = plan_of(stream).model_copy(update={"task": few})
    with pytest.raises(LichenError, match="labels that the plan has not: money") as caught:
        run(document, tmp_path / "label", "inprocess")
    assert caught.value.code is Code.DATA_LABEL


def test_a_run_that_was_stopped_says_what_is_given_out(
    tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, add = plan_of(), Versions.add

    def add_and_stop(self: Versions, *given: Any) -> None:
        add(self, *given)
        if (tmp_path / FOLDER / "2-banks").exists():
            (tmp_path / FOLDER / "pinned").write_text("1\n")  # an operator's rollback, after the round was told
            raise LichenError(Code.RUN_STOPPED, "stopped by the operator")

    monkeypatch.setattr(Versions, "add", add_and_stop)
    with pytest.raises(LichenError):
        run(plan, tmp_path, "inprocess")
    result = read_result(tmp_path)
    assert result.status == "stopped"
    assert result.continual is not None
    assert (result.continual.given_out, list(result.continual.held_back)) == ("1-fields", ["2-banks"])


def test_each_task_is_a_version_and_r_tells_what_was_learned_and_forgotten(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    result = run(plan, tmp_path, "inprocess")
    found = told(result)
    assert (found.tasks, found.split) == (["fields", "banks"], "test")
    (early, unseen), (late, learned) = found.matrix
    assert early > 0.8
    assert unseen < 0.5
    assert learned > 0.9
    assert late < early, "nothing keeps the old"
    assert measures(found.matrix, found.start) == (found.acc, found.bwt, found.fwt, found.forgetting)
    assert [line.task for line in result.rounds] == ["fields", "fields", "banks", "banks"]
    assert [sorted(line.by_task) for line in result.rounds] == [[], ["banks", "fields"]] * 2
    versions = Versions(tmp_path, plan).all()
    assert [(version.number, version.task, version.round, version.parent) for version in versions] == [
        (0, "start", 0, None),
        (1, "fields", 2, 0),
        (2, "banks", 4, 1),
    ]
    assert [version.validation for version in versions[1:]] == [result.rounds[1].by_task, result.rounds[3].by_task]
    assert same(states(tmp_path, plan)[1], load_state(tmp_path, plan))
    assert read_result(tmp_path).continual == found


def load_state(out: Path, plan: Plan) -> State:
    state = RunDirectory(out, plan).load_state()
    assert state is not None
    return state.model


def test_domains_of_the_same_labels(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of([{"name": "a", "where": {"site": ["a"]}}, {"name": "b", "where": {"site": ["b"]}}])
    found = told(run(plan, tmp_path, "inprocess"))
    assert min(found.matrix[1]) > 0.8
    assert found.matrix[0][1] > 0.6, "what was learned of one helps with the other"
    assert found.fwt > 0.2


@pytest.mark.parametrize("changes", [{}, {"privacy": PRIVATE}, {"aggregation": MEAN}])
def test_a_run_that_goes_on_in_mid_task_is_as_one_that_was_not_broken(
    tmp_path: Path, plan_of: Callable[..., Plan], changes: dict[str, Any]
) -> None:
    plan = plan_of(**changes)
    whole = run(plan, tmp_path, "inprocess")
    expected = states(tmp_path, plan)
    (tmp_path / "checkpoints" / "round-00004.safetensors").unlink()
    again = run(plan, tmp_path, "inprocess", resume=True)
    assert all(map(same, states(tmp_path, plan), expected))
    assert again.continual == whole.continual
    assert again.privacy.clients == whole.privacy.clients


@pytest.mark.parametrize("number", [1, 2])
def test_a_crash_between_a_tasks_end_and_its_version_loses_nothing(
    tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    plan = plan_of()
    whole = run(plan, tmp_path / "whole", "inprocess")
    original = Versions.add
    calls: list[int] = []

    def add(self: Versions, *given: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            raise LichenError(Code.OUTPUT_UNUSABLE, "the disk is full")
        original(self, *given)

    monkeypatch.setattr(Versions, "add", add)
    with pytest.raises(LichenError):
        run(plan, tmp_path / "broken", "inprocess")
    again = run(plan, tmp_path / "broken", "inprocess", resume=True)
    assert again.continual == whole.continual
    assert all(map(same, states(tmp_path / "broken", plan), states(tmp_path / "whole", plan)))


def test_a_disk_that_is_full_when_a_version_is_written_loses_nothing(
    tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = plan_of(), tmp_path / "full"
    whole = run(plan, tmp_path / "whole", "inprocess")
    original, file = Versions.add, out / FOLDER / "1-fields" / "state.tmp"

    def add(self: Versions, *given: Any) -> None:
        file.parent.mkdir(parents=True)
        file.symlink_to("/dev/full")
        original(self, *given)

    monkeypatch.setattr(Versions, "add", add)
    with pytest.raises(OSError, match="No space left") as caught:
        run(plan, out, "inprocess")
    monkeypatch.setattr(Versions, "add", original)
    assert disk_failed(caught.value), "a coordinator waits for space"
    assert [version.number for version in Versions(out, plan).all()] == [0], "no half of a version is told of"
    file.unlink()
    assert run(plan, out, "inprocess", resume=True).continual == whole.continual
    assert all(map(same, states(out, plan), states(tmp_path / "whole", plan)))


def test_a_version_that_has_forgotten_too_much_is_held_back(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    strict, lax = plan_of(tolerance=0.05), plan_of(tolerance=1.0)
    results = [run(plan, tmp_path / str(plan.continual.tolerance), "inprocess") for plan in (strict, lax)]
    assert told(results[0]).matrix == told(results[1]).matrix
    assert list(told(results[0]).held_back) == ["2-banks"]
    assert "accuracy on fields has fallen from" in told(results[0]).held_back["2-banks"]
    assert told(results[1]).held_back == {}
    assert Versions(tmp_path / "0.05", strict).current().number == 1
    assert Versions(tmp_path / "1.0", lax).current().number == 2
    scores = [result.final["accuracy"] for result in results]  # type: ignore[index]
    assert scores[0] != scores[1]
    with pytest.raises(LichenError) as caught:
        Versions(tmp_path / "nowhere", lax).current()
    assert caught.value.code is Code.NO_MODEL


def test_a_run_that_is_rolled_back_as_it_goes_on_ends_with_what_was_chosen(
    tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, add = plan_of(tolerance=1.0), Versions.add

    def and_choose(self: Versions, *given: Any) -> None:
        add(self, *given)
        Versions(tmp_path / "chosen", plan).choose(1)  # an operator's process

    whole = run(plan, tmp_path / "whole", "inprocess")
    monkeypatch.setattr(Versions, "add", and_choose)
    result = run(plan, tmp_path / "chosen", "inprocess")
    assert (told(result).given_out, told(result).held_back) == ("1-fields", {"2-banks": "rolled back to 1-fields"})
    assert told(result).matrix == told(whole).matrix, "training went on from the newest"
    assert read_config(tmp_path / "chosen" / "model") == dict(enumerate(STREAM[0]["labels"]))
    assert read_config(tmp_path / "whole" / "model") == dict(enumerate(plan.task.labels))


def test_test_rows_tell_of_the_versions_whose_models_were_kept(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plans = (plan_of(continual={"stream": STREAM, "tolerance": 1.0, "keep": keep}) for keep in (None, 1))
    whole, lean = (run(plan, tmp_path / str(plan.continual.keep), "inprocess") for plan in plans)
    assert told(lean).matrix == [[None, None], told(whole).matrix[1]]
    assert (told(lean).acc, told(lean).bwt) == (told(whole).acc, None)
    assert lean.final == whole.final


def test_a_stream_without_a_score_tells_its_tasks_and_what_is_given_out(
    tmp_path: Path, plan_of: Callable[..., Plan], csv_plan: dict[str, Any]
) -> None:
    data = {key: value for key, value in csv_plan["simulation"]["data"].items() if key != "test"}
    changes = {"evaluation": {"validation_fraction": 0.0}, "simulation": csv_plan["simulation"] | {"data": data}}
    result = run(plan_of(**changes), tmp_path, "inprocess")
    found = told(result)
    assert (found.tasks, found.split, found.matrix, found.given_out) == (["fields", "banks"], None, [], "2-banks")
    assert (found.acc, found.forgetting, found.held_back, result.final) == (None, None, {}, None)
    assert conclusion(result).startswith("finished; ")


def test_a_record_pays_for_its_task_and_a_person_in_all_for_the_sum(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    stream = [{**STREAM[0], "rounds": 3}, {**STREAM[1], "rounds": 1}]
    result = run(plan_of(stream, privacy=PRIVATE), tmp_path, "inprocess")
    for client in result.privacy.clients.values():
        assert client.segments.keys() == {"train:fields", "train:banks"}
        assert client.epsilon == max(client.segments.values()) <= 8.0
        assert client.epsilon_sum == pytest.approx(sum(client.segments.values()))
        assert min(client.segments.values()) > 7.0, "each task may spend what a record has"
    statement = result.privacy.statement
    assert statement is not None
    assert any("training rows of each task" in line and "no record in two tasks" in line for line in statement.assumptions)
    entity = run(plan_of(stream, privacy=PRIVATE | {"unit": "entity", "unit_field": "site"}), tmp_path / "entity", "inprocess")
    assert all(client.segments.keys() == {"train"} and client.epsilon <= 8.0 for client in entity.privacy.clients.values())


PARTS = [(["crop", "metal"], "a"), (["money"], "a"), (["crop"], "b"), (["metal"], "b"), (["money"], "b")]
FIVE = [{"name": f"task-{number}", "labels": labels, "where": {"site": [site]}} for number, (labels, site) in enumerate(PARTS)]
"""Tasks of two rounds each, of which no two have a row in common."""


def ledgers(out: Path) -> Iterator[tuple[str, dict[tuple[int, ...], float], dict[str, Any], Segment]]:
    """Of each client its name, the ε of its data segments by the rounds in which they were read, all that its ledger tells, and a round."""
    homes = sorted((out / "simulation").glob("client-*"))
    assert len(homes) == 3
    for home in homes:
        with open_ledger(home, own=True) as ledger:
            entries, told = ledger.entries(), spending(ledger, Limit(PRIVATE["epsilon"], PRIVATE["delta"]))
        of = {row["segment"]: tuple(entry.round for entry in entries if row["segment"] in entry.charged) for row in told["segments"]}
        found = {of[row["segment"]]: row["epsilon"] for row in told["segments"]}
        assert len(found) == len(of)
        (step,) = {entry.segment for entry in entries}
        yield home.name, found, told, step


def test_after_five_disjoint_tasks_a_record_has_paid_for_one_and_the_sum_stands_beside(
    tmp_path: Path, plan_of: Callable[..., Plan]
) -> None:
    plan = plan_of(FIVE, rounds=10, privacy=PRIVATE, cohort={"size": 2})  # who is not in each round pays less in some task
    result = run(plan, tmp_path, "inprocess")
    unlike = 0
    for name, found, owner, step in ledgers(tmp_path):
        client = result.privacy.clients[name]
        of_task = {plan.continual.stream[(rounds[0] - 1) // 2].name: paid for rounds, paid in found.items()}
        assert client.segments == {f"train:{task}": paid for task, paid in of_task.items()}, "owner and coordinator have one account"
        assert all(rounds in {(first,), (first + 1,), (first, first + 1)} for rounds in found for first in [(rounds[0] - 1) // 2 * 2 + 1])
        assert found == {rounds: epsilon([step] * len(rounds), PRIVATE["delta"]) for rounds in found}
        assert owner["record"] == client.epsilon == max(found.values()) <= PRIVATE["epsilon"]
        assert client.epsilon_sum == pytest.approx(sum(found.values()))
        assert client.epsilon_sum > 3 * client.epsilon
        unlike += len(set(found.values())) > 1
    assert unlike
    assert {task for client in result.privacy.clients.values() for task in client.segments} == {f"train:{task['name']}" for task in FIVE}


def test_with_replay_what_is_replayed_has_paid_for_its_rounds_too(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    continual = {"method": "replay", "stream": FIVE, "tolerance": 1.0, "replay": {"share": 0.5}}
    plan = plan_of(continual=continual, rounds=10, privacy=PRIVATE)
    result = run(plan, tmp_path, "inprocess")
    firsts = range(1, 11, 2)
    alone, replayed = [(first, first + 1) for first in firsts], [tuple(range(first, 11)) for first in firsts]
    for name, found, owner, step in ledgers(tmp_path):
        assert found.keys() == {*alone, *replayed}, "kept aside, or in all tasks from its own on"
        assert found == {rounds: epsilon([step] * len(rounds), PRIVATE["delta"]) for rounds in found}, "by the exact count"
        paid = [found[rounds] for rounds in replayed]
        assert paid == sorted(set(paid), reverse=True)
        assert {found[rounds] for rounds in alone} == {paid[-1]}, "the others have paid for one task"
        client = result.privacy.clients[name]
        assert owner["record"] == paid[0] == client.epsilon == client.epsilon_sum <= PRIVATE["epsilon"]


def test_the_next_task_starts_from_the_mean_of_the_last_rounds(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(aggregation={"average_last": 2}, transfer=EXACT)
    run(plan, tmp_path, "inprocess")
    # of the last task: its rounds' models are in the checkpoints before and at its end
    third, fourth = (load_file(tmp_path / "checkpoints" / f"round-{round:05d}.safetensors") for round in (3, 4))
    last = states(tmp_path, plan)[1]
    assert all(torch.equal(fourth[f"model/{name}"], tensor) for name, tensor in last.items())
    assert any(not torch.equal(third[f"model/{name}"], tensor) for name, tensor in last.items())
    assert not any(key.startswith("average/") for key in fourth), "the sum begins anew"


@pytest.mark.parametrize("rule", ["rolora", "flora", "fedex", "nested"])
def test_every_rule_may_learn_a_stream(tmp_path: Path, plan_of: Callable[..., Plan], csv_plan: dict[str, Any], rule: str) -> None:
    model = csv_plan["model"] | {"adapter": {"kind": "lora", "rank": 2}}
    plan = plan_of(aggregation={"rule": rule, "average_last": 2}, model=model, transfer=EXACT)
    found = told(run(plan, tmp_path, "inprocess"))
    assert found.matrix[1][1] > 0.8
    for state in states(tmp_path, plan):
        for name, tensor in state.items():
            if part_of(name) == MERGED:
                assert not state[beside(name, B)].any()
                assert tensor.any()
                assert state[beside(name, A)].any()


@pytest.mark.parametrize("privacy", [{}, PRIVATE])
def test_hold_outs_are_scored_by_task_where_the_coordinator_has_no_rows(
    tmp_path: Path, plan_of: Callable[..., Plan], csv_plan: dict[str, Any], privacy: dict[str, Any]
) -> None:
    evaluation = {"federated_every": 2, "validation_fraction": 0.0}
    data = {key: value for key, value in csv_plan["simulation"]["data"].items() if key != "test"}
    changes = {"evaluation": evaluation, "simulation": csv_plan["simulation"] | {"data": data}}
    result = run(plan_of(**changes, **({"privacy": privacy} if privacy else {})), tmp_path, "inprocess")
    assert [sorted(line.federated_by_task) for line in result.rounds] == [[], ["fields"], [], ["banks", "fields"]]
    found = told(result)
    assert (found.split, len(found.matrix), found.matrix[0][1]) == ("hold-outs", 2, None)
    assert found.matrix[0][0] == result.rounds[1].federated_by_task["fields"]["accuracy"]  # type: ignore[index]
    if not privacy:
        assert found.matrix[1][1] > 0.9 > 0.5 > found.matrix[1][0]
    for client in result.privacy.clients.values():
        assert client.segments.keys() == {"train:fields", "train:banks", "holdout"}
        assert client.epsilon <= 8.0


def test_a_task_without_validation_rows_has_no_score_and_ends_nothing(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    run(plan, tmp_path / "run", "inprocess")
    kept = tmp_path / "run" / "simulation" / "validation.parquet"
    rows = [row for row in pq.read_table(kept).to_pylist() if row["label"] == "money"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "late.parquet")
    own = OwnData(plan, tmp_path / "late.parquet", None)
    state = states(tmp_path / "run", plan)[0]
    first, second = stages(plan)
    assert own.validation(state, first) is None
    assert own.validation_by_task(state, first)["fields"] is None
    assert own.validation(state, second) is not None
    assert own.final(state, 0) is not None


@pytest.mark.parametrize(("noise", "counted"), [(None, 0), (4.0, 23)])
def test_a_task_of_which_these_clients_hold_no_rows_has_no_score(plan_of: Callable[..., Plan], noise: float | None, counted: int) -> None:
    own, plan = OwnData(plan_of(), None, None), plan_of()
    counts = [counted, *[0] * 8, 30, *[0] * 8]
    report = EvaluateReport(client="a", round=4, counts=counts, noise_multiplier=noise)
    _, by_task = own.add_counts([report], stages(plan)[1])
    assert by_task["fields"] is None, "what is counted could be noise alone"
    assert (by_task["banks"] or {})["accuracy"] == 1.0


def test_ends_that_were_not_scored_keep_their_place_in_r(tmp_path: Path, plan_of: Callable[..., Plan], csv_plan: dict[str, Any]) -> None:
    data = {key: value for key, value in csv_plan["simulation"]["data"].items() if key != "test"}
    evaluation = {"federated_every": 4, "validation_fraction": 0.0}
    plan = plan_of(evaluation=evaluation, simulation=csv_plan["simulation"] | {"data": data})
    found = told(run(plan, tmp_path, "inprocess"))
    assert found.matrix[0] == [None, None]
    assert None not in found.matrix[1]
    assert (found.bwt, found.drift) == (None, [None, None])
    assert found.acc is not None


def test_rows_of_no_task_are_left_out_whatever_their_label(tmp_path: Path, plan_of: Callable[..., Plan], csv_plan: dict[str, Any]) -> None:
    labels = ["crop", "metal"]
    stream = [{"name": site, "labels": labels, "where": {"site": [site]}} for site in "ab"]
    found = told(run(plan_of(stream, task=csv_plan["task"] | {"labels": labels}), tmp_path, "inprocess"))
    assert min(found.matrix[1]) > 0.8
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "finished"


def test_any_version_can_be_taken_out(tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    run(plan, tmp_path / "run", "inprocess")
    told = CliRunner().invoke(app, [str(tmp_path / "run"), "--out", str(tmp_path / "one"), "--version", "1"])
    assert told.exit_code == 0, told.output
    model = make_task(plan).build()
    load_saved(tmp_path / "one", model)
    assert same(model.state(), states(tmp_path / "run", plan)[0])
    export_model(tmp_path / "run", tmp_path / "newest")
    load_saved(tmp_path / "newest", model)
    assert same(model.state(), states(tmp_path / "run", plan)[1])
    export_model(tmp_path / "run", tmp_path / "merged", "merged", 1)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    with pytest.raises(LichenError) as caught:
        export_model(tmp_path / "run", tmp_path / "three", version=3)
    assert (caught.value.code, caught.value.fix) == (Code.NO_MODEL, "Versions that have a model: 1-fields, 2-banks.")
    assert not (tmp_path / "three").exists()


ONLINE: dict[str, Any] = {"mode": "online", "online": {"rounds": 2, "clients": 3}}


def test_a_simulated_online_run_deals_rows_to_batches(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    # so few rows are counted that with more noise it could be all that there is
    scored = {"evaluation": {"federated_every": 1}, "privacy": PRIVATE | {"epsilon": 100.0}}
    plan = parse_plan(csv_plan | {"rounds": 6, "cohort": {"size": 3}, "continual": ONLINE} | scored)
    result = run(plan, tmp_path / "whole", "inprocess")
    found = told(result)
    assert (found.tasks, found.split) == (["batch-1", "batch-2", "batch-3"], "hold-outs")
    assert [[score is not None for score in row] for row in found.matrix] == [[True, True, False], [True] * 3, [True] * 3]
    assert [line.drift is not None for line in result.rounds] == [False, False, True, False, True, False]
    assert [sorted(line.before_by_task) for line in result.rounds[::2]] == [found.tasks[: batch + 1] for batch in range(3)]
    for name, client in result.privacy.clients.items():
        assert client.segments.keys() == {"train:batch-1", "train:batch-2", "train:batch-3", "holdout"}
        assert client.epsilon <= 100.0
        with Ledger(tmp_path / "whole" / "simulation" / name) as ledger:
            rounds: dict[int, set[int]] = {}
            for entry in ledger.entries():
                if entry.split == "train":
                    for number in entry.charged:
                        rounds.setdefault(number, set()).add((entry.round - 1) // 2)
            assert all(len(batches) == 1 for batches in rounds.values()), "a segment is read in one batch"
            assert set().union(*rounds.values()) == {0, 1, 2}

    answered: list[str] = []

    def cut(kind: str, done: int, _: int) -> None:
        answered.extend([kind] if done == 1 else [])
        if answered.count(TRAIN) == 5:
            raise RuntimeError("in the first round of the last batch, which had been scored")

    with pytest.raises(RuntimeError):
        run(plan, tmp_path / "cut", "inprocess", progress=cut)
    resumed = run(plan, tmp_path / "cut", "inprocess", resume=True)
    assert resumed.continual == found
    assert resumed.privacy.clients == result.privacy.clients, "nothing was scored again"

    expected = states(tmp_path / "whole", plan)
    (tmp_path / "whole" / "checkpoints" / "round-00006.safetensors").unlink()
    again = run(plan, tmp_path / "whole", "inprocess", resume=True)
    assert all(map(same, states(tmp_path / "whole", plan), expected))
    assert again.continual == found
    assert again.privacy.clients == result.privacy.clients
