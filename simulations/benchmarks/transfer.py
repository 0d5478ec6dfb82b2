"""`lichen bench transfer`: what each codec makes of an update: bits a parameter, error, and speed on one core.

Bits, with all headers, and errors are of a LoRA update such as the demo's; speed is that of a large one, written to a file, and added from
there (memory-mapped) to a sum, each part of it in 64 bits. Its digest and its values' checks are in the time of the adding.
"""

from __future__ import annotations

import mmap
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from lichen.common.codec.codec import Codec, Payload, placed, sums
from lichen.common.codec.layout import Layout
from lichen.common.codec.registry import CODECS
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State
from lichen.simulations.benchmarks.memory import forget_peak, resident

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("eden", {"bits": bits}) for bits in (1, 2, 3, 4, 6, 8)),
    ("blockwise", {"bits": 4}),
    ("blockwise", {"bits": 8}),
    ("topk", {"share": 0.1}),
    ("fp16", {}),
)
TARGETS = {"bits": 4.1, "nmse": 0.0105, "encode": 50.0, "add": 120.0}
"""Of EDEN at 4 bits: bits a parameter and error at most, million parameters a second at least."""
SPREAD = 0.8
"""Of the logarithms of the heavy-tailed update's scales: its kurtosis is 3·exp(4·.8²) = 39, as of a full update by SGD."""
_MILLION = 1_000_000


def bench_transfer(parameters: int = 1 << 24, repeats: int = 3) -> Iterator[dict[str, Any]]:
    """Measure each codec, on one thread.

    Args:
        parameters: of the large update.
        repeats: the best of so many is told, in CPU time.

    Yields:
        ``codec``, ``bits`` a parameter, ``nmse`` (‖decoded − x‖²/‖x‖²) where values are normally distributed and ``heavy_nmse`` where they
        are heavy-tailed; million parameters a second as ``encode`` and ``add``; ``peak_mb``, memory above the update and the sum in 10^6
        bytes, the file's pages included (Linux); for EDEN at 4 bits, the ``targets``.

    Raises:
        LichenError: CHECK_FAILED, if the sum is not that of the update that is decoded whole.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        small, heavy = _lora(heavy=False), _lora(heavy=True)
        large = _large(parameters)
        for name, options in CASES:
            codec = CODECS[name](**options)
            count = Layout.of(small).count
            found = {"codec": "-".join([name, *map(str, options.values())]), "bits": len(codec.encoded(small)) * 8 / count}
            found |= {"nmse": _error(codec, small), "heavy_nmse": _error(codec, heavy), **_speed(codec, large, repeats)}
            yield found | ({"targets": TARGETS} if found["codec"] == "eden-4" else {})
    finally:
        torch.set_num_threads(threads)


def _lora(*, heavy: bool) -> State:
    """The demo's shapes: rank 8 at the query and value layers of 6 layers of width 384, and a head for 8 labels; 76,808 parameters."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layer.{layer}.{part}.{factor}": shape for layer in range(6) for part in "qv" for factor, shape in _FACTORS.items()}
    shapes |= {"head.weight": (8, 384), "head.bias": (1, 8)}
    found = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        values = torch.randn(shape, generator=generator) * 0.01 * (1 + number % 3)  # factors move by different amounts
        found[name] = values * torch.exp(SPREAD * torch.randn(shape, generator=generator)) if heavy else values
    return found


_FACTORS = {"A": (8, 384), "B": (384, 8)}


def _large(count: int) -> State:
    """Tensors as a Transformer has them, none of a length that blocks fit."""
    generator = torch.Generator().manual_seed(1)
    sizes = [2 * count // 5]
    while (left := count - sum(sizes)) > 0:
        sizes.append(min(left, 590_001))
    return {f"tensor.{number}": torch.randn(size, generator=generator) for number, size in enumerate(sizes)}


def _flat(update: State) -> torch.Tensor:
    return torch.cat([update[name].reshape(-1) for name, _, _ in Layout.of(update).tensors])


def _error(codec: Codec, update: State) -> float:
    layout, exact = Layout.of(update), _flat(update)
    found = _flat(codec.open(codec.encoded(update, seed=1), layout).decoded(layout))
    return float((found - exact).square().sum() / exact.square().sum())


def _speed(codec: Codec, update: State, repeats: int) -> dict[str, float]:
    layout = Layout.of(update)
    total = torch.zeros(layout.count).fill_(0)  # its pages are there now
    encode, add = [], []
    start = resident("VmRSS")
    forget_peak()
    for repeat in range(repeats):
        with tempfile.TemporaryFile() as file:
            began = time.process_time()
            codec.encode(update, file, seed=repeat)
            file.flush()
            encode.append(time.process_time() - began)
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            began = time.process_time()
            payload = codec.open(view, layout)
            _add(payload, total)
            add.append(time.process_time() - began)
    peak = resident("VmHWM") - start
    last = torch.zeros(layout.count)
    _add(payload, last)
    if not torch.equal(last, _flat(payload.decoded(layout))):
        raise LichenError(Code.CHECK_FAILED, f"{codec.name}: what is added is not what is decoded", where="lichen bench transfer")
    return {"encode": layout.count / min(encode) / _MILLION, "add": layout.count / min(add) / _MILLION, "peak_mb": peak / _MILLION}


def _add(payload: Payload, total: torch.Tensor) -> None:
    """As the coordinator adds."""
    for part, values in sums([(payload, 1.0)]):
        for view, piece in placed(payload, total, part, values):
            view.copy_(piece.add_(view.to(torch.float64)))
