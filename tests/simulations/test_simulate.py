"""A plan played in this process on real rows and a real (tiny) model: what it learns, what it costs, and that it repeats bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, digest_of, parse_plan
from lichen.common.result import ClientPrivacy, Result, read_result
from lichen.simulations.simulate import run

PRIVATE = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "sample_rate": 0.2}
MAJORITY = 1 / 3

Play = Callable[..., tuple[Result, Path]]


@pytest.fixture
def play(tmp_path: Path, csv_plan: dict[str, Any]) -> Play:
    """Play the plan with some sections changed; each time in a directory of its own."""
    played: list[Path] = []

    def go(plan: dict[str, Any] | None = None, **changes: Any) -> tuple[Result, Path]:
        document = dict(plan or csv_plan)
        for key, value in changes.items():
            old = document.get(key)
            document[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        played.append(tmp_path / f"run-{len(played)}")
        return run(parse_plan(document), played[-1], "inprocess"), played[-1]

    return go


def digest(out: Path) -> str:
    """Of the final adapter's bytes."""
    return hashlib.sha256((out / "model" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_without_privacy_it_learns_and_tells_how_well(play: Play) -> None:
    result, out = play()
    assert (result.status, result.engine, result.privacy.unit) == ("finished", "inprocess", "none")
    assert result.final is not None
    assert result.final["split"] == "test"
    assert result.final["accuracy"] > MAJORITY + 0.25
    assert result.rounds[-1].train_loss is not None
    assert result.rounds[0].train_loss is not None
    assert result.rounds[-1].train_loss < result.rounds[0].train_loss
    assert (result.rounds[0].validation or {}).keys() == {"accuracy", "macro_f1", "loss"}
    assert result.privacy.max_epsilon is None
    facts = json.loads((out / "simulation.json").read_text())
    assert facts == {
        "format": 1,
        "partition": "iid",
        "examples": {"client-0": 54, "client-1": 54, "client-2": 54},
        "validation": 18,
        "test": 60,
    }


def test_it_repeats_bit_for_bit_and_another_seed_differs(play: Play) -> None:
    (first, one), (second, two), (_, other) = play(), play(), play(seed=2)
    assert digest(one) == digest(two) != digest(other)
    assert first.final == second.final
    assert [told.train_loss for told in first.rounds] == [told.train_loss for told in second.rounds]


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE])
def test_workers_give_the_bytes_of_one_process(
    play: Play, csv_plan: dict[str, Any], tmp_path: Path, privacy: dict[str, Any], precision: str
) -> None:
    plan = csv_plan | {"privacy": privacy, "local": csv_plan["local"] | {"compute": "plain"}}
    plan["model"] = plan["model"] | {"base_precision": precision}
    _, alone = play(plan)
    run(parse_plan(plan), tmp_path / "workers", "inprocess", workers=2)
    assert digest(alone) == digest(tmp_path / "workers")
    between, beside = (read_result(out) for out in (alone, tmp_path / "workers"))
    assert [told.validation for told in between.rounds] == [told.validation for told in beside.rounds]
    assert between.rounds[0].validation
    assert between.final == beside.final


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE])
def test_clients_that_pass_together_learn_the_same(play: Play, csv_plan: dict[str, Any], privacy: dict[str, Any]) -> None:
    local = csv_plan["local"] | {"optimizer": "sgd", "learning_rate": 0.2}  # AdamW would take a step for what rounding left of a zero
    together, alone = (play(privacy=privacy, local=local | {"compute": compute}) for compute in ("lean", "plain"))
    left, right = (load_file(out / "model" / "adapter_model.safetensors") for _, out in (together, alone))
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(together[0].rounds, alone[0].rounds, strict=True):
        assert ours.train_loss == (theirs.train_loss and pytest.approx(theirs.train_loss, rel=1e-5))
    assert together[0].privacy == alone[0].privacy


