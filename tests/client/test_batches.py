"""Frozen layers computed once: the same weights as without, kept between trainings, and never another data set's or model's."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.client.data import add_source
from lichen.client.gate import Gate
from lichen.client.trainer import Trainer
from lichen.common import tasks
from lichen.common.batches import ready
from lichen.common.model.prefix import FrozenPrefix
from lichen.common.plan import parse_plan
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.randomness import SeededSource
from lichen.common.tasks import workbench

Rows = Callable[..., list[dict[str, Any]]]
TOP = {"kind": "lora", "rank": 2, "last_layers": 1}
HEAD = {"kind": "head"}
SGD = {"optimizer": "sgd", "learning_rate": 0.1, "max_physical_batch_size": 8}


@pytest.fixture
def make(tiny_plan: dict[str, Any]) -> Iterator[Callable[..., Trainer]]:
    def trainer(adapter: dict[str, Any], pooling: str = "mean", privacy: dict[str, Any] | None = None, **local: Any) -> Trainer:
        tasks.workbench.cache_clear()
        model = tiny_plan["model"] | {"adapter": adapter, "head": {"pooling": pooling, "init": "random"}}
        document = tiny_plan | {"model": model, "local": tiny_plan["local"] | SGD | local}
        return Trainer(parse_plan(document | ({"privacy": privacy} if privacy else {})))

    yield trainer
    tasks.workbench.cache_clear()


def encoded(trainer: Trainer, rows: list[dict[str, Any]]) -> Any:
    return trainer.task.encode({field: [row[field] for row in rows] for field in trainer.task.fields})


def trained(trainer: Trainer, rows: Any, cache: Path | None) -> dict[str, torch.Tensor]:
    return trainer.train(workbench(trainer.plan).start, rows, 1, SeededSource("order"), cache).delta


def private(trainer: Trainer, rows: Any, cache: Path | None) -> dict[str, torch.Tensor]:
    units, steps = [[row] for row in range(len(rows))], Segment(0.5, 0.25, 5)
    source = SeededSource("noise")
    return trainer.train_private(workbench(trainer.plan).start, rows, units, steps, 48, 1, source, Gate(steps), cache).delta


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each prefix pass was for."""
    counts: list[int] = []
    original = FrozenPrefix.compute

    def compute(self: FrozenPrefix, batch: Any) -> torch.Tensor:
        counts.append(len(batch["input_ids"]))
        return original(self, batch)

    monkeypatch.setattr(FrozenPrefix, "compute", compute)
    return counts


@pytest.mark.parametrize("pooling", ["mean", "pooler"])
@pytest.mark.parametrize("adapter", [TOP, HEAD], ids=["top layer", "head"])
def test_weights_are_those_without_it_and_each_row_is_computed_once(
    make: Callable[..., Trainer], tiny_rows: Rows, tmp_path: Path, computed: list[int], adapter: dict[str, Any], pooling: str
) -> None:
    trainer = make(adapter, pooling, epochs=3, steps=None)
    rows = encoded(trainer, tiny_rows(30))
    plain = trained(trainer, rows, None)
    assert computed == []
    cold = trained(trainer, rows, tmp_path)
    assert sum(computed) == 30 + computed[0]  # and the rows that nobody wrote
    first = sum(computed)
    warm = trained(trainer, rows, tmp_path)
    assert sum(computed) == first
    for name, delta in plain.items():
        assert torch.allclose(cold[name], delta, rtol=1e-4, atol=1e-6), name
        assert torch.equal(warm[name], cold[name]), name


def test_private_steps_are_those_without_it(make: Callable[..., Trainer], tiny_rows: Rows, tmp_path: Path) -> None:
    trainer = make(TOP, privacy={"unit": "example", "epsilon": 6.0, "delta": 1e-5, "sample_rate": 0.25, "clip": 0.5}, epochs=None, steps=5)
    rows = encoded(trainer, tiny_rows(48))
    plain, kept = private(trainer, rows, None), private(trainer, rows, tmp_path)
    for name, delta in plain.items():
        assert torch.allclose(kept[name], delta, rtol=1e-4, atol=1e-6), name


def test_half_precision_is_near(make: Callable[..., Trainer], tiny_rows: Rows, tmp_path: Path) -> None:
    trainer = make(TOP, prefix_cache="float16", epochs=2, steps=None)
    rows = encoded(trainer, tiny_rows(30))
    plain, half = trained(trainer, rows, None), trained(trainer, rows, tmp_path)
    gap = sum(float((plain[name] - half[name]).square().sum()) for name in plain)
    size = sum(float(delta.square().sum()) for delta in plain.values())
    assert 0 < gap < 1e-6 * size


def test_another_process_finds_it_and_other_rows_or_weights_do_not(
    make: Callable[..., Trainer], tiny_rows: Rows, tmp_path: Path, computed: list[int]
) -> None:
    trainer = make(TOP)
    trained(trainer, encoded(trainer, tiny_rows(30)), tmp_path)
    again = make(TOP)  # as another process would
    computed.clear()
    trained(again, encoded(again, tiny_rows(30)), tmp_path)
    assert len(computed) == 1  # only what tells the weights
    trained(again, encoded(again, tiny_rows(30, seed=5)), tmp_path)
    assert sum(computed[2:]) == 30
    files = {path.name.split(".")[0] for path in tmp_path.iterdir()}
    assert len(files) == 1, "what nobody asks for is removed"
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())
    other = make(TOP)
    with torch.no_grad():
        for parameter in other.model.network.parameters():
            parameter.mul_(1.01)
    computed.clear()
    trained(other, encoded(other, tiny_rows(30, seed=5)), tmp_path)
    assert sum(computed[1:]) == 30


@pytest.mark.parametrize(
    ("adapter", "local"),
    [({"kind": "full"}, {}), ({"kind": "lora", "rank": 2}, {}), (TOP, {"prefix_cache": "off"}), (TOP, {"compute": "plain"})],
    ids=["full", "every layer", "off", "plain"],
)
def test_it_is_off_where_it_would_be_wrong_or_was_not_asked_for(
    make: Callable[..., Trainer], tiny_rows: Rows, tmp_path: Path, adapter: dict[str, Any], local: dict[str, Any]
) -> None:
    trainer = make(adapter, **local)
    trained(trainer, encoded(trainer, tiny_rows(20)), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_rows_that_change_take_what_was_computed_of_them_along(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "gold", "label": "metal"}\n' * 5)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "prefix-0.values").touch()
    add_source(tmp_path, tmp_path / "rows.jsonl", fields={"text": "text", "label": "label"}, holdout=0.0)
    assert not (tmp_path / "cache").exists()


def test_a_store_that_would_fill_the_disk_is_not_made(
    make: Callable[..., Trainer], tiny_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lichen.common.model.prefix.MOST_OF_DISK", 0.0)
    trainer = make(TOP)
    trained(trainer, encoded(trainer, tiny_rows(20)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_of_a_model_goes_when_the_model_does(tiny_plan: dict[str, Any]) -> None:
    """A process that runs several plans has the prefix of the last."""
    plan = parse_plan(tiny_plan | {"model": tiny_plan["model"] | {"adapter": {"kind": "lora", "rank": 2, "last_layers": 1}}})
    task, model, _ = workbench(plan)
    assert ready(plan, task, model) is ready(plan, task, model)
    assert ready(plan, task, model).batches.prefix is not None
    before = weakref.ref(model.network)
    del task, model
    workbench(parse_plan(tiny_plan | {"seed": 12345}))
    gc.collect()
    assert before() is None
    workbench.cache_clear()
