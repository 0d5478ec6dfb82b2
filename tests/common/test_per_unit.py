"""The private step against a loop over single examples: what is clipped, summed, noised and divided, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import TunedModel
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.per_unit import NoisyOptimizer, PerUnitGradients
from lichen.common.privacy.randomness import GRID, RandomSource, SecretSource, SeededSource
from lichen.common.tasks import make_task

Engine = Literal["single-backward", "hooks"]
Losses = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]
Collate = Callable[[Sequence[int]], dict[str, torch.Tensor]]
ENGINES: tuple[Engine, ...] = ("single-backward", "hooks")
SINGLES = [[0], [1], [2], [3], [4]]
# of several rows, of more rows than pass at once, and of one
ENTITIES = [[0, 3], [1, 2, 4, 5, 6, 7, 8], [9], [10, 11]]


class Silence:
    """A source without noise."""

    secret = False

    def uniform(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float64)

    def normal(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64)


class Recorder(torch.optim.SGD):
    """Keeps the gradients of each step, and changes nothing."""

    def __init__(self, model: TunedModel) -> None:
        super().__init__(model.trainable.values(), lr=1.0)
        self.steps: list[torch.Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps.append(torch.cat([p.grad.flatten().clone() for group in self.param_groups for p in group["params"]]))


def noised_sum(
    gradients: PerUnitGradients,
    units: Sequence[Sequence[int]],
    collate: Collate,
    *,
    clip: float,
    noise: float = 1e-6,
    source: RandomSource | None = None,
    denominator: float = 1.0,
) -> torch.Tensor:
    """The gradient that reaches the optimizer, flat. The least of noise multipliers keeps the grid out of the way."""
    recorder = Recorder(gradients.model)
    optimizer = NoisyOptimizer(
        recorder, noise_multiplier=noise, max_grad_norm=clip, expected_batch_size=denominator, source=source or Silence()
    )
    gradients.step(optimizer, units, collate)
    assert len(recorder.steps) == 1, "one step, and one draw of noise, whatever the packs"
    assert all(parameter.grad is None for parameter in gradients.model.trainable.values())
    return recorder.steps[0]


def gradient_of(model: TunedModel, losses: Losses, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    parts = torch.autograd.grad(losses(model.network, batch).sum(), list(model.trainable.values()))
    return torch.cat([part.flatten() for part in parts]).to(torch.float64)


def clipped_by_loop(model: TunedModel, losses: Losses, units: Sequence[Sequence[int]], collate: Collate, clip: float) -> torch.Tensor:
    """Each unit's mean over its rows, one row at a time, clipped and summed, in 64-bit floats."""
    total = torch.zeros(sum(p.numel() for p in model.trainable.values()), dtype=torch.float64)
    for unit in units:
        own = torch.stack([gradient_of(model, losses, collate([row])) for row in unit]).mean(0)
        total += own * min(1.0, clip / float(own.norm()))
    return total


def bench(base: Path, adapter: str = "lora", pooling: str = "mean", max_rows: int = 3) -> tuple[Plan, TunedModel, Any, Collate]:
    """A plan's model, its trainable tensors moved off their start, and 12 made-up rows of different lengths."""
    plan = parse_plan(
        {
            "rounds": 1,
            "task": {"labels": ["a", "b", "c"], "max_length": 24},
            "model": {"base": str(base), "adapter": {"kind": adapter, "rank": 2}, "head": {"pooling": pooling, "init": "random"}},
            "local": {"steps": 1, "max_physical_batch_size": max_rows},
        }
    )
    task = make_task(plan)
    model = task.build()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.trainable.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    rows = task.made_up(12)
    assert len(set(rows.lengths.tolist())) > 3
    return plan, model, task, lambda indices: task.collate(rows, indices)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("kind", "adapter", "pooling"),
    [
        ("bert", "lora", "mean"),
        ("bert", "lora", "pooler"),
        ("bert", "full", "mean"),  # position ids that arrive once for a batch
        ("bert", "head", "mean"),
        ("roberta", "full", "pooler"),
        ("distilbert", "full", "mean"),
        ("distilbert", "lora", "pooler"),
        ("gpt2", "full", "mean"),  # Conv1D
        ("gpt2", "lora", "pooler"),
        ("llama", "lora", "mean"),
    ],
)
def test_the_clipped_sum_is_the_loops(tiny_models: Callable[[str], Path], kind: str, adapter: str, pooling: str, engine: Engine) -> None:
    _, model, task, collate = bench(tiny_models(kind), adapter, pooling)
    norms = sorted(float(gradient_of(model, task.losses, collate([row])).norm()) for row in range(5))
    # all clipped, some clipped, none clipped; one pack, several packs
    cases: list[tuple[list[list[int]], float]] = [(SINGLES, norms[0] / 100), (SINGLES, norms[2]), (ENTITIES, norms[2]), (SINGLES[:2], 1e3)]
    expected = [clipped_by_loop(model, task.losses, units, collate, clip) for units, clip in cases]
    gradients = PerUnitGradients(model, task.losses, 3, engine)
    for (units, clip), right in zip(cases, expected, strict=True):
        got = noised_sum(gradients, units, collate, clip=clip).to(torch.float64)
        assert float((got - right).norm()) <= 2e-6 * float(right.norm())


