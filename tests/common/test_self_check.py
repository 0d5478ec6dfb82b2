"""The check at start lets sound models pass and leaves no trace; whatever makes the clipped sum wrong is caught."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import TunedModel
from lichen.common.plan import parse_plan
from lichen.common.privacy import hooks
from lichen.common.privacy.per_unit import PerUnitGradients
from lichen.common.privacy.self_check import self_check
from lichen.common.privacy.single_backward.book import Book
from lichen.common.tasks import make_task
from lichen.common.tasks.task import CHECKED_ROWS

Batch = dict[str, torch.Tensor]


def check(
    base: Path,
    *,
    losses: Callable[[Any], Callable[[nn.Module, Batch], torch.Tensor]] | None = None,
    engine: Any = "single-backward",
    **adapter: Any,
) -> TunedModel:
    """Check a plan's model, perhaps with losses made from its task's."""
    plan = parse_plan(
        {
            "rounds": 1,
            "task": {"labels": ["a", "b", "c"], "max_length": 24},
            "model": {"base": str(base), "adapter": {"rank": 2, **adapter}},
            "local": {"steps": 1},
        }
    )
    task = make_task(plan)
    model = task.build()
    own = losses(task) if losses else task.losses
    before, modes = model.state(), [module.training for module in model.network.modules()]
    gradients = PerUnitGradients(model, own, 8, engine)
    rows = task.made_up(CHECKED_ROWS)
    try:
        self_check(gradients, own, lambda indices: task.collate(rows, indices))
    finally:
        after = model.state()
        assert all(torch.equal(before[name], after[name]) for name in before), "the tensors are as they were"
        assert [module.training for module in model.network.modules()] == modes
    return model


def refused(base: Path, what: str = "differs from the loop", **arguments: Any) -> None:
    with pytest.raises(LichenError) as caught:
        check(base, **arguments)
    assert caught.value.code is Code.PRIVACY_SELF_CHECK
    assert what in caught.value.what


@pytest.mark.parametrize("engine", ["single-backward", "hooks"])
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("bert", {"kind": "lora"}),
        ("bert", {"kind": "full"}),
        ("bert", {"kind": "head"}),
        ("bert", {"kind": "lora", "dropout": 0.3}),
        ("bert", {"kind": "lora", "targets": ["all-linear"]}),
        ("roberta", {"kind": "full"}),
        ("distilbert", {"kind": "lora"}),
        ("gpt2", {"kind": "full"}),
        ("gpt2", {"kind": "lora"}),
        ("llama", {"kind": "lora", "targets": ["all-linear"]}),
    ],
)
def test_sound_models_pass(tiny_models: Callable[[str], Path], kind: str, adapter: dict[str, Any], engine: str) -> None:
    check(tiny_models(kind), engine=engine, **adapter)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_loss_does_not_matter(tiny_models: Callable[[str], Path], scale: float) -> None:
    check(tiny_models("bert"), losses=lambda task: lambda network, batch: scale * task.losses(network, batch))


def test_a_loss_that_couples_examples_is_caught(tiny_models: Callable[[str], Path]) -> None:
    def relative(task: Any) -> Callable[[nn.Module, Batch], torch.Tensor]:
        def losses(network: nn.Module, batch: Batch) -> torch.Tensor:
            own: torch.Tensor = task.losses(network, batch)
            return own * own.mean()

        return losses

    refused(tiny_models("bert"), losses=relative)


def test_the_mean_over_the_batchs_tokens_is_caught(tiny_models: Callable[[str], Path]) -> None:
    def token_mean(task: Any) -> Callable[[nn.Module, Batch], torch.Tensor]:
        def losses(network: nn.Module, batch: Batch) -> torch.Tensor:
            # what a causal model's `outputs.loss` does: long examples outweigh the others
            weights = batch["attention_mask"].sum(1)
            return (task.losses(network, batch) * weights).sum().expand(len(weights)) / weights.sum()

        return losses

    refused(tiny_models("bert"), losses=token_mean)


def test_a_clip_that_does_not_clip_is_caught(tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hole 1: ghost mode's way."""
    original = Book.clipped_sum
    monkeypatch.setattr(Book, "clipped_sum", lambda self, parameters, clip: original(self, parameters, math.inf))
    refused(tiny_models("bert"))


def test_clipping_each_tensor_apart_is_caught(tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    original = Book.clipped_sum
    monkeypatch.setattr(Book, "clipped_sum", lambda self, parameters, clip: [original(self, [one], clip)[0] for one in parameters])
    refused(tiny_models("bert"))


def test_a_wrong_rule_for_a_layer_is_caught(tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = Book.add_linear

    def wrong(self: Book, parameter: nn.Parameter, inputs: torch.Tensor, backprops: torch.Tensor, **named: Any) -> None:
        neighbours = parameter.shape[0] == 2  # LoRA's A gets the gradients of neighbours: the plain sum is right, the clipped one is not
        right(self, parameter, *((t.roll(1, 0) if neighbours else t) for t in (inputs, backprops)), **named)

    monkeypatch.setattr(Book, "add_linear", wrong)
    refused(tiny_models("bert"))


def test_a_wrong_rule_of_the_fallback_is_caught(tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    samplers = dict(hooks.GradSampleModule.GRAD_SAMPLERS)
    right = samplers[nn.Linear]

    def wrong(layer: nn.Linear, activations: list[torch.Tensor], backprops: torch.Tensor) -> Any:
        found = right(layer, activations, backprops)
        return {parameter: gradient.roll(1, 0) if layer.out_features == 2 else gradient for parameter, gradient in found.items()}

    monkeypatch.setitem(hooks.GradSampleModule.GRAD_SAMPLERS, nn.Linear, wrong)
    refused(tiny_models("bert"), engine="hooks")


def test_a_sum_of_nothing_is_caught(tiny_models: Callable[[str], Path]) -> None:
    """Hole 5: nothing is learned, and noise alone moves the weights."""
    refused(tiny_models("bert"), losses=lambda task: lambda network, batch: 0.0 * task.losses(network, batch))


class Forgetful(nn.Module):
    """A network whose adapter is not on the way from input to output."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Linear(4, 4)
        self.classifier = nn.Linear(4, 2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.classifier(values + 0.0 * self.adapter(values))
        return out


def test_an_adapter_that_no_gradient_reaches_is_caught() -> None:
    """Hole 5 again: the head alone would learn, and ε and loss would look right."""
    torch.manual_seed(0)
    network = Forgetful()
    model = TunedModel(network, dict(network.named_parameters()), frozenset({"classifier.weight", "classifier.bias"}))
    data = torch.randn(CHECKED_ROWS, 4)

    def losses(network: nn.Module, batch: Batch) -> torch.Tensor:
        out: torch.Tensor = (network(batch["values"]) ** 2).sum(1)
        return out

    def collate(rows: Sequence[int]) -> Batch:
        return {"values": data[list(rows)]}

    with pytest.raises(LichenError) as caught:
        self_check(PerUnitGradients(model, losses, max_rows=8), losses, collate)
    assert caught.value.code is Code.PRIVACY_SELF_CHECK
    assert "reaches the adapter" in caught.value.what
