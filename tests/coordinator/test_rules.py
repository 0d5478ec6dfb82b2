"""One contract for all aggregation rules, on the tensors of a real model in 64 bits, and what each rule promises beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lichen.common.aggregation import MERGED, A, B, beside, cut, part_of, phase_of, properties, update_like
from lichen.common.aggregation import RULES as PROPERTIES
from lichen.common.codec.plain import Tensors
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State
from lichen.common.plan import Aggregation, Plan, parse_plan
from lichen.common.plan.sections import Privacy
from lichen.common.tasks import make_task
from lichen.coordinator.aggregation import RULES, make_rule
from lichen.coordinator.aggregation.mean import Mean
from lichen.coordinator.aggregation.merged import folded
from lichen.coordinator.downlink import Downlink
from lichen.coordinator.optimizers import server_step
from lichen.coordinator.run_directory import ServerState

RANK = 4
MIXED = sorted(name for name, needs in PROPERTIES.items() if needs.mixed_ranks)
EXACT = ["ffa", "rolora", "flora", "fedex", "nested"]
"""What the model computes is the mean of what the clients' would."""
CLOSE = 1e-12


class Setting(NamedTuple):
    """A rule's plan, a state of its model off its start, and the tensors that do not travel."""

    plan: Plan
    state: State
    fixed: State


class Client(NamedTuple):
    update: State
    weight: float
    rank: int


@pytest.fixture(scope="module")
def setting_of(tiny_model: Any) -> Callable[[str], Setting]:
    """`setting_of("rolora")`, made once."""
    made: dict[str, Setting] = {}

    def make(rule: str) -> Setting:
        if rule not in made:
            made[rule] = _setting(rule, str(tiny_model))
        return made[rule]

    return make


def _setting(rule: str, base: str) -> Setting:
    plan = parse_plan(
        {
            "rounds": 4,
            "task": {"labels": ["a", "b", "c"], "max_length": 32},
            "model": {"base": base, "adapter": {"kind": "lora", "rank": RANK, "alpha": 6}},
            "local": {"steps": 1},
            "aggregation": {"rule": rule},
        }
    )
    model = make_task(plan).build()
    generator = torch.Generator().manual_seed(0)
    state = {name: tensor.double() for name, tensor in model.state().items()}
    for tensor in state.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    fixed = {
        name.replace(".default", ""): parameter.detach().double()
        for name, parameter in model.network.named_parameters()
        if part_of(name) is not None and name.replace(".default", "") not in state
    }
    return Setting(plan, state, fixed)


def clients(rounds: Sequence[int] = (1, 2), *, mixed: bool, least: int = 1) -> st.SearchStrategy[tuple[int, list[tuple[int, float, int]]]]:
    """A round, and of each client the seed of its update, its weight and its rank."""
    rank = st.integers(1, RANK) if mixed else st.just(RANK)
    one = st.tuples(st.integers(0, 2**31), st.floats(0.5, 1000), rank)
    return st.tuples(st.sampled_from(rounds), st.lists(one, min_size=least, max_size=5))


def drawn(setting: Setting, round: int, found: Sequence[tuple[int, float, int]]) -> list[Client]:
    return [Client(update_of(setting, round, rank, seed), weight, rank) for seed, weight, rank in found]


