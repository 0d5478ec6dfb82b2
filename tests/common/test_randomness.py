"""Where noise and draws come from: moments, distribution, independence, and the statistics of Poisson sampling."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy import stats

from lichen.common.privacy import randomness
from lichen.common.privacy.gaussians import AHEAD_LIMIT, PAIRS, STEP, Ahead, Gaussians
from lichen.common.privacy.randomness import RandomSource, SecretSource, SeededSource, poisson_sample


def ahead() -> SecretSource:
    """A secret source whose first numbers come from the ring, and later ones from both."""
    source = SecretSource()
    source.draw_ahead(3 * PAIRS)
    return source


SOURCES = [SecretSource, ahead, lambda: SeededSource("test", 1)]
# Each statistical test fails by chance about once in 10,000 runs where the draws are secret.
P = 1e-4


@pytest.fixture(autouse=True)
def _a_core_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "_cores", lambda: torch.get_num_threads() + 1)


@pytest.fixture(params=SOURCES, ids=["secret", "ahead", "seeded"])
def source(request: pytest.FixtureRequest) -> Iterator[RandomSource]:
    made: RandomSource = request.param()
    yield made
    if isinstance(made, SecretSource):
        made.close()


def test_normal_has_its_distribution(source: RandomSource) -> None:
    draws = source.normal((400, 501), 3.0)  # an odd number: Box and Muller make pairs
    assert draws.dtype == torch.float64
    assert draws.shape == (400, 501)
    values = draws.flatten().numpy() / 3.0
    n = values.size
    assert abs(values.mean()) < 4 / n**0.5
    assert abs(values.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((values**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((values**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert stats.kstest(values, "norm").pvalue > P
    # both members of a Box-Muller pair, and neighbours, are uncorrelated, squares too
    for left, right in ((values[: n // 2], values[n // 2 : 2 * (n // 2)]), (values[:-1], values[1:])):
        for power in (1, 2):
            assert abs(np.corrcoef(left**power, right**power)[0, 1]) < 4.5 / len(left) ** 0.5


def test_the_tail_reaches_as_far_as_it_should(source: RandomSource) -> None:
    values = source.normal((2_000_000,), 1.0).numpy()
    beyond = int((np.abs(values) > 4).sum())
    expected = 2_000_000 * 2 * stats.norm.sf(4)
    assert stats.poisson.cdf(beyond, expected) > P
    assert stats.poisson.sf(beyond - 1, expected) > P
    assert np.isfinite(values).all()


def test_uniform_is_uniform_in_the_half_open_interval(source: RandomSource) -> None:
    values = source.uniform(200_000).numpy()
    assert values.dtype == np.float64
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > P
    low_bits = (values * 2.0**53).astype(np.uint64) % 256
    assert stats.chisquare(np.bincount(low_bits.astype(np.int64), minlength=256)).pvalue > P


def test_secret_sources_share_nothing() -> None:
    one, other = SecretSource(), SecretSource()
    assert SecretSource.secret
    left, right = one.normal((50_000,), 1.0), other.normal((50_000,), 1.0)
    assert not torch.equal(left, right)
    assert abs(float(torch.corrcoef(torch.stack([left, right]))[0, 1])) < 4.5 / 50_000**0.5
    assert not torch.equal(one.normal((8,), 1.0), one.normal((8,), 1.0))
    # torch's seed, which a plan sets, has no say
    torch.manual_seed(0)
    first = SecretSource().normal((8,), 1.0)
    torch.manual_seed(0)
    assert not torch.equal(first, SecretSource().normal((8,), 1.0))


def test_the_key_comes_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of it: with a known key, one recovered draw would give the place in the stream, hence all others."""
    asked: list[int] = []

    def fixed(count: int) -> bytes:
        asked.append(count)
        return bytes(count)

    monkeypatch.setattr("os.urandom", fixed)
    with_known_key = SecretSource().uniform(4)
    assert sum(asked) >= 32
    draws = [with_known_key]
    for index in range(len(asked)):
        calls = iter(range(len(asked)))
        monkeypatch.setattr("os.urandom", lambda count, calls=calls, index=index: bytes([next(calls) == index]) * count)
        draws.append(SecretSource().uniform(4))
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws), "each part of the key matters"
    assert max(asked) == 32


def test_a_seeded_source_repeats_and_says_that_it_is_not_secret() -> None:
    assert not SeededSource("a").secret
    assert torch.equal(SeededSource("a", 1).normal((9,), 2.0), SeededSource("a", 1).normal((9,), 2.0))
    assert torch.equal(SeededSource("a", 1).uniform(9), SeededSource("a", 1).uniform(9))
    assert not torch.equal(SeededSource("a", 1).uniform(9), SeededSource("a", 2).uniform(9))
    assert not torch.equal(SeededSource("a", 11).uniform(9), SeededSource("a1", 1).uniform(9))


