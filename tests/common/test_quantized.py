"""A frozen base in fewer bits: how near its weights are, that they are the same everywhere, that it computes and trains by them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import TunedModel
from lichen.common.model.export import save_model
from lichen.common.model.quantized import Quantized, QuantizedLinear, is_quantized, quantize, to_int8
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.statement import Statement
from lichen.common.tasks import make_task

Models = Callable[[str], Path]
ARCHITECTURES = ("bert", "roberta", "distilbert", "gpt2", "llama")
PINNED = "804069306d182cb15e130ed734121ff313470c153a5473cdf3eef85b47f6f75f"
TEXTS = ["wheat corn harvest the of", "gold", "bank rate dollar in a today and the mine copper"]


def plan_for(base: Path, precision: str, kind: str = "lora", pooling: str = "mean", targets: tuple[str, ...] = ()) -> Plan:
    adapter = {"kind": kind, "rank": 2, "targets": list(targets)}
    model = {"base": str(base), "base_precision": precision, "adapter": adapter, "head": {"pooling": pooling, "init": "random"}}
    document = {"rounds": 1, "task": {"labels": ["crop", "metal", "money"], "max_length": 32}, "model": model, "local": {"steps": 1}}
    return parse_plan(document)


def pair(plan: Plan) -> tuple[Any, TunedModel, TunedModel]:
    """A task, its model, and one in 32 bits that holds the same rounded weights."""
    task, reference = make_task(plan), make_task(plan.at_precision("float32")).build()
    model = task.build()
    rounded = {name: layer for name, layer in model.network.named_modules() if isinstance(layer, Quantized)}
    for name, layer in reference.network.named_modules():
        if name in rounded:
            layer.weight.data = rounded[name].dense()  # type: ignore[union-attr]
    start = {name: tensor + 0.1 for name, tensor in model.state().items()}  # LoRA's own start passes no gradient to A
    model.load(start)
    reference.load(start)
    return task, model, reference


def gradients(task: Any, model: TunedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    rows = task.encode({"text": TEXTS, "label": ["crop", "metal", "money"]})
    losses = task.losses(model.network, task.collate(rows, range(len(TEXTS))))
    losses.sum().backward()
    found = {name: parameter.grad for name, parameter in model.trainable.items() if parameter.grad is not None}
    assert found.keys() == model.trainable.keys()
    return losses.detach(), found


def test_integers_are_the_nearest_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator) * torch.logspace(-30, 6, 64).unsqueeze(1)
    weight[3, 5] *= 1000  # of heavy tails
    values, scale = to_int8(weight)
    assert values.dtype == torch.int8
    assert scale.shape == (64, 1)
    assert bool(((values.double() * scale.double() - weight.double()).abs() <= scale.double() * 0.5001).all())
    assert torch.equal(values.abs().amax(1), torch.full((64,), 127, dtype=torch.int8)), "each row uses its whole range"
    # numbers far below a scale, a row of zeros, and what lies between two levels, which goes to the even one
    odd, scales = to_int8(torch.tensor([[0.0, 0.0, 0.0], [127.0, 0.5, 1.5], [1e-44, 0.0, -1e-44]]))
    assert odd.tolist() == [[0, 0, 0], [127, 0, 2], [0, 0, 0]]
    assert bool(torch.isfinite(scales).all())


def test_blocks_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 11)
    whole = to_int8(weight)
    monkeypatch.setattr("lichen.common.model.quantized.AT_ONCE", 60)
    assert all(map(torch.equal, whole, to_int8(weight)))


def test_the_same_integers_on_every_machine() -> None:
    """Pinned: what a node holds follows from the base's file alone."""
    made = torch.frombuffer(bytearray(hashlib.shake_128(b"weights").digest(2 * 48 * 80)), dtype=torch.int16).view(48, 80)
    values, scale = to_int8(made.float() * 2.0**-19)
    digest = hashlib.sha256(values.numpy().tobytes() + scale.numpy().tobytes()).hexdigest()
    assert digest == PINNED