def update_of(setting: Setting, round: int, rank: int, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    like = update_like(setting.plan, round, rank, setting.state)
    return {name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for name, tensor in like.items()}


def change_of(setting: Setting, round: int, found: Sequence[Client]) -> State:
    rule = make_rule(setting.plan, round, setting.state)
    for client in found:
        rule.add(Tensors(client.update), client.weight, client.rank)
    assert rule.finite()
    return rule.change()


def stepped(setting: Setting, round: int, found: Sequence[Client]) -> State:
    """The next round's state."""
    rule = make_rule(setting.plan, round, setting.state)
    for client in found:
        rule.add(Tensors(client.update), client.weight, client.rank)
    step = server_step(rule.change(), {}, {}, setting.plan.aggregation).step
    for name, tensor in rule.restart().items():
        step[name] = step[name] + tensor if name in step else tensor
    return Downlink(None, None).add(step, ServerState(round, setting.state, {}, {}))


def effects(setting: Setting, state: State) -> State:
    """What each layer adds to the base's output, merged + s B A, by the name of its B; and the head."""
    scaling = setting.plan.model.adapter.alpha / setting.plan.model.adapter.rank
    found = {}
    for name, tensor in state.items():
        if part_of(name) == B:
            a = state[beside(name, A)] if beside(name, A) in state else setting.fixed[beside(name, A)][: tensor.shape[1]]
            merged = state.get(beside(name, MERGED), torch.zeros(()))
            found[name] = merged + scaling * tensor @ a
        elif part_of(name) is None:
            found[name] = tensor
    return found


def of_client(setting: Setting, client: Client) -> State:
    """What a client's model computes with after its training: its own columns, and those that it holds."""
    if not properties(setting.plan).holds_rest:
        start = cut(setting.state, client.rank)
        return start | {name: start[name] + tensor for name, tensor in client.update.items()}
    found = {name: tensor.clone() for name, tensor in setting.state.items()}
    for name, tensor in cut(found, client.rank).items():  # views
        if name in client.update:
            tensor.add_(client.update[name])
    return found


def mean_effects(setting: Setting, found: Sequence[Client]) -> State:
    total = sum(client.weight for client in found)
    each = [(effects(setting, of_client(setting, client)), client.weight / total) for client in found]
    return {name: torch.stack([share * effect[name] for effect, share in each]).sum(0) for name in each[0][0]}


def apart(left: State, right: State) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


every_rule = pytest.mark.parametrize("rule", sorted(RULES))
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_a_rule_of_a_plan_is_in_both_tables() -> None:
    assert all((rule is Mean) != PROPERTIES[name].single_updates for name, rule in RULES.items())
    assert set(RULES) == set(PROPERTIES) == set(get_args(Aggregation.model_fields["rule"].annotation))


# --- of every rule ------------------------------------------------------------------------------------------------------------------


@every_rule
@few
@given(data=st.data())
def test_order_does_not_matter_nor_whether_one_client_comes_as_two(
    setting_of: Callable[[str], Setting], rule: str, data: st.DataObject
) -> None:
    setting = setting_of(rule)
    round, found = data.draw(clients(mixed=rule in MIXED))
    them = drawn(setting, round, found)
    expected = change_of(setting, round, them)
    assert apart(change_of(setting, round, data.draw(st.permutations(them))), expected) < CLOSE
    first, *others = them
    half = first._replace(weight=first.weight / 2)
    assert apart(change_of(setting, round, [half, *others, half]), expected) < CLOSE


@every_rule
@few
@given(data=st.data())
def test_of_one_client_the_model_becomes_the_clients(setting_of: Callable[[str], Setting], rule: str, data: st.DataObject) -> None:
    setting = setting_of(rule)
    round, [found] = data.draw(clients(mixed=False).filter(lambda drawn: len(drawn[1]) == 1))
    (client,) = drawn(setting, round, [found])
    assert apart(effects(setting, stepped(setting, round, [client])), effects(setting, of_client(setting, client))) < CLOSE


@every_rule
@few
@given(data=st.data())
def test_what_is_not_trained_stays_to_the_bit_and_what_goes_in_is_not_changed(
    setting_of: Callable[[str], Setting], rule: str, data: st.DataObject
) -> None:
    setting = setting_of(rule)
    round, found = data.draw(clients(mixed=rule in MIXED))
    them = drawn(setting, round, found)
    before = copy.deepcopy((setting.state, them))
    after = stepped(setting, round, them)
    assert apart(setting.state, before[0]) == 0
    assert all(apart(client.update, kept.update) == 0 for client, kept in zip(them, before[1], strict=True))
    phase = phase_of(setting.plan, round)
    for name, tensor in setting.state.items():
        assert after[name].shape == tensor.shape
        assert after[name].dtype == tensor.dtype
        part = part_of(name)
        frozen = part in {A, B} and part not in phase
        assert not frozen or torch.equal(after[name], tensor)
    assert any(part_of(name) == A and A not in phase for name in setting.state) == (rule in {"rolora", "nested"} and round == 1)


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_a_product_beyond_the_models_type_is_refused_alone(setting_of: Callable[[str], Setting], rule: str) -> None:
    setting = setting_of(rule)
    honest = [Client(update_of(setting, 1, RANK, seed), 2.0, RANK) for seed in (0, 1)]
    added = make_rule(setting.plan, 1, setting.state)
    added.add(Tensors(honest[0].update), 2.0, RANK)
    with pytest.raises(LichenError) as caught:
        added.add(Tensors({name: tensor * 1e20 for name, tensor in update_of(setting, 1, RANK, 2).items()}), 2.0, RANK)
    assert caught.value.code is Code.STATE_MISMATCH
    added.add(Tensors(honest[1].update), 2.0, RANK)
    expected = change_of(setting, 1, honest)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in added.change().items())