UNITS, RATE, DRAWS = 40, 0.3, 5_000
FALSE_ALARM = 1e-8
"""Of each statistic of the sampler: where the draws are secret, one run in ten million fails by chance."""


def p_values(sample: Callable[[], list[int]]) -> dict[str, float]:
    """Chi-square statistics of many draws: of each unit, of a draw's size, of pairs of units, and of a unit's next draw."""
    included = np.zeros((DRAWS, UNITS), dtype=bool)
    for row in included:
        row[sample()] = True
    centred = (included - RATE) / (RATE * (1 - RATE)) ** 0.5
    pairs = (centred.T @ centred / DRAWS**0.5)[np.triu_indices(UNITS, 1)]
    following = (centred[:-1] * centred[1:]).sum(0) / (DRAWS - 1) ** 0.5
    sizes = np.bincount(included.sum(1), minlength=UNITS + 1)
    expected = DRAWS * stats.binom.pmf(np.arange(UNITS + 1), UNITS, RATE)
    kept = expected > 5
    observed = [*sizes[kept], sizes[~kept].sum()]
    return {
        "marginal": float(stats.chi2.sf((centred.sum(0) ** 2 / DRAWS).sum(), UNITS)),
        "size": float(stats.chisquare(observed, [*expected[kept], expected[~kept].sum()]).pvalue),
        "pairwise": float(stats.chi2.sf((pairs**2).sum(), len(pairs))),
        "next": float(stats.chi2.sf((following**2).sum(), UNITS)),
    }


def test_poisson_inclusion_is_binomial_and_independent(source: RandomSource) -> None:
    found = p_values(lambda: poisson_sample(UNITS, RATE, source))
    assert min(found.values()) > FALSE_ALARM, found


