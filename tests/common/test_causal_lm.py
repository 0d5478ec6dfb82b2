"""Language models: a text's loss is its own, what is scored, and real runs of a small LLaMA, private or not, in tasks or not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from lichen.common.errors import Code, LichenError
from lichen.common.model.base import RANDOM
from lichen.common.model.export import load_saved
from lichen.common.plan import Plan, parse_plan
from lichen.common.tasks import make_task, workbench
from lichen.common.tasks.causal_lm import BINS, CausalLM, LanguageScores
from lichen.simulations.simulate import run

DOCUMENT: dict[str, Any] = {
    "rounds": 2,
    "task": {"kind": "causal-lm", "max_length": 48},
    "model": {"base": RANDOM, "adapter": {"kind": "full"}},
    "cohort": {"size": 2, "minimum": 2},
    "local": {"steps": 12, "batch_size": 8, "learning_rate": 0.01},
    "simulation": {"clients": 2, "data": "made-up:240"},
    "evaluation": {"test_fraction": 0.2, "validation_fraction": 0.1},
}
PRIVATE = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "sample_rate": 0.2}


def plan_of(**changes: Any) -> Plan:
    document = dict(DOCUMENT)
    for key, value in changes.items():
        old = document.get(key)
        document[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return parse_plan(document)


def texts(*given: str) -> dict[str, list[str]]:
    return {"text": list(given)}


def test_a_texts_loss_is_the_mean_over_its_own_tokens_whatever_it_is_batched_with() -> None:
    task = CausalLM(plan_of())
    model = task.build()
    data = task.encode(texts("wheat", "a longer text about copper", "x"))
    together = task.losses(model.network, task.collate(data, [0, 1, 2]))
    for row in range(3):
        ids = torch.tensor(np.array(data.tokens[row]), dtype=torch.int64)[None]
        logits = model.network(input_ids=ids).logits[0, :-1]
        alone = F.cross_entropy(logits, ids[0, 1:]) if ids.shape[1] > 1 else torch.tensor(0.0)
        torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)
    assert [len(ids) for ids in data.tokens] == [5, 26, 1], "bytes"
    assert task.tokenizer.decode(data.tokens[0]) == "wheat"
    assert task.tokenizer.decode(task.encode(texts("Grün €")).tokens[0]) == "Grün €"


def test_a_score_is_the_mean_share_told_right_and_what_a_text_changes_is_one_count() -> None:
    task = CausalLM(plan_of())
    model = task.build()
    data = task.encode(texts("wheat and corn", "gold", "a mine of ore"))
    whole = task.score(model.network, data, 2)
    parts = [task.score(model.network, data, 2, [row]) for row in range(3)]
    assert all(np.abs(part.counts).sum() == 1 for part in parts)
    np.testing.assert_array_equal(sum(part.counts for part in parts), whole.counts)
    assert whole.loss_sum == pytest.approx(sum(part.loss_sum or 0 for part in parts), rel=1e-5)
    assert task.score(model.network, data, 2, []).counts.sum() == 0
    metrics = whole.metrics()
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"] or 0))
    same = task.scores_from(whole.counts.tolist(), whole.loss_sum).metrics()
    assert same == metrics
    for counts in ([0.0] * (BINS - 1), [math.nan] * BINS):
        with pytest.raises(LichenError) as caught:
            task.scores_from(counts, None)
        assert caught.value.code is Code.FRAME_INVALID


@given(st.integers(0, 1000), st.integers(0, 50))
def test_noise_does_not_move_the_mean_share(seed: int, share: int) -> None:
    counts = np.zeros(BINS)
    counts[share] = 2000
    noised = counts + np.random.default_rng(seed).normal(0, 3, BINS).round()
    found = LanguageScores(noised, None).metrics()
    assert found.keys() == {"accuracy"}
    assert found["accuracy"] == pytest.approx(share / (BINS - 1), abs=0.05)


def test_a_run_learns_and_plain_transformers_go_on_with_what_it_saved(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = plan_of(rounds=3, local={"steps": 60})
    result = run(plan, tmp_path, "inprocess")
    assert result.final is not None
    assert result.final["accuracy"] > 0.35, "of random bytes"
    assert result.final["perplexity"] == pytest.approx(math.exp(result.final["loss"]))
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens = network.generate(**tokenizer("the ", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(tokens[0]).startswith("the ")
    assert "AutoModelForCausalLM" in (tmp_path / "model" / "README.md").read_text()
    assert "labels" not in (tmp_path / "model" / "README.md").read_text()
    task = make_task(plan)
    model = task.build()
    load_saved(tmp_path / "model", model)
    rows = task.encode(texts("wheat corn said in today new"))
    with torch.no_grad():
        ours = model.network(**task.collate(rows, [0])).logits
        theirs = network(**tokenizer("wheat corn said in today new", return_tensors="pt")).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_tasks_one_after_another_under_privacy_with_hold_outs_and_a_crash(tmp_path: Path, csv_texts: dict[str, Any]) -> None:
    stream = [{"name": "first", "where": {"site": ["a"]}}, {"name": "second", "where": {"site": ["b"]}}]
    plan = plan_of(
        rounds=4,
        privacy=PRIVATE,
        continual={"method": "sequential", "stream": stream, "tolerance": 1.0},
        simulation={"data": csv_texts},
        evaluation={"federated_every": 2},
        local={"steps": 2, "learning_rate": 0.005},
    )
    result = run(plan, tmp_path, "inprocess")
    assert result.continual is not None
    assert [[score is not None for score in row] for row in result.continual.matrix] == [[True, True]] * 2
    assert all(client.segments.keys() == {"train:first", "train:second", "holdout"} for client in result.privacy.clients.values())
    (tmp_path / "checkpoints" / "round-00004.safetensors").unlink()
    again = run(plan, tmp_path, "inprocess", resume=True)
    assert again.continual == result.continual
    assert again.final == result.final


@pytest.fixture
def csv_texts(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Any) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("texts") / "train.csv"
    lines = [f'"{row["text"]}",{"ab"[number % 2]}' for number, row in enumerate(tiny_rows(160))]
    file.write_text("\n".join(["BODY,SITE", *lines]) + "\n")
    return {"path": str(file), "fields": {"text": "BODY", "site": "SITE"}}


@pytest.mark.parametrize("method", ["ewc", "replay", "olora"])
def test_methods_that_need_no_labels(tmp_path: Path, csv_texts: dict[str, Any], method: str, tiny_llama: Path) -> None:
    stream = [{"name": "first", "where": {"site": ["a"]}}, {"name": "second", "where": {"site": ["b"]}}]
    model = {"base": str(tiny_llama), "adapter": {"kind": "lora", "rank": 2}}
    continual = {"method": method, "stream": stream, "tolerance": 1.0}
    plan = plan_of(rounds=4, model=model, continual=continual, simulation={"data": csv_texts}, local={"steps": 2})
    result = run(plan, tmp_path, "inprocess")
    assert result.status == "finished"
    assert result.continual is not None
    assert result.continual.acc is not None


@pytest.fixture
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in a folder, for LoRA, whose base must be found again."""
    folder = tmp_path_factory.mktemp("llama")
    bench = workbench(plan_of())
    bench.model.network.save_pretrained(folder)
    bench.task.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"adapter": {"kind": "lora"}}}, "random weights"),
        ({"model": {"base": "some/model", "adapter": {"kind": "head"}}}, "no head of its own"),
        ({"continual": {"method": "lwf", "stream": [{"name": "x", "where": {"site": ["a"]}}]}}, "no labels to keep"),
        (
            {"continual": {"method": "replay", "replay": {"rows": 3}, "stream": [{"name": "x", "where": {"site": ["a"]}}]}},
            "so many of each label",
        ),
        ({"privacy": PRIVATE | {"audit": {"canaries": 4}}}, "rows with wrong labels"),
        ({"simulation": {"partition": "dirichlet:0.5"}}, "has none"),
        ({"continual": {"stream": [{"name": "x", "labels": ["a"]}]}}, "are not among task.labels"),
    ],
)
def test_what_would_not_do_for_a_language_model_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(LichenError) as caught:
        plan_of(**changes)
    assert caught.value.code is Code.PLAN_UNSOUND
    assert reason in caught.value.what


@pytest.mark.parametrize("task", [{"kind": "causal-lm", "labels": ["a", "b"]}, {"kind": "text-classification", "labels": ["a"]}, {}])
def test_labels_are_for_a_classification(task: dict[str, Any]) -> None:
    with pytest.raises(LichenError) as caught:
        parse_plan(DOCUMENT | {"task": task})
    assert caught.value.code is Code.PLAN_INVALID
    assert "labels" in caught.value.what


def test_the_random_base_is_for_language_models_alone() -> None:
    with pytest.raises(LichenError, match="random weights"):
        parse_plan(DOCUMENT | {"task": {"labels": ["a", "b"]}})
