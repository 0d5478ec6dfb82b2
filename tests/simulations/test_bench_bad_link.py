"""`lichen bench channel --bad-link`: a deployed federation between two namespaces whose packets are late and lost, and counted cuts."""

from __future__ import annotations

from typing import Any

import pytest

from lichen.simulations.benchmarks.bad_link import bench_cuts, bench_round, told
from lichen.simulations.benchmarks.packet_link import Conditions, packet_link


def finished(conditions: Conditions, rounds: int) -> dict[str, Any]:
    try:
        with packet_link(conditions):
            pass
    except OSError as error:
        pytest.skip(f"this machine can't have such a link: {error}")
    return bench_round(conditions, rounds)


@pytest.mark.long
def test_a_federation_finishes_a_round_over_packets_that_are_lost() -> None:
    found = finished(Conditions(rate=1e6, delay=0.05, loss=0.05), 1)
    assert found["lost"] > 0
    assert found["link_up"] > found["up"] > 10_000
    assert found["link_down"] > found["down"] > 10_000
    assert found["round_s"] < 30


@pytest.mark.long
def test_a_federation_finishes_rounds_at_64_kbit_and_500_ms_with_loss() -> None:
    found = finished(Conditions(), 2)
    assert found["round_s"] < 60
    assert "64 kbit/s" in told(Conditions(), found, bench_cuts(2, 100))


@pytest.mark.long
def test_a_cut_costs_what_was_on_its_way() -> None:
    found = bench_cuts(4, 400)
    assert found["uncut"] < 1.1 * found["payload"]
    assert 0 < found["again"] < 60_000
    assert "not measured, no namespaces" in told(Conditions(), "no namespaces", found)