@every_rule
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_seen(setting_of: Callable[[str], Setting], rule: str, value: float) -> None:
    setting = setting_of(rule)
    for name in update_like(setting.plan, 1, RANK, setting.state):
        bad, good = update_of(setting, 1, RANK, 0), update_of(setting, 1, RANK, 1)
        bad[name].view(-1)[-1] = value
        total = make_rule(setting.plan, 1, setting.state)
        total.add(Tensors(bad), 1.0, RANK)
        total.add(Tensors(good), 2.0, RANK)
        assert not total.finite()
        with pytest.raises(LichenError) as caught:
            total.change()
        assert caught.value.code is Code.STATE_MISMATCH


@every_rule
def test_nothing_added_is_a_failed_round(setting_of: Callable[[str], Setting], rule: str) -> None:
    setting = setting_of(rule)
    with pytest.raises(LichenError) as caught:
        change_of(setting, 1, [])
    assert caught.value.code is Code.ROUND_FAILED


@every_rule
def test_the_models_own_types_come_out(setting_of: Callable[[str], Setting], rule: str) -> None:
    setting = setting_of(rule)
    single = setting._replace(state={name: tensor.float() for name, tensor in setting.state.items()})
    found = [Client({name: tensor.float() for name, tensor in update_of(setting, 1, RANK, seed).items()}, 1.0, RANK) for seed in (0, 1)]
    change, exact = change_of(single, 1, found), change_of(setting, 1, found)
    assert {tensor.dtype for tensor in change.values()} == {torch.float32}
    assert apart(change, exact) < 1e-4


# --- what is exact ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", EXACT)
@few
@given(data=st.data())
def test_the_product_is_the_mean_of_the_clients_products(setting_of: Callable[[str], Setting], rule: str, data: st.DataObject) -> None:
    setting = setting_of(rule)
    round, found = data.draw(clients(mixed=rule in {"flora", "nested"}))
    them = drawn(setting, round, found)
    assert apart(effects(setting, stepped(setting, round, them)), mean_effects(setting, them)) < CLOSE


@few
@given(found=clients(mixed=False, least=2))
def test_fedavg_alone_is_not_exact(setting_of: Callable[[str], Setting], found: tuple[int, list[tuple[int, float, int]]]) -> None:
    setting, (round, each) = setting_of("fedavg"), found
    them = drawn(setting, round, [(seed + place, weight, rank) for place, (seed, weight, rank) in enumerate(each)])
    assert apart(effects(setting, stepped(setting, round, them)), mean_effects(setting, them)) > 1e-3


@few
@given(found=clients(mixed=False))
def test_fedex_is_fedavg_and_a_residual_of_low_rank(
    setting_of: Callable[[str], Setting], found: tuple[int, list[tuple[int, float, int]]]
) -> None:
    setting, (round, each) = setting_of("fedex"), found
    each = each[:3]
    change = change_of(setting, round, drawn(setting, round, each))
    plain = setting_of("fedavg")._replace(state={name: tensor for name, tensor in setting.state.items() if part_of(name) != MERGED})
    mean = change_of(plain, round, drawn(plain, round, each))
    assert apart({name: change[name] for name in mean}, mean) < CLOSE
    for name, tensor in change.items():
        if part_of(name) == MERGED:
            values = torch.linalg.svdvals(tensor)
            assert (values[(len(each) - 1) * RANK :] < 1e-10).all()


@few
@given(seed=st.integers(0, 2**31), weights=st.lists(st.floats(0.5, 1000), min_size=1, max_size=5))
def test_of_identical_clients_fedex_is_fedavg(setting_of: Callable[[str], Setting], seed: int, weights: list[float]) -> None:
    setting = setting_of("fedex")
    update = update_of(setting, 1, RANK, seed)
    change = change_of(setting, 1, [Client(update, weight, RANK) for weight in weights])
    assert all(tensor.abs().max() < CLOSE for name, tensor in change.items() if part_of(name) == MERGED)
    assert apart({name: change[name] for name in update}, update) < CLOSE