def test_rows_do_not_see_each_other_nor_the_packs(tiny_models: Callable[[str], Path]) -> None:
    """Adding a unit adds its clipped gradient and nothing else: sensitivity is the clip, exactly."""
    _, model, task, collate = bench(tiny_models("bert"), max_rows=4)
    gradients = PerUnitGradients(model, task.losses, max_rows=4)
    clip = 0.01
    together = noised_sum(gradients, SINGLES, collate, clip=clip)
    for left_out in range(5):
        rest = noised_sum(gradients, [unit for unit in SINGLES if unit != [left_out]], collate, clip=clip)
        alone = noised_sum(gradients, [[left_out]], collate, clip=clip)
        assert float((together - rest).norm()) <= clip * (1 + 1e-5)
        assert torch.allclose(together - rest, alone, atol=1e-5 * clip)
    # hole 1: whoever takes the plain backward pass has no bound at all
    gradients.remove()
    assert float(gradient_of(model, task.losses, collate([0, 1, 2, 3])).norm()) > 10 * clip


def test_an_entity_counts_once_however_many_rows_it_has(tiny_models: Callable[[str], Path]) -> None:
    _, model, task, collate = bench(tiny_models("bert"))
    gradients = PerUnitGradients(model, task.losses, max_rows=3)
    clip = 1e-3
    assert float(noised_sum(gradients, [list(range(12))], collate, clip=clip).norm()) <= clip * (1 + 1e-5)
    # the same rows as 12 units may move the sum by more
    assert float(noised_sum(gradients, [[row] for row in range(12)], collate, clip=clip).norm()) > 1.5 * clip


@pytest.mark.parametrize("source", [SecretSource(), SeededSource("noise")], ids=["secret", "seeded"])
def test_noise_has_its_size_once_and_on_every_weight(tiny_models: Callable[[str], Path], source: RandomSource) -> None:
    _, model, task, collate = bench(tiny_models("bert"), "full")
    gradients = PerUnitGradients(model, task.losses, max_rows=2)
    clip, noise = 0.5, 3.0
    for units in ([], SINGLES):  # an empty draw is noise alone; several packs are noised once
        silent = noised_sum(gradients, units, collate, clip=clip) if units else 0.0
        found = (noised_sum(gradients, units, collate, clip=clip, noise=noise, source=source) - silent).numpy() / (clip * noise)
        assert len(found) == sum(parameter.numel() for parameter in model.trainable.values()) > 5000
        assert stats.kstest(found, "norm").pvalue > 1e-4
        assert abs(found.std() - 1) < 5 / (2 * len(found)) ** 0.5
        start = 0
        for parameter in model.trainable.values():  # not one tensor is left out
            part = found[start : start + parameter.numel()]
            assert 1e-3 < np.abs(part).max() < 7
            start += parameter.numel()
    again = noised_sum(gradients, [], collate, clip=clip, noise=noise, source=source)
    assert not np.allclose(again.numpy() / (clip * noise), found)


def test_the_denominator_is_the_expected_size(tiny_models: Callable[[str], Path]) -> None:
    _, model, task, collate = bench(tiny_models("bert"))
    gradients = PerUnitGradients(model, task.losses, max_rows=2)
    whole = noised_sum(gradients, SINGLES, collate, clip=0.1)
    assert torch.allclose(noised_sum(gradients, SINGLES, collate, clip=0.1, denominator=6.4) * 6.4, whole, atol=1e-6)


def test_noised_gradients_lie_on_a_grid(tiny_models: Callable[[str], Path]) -> None:
    """The low bits of a sum of floats tell what was added (Mironov 2012): a grid has none."""
    _, model, task, collate = bench(tiny_models("bert"))
    gradients = PerUnitGradients(model, task.losses, max_rows=4)
    clip, noise = 0.3, 1.7
    step = GRID * 2.0 ** math.floor(math.log2(clip * noise))
    for units in ([], SINGLES):
        noised = noised_sum(gradients, units, collate, clip=clip, noise=noise, source=SecretSource()).to(torch.float64)
        assert torch.equal(noised / step, torch.round(noised / step))
        assert len(torch.unique(noised)) > 0.9 * len(noised), "the grid is far finer than the noise"


def test_a_step_repeats_with_its_source(tiny_models: Callable[[str], Path]) -> None:
    _, model, task, collate = bench(tiny_models("bert"))
    gradients = PerUnitGradients(model, task.losses, max_rows=4)
    first, second = (
        noised_sum(gradients, SINGLES, collate, clip=0.1, noise=1.0, source=SeededSource("repeat", number)) for number in (1, 1)
    )
    assert torch.equal(first, second)


