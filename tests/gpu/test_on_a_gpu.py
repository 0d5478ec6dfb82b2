"""On a GPU: what the CPU does, but for rounding, and the same noise bit for bit. Skipped where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.client import trainer as trainer_module
from lichen.client.app import trainer_of
from lichen.client.gate import Gate
from lichen.client.jobs import Job, Private
from lichen.client.memory import is_out_of_memory
from lichen.client.trainer import Trained, Trainer
from lichen.common import device as device_module
from lichen.common import tasks
from lichen.common.model import lean
from lichen.common.model.quantized import is_quantized
from lichen.common.plan import parse_plan
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.randomness import Noise, SeededSource, add_noises
from lichen.common.tasks import workbench

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

Rows = Callable[..., list[dict[str, str]]]
Make = Callable[..., Trainer]
PRIVATE = {"unit": "example", "epsilon": 6.0, "delta": 1e-5, "sample_rate": 0.25, "clip": 0.5}
COUNTS = (40, 9, 23, 1)
SGD = {"steps": 4, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.1}


@pytest.fixture
def make(tiny_plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """`make("cuda", local=…)`: a trainer there."""

    def trainer(where: str, **changes: Any) -> Trainer:
        monkeypatch.setenv(device_module.VARIABLE, where)
        document = tiny_plan | {"local": SGD}
        for key, value in changes.items():
            document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
        tasks.workbench.cache_clear()
        found = Trainer(parse_plan(document))
        assert found.model.device.type == where
        assert {tensor.device.type for tensor in (*found.model.network.parameters(), *found.model.network.buffers())} == {where}
        return found

    yield trainer
    tasks.workbench.cache_clear()
    trainer_of.cache_clear()


def encoded(trainer: Trainer, rows: list[dict[str, str]]) -> Any:
    return trainer.task.encode({field: [row[field] for row in rows] for field in trainer.task.fields})


def jobs(trainer: Trainer, tiny_rows: Rows, counts: tuple[int, ...] = COUNTS) -> list[Job]:
    generator = torch.Generator().manual_seed(0)
    start = {name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in workbench(trainer.plan).start.items()}
    found = []
    for number, count in enumerate(counts):
        private = None
        if trainer.plan.private:
            segment = Segment(0.5 + number, 0.25, 3 + number)
            private = Private([[row] for row in range(count)], segment, 32, Gate(segment))
        found.append(Job(start, encoded(trainer, tiny_rows(count, number)), 1, SeededSource("client", number), private=private))
    return found


def alike(found: Trained | Exception, expected: Trained | Exception) -> None:
    assert isinstance(found, Trained), found
    assert isinstance(expected, Trained), expected
    assert (found.steps, found.loss) == (expected.steps, expected.loss and pytest.approx(expected.loss, rel=1e-4))
    assert {tensor.device.type for tensor in found.delta.values()} == {"cpu"}
    gap, size = (
        torch.cat([part.flatten() for part in parts]).norm()
        for parts in ([found.delta[name] - expected.delta[name] for name in expected.delta], list(expected.delta.values()))
    )
    assert float(gap) <= 1e-4 * float(size)


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE, {**PRIVATE, "gradients": "hooks"}], ids=["none", "private", "hooks"])
@pytest.mark.parametrize("pooling", ["mean", "pooler"])
@pytest.mark.parametrize("kind", ["lora", "head", "full"])
def test_training_moves_the_weights_as_on_the_cpu(make: Make, tiny_rows: Rows, kind: str, pooling: str, privacy: dict[str, Any]) -> None:
    """With privacy by the same draws and the same noise, over clipped sums that were checked against the loop at start."""
    model = {"adapter": {"kind": kind, "rank": 2}, "head": {"pooling": pooling, "init": "random"}}
    found = []
    for where in ("cpu", "cuda"):
        trainer = make(where, model=model, privacy=privacy)
        found.append(trainer.run(jobs(trainer, tiny_rows)[0]))
    alike(found[1], found[0])


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE], ids=["none", "private"])
@pytest.mark.parametrize("kind", ["lora", "head"])
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_base_in_fewer_bits_trains_as_on_the_cpu(make: Make, tiny_rows: Rows, precision: str, kind: str, privacy: dict[str, Any]) -> None:
    model = {"base_precision": precision, "adapter": {"kind": kind, "rank": 2}}
    found = []
    for where in ("cpu", "cuda"):
        trainer = make(where, model=model, privacy=privacy)
        assert is_quantized(trainer.model.network)
        found.append(trainer.run(jobs(trainer, tiny_rows)[0]))
    alike(found[1], found[0])


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE], ids=["none", "private"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_checkpointing_changes_nothing(make: Make, tiny_rows: Rows, precision: str, privacy: dict[str, Any]) -> None:
    found = []
    for on in (False, True):
        trainer = make("cuda", model={"base_precision": precision}, local={"checkpointing": on}, privacy=privacy)
        found.append(trainer.run(jobs(trainer, tiny_rows)[0]))
    alike(found[1], found[0])


def test_memory_that_ran_out_is_told_as_such() -> None:
    free, _ = torch.cuda.mem_get_info()
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2 * free, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("compute", ["lean", "plain"])
def test_entities_and_accumulation(make: Make, tiny_rows: Rows, compute: str) -> None:
    found = []
    units = [list(range(9)), [9, 10], [11], [12, 13, 14], list(range(15, 24))]
    for where in ("cpu", "cuda"):
        trainer = make(where, privacy={**PRIVATE}, local={"max_physical_batch_size": 5, "compute": compute})
        rows, segment = encoded(trainer, tiny_rows(24)), Segment(0.1, 0.5, 4)
        start = workbench(trainer.plan).start
        found.append(trainer.train_private(start, rows, units, segment, 12, 1, SeededSource("noise"), Gate(segment)))
    alike(found[1], found[0])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE], ids=["none", "private"])
@pytest.mark.parametrize("adapter", [{"kind": "lora", "rank": 2}, {"kind": "lora", "targets": ["all-linear"]}])
def test_clients_together_get_what_each_gets_alone(
    make: Make, tiny_rows: Rows, adapter: dict[str, Any], privacy: dict[str, Any], optimizer: str
) -> None:
    rate = 0.1 if optimizer == "sgd" else 0.01
    local = {"steps": None, "epochs": 1, "optimizer": optimizer, "learning_rate": rate}
    trainer = make("cuda", model={"adapter": adapter}, privacy=privacy, local=local)
    assert trainer.at_once > 1
    alone = [trainer.run(job) for job in jobs(trainer, tiny_rows)]
    for one, other in zip(trainer.run_together(jobs(trainer, tiny_rows)), alone, strict=True):
        assert isinstance(one, Trained), one
        for name, delta in other.delta.items():
            torch.testing.assert_close(one.delta[name], delta, rtol=1e-3, atol=1e-5)
        assert (one.steps, one.loss) == (other.steps, other.loss and pytest.approx(other.loss, rel=1e-4))


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE], ids=["none", "private"])
def test_packed_batches_give_what_padded_ones_do(
    make: Make, tiny_rows: Rows, privacy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for on in (("cpu",), ("cpu", "cuda")):
        monkeypatch.setattr(lean, "PACKED_ON", on)
        trainer = make("cuda", privacy=privacy)
        assert trainer._packing.on == ("cuda" in on)
        found.append(trainer.run(jobs(trainer, tiny_rows)[0]))
    alike(found[1], found[0])


def test_fused_lora_gives_what_pefts_own_does(make: Make, tiny_rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for on in (("cpu",), ("cpu", "cuda")):
        monkeypatch.setattr(trainer_module, "FUSED_ON", on)
        trainer = make("cuda")
        found.append(trainer.run(jobs(trainer, tiny_rows)[0]))
    alike(found[1], found[0])


@pytest.mark.parametrize("adapter", [{"kind": "head"}, {"kind": "lora", "rank": 2, "last_layers": 1}])
def test_frozen_layers_that_are_kept_change_nothing(make: Make, tiny_rows: Rows, adapter: dict[str, Any], tmp_path: Path) -> None:
    trainer = make("cuda", model={"adapter": adapter})
    job = jobs(trainer, tiny_rows)[0]
    sources = [SeededSource("order") for _ in range(3)]
    without, cold, warm = (
        trainer.train(job.start, job.data, 1, source, cache) for source, cache in zip(sources, (None, tmp_path, tmp_path), strict=True)
    )
    alike(cold, without)
    alike(warm, without)
    assert trainer.at_once > 1
    for one, other in zip(
        trainer.run_together(jobs(trainer, tiny_rows)), [trainer.run(job) for job in jobs(trainer, tiny_rows)], strict=True
    ):
        alike(one, other)


def test_noise_is_the_same_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 8, 384), (3, 5), (3, 300, 700)]
    totals = [torch.randn(shape, generator=generator) for shape in shapes]
    there = [total.cuda() for total in totals]
    for found in (totals, there):
        add_noises(found, [Noise(0.3 + number, SeededSource("noise", number), 7.0 * number + 1) for number in range(3)])
    for one, other in zip(totals, there, strict=True):
        assert torch.equal(one, other.cpu())


def test_scores_are_those_of_the_cpu(make: Make, tiny_rows: Rows) -> None:
    scores = []
    for where in ("cpu", "cuda"):
        trainer = make(where, model={"head": {"init": "random"}})
        scores.append(trainer.task.score(trainer.model.network, encoded(trainer, tiny_rows(50)), 16).metrics())
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


def test_dropout_repeats(make: Make, tiny_rows: Rows) -> None:
    trainer = make("cuda", model={"adapter": {"rank": 2, "dropout": 0.5}})
    first, again = (trainer.run(jobs(trainer, tiny_rows)[0]) for _ in range(2))
    for name, delta in first.delta.items():
        torch.testing.assert_close(again.delta[name], delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("privacy", [{"unit": "none"}, {"unit": "example", "epsilon": 50.0}], ids=["none", "private"])
def test_a_whole_simulation(
    tiny_plan: dict[str, Any], tiny_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, privacy: dict[str, Any]
) -> None:
    from safetensors.torch import load_file

    from lichen.simulations.simulate import run

    for name, count, seed in (("train", 120, 0), ("test", 60, 1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(count, seed)))
    data = {"path": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
    local = {"steps": 12, "batch_size": 8, "learning_rate": 0.02, "head_learning_rate": 0.1, "optimizer": "sgd"}
    changes = {"local": local, "privacy": privacy, "simulation": {"clients": 2, "data": data}, "model": tiny_plan["model"]}
    plan = parse_plan(tiny_plan | changes)
    weights, results = [], []
    for where in ("cpu", "cuda"):
        monkeypatch.setenv(device_module.VARIABLE, where)
        tasks.workbench.cache_clear()
        trainer_of.cache_clear()
        results.append(run(plan, tmp_path / where, "inprocess", workers=2 if where == "cuda" else 1))
        weights.append(load_file(tmp_path / where / "model" / "adapter_model.safetensors"))
    assert [result.status for result in results] == ["finished"] * 2
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)
    final = [result.final or {} for result in results]
    assert final[1]["accuracy"] == pytest.approx(final[0]["accuracy"], abs=0.05)