@few
@given(found=clients(mixed=True))
def test_flora_keeps_the_product_of_the_stacks_and_starts_at_its_best_approximation(
    setting_of: Callable[[str], Setting], found: tuple[int, list[tuple[int, float, int]]]
) -> None:
    setting, (round, each) = setting_of("flora"), found
    them = drawn(setting, round, each)
    total, scaling = sum(client.weight for client in them), setting.plan.model.adapter.alpha / RANK
    whole = [of_client(setting, client) for client in them]
    after = stepped(setting, round, them)
    for name, merged in setting.state.items():
        if part_of(name) == MERGED:
            up = torch.cat([client.weight / total * scaling * own[beside(name, B)] for client, own in zip(them, whole, strict=True)], 1)
            learned = merged + up @ torch.cat([own[beside(name, A)] for own in whole])
            a, b = after[beside(name, A)], after[beside(name, B)]
            torch.testing.assert_close(after[name] + scaling * b @ a, learned)
            torch.testing.assert_close(a @ a.t(), torch.eye(RANK, dtype=a.dtype) / 3)
            lengths = b.norm(dim=0)
            assert (lengths.diff() <= 1e-9).all(), "the largest direction first"
            left = torch.linalg.svdvals(learned)[RANK:].norm()
            assert float((learned - scaling * b @ a).norm()) <= 1.01 * float(left) + 1e-9
    again = stepped(setting, round, them)
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())


@few
@given(found=clients(mixed=True))
def test_under_privacy_flora_merges_all_and_starts_afresh(
    setting_of: Callable[[str], Setting], found: tuple[int, list[tuple[int, float, int]]]
) -> None:
    setting, (round, each) = setting_of("flora"), found
    setting = setting._replace(plan=setting.plan.model_copy(update={"privacy": Privacy(unit="example")}))
    them = drawn(setting, round, each)
    after, expected = stepped(setting, round, them), mean_effects(setting, them)
    for name, tensor in after.items():
        if part_of(name) == B:
            assert not tensor.any()
            assert float((after[beside(name, MERGED)] - expected[name]).abs().max()) < CLOSE
            a = after[beside(name, A)]
            assert not torch.equal(a, setting.state[beside(name, A)])
            assert 0 < float(a.abs().max()) <= a.shape[1] ** -0.5 + CLOSE
    assert apart(after, stepped(setting, round, them)) == 0, "the same round draws the same adapters"
    other = setting._replace(plan=setting.plan.model_copy(update={"seed": setting.plan.seed + 1}))
    for again in (stepped(setting, round + 2, them), stepped(other, round, them)):
        assert all(apart({name: after[name]}, {name: again[name]}) > 0 for name in after if part_of(name) == A)


def test_where_flora_has_learned_less_than_its_rank_the_rest_of_the_adapter_does_nothing(setting_of: Callable[[str], Setting]) -> None:
    setting = setting_of("flora")
    setting = setting._replace(
        state={name: 0 * tensor if part_of(name) in {B, MERGED} else tensor for name, tensor in setting.state.items()}
    )
    one, nothing = update_of(setting, 1, 1, 0), update_of(setting, 1, RANK, 0)
    for update, rank in (({name: 0 * tensor for name, tensor in nothing.items()}, RANK), (one, 1)):
        after = stepped(setting, 1, [Client(update, 1.0, rank)])
        for name, tensor in after.items():
            if part_of(name) == B:
                learned = 0 if rank == RANK else 1
                assert float(tensor[:, learned:].abs().max()) < 1e-9
                assert bool(tensor[:, :learned].any()) == bool(learned)
                assert float(after[beside(name, A)].norm(dim=1).min()) > 0.5, "so that B can learn"


@pytest.mark.parametrize("rule", sorted(name for name, needs in PROPERTIES.items() if needs.changes_base))
def test_a_folded_state_computes_the_same_and_its_adapter_does_nothing(setting_of: Callable[[str], Setting], rule: str) -> None:
    setting = setting_of(rule)
    found = folded(setting.plan, setting.state)
    assert apart(effects(setting, found), effects(setting, setting.state)) < CLOSE
    assert not any(tensor.any() for name, tensor in found.items() if part_of(name) == B)


# --- mixed ranks --------------------------------------------------------------------------------------------------------------------


@few
@given(found=clients(mixed=True))
def test_zero_padding_is_fedavg_of_updates_that_are_zero_elsewhere(
    setting_of: Callable[[str], Setting], found: tuple[int, list[tuple[int, float, int]]]
) -> None:
    setting, (round, each) = setting_of("zero-padding"), found
    them = drawn(setting, round, each)
    padded = []
    for client in them:
        update = {name: torch.zeros_like(tensor) for name, tensor in update_like(setting.plan, round, RANK, setting.state).items()}
        for name, tensor in cut(update, client.rank).items():
            tensor.add_(client.update[name])
        padded.append(Client(update, client.weight, RANK))
    assert apart(change_of(setting, round, them), change_of(setting_of("fedavg"), round, padded)) < CLOSE