def test_private_runs_repeat_too_and_keep_to_the_plans_epsilon(play: Play) -> None:
    (result, one), (again, two) = play(privacy=PRIVATE), play(privacy=PRIVATE)
    assert digest(one) == digest(two)
    assert result.privacy == again.privacy
    statement = result.privacy.statement
    assert statement is not None
    assert not statement.private
    told = {name: (bound.epsilon, bound.epsilon_sum) for name, bound in statement.with_secret_noise.items()}
    assert told == {name: (client.epsilon, client.epsilon_sum) for name, client in result.privacy.clients.items()}
    assert statement.summary in (one / "model" / "README.md").read_text(encoding="utf-8")
    assert f"<p>{statement.summary}</p>" in (one / "report.html").read_text(encoding="utf-8")
    assert result.privacy.max_epsilon is not None
    assert 0 < result.privacy.max_epsilon <= 8.0
    assert result.privacy.max_epsilon == max(client.epsilon for client in result.privacy.clients.values())
    assert [told.train_loss for told in result.rounds] == [None, None]
    participated = {name: client.steps // 12 for name, client in result.privacy.clients.items()}
    assert sum(participated.values()) == sum(told.participants for told in result.rounds)


def independent(client: ClientPrivacy, delta: float) -> tuple[float, float]:
    """ε of a client's training by dp-accounting: privacy loss distributions on a grid ten times as fine, and Rényi DP's looser bound."""
    from dp_accounting import dp_event
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
    from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

    step = dp_event.PoissonSampledDpEvent(client.sample_rate, dp_event.GaussianDpEvent(client.noise_multiplier))
    fine, loose = PLDAccountant(value_discretization_interval=1e-4), RdpAccountant()
    fine.compose(step, client.steps)
    loose.compose(step, client.steps)
    return float(fine.get_epsilon(delta)), float(loose.get_epsilon(delta))


def test_epsilon_is_what_an_independent_accountant_says(play: Play) -> None:
    result, _ = play(privacy=PRIVATE, evaluation={"federated_every": 1}, cohort={"size": 2})
    assert result.privacy.clients
    for client in result.privacy.clients.values():
        exact, loose = independent(client, 1e-3)
        assert exact * (1 - 1e-6) <= client.segments["train"] <= min(exact * 1.005, loose)


def test_private_hold_outs_are_noised_charged_and_told_apart(play: Play) -> None:
    result, out = play(privacy=PRIVATE, evaluation={"federated_every": 1})
    for client in result.privacy.clients.values():
        assert client.segments.keys() == {"train", "holdout"}
        assert client.epsilon == max(client.segments.values()) <= 8.0
        assert client.epsilon_sum == sum(client.segments.values())
    for told in result.rounds:
        assert told.federated is not None
        assert told.federated.keys() == {"accuracy", "macro_f1"}
    assert json.loads((out / "simulation.json").read_text())["examples"]["client-0"] == 54


def test_hold_outs_without_privacy_are_exact(play: Play) -> None:
    result, _ = play(evaluation={"federated_every": 2})
    assert result.rounds[0].federated is None
    assert result.rounds[1].federated is not None
    assert result.rounds[1].federated.keys() == {"accuracy", "macro_f1", "loss"}
    first, second = (told.downlink_bytes or 0 for told in result.rounds)
    assert 0 < second / 4 < first / 2 / 2, "what a round added, to each of two clients, before and after it"


def checkpoint(out: Path, round: int, part: str) -> dict[str, torch.Tensor]:
    with safe_open(out / "checkpoints" / f"round-{round:05d}.safetensors", framework="pt") as file:
        return {key.split("/", 1)[1]: file.get_tensor(key) for key in file.keys() if key.startswith(part + "/")}  # noqa: SIM118


def test_the_final_model_is_the_mean_of_the_last_rounds(play: Play) -> None:
    _, out = play(rounds=3, aggregation={"average_last": 2})
    final = load_file(out / "model" / "adapter_model.safetensors")
    before, last = checkpoint(out, 2, "model"), checkpoint(out, 3, "model")
    for name, tensor in final.items():
        torch.testing.assert_close(tensor, (before[name] + last[name]) / 2)
    assert any(not torch.equal(before[name], last[name]) for name in last)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(
    ("kind", "rate", "precision"),
    [("lora", 0.02, "float32"), ("full", 0.005, "float32"), ("head", 0.2, "float32"), ("lora", 0.02, "int8"), ("head", 0.2, "bfloat16")],
)
def test_each_kind_of_adapter_trains_and_is_loaded_by_plain_transformers(
    play: Play, tiny_model: Path, kind: str, rate: float, precision: str, private: bool
) -> None:
    from peft import AutoPeftModelForTokenClassification
    from transformers import AutoModelForTokenClassification, AutoTokenizer, BertModel

    changes: dict[str, Any] = {
        "local": {"learning_rate": rate, "head_learning_rate": None},
        "model": {"adapter": {"kind": kind, "rank": 2}, "base_precision": precision},
    }
    result, out = play(**changes, **({"privacy": PRIVATE} if private else {}))
    assert result.final is not None

    if kind == "lora":
        model: Any = AutoPeftModelForTokenClassification.from_pretrained(out / "model", num_labels=3).eval()
    else:
        model = AutoModelForTokenClassification.from_pretrained(out / "model").eval()
        base, body = BertModel.from_pretrained(tiny_model).state_dict(), model.bert.state_dict()
        unchanged = all(torch.equal(base[name], tensor) for name, tensor in body.items())
        assert unchanged == (kind == "head")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    import pyarrow.parquet as pq

    rows = pq.read_table(out / "simulation" / "test.parquet").to_pylist()
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits, mask = model(**batch).logits, batch["attention_mask"].unsqueeze(-1)
    found = ((logits * mask).sum(1) / mask.sum(1)).argmax(-1).tolist()
    labels = parse_labels(out)
    accuracy = sum(labels[index] == row["label"] for index, row in zip(found, rows, strict=True)) / len(rows)
    assert accuracy == pytest.approx(result.final["accuracy"])
    if kind != "head" and not private:
        assert accuracy > MAJORITY + 0.2


def parse_labels(out: Path) -> tuple[str, ...]:
    from lichen.common.plan import load_plan

    return load_plan(out / "plan.yaml").task.labels


def test_partitions_deal_as_the_plan_says(play: Play) -> None:
    _, by_site = play(simulation={"partition": "by:site"})
    sizes = json.loads((by_site / "simulation.json").read_text())["examples"]  # one client a site, less the validation rows
    assert sizes.keys() == {"client-0", "client-1"}
    assert sum(sizes.values()) == 162
    _, skewed = play(simulation={"partition": "dirichlet:0.3"}, cohort={"size": 1, "minimum": 1}, rounds=1)
    sizes = json.loads((skewed / "simulation.json").read_text())["examples"].values()
    assert sum(sizes) == 162
    assert len(set(sizes)) > 1


def test_without_validation_and_test_rows_there_is_no_score(play: Play, csv_plan: dict[str, Any]) -> None:
    data = {key: value for key, value in csv_plan["simulation"]["data"].items() if key != "test"}
    bare = csv_plan | {"simulation": csv_plan["simulation"] | {"data": data}}
    result, out = play(bare, evaluation={"validation_fraction": 0.0}, rounds=1)
    assert (result.status, result.final, result.rounds[0].validation) == ("finished", None, None)
    assert (out / "model" / "adapter_model.safetensors").exists()
    result, _ = play(bare, rounds=1)
    assert result.final is not None
    assert result.final["split"] == "validation"


def test_test_rows_may_be_held_out_and_are_the_same_for_every_seed(play: Play, csv_plan: dict[str, Any]) -> None:
    data = {key: value for key, value in csv_plan["simulation"]["data"].items() if key != "test"}
    bare = csv_plan | {"simulation": csv_plan["simulation"] | {"data": data}}
    runs = [play(bare, evaluation={"test_fraction": 0.2}, rounds=1, seed=seed) for seed in (1, 2)]
    (one, other), (first, second) = (
        [pq.read_table(out / "simulation" / f"{name}.parquet").to_pylist() for _, out in runs] for name in ("test", "validation")
    )
    assert one == other
    assert len(one) == 36
    assert first != second
    assert not {row["text"] for row in one} & {row["text"] for row in first}
    assert runs[0][0].final is not None
    assert runs[0][0].final["split"] == "test"
    with pytest.raises(LichenError) as caught:
        play(evaluation={"test_fraction": 0.2})
    assert caught.value.code is Code.PLAN_INVALID


def test_more_clients_asked_than_simulated_is_told_at_once(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    with pytest.raises(LichenError) as caught:
        run(parse_plan(csv_plan | {"cohort": {"size": 4, "minimum": 1, "deadline_s": 600}}), tmp_path / "out", "inprocess")
    assert caught.value.code is Code.PARTITION_INVALID
    assert "cohort.size" in caught.value.what


def test_a_resume_with_another_plan_touches_nothing(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    def files() -> dict[str, str]:
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    plan = parse_plan(csv_plan | {"rounds": 1})
    run(plan, tmp_path / "out", "inprocess")
    before = files()
    other: Plan = parse_plan(csv_plan | {"rounds": 1, "seed": 5})
    with pytest.raises(LichenError) as caught:
        run(other, tmp_path / "out", "inprocess", resume=True)
    assert caught.value.code is Code.OUTPUT_UNUSABLE
    assert files() == before


def test_a_run_that_an_older_lichen_began_goes_on_under_its_id(
    tmp_path: Path, csv_plan: dict[str, Any], older_text: Callable[[Plan], str]
) -> None:
    plan, out = parse_plan(csv_plan | {"privacy": PRIVATE}), tmp_path / "out"
    assert plan.rounds > 1
    text = older_text(plan)
    (out / "checkpoints").mkdir(parents=True)
    (out / "plan.yaml").write_text(yaml.safe_dump(json.loads(text)))
    (out / "checkpoints" / "plan.sha256").write_text(digest_of(text))
    whole = run(plan, out, "inprocess", resume=True)
    assert (whole.run_id, whole.plan_sha256) == (str(int(digest_of(text)[:15], 16)), digest_of(text))
    before = digest(out)
    (out / "checkpoints" / f"round-{plan.rounds:05d}.safetensors").unlink()  # as if it had been killed in the last round
    again = run(plan, out, "inprocess", resume=True)
    assert (again.status, again.run_id, again.privacy) == ("finished", whole.run_id, whole.privacy), "charged once"
    assert digest(out) == before


def test_only_clients_that_were_asked_have_homes_and_a_resume_gives_the_same(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    plan = parse_plan(csv_plan | {"rounds": 3, "simulation": csv_plan["simulation"] | {"clients": 30}})

    def homes(out: Path) -> set[str]:
        return {path.parent.name for path in out.glob("simulation/*/data.yaml")}

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(plan, whole, "inprocess")
    run(plan, cut, "inprocess", workers=2)
    assert 2 <= len(homes(whole)) <= 6
    assert not (whole / "simulation" / "spool").exists()
    assert homes(cut) == homes(whole)
    for round in (2, 3):  # as if it had been killed in the second round, when some homes were not yet there
        (cut / "checkpoints" / f"round-{round:05d}.safetensors").unlink(missing_ok=True)
    for home in sorted((cut / "simulation").glob("client-*"))[:2]:
        (home / "data.yaml").unlink()
    result = run(plan, cut, "inprocess", resume=True)
    assert (result.status, len(result.rounds)) == ("finished", 3)
    assert digest(cut) == digest(whole)
    assert len(json.loads((cut / "simulation.json").read_text())["examples"]) == 30


def test_a_bad_row_of_a_client_that_may_never_be_asked_is_told_before_the_first_round(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    data = csv_plan["simulation"]["data"]
    broken = tmp_path / "broken.csv"
    lines = Path(data["path"]).read_text().splitlines(keepends=True)
    broken.write_text("".join([*lines[:5], ",crop,a\n", *lines[5:]]))
    plan = parse_plan(csv_plan | {"simulation": {"clients": 30, "data": data | {"path": str(broken)}}})
    with pytest.raises(LichenError) as caught:
        run(plan, tmp_path / "out", "inprocess")
    assert caught.value.code is Code.DATA_ROW
    assert caught.value.where == f"{broken}, row 6"
    assert not (tmp_path / "out").exists()


def test_progress_is_told_within_a_round(tmp_path: Path, csv_plan: dict[str, Any]) -> None:
    heard: list[tuple[str, int, int]] = []
    plan = parse_plan(csv_plan | {"rounds": 1, "evaluation": {"federated_every": 1}})
    run(plan, tmp_path / "out", "inprocess", progress=lambda *what: heard.append(what))
    assert heard == [("train", 1, 2), ("train", 2, 2), ("evaluate", 1, 2), ("evaluate", 2, 2)]
