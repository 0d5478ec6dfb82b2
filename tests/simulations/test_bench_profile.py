"""The memory model against a real training in a fresh process."""

from __future__ import annotations

import pytest

from lichen.simulations.benchmarks.profile import MINILM, WITHIN, bench_profile


@pytest.mark.long
@pytest.mark.parametrize(("adapter", "size"), [("lora", (16, 128)), ("full", (4, 64))])
def test_a_peak_is_predicted_within_what_is_promised(adapter: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the libraries LoRA is mostly activations here, all weights mostly state."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for row in bench_profile(MINILM, [adapter], [size]):
        assert row["measured_mb"] > 800
        assert abs(row["ratio"] - 1) < WITHIN, row
