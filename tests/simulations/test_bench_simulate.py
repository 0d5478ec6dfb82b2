"""The benches of training: what is compared gives equal weights, and the ratios lie where a broken saving would not."""

from __future__ import annotations

import pytest

from lichen.simulations.benchmarks.simulate import bench_simulate
from lichen.simulations.benchmarks.step import bench_step

pytestmark = pytest.mark.long


@pytest.mark.timeout(1200)
def test_the_simulation_and_a_plain_loop_end_with_the_same_weights() -> None:
    rows = list(bench_simulate(2))
    ours = [row for row in rows if "apart" in row]
    assert {row["what"] for row in ours} == {"lichen, plain", "lichen, lean"}
    assert all(row["apart"] <= 1e-5 for row in ours)
    assert all(row["over"] > 0.7 for row in ours)  # wide: the machine is shared


@pytest.mark.timeout(600)
def test_frozen_layers_that_are_kept_save_time_and_change_nothing() -> None:
    cold, warm, private = bench_step(64, 2)
    assert max(cold["apart"], warm["apart"]) <= 1e-5
    assert warm["ratio"] > 1.4
    assert cold["ratio"] > 1.1
    assert private["ratio"] < 1.4
