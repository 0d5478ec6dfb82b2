"""The bench of populations: clients that are not asked cost next to nothing; and memory of a tree of processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lichen.simulations.benchmarks.memory import of_trees, resident
from lichen.simulations.benchmarks.scale import bench_scale


def test_memory_of_a_tree_counts_shared_pages_once_and_ends_with_it() -> None:
    child = "import sys; held = bytearray(60 << 20); print(flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        assert 60 << 20 < of_trees([running.pid]) < 120 << 20
        running.communicate()
    assert of_trees([running.pid]) == 0
    assert 0 < of_trees([os.getpid()]) < 2 * resident("VmRSS")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_population_that_is_not_asked_takes_no_memory() -> None:
    few, many = bench_scale((20, 20_000), 4, 1)
    assert (few["homes"], many["homes"]) == (4, 4)
    assert many["over"] <= many["target"] == 1.2
    assert 0 < few["first_round_s"] <= few["seconds"]
