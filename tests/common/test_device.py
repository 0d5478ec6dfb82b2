"""The device: chosen in one place, refused by number where it is not there; and nothing of the CPU meets what is on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from lichen.client import cli as client_cli
from lichen.client import together
from lichen.client.gate import Gate
from lichen.client.jobs import Job, Private
from lichen.client.trainer import Trained, Trainer
from lichen.common import batching, device, tasks
from lichen.common.batching import clients_at_once, most_at_once
from lichen.common.errors import Code, LichenError
from lichen.common.plan import parse_plan
from lichen.common.privacy import per_unit, randomness
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.randomness import Noise, SeededSource, add_noises
from lichen.common.tasks import workbench
from lichen.common.tasks.text_classification import TextClassification
from lichen.simulations import simulate
from lichen.simulations.cli import app as simulate_app

Rows = Callable[..., list[dict[str, str]]]
PRIVATE = {"unit": "example", "epsilon": 6.0, "delta": 1e-5, "sample_rate": 0.25, "clip": 0.5}


# --- the choice -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(device.find("auto")) == "cuda"
    assert [str(device.find(name)) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    monkeypatch.delenv(device.VARIABLE)
    assert device.device().type == "cuda"


@pytest.mark.usefixtures("no_gpu")
def test_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(device.find("auto")) == "cpu"
    monkeypatch.setenv(device.VARIABLE, "")
    assert str(device.device()) == "cpu"


def test_an_accelerator_that_nobody_tried_is_taken_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert str(device.find("auto")) == "cpu"
    assert str(device.find("mps")) == "mps"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["cuda:2", "mps", "nonsense", "meta"])
def test_what_is_not_there_is_refused_and_what_is_there_is_named(name: str) -> None:
    with pytest.raises(LichenError, match="cpu, cuda:0, cuda:1") as caught:
        device.find(name)
    assert caught.value.code is Code.DEVICE_MISSING


def test_the_commands_refuse_it_before_they_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.VARIABLE, "cpu")
    out = tmp_path / "out"
    for app, arguments in ((client_cli.app, ["run", "--home", str(tmp_path)]), (simulate_app, ["r8", "--out", str(out)])):
        found = CliRunner().invoke(app, [*arguments, "--device", "cuda:99"])
        assert isinstance(found.exception, LichenError)
        assert found.exception.code is Code.DEVICE_MISSING
    assert not out.exists()
    assert os.environ[device.VARIABLE] == "cpu"


@pytest.mark.usefixtures("two_gpus")
def test_with_a_gpu_one_process_trains_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.VARIABLE, "auto")
    assert simulate._layout(10, 4) == (1, 1)
    monkeypatch.setenv(device.VARIABLE, "cpu")
    assert simulate._layout(10, 4)[0] == 4


def test_on_a_gpu_more_clients_pass_together_within_its_memory() -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=384, num_hidden_layers=6))
    for kind, private, most in (("cpu", False, 16), ("cuda", False, 37), ("cuda", True, 33)):
        model: Any = SimpleNamespace(
            device=torch.device(kind), network=SimpleNamespace(config=config), trainable={"lora": torch.empty(76_808)}
        )
        assert most_at_once(model, 16, 64, private=private) == most
        assert most_at_once(model, 10_000, 512, private=private) == (16 if kind == "cpu" else 1)
    assert clients_at_once(5000, 1024, 37) == 37
    assert clients_at_once(200, 1024, 37) == 1
    assert batching.GPU_MOST_AT_ONCE >= batching.MOST_AT_ONCE


def test_noise_that_travels_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU is sent, here sent nowhere; tensors that do not fit in one piece, and draws that do not fit in one call."""
    monkeypatch.setattr(randomness, "_SENT_AT_ONCE", 5000)
    generator = torch.Generator().manual_seed(0)
    totals = [torch.randn((3, *shape), generator=generator) for shape in ((8, 384), (5,), (300, 250), (7, 2))]
    copies = [total.clone() for total in totals]
    noises = [[Noise(0.3 + number, SeededSource("noise", number), 7.0 * number + 1) for number in range(3)] for _ in range(2)]
    add_noises(totals, noises[0])
    randomness._add_there([copy.view(3, -1) for copy in copies[:2]], noises[1])
    randomness._add_there([copy.view(3, -1) for copy in copies[2:]], noises[1])
    for one, other in zip(totals, copies, strict=True):
        assert torch.equal(one, other)


