"""A ridge regression from sums: exact where they are, and steady where there is noise on them, however much."""

from __future__ import annotations

import pytest
import torch

from lichen.common.continual.ridge import NOISE_SHARE, solved

ROWS, WIDTH, CLASSES = 600, 24, 4


@pytest.fixture
def sums() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of length 1 about four centres, their classes, and both sums."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, WIDTH, dtype=torch.float64, generator=generator)
    classes = torch.arange(ROWS) % CLASSES
    rows = torch.nn.functional.normalize(centres[classes] + 1.5 * torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator), dim=1)
    return rows, classes, rows.T @ rows, torch.eye(CLASSES, dtype=torch.float64)[classes].T @ rows


def noise(size: float, seed: int) -> torch.Tensor:
    drawn = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).triu()
    return size * (drawn + drawn.triu(1).T)


def test_without_noise_it_is_the_plain_one(sums: tuple[torch.Tensor, ...]) -> None:
    _, _, gram, cross = sums
    expected = torch.linalg.solve(gram + 0.5 * torch.eye(WIDTH, dtype=torch.float64), cross.T).T
    torch.testing.assert_close(solved(gram, cross, 0.5), expected)


def test_with_noise_lambda_grows_by_its_size(sums: tuple[torch.Tensor, ...]) -> None:
    _, _, gram, cross = sums
    noisy = gram + noise(20, 1)
    values, vectors = torch.linalg.eigh(noisy)
    assert values[0] < -10
    expected = cross @ vectors @ torch.diag(1 / (values.clamp(min=0) + 0.5 - NOISE_SHARE * values[0])) @ vectors.T
    torch.testing.assert_close(solved(noisy, cross, 0.5), expected)


@pytest.mark.parametrize("size", [2.0, 10.0, 50.0])
def test_so_it_tells_more_rows_right_than_with_a_fixed_one(sums: tuple[torch.Tensor, ...], size: float) -> None:
    rows, classes, gram, cross = sums

    def right(weight: torch.Tensor) -> float:
        return float(((rows @ weight.T).argmax(1) == classes).double().mean())

    def fixed(gram: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(gram)
        return cross @ (vectors / (values.clamp(min=0) + 1.0)) @ vectors.T

    found = [(right(solved(gram + noise(size, seed), cross, 1.0)), right(fixed(gram + noise(size, seed)))) for seed in range(8)]
    assert sum(ours for ours, _ in found) > sum(theirs for _, theirs in found)
