"""Passes in 16 bits: near to those in 32, exact in what privacy rests on, and not taken where the machine has no instructions for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.client.gate import Gate
from lichen.client.jobs import Job, Private
from lichen.client.trainer import Trained, Trainer
from lichen.common import tasks
from lichen.common.batches import ready
from lichen.common.errors import Code, LichenError
from lichen.common.model import precision
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.randomness import SeededSource
from lichen.common.privacy.single_backward.book import Book
from lichen.common.privacy.single_backward.records import Whole
from lichen.common.tasks import workbench

Rows = Callable[..., list[dict[str, Any]]]
NONE = {"unit": "none"}
PRIVATE = {"unit": "example", "epsilon": 6.0, "delta": 1e-5, "sample_rate": 0.25, "clip": 0.5}
STEPS = Segment(1e-6, 0.25, 3)  # next to no noise: what is left is the clipped sums
ADAPTERS = {
    "lora": {"kind": "lora", "rank": 2},
    "last layer": {"kind": "lora", "rank": 2, "last_layers": 1},
    "head": {"kind": "head"},
    "full": {"kind": "full"},
}


@pytest.fixture
def make(tiny_plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Plan]]:
    monkeypatch.setattr(precision, "has_bfloat16", lambda where: True)  # without instructions for it the processor is slow, but right

    def plan(precision: str, adapter: str = "lora", privacy: dict[str, Any] = NONE, base: str = "float32", **local: Any) -> Plan:
        tasks.workbench.cache_clear()
        model = tiny_plan["model"] | {"adapter": ADAPTERS[adapter], "base_precision": base, "head": {"pooling": "mean"}}
        local = tiny_plan["local"] | {"steps": 3, "batch_size": 12, "precision": precision} | local
        return parse_plan(tiny_plan | {"model": model, "local": local, "privacy": privacy})

    yield plan
    tasks.workbench.cache_clear()


def trained(plan: Plan, rows: list[dict[str, Any]], cache: Path | None = None) -> Trained:
    trainer = Trainer(plan)
    data = trainer.task.encode({field: [row[field] for row in rows] for field in trainer.task.fields})
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(tensor.shape, generator=generator) * 0.1 for name, tensor in trainer.model.trainable.items()}
    private = Private([[row] for row in range(len(rows))], STEPS, 48, Gate(STEPS)) if plan.private else None
    return trainer.run(Job(start, data, 1, SeededSource("client"), cache, private))


def distance(found: Trained, expected: Trained) -> float:
    left, right = (torch.cat([one.delta[name].flatten() for name in sorted(one.delta)]) for one in (found, expected))
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("compute", ["lean", "plain"])
@pytest.mark.parametrize("privacy", [NONE, PRIVATE], ids=["plain", "private"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_client_learns_nearly_the_same(
    make: Callable[..., Plan], tiny_rows: Rows, tmp_path: Path, adapter: str, privacy: dict[str, Any], compute: str
) -> None:
    """The private step has passed its self-check by then."""
    settings: dict[str, Any] = {"privacy": privacy, "compute": compute, "optimizer": "sgd", "learning_rate": 0.01}
    whole = trained(make("float32", adapter, **settings), tiny_rows(24), tmp_path / "whole")
    half = trained(make("bfloat16", adapter, **settings), tiny_rows(24), tmp_path / "half")
    assert all(tensor.dtype == torch.float32 for tensor in half.delta.values())
    assert 0 < distance(half, whole) < 0.03


def test_over_a_base_in_fewer_bits(make: Callable[..., Plan], tiny_rows: Rows) -> None:
    settings: dict[str, Any] = {"base": "int8", "optimizer": "sgd", "learning_rate": 0.01}
    whole, half = (trained(make(kind, "lora", **settings), tiny_rows(24)) for kind in ("float32", "bfloat16"))
    assert 0 < distance(half, whole) < 0.03


def test_results_are_held_against_each_other_in_32_bits(make: Callable[..., Plan], tiny_rows: Rows) -> None:
    """The coordinator may have made the model ready before the trainer checks its private step, in a simulation."""
    plan = make("bfloat16", "lora", PRIVATE)
    task, model, _ = workbench(plan)
    batch = task.collate(task.made_up(4), range(4))
    with torch.no_grad():
        for tensor in model.trainable.values():
            tensor.normal_(generator=torch.Generator().manual_seed(0))
    before = task.losses(model.network, batch)
    ready(plan, task, model)
    lowered = task.losses(model.network, batch)
    assert lowered.dtype == torch.float32
    assert not torch.allclose(lowered, before, rtol=1e-6)
    with precision.full_precision(model.network):
        torch.testing.assert_close(task.losses(model.network, batch), before)
    assert not torch.allclose(task.losses(model.network, batch), before, rtol=1e-6), "it is back"
    Trainer(plan)


def test_a_row_that_moves_the_sum_by_more_than_the_clip_in_16_bits_is_found(
    make: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the check against a loop, in 32 bits, finds nothing wrong."""
    original = Book.clipped_sum

    def wrong(self: Book, parameters: Any, clip: float) -> list[torch.Tensor]:
        lowered = any(
            record.backprops.dtype == torch.bfloat16 for own in self._records.values() for record in own if hasattr(record, "backprops")
        )
        lowered |= any(
            record.gradients.dtype == torch.bfloat16 for own in self._records.values() for record in own if isinstance(record, Whole)
        )
        found = original(self, parameters, clip)
        return [1.01 * part for part in found] if lowered else found

    monkeypatch.setattr(Book, "clipped_sum", wrong)
    Trainer(make("float32", "lora", PRIVATE))
    with pytest.raises(LichenError, match="in 16 bits a row") as caught:
        Trainer(make("bfloat16", "lora", PRIVATE))
    assert caught.value.code is Code.PRIVACY_SELF_CHECK


def test_without_instructions_for_it_a_machine_computes_in_32_bits(
    make: Callable[..., Plan], tiny_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda where: False)
    whole, same = (trained(make(kind), tiny_rows(24)) for kind in ("float32", "bfloat16"))
    assert distance(same, whole) == 0


@pytest.mark.parametrize("able", [{"avx512_bf16": True}, {"amx_bf16": True}, {"avx2": True, "avx512_bf16": False}])
def test_what_a_processor_says_of_itself(able: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert precision.has_bfloat16(torch.device("cpu")) == any(able.get(name) for name in ("avx512_bf16", "amx_bf16"))


def test_opacus_hooks_want_32_bits(make: Callable[..., Plan]) -> None:
    with pytest.raises(LichenError) as caught:
        make("bfloat16", privacy=PRIVATE | {"gradients": "hooks"})
    assert caught.value.code is Code.PLAN_UNSOUND
    assert "single-backward" in str(caught.value.fix)
