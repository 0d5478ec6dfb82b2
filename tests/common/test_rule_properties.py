"""What follows from a plan's aggregation rule at both ends: phases, ranks, the shape of an update, and which plans are refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.common.aggregation import MERGED, RULES, A, B, beside, cut, part_of, phase_of, properties, rank_of, update_like
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import TunedModel
from lichen.common.model.export import load_saved, save_model
from lichen.common.plan import Plan, load_plan, parse_plan
from lichen.common.privacy.single_backward.fused import fuse_lora
from lichen.common.privacy.statement import Statement
from lichen.common.tasks import make_task

LORA = {"kind": "lora", "rank": 4}
LOCAL = {"steps": 1}
CENTRAL = {
    "privacy": {"unit": "client", "noise": "central", "delta": 1e-3},
    "cohort": {"size": 2, "population": 4},
}


@pytest.fixture
def plan_of(tiny_plan: dict[str, Any]) -> Any:
    def make(rule: str, **changes: Any) -> Plan:
        document = tiny_plan | {"local": LOCAL, "aggregation": {"rule": rule}}
        document["model"] = document["model"] | {"adapter": LORA}
        for key, value in changes.items():
            document[key] = value if key == "cohort" else {**document.get(key, {}), **value}
        return parse_plan(document)

    return make


@pytest.mark.parametrize(
    ("rule", "phases"),
    [("fedavg", [{A, B}] * 4), ("flora", [{A, B}] * 4), ("ffa", [{B}] * 4), ("rolora", [{B}, {A}] * 2), ("nested", [{B}, {A}] * 2)],
)
def test_phases(plan_of: Any, rule: str, phases: list[set[str]]) -> None:
    assert [set(phase_of(plan_of(rule), round)) for round in (1, 2, 3, 4)] == phases


def test_ranks_are_dealt_in_turn_and_only_in_a_simulation(plan_of: Any) -> None:
    plan = plan_of("flora", simulation={"ranks": [1, 4, 2]})
    assert [rank_of(plan, f"client-{number}", simulated=True) for number in range(5)] == [1, 4, 2, 1, 4]
    assert rank_of(plan, "client-0", simulated=False) == 4
    assert rank_of(plan_of("flora"), "client-3", simulated=True) == 4


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "rolora", "nested", "flora", "fedex", "zero-padding"])
@pytest.mark.parametrize("round", [1, 2])
def test_an_update_has_the_tensors_that_are_trained(plan_of: Any, rule: str, round: int) -> None:
    plan = plan_of(rule)
    model = make_task(plan).build()
    state = model.state()
    rank = 3 if properties(plan).mixed_ranks else 4
    model.load(cut(state, rank, hold=properties(plan).holds_rest))
    model.train_only(phase_of(plan, round))
    found = {name: parameter.shape for name, parameter in model.active.items()}
    assert {name: tensor.shape for name, tensor in update_like(plan, round, rank, state).items()} == found
    trained = {part for part in (A, B) if any(part in name for name in found)}
    assert trained == set(phase_of(plan, round))
    assert model.head <= found.keys()


def test_a_model_takes_the_rank_of_its_state_and_computes_as_one_of_that_rank(plan_of: Any) -> None:
    plan = plan_of("zero-padding")
    model = make_task(plan).build()
    generator = torch.Generator().manual_seed(0)
    state = {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in model.state().items()}
    batch = {"input_ids": torch.tensor([[2, 7, 9, 3]]), "attention_mask": torch.ones((1, 4), dtype=torch.int64)}

    def logits(state: dict[str, torch.Tensor]) -> torch.Tensor:
        model.load(state)
        with torch.no_grad():
            found: torch.Tensor = model.network(**batch).logits
        return found

    whole = logits(state)
    low = logits(cut(state, 2))
    padded = {name: tensor.clone() for name, tensor in state.items()}
    for name, tensor in padded.items():
        if B in name:
            tensor[:, 2:] = 0
    torch.testing.assert_close(low, logits(padded))
    assert not torch.allclose(low, whole)
    assert torch.equal(logits(state), whole), "it grows again"


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_what_is_held_computes_as_the_whole_model_and_is_not_trained(
    plan_of: Any, tiny_models: Callable[[str], Path], kind: str, precision: str
) -> None:
    plan = plan_of("nested", model={"base": str(tiny_models(kind)), "base_precision": precision}, privacy={"unit": "example"})
    task = make_task(plan)
    model = task.build()
    generator = torch.Generator().manual_seed(0)
    state = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in model.state().items()}
    batch = task.collate(task.made_up(3), range(3))

    def passed(state: dict[str, torch.Tensor], within: Any = nullcontext) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.load(state)
        model.network.zero_grad()
        with within():
            losses = task.losses(model.network, batch)
            torch.autograd.backward(losses.sum())
        return losses.detach(), {name: parameter.grad.clone() for name, parameter in model.trainable.items() if parameter.grad is not None}

    losses, gradients = passed(state)
    low = cut(state, 1, hold=True)
    assert not torch.allclose(losses, passed(low | {name: 0 * low[name] for name in low if "held" in name})[0])
    sums = fuse_lora(model.network)  # the nodes that private training uses as well
    for within in (nullcontext, sums.use):
        found, of_low = passed(low, within)
        torch.testing.assert_close(found, losses, rtol=1e-4, atol=1e-5)
        for name, gradient in of_low.items():
            part = part_of(name)
            expected = gradients[name][:1] if part == A else gradients[name][:, :1] if part == B else gradients[name]
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(passed(state)[0], losses, rtol=1e-4, atol=1e-5)  # at the whole rank it holds nothing
    for wrong in (cut(state, 1), state | {name: tensor for name, tensor in low.items() if "held" in name}):
        with pytest.raises(LichenError) as caught:
            model.load(wrong)
        assert caught.value.code is Code.STATE_MISMATCH


def test_a_state_of_a_larger_rank_or_of_two_is_refused(plan_of: Any) -> None:
    model = make_task(plan_of("flora")).build()
    state = model.state()
    larger = {name: torch.cat([tensor, tensor]) if A in name else tensor for name, tensor in state.items()}
    mixed = cut(state, 2) | {name: tensor for name, tensor in state.items() if B in name}
    for wrong in (larger, mixed):
        with pytest.raises(LichenError) as caught:
            model.load(wrong)
        assert caught.value.code is Code.STATE_MISMATCH
    flat = {name: tensor.flatten() if B in name else tensor for name, tensor in state.items()}
    for unfit, rank in ((state, 5), (flat, 2)):
        with pytest.raises(LichenError) as caught:
            cut(unfit, rank)
        assert caught.value.code is Code.STATE_MISMATCH


def test_the_fixed_factor_has_orthonormal_rows_that_follow_from_the_seed(plan_of: Any) -> None:
    def fixed(plan: Plan) -> list[torch.Tensor]:
        model = make_task(plan).build()
        assert not any(A in name for name in model.state())
        return [parameter for name, parameter in model.network.named_parameters() if A in name]

    plan = plan_of("ffa")
    first, second = fixed(plan), fixed(plan)
    assert len(first) == 4
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad
        torch.testing.assert_close(one @ one.t(), torch.eye(4), rtol=0, atol=1e-6)
    assert not torch.equal(first[0], first[1])
    other = fixed(plan.model_copy(update={"seed": 2}))
    assert not torch.equal(first[0], other[0])


def test_more_rows_than_a_layer_is_wide_can_not_be_orthonormal(plan_of: Any) -> None:
    with pytest.raises(LichenError) as caught:
        make_task(plan_of("ffa", model={"adapter": {"rank": 33}})).build()
    assert caught.value.code is Code.MODEL_UNSUPPORTED


@pytest.mark.parametrize(
    ("rule", "changes", "reason"),
    [
        *((rule, {"model": {"adapter": {"kind": "head"}}}, "is for LoRA") for rule in RULES if rule != "fedavg"),
        ("rolora", {"model": {"adapter": {"kind": "full"}}}, "is for LoRA"),
        ("fedavg", {"simulation": {"ranks": [2, 4]}}, "takes one rank"),
        ("fedex", {"simulation": {"ranks": [2, 4]}}, "takes one rank"),
        ("flora", {"simulation": {"ranks": [2, 3]}}, "the largest of simulation.ranks is 3, model.adapter.rank 4"),
        ("fedex", {"aggregation": {"learning_rate": 0.5}}, "exact only"),
        ("fedex", {"aggregation": {"optimizer": "fedadam"}}, "exact only"),
        ("flora", CENTRAL, "needs each update"),
        ("fedex", CENTRAL, "needs each update"),
        ("nested", CENTRAL, "is for several ranks"),
        ("zero-padding", CENTRAL, "is for several ranks"),
    ],
)
def test_what_a_rule_can_not_go_with_is_refused(plan_of: Any, rule: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(LichenError) as caught:
        plan_of(rule, **changes)
    assert caught.value.code is Code.PLAN_UNSOUND
    assert reason in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("ffa", CENTRAL),
        ("rolora", CENTRAL),
        ("nested", {"simulation": {"ranks": [1, 1, 1, 1, 4]}, "privacy": {"unit": "example"}}),
        ("flora", {"local": {"prefix_cache": "float32"}}),
        ("fedex", {"local": {"prefix_cache": "float16"}}),
        ("flora", {"aggregation": {"optimizer": "fedadam"}, "privacy": {"unit": "example"}}),
    ],
)
def test_what_it_can_go_with_is_not(plan_of: Any, rule: str, changes: dict[str, Any]) -> None:
    assert plan_of(rule, **changes).aggregation.rule == rule


def test_a_cache_may_be_turned_off_as_yaml_has_it(tmp_path: Path, plan_of: Any) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(plan_of("fedavg").to_yaml())
    assert load_plan(path, ["local.prefix_cache=off"]).local.prefix_cache == "off"
    assert load_plan(path, ["local.prefix_cache=float16"]).local.prefix_cache == "float16"


@pytest.mark.parametrize("rule", ["rolora", "nested", "flora", "fedex"])
def test_what_a_codec_lost_can_not_wait_for_other_tensors(plan_of: Any, rule: str) -> None:
    feedback = {"uplink": {"codec": "blockwise", "error_feedback": True}}
    with pytest.raises(LichenError) as caught:
        plan_of(rule, transfer=feedback)
    assert caught.value.code is Code.PLAN_UNSOUND
    assert "whose next round trains other tensors" in caught.value.what
    assert plan_of("ffa", transfer=feedback).transfer.uplink.error_feedback


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_what_is_merged_computes_as_an_adapter_would_and_is_saved(
    tmp_path: Path, plan_of: Any, tiny_models: Callable[[str], Path], kind: str
) -> None:
    plan = plan_of("fedex", model={"base": str(tiny_models(kind))})
    task = make_task(plan)
    model = task.build()
    start = model.state()
    generator = torch.Generator().manual_seed(0)
    adapter = {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in start.items() if part_of(name) != MERGED}
    merged = dict(start) | {name: tensor for name, tensor in adapter.items() if part_of(name) is None}
    for name in start:
        if part_of(name) == MERGED:
            scaling = plan.model.adapter.alpha / plan.model.adapter.rank
            merged[name] = scaling * adapter[beside(name, B)] @ adapter[beside(name, A)]
    assert any(part_of(name) == MERGED for name in start)
    batch = task.collate(task.made_up(3), range(3))

    def losses(of: TunedModel) -> torch.Tensor:
        with torch.no_grad():
            return task.losses(of.network, batch)

    model.load(start | adapter)
    expected = losses(model)
    model.load(merged)
    torch.testing.assert_close(losses(model), expected, rtol=1e-4, atol=1e-5)
    for name, tensor in model.state().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-4, atol=1e-5)
    model.load(start | adapter)
    save_model(tmp_path, plan, model, task.tokenizer, Statement(private=False, summary="Nothing is said."))
    other = make_task(plan).build()
    load_saved(tmp_path, other)
    torch.testing.assert_close(losses(other), expected, rtol=1e-4, atol=1e-5)
