"""`lichen bench aggregate`: the mean of many updates that lie in a spool, beside a plain memory copy of as many bytes.

What is timed is the coordinator's own way: payloads are opened by reference, checked against the model, added and divided. The naive loop
beside it is what it replaces: `isfinite`, then one addition in 64 bits, over each update alone.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict

from lichen.common import records
from lichen.common.codec.layout import Layout
from lichen.common.codec.plain import Tensors
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State, check_fits, check_state
from lichen.coordinator.aggregation.fedavg import FedAvg
from lichen.simulations.benchmarks.memory import forget_peak, resident

TARGET = 0.5
"""Of the speed of a memory copy, at least."""
MOST_DISK = 1_600_000_000
"""Bytes of distinct updates on the disk; more updates than that are the same files again."""
DISTINCT = 8
SAMPLES = 1000
_MB = 1_000_000


def bench_aggregate(updates: int = 100, megabytes: int = 100) -> dict[str, Any]:
    """Measure the aggregation, and check its result.

    Args:
        updates: how many; of more than `DISTINCT` some are the same files again, so that the disk and the page cache hold them.
        megabytes: size of each in 10^6 bytes, 32-bit floats.

    Returns:
        GB/s (10^9 bytes of updates a second) as ``gb_s``, ``copy_gb_s`` and ``naive_gb_s``, the first and last over the copy's as
        ``ratio`` and ``naive_ratio``, the ``target`` of the first, torch's ``threads``, and resident memory at its peak above the start
        in 10^6 bytes, the mapped files' pages included, as ``peak_mb`` (Linux).

    Raises:
        LichenError: CHECK_FAILED, if the mean is not that of a sum in 64 bits.
    """
    distinct = max(1, min(updates, DISTINCT, MOST_DISK // (megabytes * _MB)))
    with tempfile.TemporaryDirectory(prefix="lichen-bench-") as name:
        spool = Path(name)
        shapes = _shapes(megabytes * _MB // 4)
        contents = [_update(shapes, seed, spool) for seed in range(distinct)]
        weighted = [(contents[number % distinct], float(100 + number)) for number in range(updates)]
        like = records.get_tensors(contents[0], spool)
        for _ in _updates(weighted[:distinct], spool, like, check_state):
            pass  # now the page cache is warm
        start = resident("VmRSS")
        forget_peak()
        began = time.perf_counter()
        mean = _mean(weighted, spool, like)
        seconds = time.perf_counter() - began
        peak = resident("VmHWM") - start
        _check(mean, weighted, spool)
        copied = _speed(lambda: _copy(updates, megabytes), updates, megabytes)
        few = min(updates, DISTINCT)
        naive = _speed(lambda: _naive(weighted[:few], spool, like), few, megabytes)
    ours = updates * megabytes * _MB / seconds / 1e9
    return {
        "updates": updates,
        "distinct": distinct,
        "megabytes": megabytes,
        "threads": torch.get_num_threads(),
        "gb_s": ours,
        "copy_gb_s": copied,
        "ratio": ours / copied,
        "target": TARGET,
        "naive_gb_s": naive,
        "naive_ratio": naive / copied,
        "peak_mb": peak / _MB,
    }


def told(figures: dict[str, Any]) -> str:
    """The figures, for people."""
    return "\n".join(
        (
            f"{figures['updates']} updates of {figures['megabytes']} MB from a spool ({figures['distinct']} distinct files, read again and"
            f" again), {figures['threads']} torch threads",
            f"aggregation: {figures['gb_s']:.2f} GB/s; memory copy: {figures['copy_gb_s']:.2f} GB/s; ratio {figures['ratio']:.2f}"
            f" (at least {figures['target']:g})",
            f"naive loop: {figures['naive_gb_s']:.2f} GB/s; ratio {figures['naive_ratio']:.2f}",
            f"memory: {figures['peak_mb']:.0f} MB above the start at its peak, mapped files included",
        )
    )


def _shapes(count: int) -> dict[str, tuple[int]]:
    """Tensors as a Transformer has them: an embedding of two fifths, the rest in layers of at most 2.4 MB."""
    shapes = {"embedding": (2 * count // 5,)}
    left = count - 2 * count // 5
    while left:
        shapes[f"layer.{len(shapes)}"] = (min(left, 589_824),)
        left -= min(left, 589_824)
    return shapes


def _update(shapes: dict[str, tuple[int]], seed: int, spool: Path) -> RecordDict:
    generator = torch.Generator().manual_seed(seed)
    content = RecordDict()
    records.put_tensors(content, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, spool)
    return content


def _updates(
    weighted: list[tuple[RecordDict, float]], spool: Path, like: State, check: Callable[[State, State], None]
) -> Iterator[tuple[State, float]]:
    for content, weight in weighted:
        update = records.get_tensors(content, spool)
        check(update, like)
        yield update, weight


def _mean(weighted: list[tuple[RecordDict, float]], spool: Path, like: State) -> State:
    total = FedAvg()
    for update, weight in _updates(weighted, spool, like, check_fits):
        total.add(Tensors(update), weight)
    return Layout.of(like).split(total.mean())


def _naive(weighted: list[tuple[RecordDict, float]], spool: Path, like: State) -> None:
    total: State = {}
    for update, weight in _updates(weighted, spool, like, check_state):
        for name, tensor in update.items():
            if name in total:
                total[name].add_(tensor, alpha=weight)
            else:
                total[name] = tensor.to(torch.float64) * weight


def _copy(times: int, megabytes: int) -> None:
    source, target = torch.ones(megabytes * _MB // 4), torch.zeros(megabytes * _MB // 4)
    for _ in range(times):
        target.copy_(source)


def _speed(act: Callable[[], None], updates: int, megabytes: int) -> float:
    began = time.perf_counter()
    act()
    return updates * megabytes * _MB / (time.perf_counter() - began) / 1e9


def _check(mean: State, weighted: list[tuple[RecordDict, float]], spool: Path) -> None:
    """Compare values drawn from each tensor with the same mean, made in 64 bits from the files anew."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randint(tensor.numel(), (SAMPLES,), generator=generator) for name, tensor in mean.items()}
    expected = {name: torch.zeros(SAMPLES, dtype=torch.float64) for name in mean}
    whole = sum(weight for _, weight in weighted)
    for content, weight in weighted:
        update = records.get_tensors(content, spool)
        for name, places in drawn.items():
            expected[name] += update[name][places].to(torch.float64) * (weight / whole)
    for name, places in drawn.items():
        if not torch.allclose(mean[name][places].to(torch.float64), expected[name], rtol=1e-6, atol=1e-7):
            raise LichenError(Code.CHECK_FAILED, f"the mean of {name!r} is not that of 64-bit floats", where="lichen bench aggregate")
