"""Where random numbers come from: the operating system's generator in earnest, a seed where a simulation must repeat."""

from __future__ import annotations

import hashlib
import math
import os
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

GRID = 2.0**-15
"""Step of noised sums, over the noise's standard deviation (rounded down to a power of two)."""


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
    """An AES-256-CTR keystream under a key from the operating system; Gaussians by Box and Muller (1958) in 64-bit floats.

    torch's own generators are not used for noise: their CPU engine keeps 32 bits of its seed, which can be searched.
    """

    secret = True

    def __init__(self) -> None:
        self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

    def uniform(self, count: int) -> torch.Tensor:
        """Shape (count,), float64, uniform on [0, 1): 53 random bits each."""
        bits = np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)
        return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def normal(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
        """Gaussian with mean 0, float64."""
        count = math.prod(shape)
        pairs = (count + 1) // 2
        draws = self.uniform(2 * pairs)
        # 1 - u lies in (0, 1], so the logarithm is finite
        radius = torch.sqrt(-2.0 * torch.log1p(-draws[:pairs])) * std
        angle = 2 * math.pi * draws[pairs:]
        values = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
        return values[:count].reshape(shape)


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


def noised(total: torch.Tensor, std: float, source: RandomSource) -> torch.Tensor:
    """A sum plus Gaussian noise, in 64-bit floats, rounded to a grid.

    The low bits of a float tell which values were added (Mironov 2012); a grid that is coarse beside the sum's own rounding and fine
    beside the noise has no such bits.

    Args:
        total: any shape.
        std: the noise's standard deviation, above 0.
        source: of the noise.
    """
    grid = GRID * 2.0 ** math.floor(math.log2(std))
    return source.normal(tuple(total.shape), std).add_(total).mul_(1 / grid).round_().mul_(grid)