# --- a model of one linear layer, whose losses can be made as bad as one likes --------------------------------------------------


def linear(network: nn.Module | None = None, rows: int = 6) -> tuple[TunedModel, Collate]:
    torch.manual_seed(0)
    network = network or nn.Sequential(nn.Linear(4, 3))
    network.train()
    trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    data = torch.randn(rows, 4)

    def collate(indices: Sequence[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": data[list(indices)], "row": torch.tensor(list(indices))}

    return TunedModel(network, trainable, frozenset()), collate


def squares(network: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = (network(batch["input_ids"]) ** 2).sum(1)
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_unit_without_a_finite_gradient_counts_as_zero(bad: float, engine: Engine) -> None:
    model, collate = linear()

    def losses(network: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return squares(network, batch) * torch.where(batch["row"] == 2, bad, 1.0)

    gradients = PerUnitGradients(model, losses, 8, engine)
    with_it = noised_sum(gradients, SINGLES, collate, clip=0.5)
    without = noised_sum(gradients, [unit for unit in SINGLES if unit != [2]], collate, clip=0.5)
    assert torch.isfinite(with_it).all()
    assert torch.equal(with_it, without)


def test_finite_rows_whose_sum_is_not_are_bounded_too() -> None:
    model, collate = linear()

    def losses(network: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return squares(network, batch) * torch.where(batch["row"] < 4, 3e38, 1.0)

    gradients = PerUnitGradients(model, losses, max_rows=8)
    clip = 0.5
    found = noised_sum(gradients, [[0, 1, 2, 3], [4]], collate, clip=clip)
    assert torch.isfinite(found).all()
    assert float(found.norm()) <= 2 * clip


def test_the_mean_over_a_batchs_tokens_breaks_the_bound_and_the_mean_of_each_example_does_not() -> None:
    """Hole 2, at its size: with the batch's mean, one long example turns the clipped gradients of all others."""
    torch.manual_seed(0)
    vocabulary, width = 6, 4
    network = nn.Sequential(nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary))
    model = TunedModel(network, dict(network.named_parameters()), frozenset())
    ids = torch.cat([torch.randint(vocabulary, (1, 40)).expand(8, 40), torch.randint(vocabulary, (1, 40))])
    lengths = torch.tensor([2, 2, 2, 2, 2, 2, 2, 2, 40])

    def collate(indices: Sequence[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": ids[list(indices)], "lengths": lengths[list(indices)]}

    def token_losses(network: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = network(batch["input_ids"])
        each = nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"].roll(-1, 1), reduction="none")
        return each * (torch.arange(each.shape[1]) < batch["lengths"][:, None])

    def of_the_batch(network: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (token_losses(network, batch).sum() / batch["lengths"].sum()).expand(len(batch["lengths"]))

    def of_each(network: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return token_losses(network, batch).sum(1) / batch["lengths"]

    short, everyone = [[row] for row in range(8)], [[row] for row in range(9)]
    clip = float(gradient_of(model, of_each, collate([0])).norm())
    moved = {}
    for losses in (of_the_batch, of_each):
        gradients = PerUnitGradients(model, losses, max_rows=16)
        with_it, without = (noised_sum(gradients, units, collate, clip=clip) for units in (everyone, short))
        moved[losses] = float((with_it - without).norm()) / clip
        gradients.remove()
    assert moved[of_the_batch] > 4
    assert moved[of_each] <= 1 + 1e-5


class Tied(nn.Module):
    """An output layer that shares its weight with the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.embedding(input_ids))
        return out


class Bare(nn.Module):
    """A weight that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.scale


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norm_is_refused_by_name(frozen: bool, engine: Engine) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    network[1].requires_grad_(not frozen)
    assert "batch norm" in refusal(network, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_weight_without_a_rule_is_refused_by_name(engine: Engine) -> None:
    assert "Bare" in refusal(nn.Sequential(Bare(), nn.Linear(4, 2)), engine)


def test_what_opacus_has_no_rule_for_is_refused_by_name_and_trained_by_ours(tiny_models: Callable[[str], Path]) -> None:
    assert "head and embedding share a weight" in refusal(Tied(), "hooks")
    assert "LlamaRMSNorm" in refusal(bench(tiny_models("llama"), "full")[1].network, "hooks")
    PerUnitGradients(TunedModel(tied := Tied(), dict(tied.named_parameters()), frozenset()), squares, max_rows=4)


def refusal(network: nn.Module, engine: Engine) -> str:
    model = TunedModel(network, {name: p for name, p in network.named_parameters() if p.requires_grad}, frozenset())
    with pytest.raises(LichenError) as caught:
        PerUnitGradients(model, squares, 4, engine)
    assert caught.value.code is Code.MODEL_DP_UNSUPPORTED
    return caught.value.what
