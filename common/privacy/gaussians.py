"""Standard Gaussians from a cipher's keystream at a few nanoseconds each, and a thread that draws them ahead."""

from __future__ import annotations

import math
import os
import threading

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

PAIRS = 1 << 15
"""Pairs made at once: what is worked on stays in a core's cache, and calls are few, between which threads wait for each other."""
AHEAD_LIMIT = 1 << 25
"""Most numbers that are kept ready: 128 MiB."""
STEP = 2.0**-27
"""Numbers that are kept ready are whole multiples of this; the largest, 8.57, still fits in 32 bits."""

_RADIUS_BYTES, _ANGLE_BYTES = 8 * PAIRS, 4 * PAIRS
_AES_BLOCK = 16


class Gaussians:
    """Gaussians by Box and Muller (1958) in 64-bit floats, from AES-256-CTR under a key from the operating system. For one thread.

    A radius has 53 random bits, so draws reach 8.57 standard deviations, and an angle has 32. The float64 arithmetic is not an
    exact sampler. What rests on these draws rounds its sums to a grid (see `NoisyOptimizer`): at a distance of one standard deviation
    a pair's square of the grid, 2^-15 wide, is crossed by 10^4 angles and 10^11 radii, so its probability is that of real numbers.
    """

    def __init__(self) -> None:
        self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
        self._zeros = bytes(_RADIUS_BYTES + _ANGLE_BYTES)
        bits = bytearray(len(self._zeros) + _AES_BLOCK - 1)
        self._bits = bits
        self._radius_bits = torch.frombuffer(bits, dtype=torch.int64, count=PAIRS)
        self._angle_bits = torch.frombuffer(bits, dtype=torch.int32, count=PAIRS, offset=_RADIUS_BYTES)
        self._radius, self._angle = torch.empty(2, PAIRS, dtype=torch.float64)

    def keystream(self, count: int) -> bytes:
        """So many random bytes, which nobody gets again."""
        return self._stream.update(bytes(count))

    def fill(self, values: torch.Tensor, std: float) -> None:
        """Overwrite float64 values, shape (N,), with Gaussians of mean 0."""
        for start in range(0, len(values), 2 * PAIRS):
            self._fill(values[start : start + 2 * PAIRS], std)

    def _fill(self, values: torch.Tensor, std: float) -> None:
        pairs = (len(values) + 1) // 2
        if pairs == PAIRS:
            self._stream.update_into(self._zeros, self._bits)
        else:  # short ones: radii and angles still lie where the views are
            zeros = memoryview(self._zeros)
            self._stream.update_into(zeros[: 8 * pairs], self._bits)
            self._stream.update_into(zeros[: 4 * pairs], memoryview(self._bits)[_RADIUS_BYTES:])
        radius, angle = self._radius[:pairs], self._angle[:pairs]
        # 53 bits with a sign, times 2^-53, plus a half and one step: uniform on (0, 1], exact, and its logarithm is finite
        radius.copy_(self._radius_bits[:pairs].bitwise_right_shift_(11))
        radius.add_(2.0**52 + 1).mul_(2.0**-53).log_().mul_(-2.0 * std * std).sqrt_()
        angle.copy_(self._angle_bits[:pairs]).mul_(math.tau * 2.0**-32)
        torch.cos(angle, out=values[:pairs]).mul_(radius)
        rest = len(values) - pairs
        torch.sin(angle[:rest], out=values[pairs:]).mul_(radius[:rest])


class Ahead:
    """A thread that keeps Gaussians ready in a ring, under a key of its own. The cipher and torch let other threads run meanwhile.

    It fills the ring when that is nearly empty, which is after the step that it was for: drawing during a step made that slower.
    A number is rounded to the nearest multiple of `STEP`: over d weights that moves the noise by √d·2^-28 standard deviations at most.

    Args:
        count: numbers to keep ready at least, in whole blocks of `2 * PAIRS`.
    """

    def __init__(self, count: int) -> None:
        self._block = 2 * PAIRS
        self._ring = torch.empty((-(-count // self._block) + 1) * self._block, dtype=torch.int32)
        self._made = self._taken = 0  # numbers since the start; what lies between them is ready, and only its side moves each
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="lichen-noise", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Numbers that it keeps ready."""
        return len(self._ring)

    def take(self, values: torch.Tensor, std: float) -> int:
        """Fill float64 values, shape (N,), from the front as far as numbers are ready; how many those are. Each is taken once."""
        filled = 0
        while filled < len(values) and (ready := self._made - self._taken):
            start = self._taken % len(self._ring)
            count = min(ready, len(values) - filled, len(self._ring) - start)
            values[filled : filled + count].copy_(self._ring[start : start + count]).mul_(STEP * std)
            with self._changed:  # only now may they be overwritten
                self._taken += count
                if self._low():
                    self._changed.notify()
            filled += count
        return filled

    def close(self) -> None:
        """End the thread; nothing is ready any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not threading.current_thread():  # which may be the one that collects what nobody needs any more
            self._thread.join()
        self._taken = self._made

    def _run(self) -> None:
        gaussians, made = Gaussians(), torch.empty(self._block, dtype=torch.float64)
        while not self._closed:
            gaussians.fill(made, 1 / STEP)
            start = self._made % len(self._ring)
            self._ring[start : start + self._block].copy_(made.round_())
            with self._changed:
                self._made += self._block
                if self._made - self._taken > len(self._ring) - self._block:  # no room for another
                    self._changed.wait_for(lambda: self._closed or self._low())

    def _low(self) -> bool:
        return self._made - self._taken < self._block