@pytest.mark.parametrize("pooling", ["mean", "pooler"])
@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_it_computes_and_trains_as_32_bits_that_hold_the_same_weights(tiny_models: Models, kind: str, precision: str, pooling: str) -> None:
    task, model, reference = pair(plan_for(tiny_models(kind), precision, pooling=pooling))
    assert is_quantized(model.network)
    assert not is_quantized(reference.network)
    (losses, found), (right, expected) = gradients(task, model), gradients(task, reference)
    torch.testing.assert_close(losses, right, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_matrix_of_the_base_is_kept_in_8_bits(tiny_models: Models, kind: str) -> None:
    task = make_task(plan_for(tiny_models(kind), "int8", targets=("all-linear",)))
    model = task.build()
    for name, parameter in model.network.named_parameters():
        own = name in {other for other, trained in model.network.named_parameters() if trained.requires_grad}
        matrix = parameter.dim() == 2 and not own and ".classifier." not in name and ".score." not in name
        assert parameter.dtype == (torch.int8 if matrix else torch.float32), name


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
@pytest.mark.parametrize(("kind", "transposed"), [(nn.Linear, False), (Conv1D, True)])
def test_a_layer_and_its_gradient(kind: Any, transposed: bool, precision: Any) -> None:
    torch.manual_seed(0)
    layer = kind(7, 5)  # of Conv1D the output comes first
    network = nn.Sequential(layer)
    before = layer.weight.detach().clone()
    quantize(network, precision)
    assert layer is network[0]
    assert isinstance(layer, Quantized)
    assert layer.dense().shape == before.shape
    steps = layer.scale if layer.scale is not None else before.abs() * 2.0**-8
    assert bool(((layer.dense() - before).abs() <= steps).all())
    x = torch.randn(2, 3, 5 if transposed else 7, requires_grad=True)
    y = layer(x)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    dense, bias = layer.dense(), layer.bias.detach()
    right = x @ (dense if transposed else dense.t()) + bias
    (expected,) = torch.autograd.grad(right.square().sum(), x)
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for name, parameter in layer.named_parameters() if name == "weight")


def test_no_weight_in_32_bits_is_kept_for_the_backward_pass() -> None:
    layer = nn.Linear(64, 48)
    quantize(nn.Sequential(layer), "int8")
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        layer(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert kept == []


def test_what_keeps_a_passing_weight_is_told() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantize(layers, "int8")
    first, second = layers
    x = torch.ones(4, requires_grad=True)
    y = first.passing() @ x  # type: ignore[operator]
    assert torch.equal(first.dense(), first.passing())  # type: ignore[operator]
    second.passing()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_tied_weights_stay_one() -> None:
    table, head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    head.weight = table.weight
    network = nn.ModuleDict({"table": table, "head": head})
    quantize(network, "int8")
    assert head.weight is table.weight
    assert head.weight.dtype == torch.int8
    assert torch.equal(table(torch.arange(9)), head.dense())  # type: ignore[operator]


def test_what_is_skipped_and_what_is_another_type_stays() -> None:
    class Own(nn.Linear):
        pass

    network = nn.ModuleDict({"body": nn.Linear(4, 4), "own": Own(4, 4), "classifier": nn.Linear(4, 2), "norm": nn.LayerNorm(4)})
    quantize(network.half(), "int8", skip=("classifier",))
    assert type(network["body"]) is QuantizedLinear
    assert type(network["own"]) is Own
    kinds = {name: parameter.dtype for name, parameter in network.named_parameters()}
    assert kinds.pop("body.weight") == torch.int8
    assert set(kinds.values()) == {torch.float32}


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(precision: Any, value: float) -> None:
    network = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        network[0].weight[1, 2] = value  # type: ignore[index]
    with pytest.raises(LichenError) as caught:
        quantize(network, precision)
    assert caught.value.code is Code.MODEL_UNSUPPORTED
    assert "0 has weights" in caught.value.what


def test_weights_whose_sum_16_bits_do_not_hold_are_finite() -> None:
    layer = nn.Linear(64, 64).half()
    nn.init.constant_(layer.weight, 30.0)
    quantize(nn.Sequential(layer), "bfloat16")
    assert torch.equal(layer.dense(), torch.full((64, 64), 30.0))  # type: ignore[operator]


def test_the_file_is_let_go_of(tiny_models: Models) -> None:
    """A small tensor that were a view of the mapped file would keep all of it resident."""
    model = make_task(plan_for(tiny_models("bert"), "int8")).build()
    sizes = {tensor.untyped_storage().nbytes() for tensor in model.network.parameters()}
    assert max(sizes) < 0.2 * (tiny_models("bert") / "model.safetensors").stat().st_size


def test_a_base_of_16_bits_gives_the_integers_of_its_32_bit_self(tiny_models: Models, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    half = AutoModel.from_pretrained(tiny_models("bert"), dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    half.float().save_pretrained(tmp_path / "whole")
    found = []
    for name in ("half", "whole"):
        AutoTokenizer.from_pretrained(tiny_models("bert")).save_pretrained(tmp_path / name)
        network = make_task(plan_for(tmp_path / name, "int8")).build().network
        found.append([layer.dense() for layer in network.modules() if isinstance(layer, Quantized)])
    assert len(found[0]) > 10
    assert all(map(torch.equal, *found))


def test_an_adapter_is_never_merged_into_integers(tiny_models: Models) -> None:
    model = make_task(plan_for(tiny_models("bert"), "int8")).build()
    with pytest.raises(RuntimeError, match="can't be cast"):
        model.network.merge_and_unload()  # type: ignore[operator]


def test_a_whole_model_over_a_quantised_base_is_not_saved(tiny_models: Models, tmp_path: Path) -> None:
    plan = plan_for(tiny_models("bert"), "int8", "head")
    task = make_task(plan)
    with pytest.raises(LichenError, match="quantised"):
        save_model(tmp_path, plan, task.build(), task.tokenizer, Statement(private=False, summary="Nothing is said."))
