"""Where random numbers come from: the operating system's generator in earnest, a seed where a simulation must repeat."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from lichen.common.device import sent
from lichen.common.privacy.gaussians import AHEAD_LIMIT, PAIRS, Ahead, Gaussians

GRID = 2.0**-15
"""Step of noised sums, over the noise's standard deviation (rounded down to a power of two)."""
_NOISED_AT_ONCE = 2 * PAIRS
"""Numbers that are noised together: they stay in the cache."""
_SENT_AT_ONCE = 1 << 22
"""Numbers that travel to a device together."""
_WITHOUT_DOUBLES = {"mps"}
"""Kinds of devices that have no 64-bit floats."""


class RandomSource(Protocol):
    """Draws for sampling and noise."""

    secret: bool
    """Whether nobody else can predict the draws, without which there is no privacy."""

    def uniform(self, count: int) -> torch.Tensor:
        """Shape (count,), float64, uniform on [0, 1)."""
        ...

    def normal(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
        """Gaussian with mean 0, float64."""
        ...


class SecretSource:
    """An AES-256-CTR keystream under a key from the operating system; Gaussians of it, drawn ahead on another core where one is free.

    torch's own generators are not used for noise: their CPU engine keeps 32 bits of its seed, which can be searched. Every number is
    handed out once: to one caller, in one process. A fork has keys of its own.
    """

    secret = True

    def __init__(self) -> None:
        self._start()
        _alive.add(self)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._own = Gaussians()
        self._ahead: Ahead | None = None
        self._finalizer: weakref.finalize[..., SecretSource] | None = None

    def uniform(self, count: int) -> torch.Tensor:
        """Shape (count,), float64, uniform on [0, 1): 53 random bits each."""
        with self._lock:
            bits = np.frombuffer(self._own.keystream(8 * count), dtype=np.uint64)
        return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def normal(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
        """Gaussian with mean 0, float64."""
        values = torch.empty(math.prod(shape), dtype=torch.float64)
        with self._lock:
            ready = self._ahead.take(values, std) if self._ahead else 0
            self._own.fill(values[ready:], std)
        return values.view(shape)

    def draw_ahead(self, count: int, *, busy: int | None = None) -> None:
        """Keep so many Gaussians ready, at most `AHEAD_LIMIT`, if there is a core that torch does not use.

        Args:
            count: how many.
            busy: cores that are in use; by default one for each of torch's threads.
        """
        count = min(count, AHEAD_LIMIT)
        if _cores() <= (busy or torch.get_num_threads()) or (self._ahead and len(self._ahead) >= count):
            return
        self.close()
        with self._lock:
            self._ahead = Ahead(count)
            self._finalizer = weakref.finalize(self, self._ahead.close)  # at exit at the latest

    def close(self) -> None:
        """End the thread that draws ahead; what it had ready is dropped. Draws go on without it."""
        with self._lock:
            if self._finalizer:
                self._finalizer()
            self._ahead = self._finalizer = None


_alive: weakref.WeakSet[SecretSource] = weakref.WeakSet()


def _after_fork() -> None:
    # parent and child would hand out the same numbers, and the child has no thread
    for source in list(_alive):
        if source._finalizer:
            source._finalizer.detach()  # it would wait for a lock that the parent's thread may hold
        source._start()


os.register_at_fork(after_in_child=_after_fork)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class SeededSource:
    """Draws that follow from a key: for simulations and tests. Whoever knows the key can take the noise off: not private."""

    secret = False

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
        self._generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))

    def uniform(self, count: int) -> torch.Tensor:
        """Shape (count,), float64, uniform on [0, 1)."""
        return torch.from_numpy(self._generator.random(count))

    def normal(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
        """Gaussian with mean 0, float64 (of float32 draws, which are faster)."""
        draws = self._generator.standard_normal(math.prod(shape), dtype=np.float32) * np.float32(std)
        return torch.from_numpy(draws.astype(np.float64)).reshape(shape)


def poisson_sample(units: int, rate: float, source: RandomSource) -> list[int]:
    """Indices of the units that are in a step: each is, with probability ``rate``, whatever the others are."""
    return torch.nonzero(source.uniform(units) < rate).flatten().tolist()


def add_noise(total: torch.Tensor, std: float, source: RandomSource, *, over: float = 1.0) -> torch.Tensor:
    """Add Gaussian noise to a sum, in place: in 64-bit floats and rounded to a grid.

    The low bits of a float tell which values were added (Mironov 2012); a grid that is coarse beside the sum's own rounding and fine
    beside the noise has no such bits.

    Args:
        total: any shape, contiguous; a copy of it would cost as much as the noise.
        std: the noise's standard deviation, above 0.
        source: of the noise.
        over: what the noised sum is divided by at the end.

    Returns:
        ``total``.
    """
    grid = _grid(std)
    for part in torch.split(total.view(-1), _NOISED_AT_ONCE):
        # in steps of the grid, which as a power of two changes no digit
        noisy = source.normal(tuple(part.shape), std / grid).add_(part, alpha=1 / grid).round_()
        part.copy_(noisy.mul_(grid / over))
    return total


def _grid(std: float) -> float:
    return GRID * 2.0 ** math.floor(math.log2(std))


class Noise(NamedTuple):
    """Of one sum: the arguments of `add_noise`."""

    std: float
    source: RandomSource
    over: float = 1.0


def add_noises(totals: Sequence[torch.Tensor], noises: Sequence[Noise]) -> None:
    """`add_noise` to several sums, each of several tensors, in place: the same draws in the same order, and the same sums.

    For a GPU too the numbers come from their source, on the CPU; they travel, and are added there, in few calls.

    Args:
        totals: the tensors, (S, …) each, contiguous; a sum is what one place of all of them has.
        noises: of each sum, S.
    """
    device = totals[0].device
    if device.type == "cpu":
        for place, noise in enumerate(noises):
            for total in totals:
                add_noise(total[place], noise.std, noise.source, over=noise.over)
    elif device.type in _WITHOUT_DOUBLES:
        here = [total.cpu() for total in totals]
        add_noises(here, noises)
        for total, found in zip(totals, here, strict=True):
            total.copy_(found)
    else:
        part: list[torch.Tensor] = []
        for total in totals:
            if part and sum(map(torch.numel, part)) + total.numel() > _SENT_AT_ONCE:
                _add_there(part, noises)
                part = []
            part.append(total.view(len(noises), -1))
        _add_there(part, noises)


def _add_there(totals: Sequence[torch.Tensor], noises: Sequence[Noise]) -> None:
    """Add noise to some tensors of a GPU, (S, N) each, in place."""
    flat, sizes = torch.cat(list(totals), 1), [total.shape[1] for total in totals]
    drawn = torch.empty(flat.shape, dtype=torch.float64, pin_memory=flat.device.type == "cuda")
    grids = [_grid(noise.std) for noise in noises]
    for row, noise, grid in zip(drawn, noises, grids, strict=True):  # one after another: threads took longer
        for part in (part for piece in torch.split(row, sizes) for part in torch.split(piece, _NOISED_AT_ONCE)):
            part.copy_(noise.source.normal(tuple(part.shape), noise.std / grid))
    steps = torch.tensor([(grid, grid / noise.over) for noise, grid in zip(noises, grids, strict=True)], dtype=torch.float64)
    grid_there, step_there = sent(steps, flat.device).unsqueeze(1).unbind(2)
    noisy = sent(drawn, flat.device).add_(flat / grid_there).round_().mul_(step_there).to(flat.dtype)
    torch._foreach_copy_(list(totals), list(torch.split(noisy, sizes, 1)))
