"""Client-level privacy in a plan: what it needs, what would break its guarantee, and what it costs by three accountants."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.accounting import Segment, epsilon, epsilon_prv
from lichen.common.privacy.schedule import planned_central


def document(**sections: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "rounds": 30,
        "task": {"labels": ["a", "b"]},
        "model": {"base": "some/model"},
        "cohort": {"size": 100, "population": 200},
        "local": {"steps": 1},
        "privacy": {"unit": "client", "noise": "central", "epsilon": 8, "delta": 1e-5},
    }
    for name, changes in sections.items():
        found[name] = {key: value for key, value in {**found.get(name, {}), **changes}.items() if value is not None}
    return found


def plan(**sections: Any) -> Plan:
    return parse_plan(document(**sections))


def test_it_is_accepted_and_known_for_what_it_is() -> None:
    found = plan(privacy={"adaptive_clip": {}}, local={"steps": None, "epochs": 1})
    assert (found.private, found.central) == (True, True)
    assert found.privacy.adaptive_clip is not None
    assert (found.privacy.adaptive_clip.quantile, found.privacy.adaptive_clip.learning_rate) == (0.5, 0.2)
    assert not plan(cohort={"population": None}, privacy={"unit": "example", "noise": "local"}).central


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"privacy": {"noise": "local"}}, ("unit: client goes with noise: central", "Nearest valid: privacy.noise: central")),
        ({"privacy": {"unit": "example"}}, ("unit: client goes with noise: central", "Nearest valid: privacy.noise: local")),
        ({"cohort": {"population": None}}, ("cohort.population", "nearest valid: 100")),
        ({"cohort": {"size": 201}}, ("chance above 1", "Nearest valid: cohort.size: 200")),
        ({"cohort": {"minimum": 2}}, ("cohort.minimum is 2", "Nearest valid: cohort.minimum: 1")),
        ({"cohort": {"oversample": 1.3}}, ("cohort.oversample: 1.3", "who is first", "Nearest valid: cohort.oversample: 1")),
        ({"cohort": {"mode": "buffered"}}, ("ε gains nothing by sampling", "Nearest valid: cohort.mode: synchronous")),
        ({"local": {"partial": True}}, ("local.partial under differential privacy",)),
        ({"privacy": {"sample_rate": 0.1}}, ("privacy.sample_rate", "cohort.size and cohort.population")),
        ({"privacy": {"delta": 0.006}}, ("above one in cohort.population", "below 0.005")),
        ({"evaluation": {"federated_every": 1}}, ("federated evaluation", "evaluation.federated_every: 0")),
        ({"privacy": {"unit": "example", "noise": "local"}}, ("cohort.population goes with privacy.unit: client",)),
        (
            {"privacy": {"unit": "none", "noise": "local", "adaptive_clip": {}}, "cohort": {"population": None}},
            ("privacy.adaptive_clip goes with privacy.unit: client",),
        ),
    ],
)
def test_what_breaks_the_guarantee_is_refused(sections: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(LichenError) as caught:
        plan(**sections)
    assert caught.value.code is Code.PLAN_UNSOUND
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_entities_are_not_clients() -> None:
    with pytest.raises(LichenError, match="unit_field goes with unit: entity"):
        plan(privacy={"unit_field": "patient"})


def test_a_fixed_clip_spends_all_on_the_update() -> None:
    found = planned_central(plan())
    assert (found.update, found.count) == (found.z, None)
    assert found.segment == Segment(found.z, 0.5, 30)
    assert 7.95 < epsilon([found.segment], 1e-5) <= 8


@settings(deadline=None, max_examples=10)
@given(size=st.sampled_from([1, 100]), quantile=st.floats(0.05, 0.95))
def test_update_and_count_cost_together_what_is_accounted(size: int, quantile: float) -> None:
    found = planned_central(plan(cohort={"size": size}, privacy={"adaptive_clip": {"quantile": quantile}}))
    assert found.count is not None
    moved = max(quantile, 1 - quantile)
    assert found.count >= size / 20
    assert found.z <= found.update <= 1.16 * found.z, "the count takes little, however small the cohort is"
    # two Gaussian mechanisms on the same data are one: the inverse squares of their multipliers add up
    assert found.update**-2 + (found.count / moved) ** -2 == pytest.approx(found.z**-2)


def test_two_releases_are_one_to_the_accountant_too() -> None:
    found = planned_central(plan(privacy={"adaptive_clip": {}}))
    assert found.count is not None
    both = [Segment(found.update, 1.0, 1), Segment(2 * found.count, 1.0, 1)]
    assert epsilon(both, 1e-5) == pytest.approx(epsilon([Segment(found.z, 1.0, 1)], 1e-5), rel=5e-3)


@pytest.mark.parametrize(("size", "target"), [(100, 8.0), (50, 2.0), (200, 8.0), (10, 1.0)])
def test_three_accountants_agree(size: int, target: float, caplog: pytest.LogCaptureFixture) -> None:
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    segment = planned_central(plan(cohort={"size": size}, privacy={"epsilon": target})).segment
    pld, prv = epsilon([segment], 1e-5), epsilon_prv([segment], 1e-5)
    assert prv == pytest.approx(pld, rel=5e-3 if target >= 2 else 1e-2)
    rdp = RdpAccountant()
    with caplog.at_level(logging.ERROR, "absl"):
        rdp.compose(dp_event.PoissonSampledDpEvent(segment.sample_rate, dp_event.GaussianDpEvent(segment.noise_multiplier)), segment.steps)
        assert pld < float(rdp.get_epsilon(1e-5)) < 1.25 * pld
    assert pld <= target


def test_the_second_accountants_edges() -> None:
    assert epsilon_prv([], 1e-5) == epsilon_prv([Segment(1.0, 0.5, 0)], 1e-5) == 0
    assert epsilon_prv([Segment(0.0, 0.5, 1)], 1e-5) == math.inf
