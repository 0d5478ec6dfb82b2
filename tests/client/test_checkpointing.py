"""Gradient checkpointing: the same updates with fewer activations, privately too, packed or not, over frozen layers that are known."""

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
from lichen.common.errors import Code, LichenError
from lichen.common.model import checkpointing
from lichen.common.plan import parse_plan
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.randomness import SeededSource

Rows = Callable[..., list[dict[str, Any]]]
STEPS = Segment(0.5, 0.25, 3)
PRIVATE = {"unit": "example", "epsilon": 6.0, "delta": 1e-5, "sample_rate": 0.25, "clip": 0.5}
LORA = {"kind": "lora", "rank": 2, "targets": ["all-linear"]}


@pytest.fixture
def make(tiny_plan: dict[str, Any]) -> Iterator[Callable[..., Trainer]]:
    def trainer(checkpointing: bool, adapter: dict[str, Any], privacy: dict[str, Any] | None = None, **local: Any) -> Trainer:
        tasks.workbench.cache_clear()
        model = tiny_plan["model"] | {"adapter": adapter, "head": {"pooling": "pooler", "init": "random"}}
        settings = tiny_plan["local"] | {"optimizer": "sgd", "learning_rate": 0.1, "checkpointing": checkpointing} | local
        return Trainer(parse_plan(tiny_plan | {"model": model, "local": settings, "privacy": privacy or {"unit": "none"}}))

    yield trainer
    tasks.workbench.cache_clear()


def run(trainer: Trainer, rows: list[dict[str, Any]], cache: Path | None = None) -> Trained:
    data = trainer.task.encode({field: [row[field] for row in rows] for field in trainer.task.fields})
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(tensor.shape, generator=generator) * 0.1 for name, tensor in trainer.model.trainable.items()}
    private = Private([[row] for row in range(len(rows))], STEPS, 48, Gate(STEPS)) if trainer.plan.private else None
    return trainer.run(Job(start, data, 1, SeededSource("client"), cache, private))


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE], ids=["plain", "private"])
@pytest.mark.parametrize("compute", ["lean", "plain"])
@pytest.mark.parametrize(
    "adapter",
    [LORA, LORA | {"dropout": 0.2}, {"kind": "lora", "rank": 2, "last_layers": 1}, {"kind": "full"}],
    ids=["lora", "dropout", "last layer", "full"],
)
def test_updates_are_the_same(
    make: Callable[..., Trainer], tiny_rows: Rows, tmp_path: Path, adapter: dict[str, Any], compute: str, privacy: dict[str, Any]
) -> None:
    found = [run(make(on, adapter, privacy, compute=compute), tiny_rows(24), tmp_path / str(on)).delta for on in (False, True)]
    for name, delta in found[0].items():
        torch.testing.assert_close(found[1][name], delta, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE], ids=["plain", "private"])
def test_of_a_layer_its_input_is_kept(make: Callable[..., Trainer], tiny_rows: Rows, privacy: dict[str, Any]) -> None:
    kept = []
    for on in (False, True):
        trainer = make(on, LORA, privacy)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, own=sizes: own.append(tensor.numel()) or tensor, lambda found: found):
            run(trainer, tiny_rows(24))
        kept.append(sum(sizes))
    assert kept[1] < 0.25 * kept[0]


def test_clients_are_not_put_together(make: Callable[..., Trainer]) -> None:
    """Their passes end before the layers run again."""
    assert make(False, LORA).at_once > 1
    assert make(True, LORA).at_once == 1


def test_layers_that_are_not_found_are_an_error(make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "encoder_layers", lambda _: None)
    with pytest.raises(LichenError) as caught:
        make(True, LORA)
    assert caught.value.code is Code.MODEL_UNSUPPORTED
