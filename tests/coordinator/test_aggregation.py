"""FedAvg: what a weighted mean must hold for any clients, and Flower's own FedAvg as its oracle."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.common import records
from lichen.common.codec.layout import Layout
from lichen.common.codec.plain import Tensors
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State
from lichen.coordinator.aggregation import RULES, fedavg
from lichen.coordinator.aggregation.fedavg import FedAvg

SHAPES = {"layer.lora_A.weight": (2, 3), "layer.lora_B.weight": (3, 2), "classifier.bias": (3,)}
Client = tuple[State, float]
unhurried = settings(deadline=None)  # the machine may be busy


@st.composite
def clients(draw: st.DrawFn, least: int = 1, most: int = 6) -> list[Client]:
    """Updates of the same tensors, over many orders of magnitude, with weights from one row to millions."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = []
    for _ in range(draw(st.integers(least, most))):
        scale = 10.0 ** draw(st.integers(-6, 3))
        update = {name: torch.from_numpy((generator.standard_normal(shape) * scale).astype(np.float32)) for name, shape in SHAPES.items()}
        found.append((update, float(draw(st.integers(1, 10**7)))))
    return found


def mean(found: list[Client]) -> State:
    total = FedAvg()
    for update, weight in found:
        total.add(Tensors(update), weight)
    return Layout.of(found[0][0]).split(total.mean())


def near(left: State, right: State, found: list[Client]) -> None:
    """Equal to the last place of 32-bit floats, on the scale of what was added: terms may cancel."""
    assert left.keys() == right.keys()
    for name in left:
        scale = max(float(update[name].abs().max()) for update, _ in found)
        torch.testing.assert_close(left[name], right[name], rtol=1e-6, atol=1e-7 * scale)


@unhurried
@given(clients())
def test_it_is_the_weighted_mean_in_32_bit_floats_and_leaves_the_updates_as_they_were(found: list[Client]) -> None:
    before = [{name: tensor.clone() for name, tensor in update.items()} for update, _ in found]
    result = mean(found)
    weights = np.array([weight for _, weight in found])
    for name, shape in SHAPES.items():
        stacked = np.stack([update[name].numpy().astype(np.float64) for update, _ in found])
        expected = np.tensordot(weights / weights.sum(), stacked, axes=1)
        assert result[name].dtype == torch.float32
        assert tuple(result[name].shape) == shape
        np.testing.assert_allclose(result[name].numpy(), expected, rtol=1e-6, atol=1e-7 * np.abs(stacked).max())
    for (update, _), copy in zip(found, before, strict=True):
        assert all(torch.equal(update[name], copy[name]) for name in SHAPES)


@unhurried
@given(clients(most=1))
def test_one_client_is_the_identity_whatever_its_weight(found: list[Client]) -> None:
    result = mean(found)
    assert all(torch.equal(result[name], found[0][0][name]) for name in SHAPES)


@unhurried
@given(clients(), st.randoms(use_true_random=False))
def test_the_order_of_clients_changes_nothing(found: list[Client], random: object) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    near(mean(found), mean(shuffled), found)


@unhurried
@given(clients())
def test_a_client_split_in_two_of_half_its_weight_changes_nothing(found: list[Client]) -> None:
    (update, weight), *others = found
    near(mean(found), mean([(update, weight / 2), *others, (update, weight / 2)]), found)


@unhurried
@given(clients(), st.sampled_from([2.0**-20, 0.5, 3.0, 1e6]))
def test_only_the_ratio_of_weights_counts(found: list[Client], factor: float) -> None:
    near(mean(found), mean([(update, weight * factor) for update, weight in found]), found)


@unhurried
@given(clients())
def test_the_mean_lies_between_its_updates(found: list[Client]) -> None:
    result = mean(found)
    for name in SHAPES:
        stacked = torch.stack([update[name] for update, _ in found])
        slack = 1e-6 * stacked.abs().max()
        assert bool((result[name] >= stacked.amin(0) - slack).all())
        assert bool((result[name] <= stacked.amax(0) + slack).all())


