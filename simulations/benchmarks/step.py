"""A client's local training: what frozen layers that are computed once save, and what privacy costs with all that belongs to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lichen.common.errors import Code, LichenError
from lichen.simulations.benchmarks.simulate import LABELS, MINILM

if TYPE_CHECKING:
    import torch

    from lichen.client.trainer import Trainer
    from lichen.common.plan import Precision

APART = 1e-5


def bench_step(rows: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Train on rows of R8 with MiniLM, in this process; ways that are compared take turns.

    Args:
        rows: of the one client.
        repeats: of each way.

    Yields:
        For each figure ``what``, ``ratio``, ``target``, and ``apart``, the largest difference between the two ways' weights where they
        should be equal.

    Raises:
        LichenError: CHECK_FAILED, if such weights are further apart than 1e-5.
    """
    yield from _prefix(rows, repeats)
    yield from _privacy(rows, repeats)


def _prefix(rows: int, repeats: int) -> Iterator[dict[str, Any]]:
    from lichen.common.privacy.randomness import SeededSource

    trainer = make_trainer({"kind": "lora", "rank": 8, "alpha": 16, "last_layers": 2}, epochs=3)
    data, start = r8_rows(trainer, rows), trainer.model.state()
    found: dict[str, tuple[float, dict[str, torch.Tensor]]] = {}
    with TemporaryDirectory(prefix="lichen-bench-") as name:
        for repeat in range(repeats):
            folder = Path(name) / str(repeat)
            for way, cache in (("without", None), ("cold", folder), ("warm", folder)):
                seconds, trained = timed(partial(trainer.train, start, data, 1, SeededSource("order"), cache))
                if way not in found or seconds < found[way][0]:
                    found[way] = seconds, trained.delta
    for way, target in (("cold", 1.5), ("warm", 1.9)):
        apart = max(float((found[way][1][name] - found["without"][1][name]).abs().max()) for name in start)
        if apart > APART:
            raise LichenError(Code.CHECK_FAILED, f"a weight moves by {apart:.1e} more or less with it", where=f"prefix cache, {way}")
        what = f"LoRA on the top 2 of 6 layers, 3 epochs: times faster by the prefix cache, {way}"
        yield {"what": what, "ratio": found["without"][0] / found[way][0], "target": target, "apart": apart}


def _privacy(rows: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Time a row of an epoch with secret noise and the gate, over that of one without privacy."""
    from lichen.client.gate import Gate
    from lichen.common import tasks
    from lichen.common.privacy.accounting import Segment
    from lichen.common.privacy.randomness import SecretSource, SeededSource

    steps = Segment(1.0, 16 / rows, -(-rows // 16))

    class Counting(SecretSource):
        drawn = 0

        def uniform(self, count: int) -> torch.Tensor:
            found = super().uniform(count)
            Counting.drawn += int((found < steps.sample_rate).sum())
            return found

    adapter = {"kind": "lora", "rank": 8, "alpha": 16}
    plain = make_trainer(adapter, epochs=1)
    data, start = r8_rows(plain, rows), plain.model.state()
    tasks.workbench.cache_clear()  # a model of its own
    private = make_trainer(adapter, privacy={"unit": "example", "epsilon": 8, "delta": 1e-5}, steps=steps.steps)
    units = [[row] for row in range(rows)]
    seconds = {"plain": 0.0, "private": 0.0}
    for _ in range(repeats):
        seconds["plain"] += timed(lambda: plain.train(start, data, 1, SeededSource("order")))[0]
        seconds["private"] += timed(lambda: private.train_private(start, data, units, steps, rows, 1, Counting(), Gate(steps)))[0]
    ratio = (seconds["private"] / Counting.drawn) / (seconds["plain"] / (rows * repeats))
    yield {"what": "local private epoch over the same without privacy, by time a row", "ratio": ratio, "target": 1.05}


def make_trainer(adapter: dict[str, Any], privacy: dict[str, Any] | None = None, precision: Precision = "float32", **local: Any) -> Trainer:
    """A trainer of MiniLM for R8, in batches of 16 × 64."""
    from lichen.client.trainer import Trainer
    from lichen.common.plan import parse_plan

    document = {
        "name": "bench-step",
        "rounds": 1,
        "task": {"kind": "text-classification", "labels": LABELS, "max_length": 64},
        "model": {"base": MINILM.base, "base_precision": precision, "adapter": adapter, "head": {"pooling": "pooler", "init": "random"}},
        "local": {"batch_size": 16, "optimizer": "sgd", "learning_rate": 0.01, **local},
        "privacy": privacy or {"unit": "none"},
    }
    return Trainer(parse_plan(document))


def r8_rows(trainer: Trainer, rows: int) -> Any:
    """The first rows of R8, encoded."""
    from lichen.simulations.datasets import load_named

    found = load_named("r8").train[:rows]
    return trainer.task.encode({field: [row[field] for row in found] for field in trainer.task.fields})


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that it took, and what came of it."""
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found
