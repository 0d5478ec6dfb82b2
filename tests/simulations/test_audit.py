"""`lichen audit` on real runs: it passes the correct code, and catches each way to break it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lichen.client import private_step
from lichen.client.gate import Gate
from lichen.common import tasks
from lichen.common.errors import Code, LichenError
from lichen.common.plan import parse_plan
from lichen.common.privacy.per_unit import NoisyOptimizer, PerUnitGradients
from lichen.simulations.audit import Audit, app, run_audit
from lichen.simulations.simulate import run

CLASSES = 1600
"""Most canaries have a label to themselves, so that their gradients hardly overlap: the head alone is enough to find them by."""
CLAIMED = 1.0
DRAWN = 216
"""Rows that a step draws, about: of 40 rows and 200 canaries nine tenths."""


@pytest.fixture
def document(tmp_path: Path, tiny_plan: dict[str, Any], tiny_rows: Callable[..., list[dict[str, str]]]) -> dict[str, Any]:
    for name, seed in (("train", 0), ("test", 1)):
        with (tmp_path / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(tiny_rows(40, seed))
    return tiny_plan | {
        "rounds": 1,
        "task": {"labels": [*tiny_plan["task"]["labels"], *(f"l{index}" for index in range(CLASSES))], "max_length": 32},
        "model": {"base": tiny_plan["model"]["base"], "adapter": {"kind": "head"}, "head": {"init": "random"}},
        "cohort": {"size": 1},
        "local": {
            "steps": 3,
            "batch_size": 8,
            "optimizer": "sgd",
            "betas": [0.0, 0.9],
            "learning_rate": 0.1,
            "max_physical_batch_size": 512,
        },
        "privacy": {"unit": "example", "epsilon": CLAIMED, "clip": 0.1, "sample_rate": 0.9, "audit": {"canaries": 400}},
        "evaluation": {"validation_fraction": 0},
        "simulation": {"clients": 1, "data": {"path": str(tmp_path / "train.csv"), "test": str(tmp_path / "test.csv")}},
    }


@pytest.fixture
def audited(tmp_path: Path, document: dict[str, Any]) -> Callable[..., Audit]:
    def go(**changes: Any) -> Audit:
        tasks.workbench.cache_clear()
        run(parse_plan(document | changes), tmp_path / "run", "inprocess")
        return run_audit(tmp_path / "run", [])

    return go


def optimizer(**factors: float) -> Callable[..., NoisyOptimizer]:
    """The real optimizer, but for factors on what it is given."""

    def make(inner: Any, **given: Any) -> NoisyOptimizer:
        return NoisyOptimizer(inner, **{key: value * factors.get(key, 1.0) if key in factors else value for key, value in given.items()})

    return make


def no_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that no gradient reaches; the noise is as strong as before."""
    monkeypatch.setattr(private_step, "NoisyOptimizer", optimizer(max_grad_norm=1e6, noise_multiplier=1e-6))


def little_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of what was accounted for."""
    monkeypatch.setattr(private_step, "NoisyOptimizer", optimizer(noise_multiplier=0.1))


def mean_of_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the batch's mean loss, clipped as one, with noise as for a mean over rows; the check at start would refuse it."""
    monkeypatch.setattr(private_step, "self_check", lambda *_: None)
    monkeypatch.setattr(private_step, "NoisyOptimizer", optimizer(noise_multiplier=1 / DRAWN, expected_batch_size=1 / DRAWN))
    real = PerUnitGradients.step

    def step(self: PerUnitGradients, optimizer: Any, units: Any, collate: Any, lengths: Any) -> None:
        real(self, optimizer, [[row for unit in units for row in unit]], collate)  # a unit's gradient is the mean of its rows'

    monkeypatch.setattr(PerUnitGradients, "step", step)


def test_it_passes_the_correct_code(audited: Callable[..., Audit]) -> None:
    found = audited()
    assert not found.refuted
    assert found.epsilon_at_least is not None
    assert found.claimed_epsilon is not None
    assert found.epsilon_at_least < found.claimed_epsilon <= CLAIMED
    assert (found.canaries, found.clients) == (400, 1)
    assert [guess.guesses for guess in found.guesses] == [200, 50, 12]