@settings(max_examples=40, deadline=None)
@given(clients(least=2))
def test_it_agrees_with_flowers_own_fedavg(found: list[Client]) -> None:
    replies = []
    for number, (update, weight) in enumerate(found):
        asked = records.build_message(
            RecordDict(), run_id=1, message_id=f"{number:032x}", src_node_id=1, dst_node_id=number + 2, message_type="train", group_id="1"
        )
        arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in update.items()})
        replies.append(records.reply(asked, RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": int(weight)})})))
    theirs, _ = FlowerFedAvg().aggregate_train(1, replies)
    assert theirs is not None
    near(mean(found), {name: torch.from_numpy(array.numpy().astype(np.float32)) for name, array in theirs.items()}, found)


@settings(max_examples=40, deadline=None)
@given(clients(most=fedavg.GROUP), st.integers(1, 7))
def test_a_group_is_summed_in_64_bits_whatever_its_parts(found: list[Client], piece: int) -> None:
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for update, weight in found:
        for name, tensor in update.items():
            total[name] += tensor.to(torch.float64) * weight
    whole = sum(weight for _, weight in found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensors, "piece", piece)
        result = mean(found)
    for name in SHAPES:
        assert torch.equal(result[name], (total[name] * (1 / whole)).to(torch.float32)), name


@settings(max_examples=40, deadline=None)
@given(clients(least=fedavg.GROUP + 1, most=3 * fedavg.GROUP + 1))
def test_more_than_a_group_is_off_by_a_rounding_a_group(found: list[Client]) -> None:
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for update, weight in found:
        for name, tensor in update.items():
            total[name] += tensor.to(torch.float64) * weight
    whole = sum(weight for _, weight in found)
    near(mean(found), {name: (tensor / whole).to(torch.float32) for name, tensor in total.items()}, found)


@unhurried
@given(clients(least=2, most=2 * fedavg.GROUP + 1), st.data())
def test_a_value_that_is_not_finite_shows_in_the_sum_wherever_it_is(found: list[Client], data: st.DataObject) -> None:
    total = FedAvg()
    update, _ = found[data.draw(st.integers(0, len(found) - 1))]
    update[data.draw(st.sampled_from(sorted(SHAPES)))].view(-1)[data.draw(st.integers(0, 2))] = data.draw(
        st.sampled_from([float("nan"), float("inf"), -float("inf")])
    )
    for update, weight in found:
        total.add(Tensors(update), weight)
    assert not total.finite()
    with pytest.raises(LichenError) as caught:
        total.mean()
    assert caught.value.code is Code.STATE_MISMATCH


def test_infinities_that_would_cancel_do_not_hide() -> None:
    total = FedAvg()
    for value in (float("inf"), -float("inf")):
        total.add(Tensors({"w": torch.full((3,), value)}), 1.0)
    assert not total.finite()


def test_a_sum_that_is_finite_stays_so_and_can_be_asked_between_updates() -> None:
    total = FedAvg()
    for value in (1.0, 4.0):
        total.add(Tensors({"w": torch.full((3,), value)}), 1.0)
        assert total.finite()
    assert torch.equal(total.mean(), torch.full((3,), 2.5))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (4, 1, 5)])
def test_tensors_of_any_shape(shape: tuple[int, ...]) -> None:
    result = mean([({"w": torch.ones(shape)}, 1.0), ({"w": torch.full(shape, 3.0)}, 3.0)])["w"]
    assert torch.equal(result, torch.full(shape, 2.5))


def test_a_tensor_need_not_lie_in_one_piece() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(mean([({"w": tensor}, 2.0)])["w"], tensor)


@pytest.mark.parametrize("count", [fedavg.GROUP, 5 * fedavg.GROUP])
def test_no_more_updates_are_held_than_are_added_together(count: int) -> None:
    total = FedAvg()
    held: list[weakref.ref[torch.UntypedStorage]] = []
    most = 0
    for number in range(count):
        tensor = torch.full((4,), float(number))
        held.append(weakref.ref(tensor.untyped_storage()))
        total.add(Tensors({"w": tensor}), 1.0)
        del tensor
        most = max(most, sum(one() is not None for one in held))
    assert most == fedavg.GROUP - 1
    assert torch.equal(total.mean(), torch.full((4,), (count - 1) / 2))


def test_values_at_the_end_of_the_range_do_not_overflow_on_the_way() -> None:
    update = {"w": torch.full((2,), torch.finfo(torch.float32).max)}
    assert torch.equal(mean([(update, 2.0**40), (update, 2.0**40)])["w"], update["w"])


def test_nothing_added_is_a_failed_round() -> None:
    with pytest.raises(LichenError) as caught:
        FedAvg().mean()
    assert caught.value.code is Code.ROUND_FAILED


def test_every_rule_that_a_plan_may_name_is_registered() -> None:
    from typing import get_args

    from lichen.common.plan import Aggregation

    assert set(RULES) == set(get_args(Aggregation.model_fields["rule"].annotation))
