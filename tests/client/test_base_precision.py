"""Clients over a quantised base: whatever trains over a base in 32 bits gets the same over one in fewer that holds the same weights."""

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
from lichen.common.model.quantized import Quantized, is_quantized
from lichen.common.plan import parse_plan
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.randomness import SeededSource
from lichen.coordinator.app import OwnData

Rows = Callable[..., list[dict[str, Any]]]
STEPS = Segment(0.5, 0.25, 3)
PRIVATE = {"unit": "example", "epsilon": 6.0, "delta": 1e-5, "sample_rate": 0.25, "clip": 0.5}
LORA = {"kind": "lora", "rank": 2}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "all-linear": LORA | {"targets": ["all-linear"]},
    "last layer": LORA | {"last_layers": 1},
    "dropout": LORA | {"dropout": 0.2},
    "head": {"kind": "head"},
}


@pytest.fixture
def make(tiny_plan: dict[str, Any]) -> Iterator[Callable[..., Trainer]]:
    def trainer(
        precision: str, adapter: dict[str, Any], pooling: str = "mean", privacy: dict[str, Any] | None = None, **local: Any
    ) -> Trainer:
        tasks.workbench.cache_clear()
        model = tiny_plan["model"] | {"base_precision": precision, "adapter": adapter, "head": {"pooling": pooling, "init": "random"}}
        settings = tiny_plan["local"] | {"optimizer": "sgd", "learning_rate": 0.1} | local
        return Trainer(parse_plan(tiny_plan | {"model": model, "local": settings, "privacy": privacy or {"unit": "none"}}))

    yield trainer
    tasks.workbench.cache_clear()


def pair(make: Callable[..., Trainer], precision: str, *arguments: Any, **named: Any) -> tuple[Trainer, Trainer]:
    """A trainer over a quantised base, and one over a base in 32 bits that holds the same rounded weights."""
    trainer, reference = (make(kind, *arguments, **named) for kind in (precision, "float32"))
    rounded = {name: layer.dense() for name, layer in trainer.model.network.named_modules() if isinstance(layer, Quantized)}
    assert rounded
    for name, layer in reference.model.network.named_modules():
        if name in rounded:
            layer.weight.data = rounded[name]  # type: ignore[assignment]
    return trainer, reference


def job(trainer: Trainer, rows: list[dict[str, Any]], cache: Path | None = None, key: int = 0) -> Job:
    data = trainer.task.encode({field: [row[field] for row in rows] for field in trainer.task.fields})
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(tensor.shape, generator=generator) * 0.1 for name, tensor in trainer.model.trainable.items()}
    private = Private([[row] for row in range(len(rows))], STEPS, 48, Gate(STEPS)) if trainer.plan.private else None
    return Job(start, data, 1, SeededSource("client", key), cache, private)


def same(found: Trained, expected: Trained) -> None:
    assert found.delta.keys() == expected.delta.keys()
    for name, delta in expected.delta.items():
        torch.testing.assert_close(found.delta[name], delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE, PRIVATE | {"gradients": "hooks"}], ids=["plain", "private", "hooks"])
@pytest.mark.parametrize("pooling", ["mean", "pooler"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_client_learns_the_same(
    make: Callable[..., Trainer], tiny_rows: Rows, tmp_path: Path, adapter: str, pooling: str, privacy: dict[str, Any]
) -> None:
    """The private step has passed its self-check by then."""
    trainer, reference = pair(make, "int8", ADAPTERS[adapter], pooling, privacy)
    found, expected = (one.run(job(one, tiny_rows(24), tmp_path / str(number))) for number, one in enumerate((trainer, reference)))
    same(found, expected)


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE], ids=["plain", "private"])
def test_without_lean_compute_and_in_bfloat16(make: Callable[..., Trainer], tiny_rows: Rows, privacy: dict[str, Any]) -> None:
    trainer, reference = pair(make, "bfloat16", LORA, privacy=privacy, compute="plain")
    same(trainer.run(job(trainer, tiny_rows(24))), reference.run(job(reference, tiny_rows(24))))


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE], ids=["plain", "private"])
def test_clients_together(make: Callable[..., Trainer], tiny_rows: Rows, privacy: dict[str, Any]) -> None:
    trainer, reference = pair(make, "int8", LORA, "pooler", privacy)
    assert trainer.at_once > 1
    found = trainer.run_together([job(trainer, tiny_rows(24, number), key=number) for number in range(2)])
    for number, together in enumerate(found):
        assert isinstance(together, Trained), together
        for name, delta in reference.run(job(reference, tiny_rows(24, number), key=number)).delta.items():
            torch.testing.assert_close(together.delta[name], delta, rtol=1e-4, atol=1e-5)


def test_what_frozen_layers_give_is_kept_by_precision(make: Callable[..., Trainer], tiny_rows: Rows, tmp_path: Path) -> None:
    names = set()
    for precision in ("float32", "bfloat16", "int8"):
        trainer = make(precision, ADAPTERS["last layer"])
        trainer.run(job(trainer, tiny_rows(24), tmp_path))
        (values,) = tmp_path.glob("prefix-*.values")
        names.add(values.name)
    assert len(names) == 3


def test_the_coordinator_keeps_32_bits(make: Callable[..., Trainer]) -> None:
    trainer = make("int8", LORA)
    own = OwnData(trainer.plan, None, None)
    assert is_quantized(trainer.model.network)
    assert not is_quantized(own.model.network)