@pytest.mark.parametrize(
    ("sampler", "told_by"),
    [
        ("a batch of fixed size", "size"),
        ("neighbours together", "pairwise"),
        ("shuffled passes", "next"),
        ("a rate one tenth too small", "marginal"),
    ],
)
def test_the_statistics_tell_other_samplers_apart(sampler: str, told_by: str) -> None:
    generator = np.random.default_rng(0)
    queue: list[int] = []

    def sample() -> list[int]:
        if sampler == "a batch of fixed size":
            return generator.choice(UNITS, int(RATE * UNITS), replace=False).tolist()
        if sampler == "neighbours together":
            heads = np.repeat(generator.random(UNITS // 2) < RATE, 2)
        elif sampler == "a rate one tenth too small":
            heads = generator.random(UNITS) < 0.9 * RATE
        else:
            if len(queue) < int(RATE * UNITS):
                queue[:] = generator.permutation(UNITS).tolist()
            heads = np.isin(np.arange(UNITS), queue[: int(RATE * UNITS)])
            del queue[: int(RATE * UNITS)]
        return np.flatnonzero(heads).tolist()

    assert p_values(sample)[told_by] < FALSE_ALARM


def test_poisson_sampling_at_its_edges(source: RandomSource) -> None:
    assert poisson_sample(5, 1.0, source) == [0, 1, 2, 3, 4]
    assert poisson_sample(0, 0.5, source) == []
    assert poisson_sample(1000, 1e-12, source) == []


# --- drawn ahead ---------------------------------------------------------------------------------------------------------------------


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def noise_threads() -> Callable[[], int]:
    """How many more threads draw ahead than at the test's start: other tests' sources may live on."""
    gc.collect()

    def count() -> int:
        return sum(thread.name == "lichen-noise" for thread in threading.enumerate())

    before = count()
    return lambda: count() - before


class Counting(Gaussians):
    """Makes 1, 2, 3, … steps: what is handed out twice or left out shows."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 1

    def fill(self, values: torch.Tensor, std: float) -> None:
        values.copy_(torch.arange(self._next, self._next + len(values)))
        self._next += len(values)


def test_every_number_drawn_ahead_is_handed_out_once_and_none_is_made_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lichen.common.privacy.gaussians.Gaussians", Counting)
    ring = Ahead(5 * PAIRS)
    assert len(ring) == 8 * PAIRS, "three whole blocks, and one to write to"
    wait_for(lambda: ring._made == len(ring))
    generator, seen = np.random.default_rng(0), []
    while sum(map(len, seen)) < 40 * PAIRS:
        wait_for(lambda: ring._made > ring._taken)
        assert ring._made - ring._taken <= len(ring)
        values = torch.zeros(int(generator.integers(1, 3 * PAIRS)), dtype=torch.float64)
        filled = ring.take(values, 1 / STEP)
        assert not values[filled:].any()
        seen.append(values[:filled])
    everything = torch.cat(seen)
    assert torch.equal(everything, torch.arange(1, len(everything) + 1).double())
    ring.close()
    assert ring.take(values, 1.0) == 0


def test_it_draws_again_only_when_little_is_left() -> None:
    """While a step takes its numbers, a thread that made others would hold it up."""
    ring = Ahead(4 * PAIRS)
    wait_for(lambda: ring._made == len(ring))
    taken = torch.zeros(len(ring) - 2 * PAIRS, dtype=torch.float64)
    assert ring.take(taken, 1.0) == len(taken)
    time.sleep(0.2)
    assert ring._made == len(ring), "a whole block is left"
    ring.take(taken[:1], 1.0)
    wait_for(lambda: ring._made == 2 * len(ring) - 2 * PAIRS)
    ring.close()


class Extreme(Gaussians):
    """The largest draws that 53 bits of radius allow, and some between two steps."""

    draws = torch.tensor([1.0, -1.0]).double() * (2 * 53 * np.log(2)) ** 0.5
    between = torch.tensor([0.75, -0.75]).double() * STEP

    def fill(self, values: torch.Tensor, std: float) -> None:
        values.copy_(torch.cat([self.draws, self.between]).repeat(len(values) // 4)).mul_(std)


def test_the_largest_draws_fit_the_ring_and_the_others_are_rounded_to_the_nearest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lichen.common.privacy.gaussians.Gaussians", Extreme)
    ring = Ahead(4)
    wait_for(lambda: ring._made > 0)
    values = torch.zeros(4, dtype=torch.float64)
    assert ring.take(values, 1.0) == 4
    ring.close()
    assert torch.allclose(values[:2], Extreme.draws, rtol=0, atol=STEP / 2)
    assert values[2:].tolist() == [STEP, -STEP]


def test_what_is_ready_is_bounded_and_a_larger_wish_is_met(noise_threads: Callable[[], int]) -> None:
    source = SecretSource()
    source.draw_ahead(10)
    first = source._ahead
    source.draw_ahead(5)
    assert source._ahead is first
    source.draw_ahead(10**9)
    assert source._ahead is not None
    assert AHEAD_LIMIT <= len(source._ahead) <= AHEAD_LIMIT + 2 * PAIRS
    assert noise_threads() == 1
    source.close()
    assert noise_threads() == 0
    assert torch.isfinite(source.normal((9,), 1.0)).all(), "draws go on"


def test_no_thread_where_torch_has_every_core(monkeypatch: pytest.MonkeyPatch, noise_threads: Callable[[], int]) -> None:
    monkeypatch.setattr(randomness, "_cores", torch.get_num_threads)
    source = SecretSource()
    source.draw_ahead(100)
    assert noise_threads() == 0


def test_a_source_that_is_forgotten_ends_its_thread(noise_threads: Callable[[], int]) -> None:
    source = SecretSource()
    source.draw_ahead(100)
    assert noise_threads() == 1
    del source
    gc.collect()
    wait_for(lambda: noise_threads() == 0)


def test_a_fork_draws_other_numbers() -> None:
    """Parent and child with one key would add the same noise to two releases: their difference would be bare."""
    source = SecretSource()
    source.draw_ahead(4 * PAIRS)
    wait_for(lambda: source._ahead is not None and source._ahead._made > 0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        values = np.concatenate([source.normal((500,), 1.0).numpy(), source.uniform(500).numpy()])
        os.write(writer, values.tobytes())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        theirs = np.frombuffer(stream.read(), dtype=np.float64)
    assert os.waitpid(child, 0)[1] == 0
    ours = np.concatenate([source.normal((500,), 1.0).numpy(), source.uniform(500).numpy()])
    assert len(theirs) == 1000
    assert not np.isin(theirs, ours).any()
    source.close()


def test_threads_that_share_a_source_share_no_number() -> None:
    source = SecretSource()
    source.draw_ahead(4 * PAIRS)
    found: list[np.ndarray] = []

    def draw() -> None:
        for _ in range(50):
            found.append(source.normal((1000,), 1.0).numpy())

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = np.concatenate(found)
    # on a grid of 2^-27 some 40 are equal by chance; two threads with the same numbers would share a thousand at once
    assert len(everything) == 200_000
    assert len(np.unique(everything)) > 199_900
    source.close()