@pytest.mark.parametrize("broken", [no_clipping, little_noise, mean_of_batch])
def test_it_catches_what_is_broken(
    audited: Callable[..., Audit], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: Callable[[pytest.MonkeyPatch], None]
) -> None:
    monkeypatch.setattr(Gate, "step", lambda *_: None)  # it would refuse less noise than was charged
    broken(monkeypatch)
    found = audited()
    assert found.refuted
    assert found.epsilon_at_least is not None
    assert found.epsilon_at_least > 1.5 * CLAIMED, "by a margin: the test must not hang on a draw"
    told = CliRunner().invoke(app, [str(tmp_path / "run")])
    assert isinstance(told.exception, LichenError)
    assert told.exception.code is Code.PRIVACY_REFUTED
    assert "Refuted" in (tmp_path / "run" / "audit.html").read_text(encoding="utf-8")


def test_canaries_of_all_clients_count_together(audited: Callable[..., Audit], document: dict[str, Any], tmp_path: Path) -> None:
    found = audited(
        cohort={"size": 2},
        privacy=document["privacy"] | {"audit": {"canaries": 50}},
        simulation=document["simulation"] | {"clients": 2},
    )
    assert (found.canaries, found.clients) == (100, 2)
    alone = run_audit(tmp_path / "run", [tmp_path / "run" / "simulation" / "client-1"])
    assert (alone.canaries, alone.clients) == (50, 1)


def test_without_privacy_a_baseline_shows_what_is_there_to_find(audited: Callable[..., Audit], document: dict[str, Any]) -> None:
    found = audited(privacy={"audit": {"canaries": 200, "baseline": True}}, local=document["local"] | {"steps": 60})
    assert found.claimed_epsilon is None
    assert not found.refuted
    assert found.epsilon_at_least is not None
    assert found.epsilon_at_least > 1.5


def test_without_canaries_the_membership_attack_is_left(audited: Callable[..., Audit], document: dict[str, Any], tmp_path: Path) -> None:
    found = audited(privacy=document["privacy"] | {"audit": {}})
    assert found.epsilon_at_least is None
    assert found.membership is not None
    assert (found.membership.members, found.membership.others) == (40, 40)
    low, high = found.membership.auc_interval
    assert low <= found.membership.auc <= high
    page = (tmp_path / "run" / "audit.html").read_text(encoding="utf-8")
    assert "No claim was tested" in page
    told = CliRunner().invoke(app, [str(tmp_path / "run"), "--json"])
    assert told.exit_code == 0
    written = Audit.model_validate_json((tmp_path / "run" / "audit.json").read_text(encoding="utf-8"))
    assert Audit.model_validate(json.loads(told.stdout)) == written == found
    assert "cannot show that it is true" in written.note


def test_members_are_compared_with_rows_of_the_same_labels(audited: Callable[..., Audit], document: dict[str, Any], tmp_path: Path) -> None:
    """A client whose rows are all of one label is told from the others by that label, not by what it trained on."""
    with (tmp_path / "train.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *((f"gold copper mine {index}", "metal") for index in range(40))])
    found = audited(privacy=document["privacy"] | {"audit": {}})
    with (tmp_path / "test.csv").open(encoding="utf-8") as file:
        metal = sum(row["label"] == "metal" for row in csv.DictReader(file))
    assert found.membership is not None
    assert (found.membership.members, found.membership.others) == (metal, metal)


def test_what_cannot_be_audited_is_told(audited: Callable[..., Audit], document: dict[str, Any], tmp_path: Path) -> None:
    audited()
    out = tmp_path / "run"

    def refused(code: Code, homes: list[Path] | None = None) -> None:
        with pytest.raises(LichenError) as caught:
            run_audit(out, homes or [])
        assert caught.value.code is code

    other = tmp_path / "elsewhere"
    other.mkdir()
    told = CliRunner().invoke(app, [str(other)])
    assert isinstance(told.exception, LichenError)
    assert told.exception.code is Code.OUTPUT_UNUSABLE
    refused(Code.DATA_NOT_FOUND, [other])
    (out / "simulation" / "client-0" / "canaries").rename(tmp_path / "moved")
    refused(Code.DATA_NOT_FOUND)
    (out / "simulation").rename(tmp_path / "homes")
    refused(Code.DATA_NOT_FOUND)
    (out / "model").rename(tmp_path / "model")
    refused(Code.NO_MODEL)


def test_a_fetched_model_is_held_to_its_plans_epsilon(audited: Callable[..., Audit], tmp_path: Path) -> None:
    """What `lichen client model` fetched has no result: an owner audits it by the node's own home."""
    found = audited()
    fetched = tmp_path / "models" / found.run_id
    fetched.mkdir(parents=True)
    for name in ("plan.yaml", "model"):
        (tmp_path / "run" / name).rename(fetched / name)
    again = run_audit(fetched, [tmp_path / "run" / "simulation" / "client-0"])
    assert (again.run_id, again.claimed_epsilon) == (found.run_id, CLAIMED)
    assert again.guesses == found.guesses