# --- what meets what --------------------------------------------------------------------------------------------------------------


class Apart(TorchFunctionMode):
    """Pretends that some tensors are on another device: what is made of them is there too, and what meets one of the CPU fails.

    Tensors that autograd makes are of neither side. A number (no axes) may meet anything, as on a GPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = list(tensors((args, kwargs)))
        sides = {side(tensor) for tensor in given if tensor.dim()} | {side(tensor) for tensor in given if side(tensor)}
        if name == "to" and kwargs.get("non_blocking"):
            return put(args[0].clone(), "there")
        if name == "cpu" or (name == "to" and "cpu" in args):
            return put(func(*args, **kwargs).detach().clone(), "here")
        if name == "copy_":  # from side to side
            return func(*args, **kwargs)
        if name == "numpy":
            assert "there" not in sides, "numpy reads the CPU alone"
        if {"there", "here"} <= {side(tensor) for tensor in given if tensor.dim()}:
            raise AssertionError(f"{name or func} gets tensors of two devices")
        found = func(*args, **kwargs)
        made = "there" if "there" in sides or kwargs.get("device") is not None else "here" if not given or sides == {"here"} else None
        for tensor in tensors(found):
            if made and not side(tensor):
                put(tensor, made)
        return found


def side(tensor: torch.Tensor) -> str | None:
    return tensor.__dict__.get("_side")


def put(tensor: torch.Tensor, where: str) -> torch.Tensor:
    tensor.__dict__["_side"] = where
    return tensor


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for part in value.values() for tensor in tensors(part))
    elif isinstance(value, list | tuple):
        yield from (tensor for part in value for tensor in tensors(part))


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Apart]:
    build = TextClassification.build

    def there(self: TextClassification) -> Any:
        model = build(self)
        for tensor in (*model.network.parameters(), *model.network.buffers()):
            put(tensor, "there")
        return model

    def noised_there(totals: Sequence[torch.Tensor], noises: Sequence[Noise]) -> None:
        randomness._add_there([total.view(len(noises), -1) for total in totals], noises)

    monkeypatch.setattr(TextClassification, "build", there)
    for module in (per_unit, together):
        monkeypatch.setattr(module, "add_noises", noised_there)
    tasks.workbench.cache_clear()
    yield Apart()
    tasks.workbench.cache_clear()


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE, {**PRIVATE, "gradients": "hooks"}], ids=["none", "private", "hooks"])
@pytest.mark.parametrize(
    ("kind", "precision"), [("lora", "float32"), ("lora", "int8"), ("lora", "bfloat16"), ("head", "float32"), ("full", "float32")]
)
def test_all_follows_the_model_to_its_device(
    tiny_plan: dict[str, Any], tiny_rows: Rows, apart: Apart, kind: str, precision: str, privacy: dict[str, Any], tmp_path: Path
) -> None:
    model = {**tiny_plan["model"], "adapter": {"kind": kind, "rank": 2}, "base_precision": precision}
    with apart:
        trainer = Trainer(parse_plan(tiny_plan | {"model": model, "privacy": privacy}))
        jobs = [job(trainer, tiny_rows, count, tmp_path / str(count)) for count in (13, 5)]
        found = [*(trainer.run(jobs[number]) for number in (0, 1)), *trainer.run_together([job(trainer, tiny_rows, 9), jobs[1]])]
        trainer.task.score(trainer.model.network, jobs[0].data, 4)
        state = trainer.model.state()
    assert {side(tensor) for tensor in state.values()} == {"here"}
    for one in found[:3]:
        assert isinstance(one, Trained), one


def job(trainer: Trainer, tiny_rows: Rows, count: int, cache: Path | None = None) -> Job:
    rows = tiny_rows(count)
    data = trainer.task.encode({field: [row[field] for row in rows] for field in trainer.task.fields})
    private = None
    if trainer.plan.private:
        segment = Segment(1.0, 0.5, 3)
        private = Private([[row] for row in range(count)], segment, 16, Gate(Segment(1.0, 0.5, 9)))
    return Job(workbench(trainer.plan).start, data, 1, SeededSource("client", count), cache, private)


def test_a_tensor_that_was_left_behind_is_found(apart: Apart) -> None:
    with apart, pytest.raises(AssertionError, match="two devices"):
        torch.ones(3) + put(torch.ones(3), "there")
